//! The processes of this host, read from /proc, and ways to end whole families of them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::wait::{TimedOut, until_true};

/// One process as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its state letter: `R`, `S`, `D`, `Z`...
    pub state: char,
    /// When it started, in clock ticks since boot: with the pid, this names it uniquely.
    pub started: u64,
    /// The name of its program, at most 15 bytes.
    pub name: String,
    /// Its arguments, joined by spaces; empty for zombies and kernel threads.
    pub arguments: String,
}

impl Process {
    /// Whether it has ended and only waits for its parent to notice.
    pub fn is_zombie(&self) -> bool {
        self.state == 'Z'
    }

    /// Whether it belongs to the kernel.
    pub fn is_kernel_thread(&self) -> bool {
        self.pid == 2 || self.parent == 2
    }

    /// One line for a person.
    pub fn describe(&self) -> String {
        match (self.is_zombie(), self.arguments.as_str()) {
            (true, _) => format!("{} {} (zombie)", self.pid, self.name),
            (false, "") => format!("{} {}", self.pid, self.name),
            (false, arguments) => format!("{} {arguments}", self.pid),
        }
    }
}

/// All processes. One that ends while being read is left out.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(read).collect()
}

/// The process `pid`, if there is one.
pub fn read(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    parse(&stat, &arguments)
}

/// Processor time that the process `pid` has taken, in clock ticks: hundredths of a second.
pub fn cpu_ticks(pid: i32) -> std::io::Result<u64> {
    Ok(ticks(&fs::read_to_string(format!("/proc/{pid}/stat"))?))
}

/// The same of each of its threads, by id and name.
pub fn thread_ticks(pid: i32) -> std::io::Result<HashMap<(String, String), u64>> {
    let mut found = HashMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        // One that ends meanwhile is left out.
        let (Ok(stat), Ok(name)) =
            (fs::read_to_string(task.path().join("stat")), fs::read_to_string(task.path().join("comm")))
        else {
            continue;
        };
        let id = task.file_name().to_string_lossy().into_owned();
        found.insert((id, name.trim().to_owned()), ticks(&stat));
    }
    Ok(found)
}

fn ticks(stat: &str) -> u64 {
    let fields: Vec<&str> = match stat.rsplit_once(") ") {
        Some((_, rest)) => rest.split_ascii_whitespace().collect(),
        None => Vec::new(),
    };
    // In user mode and in the kernel.
    [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum()
}

/// What a process takes of the host's memory, its share of what it shares with others (PSS), in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub all: u64,
    /// Of that, the RAM of a monitor's guest: what is in large mappings, or between such of a snapshot's memory.
    pub large: u64,
}

impl Memory {
    /// All but a guest's RAM, in MiB.
    pub fn own_mib(self) -> f64 {
        mib(self.all - self.large)
    }

    /// All of it, in MiB.
    pub fn all_mib(self) -> f64 {
        mib(self.all)
    }
}

#[allow(clippy::cast_precision_loss, reason = "nobody has 2^52 KiB")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// The memory of the process `pid`. A mapping is large from `large` bytes on.
pub fn memory(pid: i32, large: u64) -> std::io::Result<Memory> {
    Ok(sum(&fs::read_to_string(format!("/proc/{pid}/smaps"))?, large / 1024))
}

fn sum(smaps: &str, large: u64) -> Memory {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let kib = |rest: &str| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        if let Some(rest) = line.strip_prefix("Size:") {
            mappings.last_mut().into_iter().for_each(|mapping| mapping.size = kib(rest));
        } else if let Some(rest) = line.strip_prefix("Pss:") {
            mappings.last_mut().into_iter().for_each(|mapping| mapping.pss = kib(rest));
        } else {
            mappings.extend(Mapping::of(line));
        }
    }
    // They are in the order of their addresses.
    let of_file = |mapping: &Mapping| mapping.is_of_snapshot;
    let from = mappings.iter().position(of_file).unwrap_or(0);
    let to = mappings.iter().rposition(of_file).map_or(from, |last| last + 1);
    let mut memory = Memory::default();
    for (index, mapping) in mappings.iter().enumerate() {
        memory.all += mapping.pss;
        if mapping.size >= large || (from..to).contains(&index) {
            memory.large += mapping.pss;
        }
    }
    memory
}

/// One of a process's mappings.
#[derive(Debug)]
struct Mapping {
    size: u64,
    pss: u64,
    is_of_snapshot: bool,
}

impl Mapping {
    /// Of the line that begins with its addresses.
    fn of(line: &str) -> Option<Self> {
        let (addresses, rest) = line.split_once(' ')?;
        let (start, end) = addresses.split_once('-')?;
        let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let path = rest.split_ascii_whitespace().nth(4).unwrap_or_default();
        let is_of_snapshot = ["/memory", "/base"].iter().any(|name| path.ends_with(name));
        (is_hex(start) && is_hex(end)).then_some(Self { size: 0, pss: 0, is_of_snapshot })
    }
}

