//! What the system logged while a test ran.
//!
//! Files that tests clean up after themselves (a guest's console, a shim's log) are opened as soon as they
//! are seen and held open, so they can be read after they were removed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

/// Directories are read no more often than this: in an emulated host that is work, too.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Of one log no more is kept than its last part of this size.
const KEPT: u64 = 1 << 20;
/// A bound on the search, not a promise: state directories are small.
const DEEPEST: usize = 6;

/// Where logs come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogSources {
    /// Files that grow: title and path.
    pub files: Vec<(String, PathBuf)>,
    /// Directories below which files named `*.log` or `*console*` are logs.
    pub directories: Vec<PathBuf>,
    /// Directories of which only the files themselves are looked at: what is below may be large.
    pub flat: Vec<PathBuf>,
    /// Whether the kernel's messages belong to it.
    pub kernel: bool,
}

impl LogSources {
    /// Looks at the files in `directory`, too, but at nothing below.
    #[must_use]
    pub(crate) fn with_files_in(mut self, directory: &Path) -> Self {
        self.flat.push(directory.to_owned());
        self
    }
}

/// Follows the logs from the moment it is made.
pub(crate) struct Watch {
    sources: LogSources,
    begun_at: BTreeMap<PathBuf, u64>,
    held: BTreeMap<PathBuf, File>,
    kernel: Option<File>,
    looked: Option<Instant>,
}

impl Watch {
    pub(crate) fn begin(sources: &LogSources) -> Self {
        let mut watch = Self {
            sources: sources.clone(),
            begun_at: BTreeMap::new(),
            held: BTreeMap::new(),
            kernel: sources.kernel.then(open_kernel_log).flatten(),
            looked: None,
        };
        watch.look();
        for (path, file) in &watch.held {
            watch.begun_at.insert(path.clone(), file.metadata().map_or(0, |data| data.len()));
        }
        watch
    }

    /// Looks for new files, at most as often as is reasonable. To be called while the test runs.
    pub(crate) fn look_now_and_then(&mut self) {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY) {
            self.look();
        }
    }

    fn look(&mut self) {
        for (_, path) in &self.sources.files {
            hold(&mut self.held, path);
        }
        for directory in &self.sources.directories {
            find_logs(directory, DEEPEST, &mut |path| hold(&mut self.held, path));
        }
        for directory in &self.sources.flat {
            find_logs(directory, 0, &mut |path| hold(&mut self.held, path));
        }
        self.looked = Some(Instant::now());
    }

    /// What was logged since the beginning: title and text, the empty ones left out.
    pub(crate) fn end(mut self) -> Vec<(String, String)> {
        self.look();
        let mut found = Vec::new();
        for (path, mut file) in self.held {
            let begun_at = self.begun_at.get(&path).copied().unwrap_or(0);
            let named = self.sources.files.iter().find(|(_, named)| *named == path);
            let title = named.map_or_else(|| path.display().to_string(), |(title, _)| title.clone());
            found.push((title, read_from(&mut file, begun_at)));
        }
        if let Some(kernel) = &mut self.kernel {
            found.push(("kernel".into(), read_kernel_log(kernel)));
        }
        found.retain(|(_, text)| !text.trim().is_empty());
        found
    }
}

/// Opens `path` unless it is held already. Only regular files: opening a FIFO would take its bytes away.
fn hold(held: &mut BTreeMap<PathBuf, File>, path: &Path) {
    if held.contains_key(path) || !fs::symlink_metadata(path).is_ok_and(|data| data.is_file()) {
        return;
    }
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    if let Ok(file) = opened {
        held.insert(path.to_owned(), file);
    }
}

fn find_logs(directory: &Path, depth: usize, found: &mut impl FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 0 && name != "rootfs" {
            find_logs(&path, depth - 1, found);
        } else if kind.is_file() && (name.ends_with(".log") || name.contains("console")) {
            found(&path);
        }
    }
}

fn read_from(file: &mut File, begun_at: u64) -> String {
    let length = file.metadata().map_or(0, |data| data.len());
    // Shorter than before: it was truncated, and all of it is new.
    let begun_at = if length < begun_at { 0 } else { begun_at };
    let from = begun_at.max(length.saturating_sub(KEPT));
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(from)).is_ok() {
        // What could be read before an error is still worth showing.
        let _ = file.take(KEPT).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn open_kernel_log() -> Option<File> {
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg");
    let mut file = opened.ok()?;
    file.seek(SeekFrom::End(0)).ok()?;
    Some(file)
}

/// One read returns one record.
fn read_kernel_log(file: &mut File) -> String {
    let mut text = String::new();
    let mut record = vec![0; 8192];
    while (text.len() as u64) < KEPT {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(count) => text.push_str(&kernel_record(&String::from_utf8_lossy(&record[..count]))),
            // Overwritten before it was read: the next read gives what is left.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => text.push_str("(messages lost)\n"),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    text
}

/// `6,1234,5678901,-;text\n KEY=value\n` as dmesg shows it.
fn kernel_record(record: &str) -> String {
    let (head, body) = record.split_once(';').unwrap_or(("", record));
    let microseconds: u64 = head.split(',').nth(2).and_then(|field| field.parse().ok()).unwrap_or(0);
    let text = body.lines().next().unwrap_or_default();
    format!("[{:5}.{:06}] {text}\n", microseconds / 1_000_000, microseconds % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("logs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn only_what_was_logged_meanwhile_is_shown() {
        let dir = directory("tail");
        let (old, cut) = (dir.join("containerd.log"), dir.join("cut.log"));
        fs::write(&old, "before\n").unwrap();
        fs::write(&cut, "a long line that will go away\n").unwrap();
        let files = vec![("containerd".to_owned(), old.clone()), ("cut".to_owned(), cut.clone())];
        let watch = Watch::begin(&LogSources { files, ..LogSources::default() });
        OpenOptions::new().append(true).open(&old).unwrap();
        fs::write(&old, "before\nduring\n").unwrap();
        fs::write(&cut, "new\n").unwrap();
        let found = watch.end();
        assert_eq!(found, [("containerd".into(), "during\n".into()), ("cut".into(), "new\n".into())]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_log_that_was_removed_is_still_read() {
        let dir = directory("removed");
        fs::write(dir.join("quiet.log"), "old").unwrap();
        let sources = LogSources { directories: vec![dir.clone()], ..LogSources::default() };
        let mut watch = Watch::begin(&sources);
        let state = dir.join("vm/1");
        fs::create_dir_all(&state).unwrap();
        fs::write(state.join("console"), "guest panics").unwrap();
        fs::write(state.join("ram"), "no log").unwrap();
        watch.look();
        fs::remove_dir_all(&dir).unwrap();
        let found = watch.end();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].0.ends_with("vm/1/console") && found[0].1 == "guest panics");
    }

    #[test]
    fn a_fifo_is_not_opened() {
        let dir = directory("fifo");
        let path = dir.join("shim.log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let sources = LogSources { files: vec![("shim".into(), path)], ..LogSources::default() };
        let watch = Watch::begin(&sources);
        assert!(watch.held.is_empty());
        assert_eq!(watch.end(), []);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn kernel_records_lose_their_header() {
        assert_eq!(kernel_record("6,12,5000042,-;kvm: hello\n SUBSYSTEM=x\n"), "[    5.000042] kvm: hello\n");
        assert_eq!(kernel_record("odd"), "[    0.000000] odd\n");
    }
}