fn parse(stat: &str, arguments: &[u8]) -> Option<Process> {
    // The name is in parentheses and may itself contain any of them.
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let arguments: Vec<_> = arguments
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        state: fields.first()?.chars().next()?,
        started: fields.get(19)?.parse().ok()?,
        name: name.to_owned(),
        arguments: arguments.join(" "),
    })
}

/// The children of `root`, their children and so on, `root` itself not included.
pub fn descendants(root: i32) -> Vec<Process> {
    let mut by_parent: HashMap<i32, Vec<Process>> = HashMap::new();
    for process in all() {
        by_parent.entry(process.parent).or_default().push(process);
    }
    let (mut found, mut queue, mut seen) = (Vec::new(), vec![root], HashSet::from([root]));
    while let Some(parent) = queue.pop() {
        for process in by_parent.remove(&parent).unwrap_or_default() {
            if seen.insert(process.pid) {
                queue.push(process.pid);
                found.push(process);
            }
        }
    }
    found
}

/// Sends SIGKILL to everything below `root` until nothing is left there, and reaps what is a direct child.
/// A caller that is a child subreaper thereby ends daemons as well.
pub fn kill_descendants(root: i32, deadline: Duration) -> Result<(), TimedOut> {
    until_true("descendants to end after SIGKILL", deadline, || {
        let left = descendants(root);
        for process in left.iter().filter(|process| !process.is_zombie()) {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        reap(root, &left);
        left.is_empty()
    })
}

/// Collects those of `processes` that are zombies and children of `parent`, which must be the caller.
pub fn reap(parent: i32, processes: &[Process]) {
    for process in processes.iter().filter(|process| process.is_zombie() && process.parent == parent) {
        let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Cmd;

    #[test]
    fn names_with_parentheses_and_spaces_are_read() {
        let stat = "42 (a) b (c)) S 7 42 40 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 998877 0 0";
        let found = parse(stat, b"/bin/a\0--b\0\0").unwrap();
        assert_eq!((found.pid, found.parent, found.state), (42, 7, 'S'));
        assert_eq!((found.name.as_str(), found.arguments.as_str()), ("a) b (c)", "/bin/a --b"));
        assert_eq!(found.started, 998_877);
        for broken in ["", "42", "42 (x)", "42 (x) S", "x (y) S 1"] {
            assert_eq!(parse(broken, b""), None, "{broken:?}");
        }
    }

    #[test]
    fn guest_ram_is_not_the_monitors_own() {
        let smaps = "7f-80 rw-p 0 0:0 0\nSize:  131072 kB\nPss:  70000 kB\nPss_Dirty: 5 kB\n\
                     55-56 r-xp 0 0:0 0 /usr/bin/x\nSize: 2000 kB\nPss: 1500 kB\n\
                     7a-7b rw-p 0 0:0 0\nSize: 64 kB\nPss: 12 kB\n";
        let found = sum(smaps, 131_072);
        assert_eq!(found, Memory { all: 71_512, large: 70_000 });
        assert!((found.own_mib() - 1512.0 / 1024.0).abs() < 1e-9);
        // That of one that was restored is in pieces.
        let restored = "10-11 rw-p 0 0:0 0\nSize: 8 kB\nPss: 1 kB\n\
                        11-12 rw-p 0 fe:1 9   /var/lib/templates/0a/memory\nSize: 8 kB\nPss: 2 kB\n\
                        12-13 rw-p 0 0:0 0\nSize: 8 kB\nPss: 4 kB\n\
                        13-14 rw-p 0 fe:1 9   /var/lib/templates/0a/memory\nSize: 8 kB\nPss: 8 kB\n\
                        14-15 r--p 0 fe:1 7   /usr/bin/memory-of-x\nSize: 8 kB\nPss: 16 kB\n";
        assert_eq!(sum(restored, 131_072), Memory { all: 31, large: 14 });
        assert!(memory(i32::try_from(std::process::id()).unwrap(), u64::MAX).unwrap().all > 0);
    }

    #[test]
    fn a_family_is_found_and_ended() {
        let long = Duration::from_secs(20);
        let shell = Cmd::new("sh", long).args(["-c", "sleep 1000 & wait"]).start().unwrap();
        let family = || descendants(shell.pid());
        until_true("a sleep", long, || family().iter().any(|process| process.name == "sleep")).unwrap();
        for process in family() {
            kill(Pid::from_raw(process.pid), Signal::SIGKILL).unwrap();
        }
        until_true("no sleep", long, || family().is_empty()).unwrap();
        shell.wait().unwrap();
    }
}
