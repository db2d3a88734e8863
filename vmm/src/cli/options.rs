//! The options of `supermachine-vmm run`.

use std::path::PathBuf;

use lexopt::prelude::*;
use log::LevelFilter;
use vmm::devices::virtio::fs::{Cache, News};
use vmm::hypervisor::PsciBy;

use super::control::Control;
use super::disks::Disk;
use super::jail::Netns;
use super::{Usage, log as lines, net};

/// What every guest is told, before what the caller adds.
#[cfg(target_arch = "x86_64")]
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=a pci=off";
#[cfg(target_arch = "aarch64")]
const COMMAND_LINE: &str = "console=ttyAMA0 panic=-1";

/// What a guest whose memory can grow is told, too: to put what it is given where it can be taken back from.
const GROWING: &str = "memhp_default_state=online_movable";

const MEMORY: u64 = 256 << 20;

/// What the command line asks for.
pub(super) struct Options {
    pub(super) origin: Origin,
    pub(super) console: Console,
    pub(super) markers: Vec<Vec<u8>>,
    pub(super) control: Option<Control>,
    pub(super) jail: Option<PathBuf>,
    pub(super) netns: Option<Netns>,
    pub(super) cgroup: Option<PathBuf>,
    pub(super) paused: bool,
    pub(super) log: LevelFilter,
    pub(super) vsock: Option<PathBuf>,
    pub(super) disks: Vec<Disk>,
    /// Drives, and what is in them.
    pub(super) drives: Vec<Option<Disk>>,
    pub(super) shares: Vec<Share>,
    pub(super) taps: Vec<net::Port>,
}

/// What the guest begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// A kernel.
    Boot(Boot),
    /// The snapshot in a directory.
    Snapshot(PathBuf),
}

/// A machine that boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Option<PathBuf>,
    pub(super) append: String,
    pub(super) memory: u64,
    pub(super) memory_max: Option<u64>,
    pub(super) vcpus: u32,
    pub(super) psci: PsciBy,
}

impl Boot {
    /// Linux obeys the last of words that contradict each other, so that the caller's come last.
    pub(super) fn command_line(&self) -> String {
        let growing = if self.memory_max.is_some_and(|max| max > self.memory) { GROWING } else { "" };
        let words = [COMMAND_LINE, growing, &self.append];
        words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

/// A directory of the host that the guest mounts by its tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) tag: String,
    pub(super) directory: PathBuf,
    pub(super) read_only: bool,
    pub(super) cache: Cache,
    pub(super) news: Option<News>,
}

impl Share {
    /// Options are taken from the end, so that a directory may have colons in its name.
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text} is no share: give TAG=DIR, and behind it :ro, :cache=auto|fresh|always|never or :news=GROUP"
            )
        };
        let (tag, mut rest) = text.split_once('=').ok_or_else(wrong)?;
        let (mut read_only, mut cache, mut news) = (false, Cache::default(), None);
        while let Some((before, option)) = rest.rsplit_once(':') {
            match option {
                "ro" => read_only = true,
                "cache=auto" => cache = Cache::Auto,
                "cache=fresh" => cache = Cache::Fresh,
                "cache=always" => cache = Cache::Always,
                "cache=never" => cache = Cache::Never,
                _ if option.starts_with("cache=") => return Err(wrong()),
                _ => match option.strip_prefix("news=") {
                    Some(first) => news = Some(self::news(first)?),
                    None => break,
                },
            }
            rest = before;
        }
        if tag.is_empty() || rest.is_empty() {
            return Err(wrong());
        }
        Ok(Self { tag: tag.into(), directory: rest.into(), read_only, cache, news })
    }
}

/// Groups that no request is of but those that bring news.
fn news(text: &str) -> Result<News, String> {
    let first = text.parse().ok().and_then(News::from);
    let wrong = || {
        let last = u32::MAX - 4;
        format!("{text:?} is no group for news: give the first of four in a row, from 1 to {last}")
    };
    first.ok_or_else(wrong)
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Console {
    Stdio,
    Pty,
    File(PathBuf),
    Unix(PathBuf),
    None,
}

impl Console {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text} is no console: give stdio, pty, none, file:PATH or unix:PATH")),
        }
    }
}

/// A size like 512M or 2G, in bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) => {
            let shift = match text.as_bytes().last() {
                Some(b'K') => 10,
                Some(b'M') => 20,
                _ => 30,
            };
            (digits, shift)
        }
        None => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text} is no size: give a number, with K, M or G behind it if you like"))
}

fn psci_by(text: &str) -> Result<PsciBy, String> {
    match text {
        "kernel" => Ok(PsciBy::Hypervisor),
        "userspace" => Ok(PsciBy::Monitor),
        _ => Err(format!("{text} is nobody who answers PSCI calls: give kernel or userspace")),
    }
}

pub(super) fn parse(mut args: lexopt::Parser) -> Result<Options, Usage> {
    let (mut kernel, mut initrd, mut append) = (None, None, None);
    let (mut memory, mut memory_max, mut vcpus, mut psci) = (None, None, None, None);
    let (mut snapshot, mut console) = (None, Console::Stdio);
    let (mut vsock, mut disks, mut shares, mut taps) = (None, Vec::new(), Vec::new(), Vec::new());
    let mut drives = Vec::new();
    let (mut markers, mut control, mut paused) = (Vec::new(), None, false);
    let mut log = LevelFilter::Warn;
    let (mut jail, mut netns, mut cgroup) = (None, None, None);
    while let Some(arg) = args.next()? {
        match arg {
            Long("kernel") => kernel = Some(args.value()?.into()),
            Long("initrd") => initrd = Some(args.value()?.into()),
            Long("append") => append = Some(args.value()?.string()?),
            Long("memory") => memory = Some(size(&args.value()?.string()?)?),
            Long("memory-max") => memory_max = Some(size(&args.value()?.string()?)?),
            Long("cpus") => vcpus = Some(args.value()?.parse()?),
            Long("restore") => snapshot = Some(PathBuf::from(args.value()?)),
            Long("console") => console = Console::parse(&args.value()?.string()?)?,
            Long("marker") => markers.push(args.value()?.string()?.into_bytes()),
            Long("control") => control = Some(Control::parse(&args.value()?.string()?)?),
            Long("jail") => jail = Some(args.value()?.into()),
            Long("netns") => netns = Some(Netns::parse(&args.value()?.string()?)),
            Long("cgroup") => cgroup = Some(args.value()?.into()),
            Long("log") => log = lines::level(&args.value()?.string()?)?,
            Long("psci") => psci = Some(psci_by(&args.value()?.string()?)?),
            Long("paused") => paused = true,
            Long("block") => disks.push(Disk::parse(&args.value()?.string()?)?),
            Long("drive") => drives.push(Disk::parse_in_drive(&args.value()?.string()?)?),
            Long("share") => shares.push(Share::parse(&args.value()?.string()?)?),
            Long("tap") => taps.push(net::Port::parse(&args.value()?.string()?)?),
            Long("nic") => taps.push(net::Port::parse_socket(&args.value()?.string()?)?),
            Long("vsock") => vsock = Some(args.value()?.into()),
            other => return Err(other.unexpected()),
        }
    }
    let origin = match (kernel, snapshot) {
        (Some(kernel), None) => Origin::Boot(Boot {
            kernel,
            initrd,
            append: append.unwrap_or_default(),
            memory: memory.unwrap_or(MEMORY),
            memory_max,
            vcpus: vcpus.unwrap_or(1),
            psci: psci.unwrap_or_default(),
        }),
        (None, Some(directory)) => {
            let given = [
                (initrd.is_some(), "--initrd"),
                (append.is_some(), "--append"),
                (memory.is_some(), "--memory"),
                (memory_max.is_some(), "--memory-max"),
                (vcpus.is_some(), "--cpus"),
                (psci.is_some(), "--psci"),
            ];
            if let Some((_, option)) = given.iter().find(|(given, _)| *given) {
                return Err(format!("{option} is the snapshot's to say: leave it out").into());
            }
            Origin::Snapshot(directory)
        }
        (Some(_), Some(_)) => return Err("a machine either boots a --kernel or goes on by --restore".into()),
        (None, None) => return Err("--kernel is missing, or --restore".into()),
    };
    if paused && control.is_none() {
        return Err("a machine that begins paused needs --control, or nobody could resume it".into());
    }
    if taps.iter().any(net::Port::waits) && control.is_none() {
        return Err("a tap that comes later needs --control, or nobody could bring it".into());
    }
    Ok(Options {
        origin,
        console,
        markers,
        control,
        jail,
        netns,
        cgroup,
        paused,
        log,
        vsock,
        disks,
        drives,
        shares,
        taps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("64K", Some(64 << 10)),
            ("512M", Some(512 << 20)),
            ("8G", Some(8 << 30)),
            ("", None),
            ("M", None),
            ("-1M", None),
            ("1T", None),
            ("99999999999G", None),
        ] {
            assert_eq!(size(text).ok(), bytes, "{text:?}");
        }
    }

    #[test]
    fn shares() {
        let share = |tag: &str, directory: &str, read_only, cache| {
            Some(Share { tag: tag.into(), directory: directory.into(), read_only, cache, news: None })
        };
        for (text, expected) in [
            ("root=/srv", share("root", "/srv", false, Cache::Auto)),
            ("root=/srv:ro", share("root", "/srv", true, Cache::Auto)),
            ("a=b=c", share("a", "b=c", false, Cache::Auto)),
            ("a=/srv:cache=auto", share("a", "/srv", false, Cache::Auto)),
            ("a=/srv:cache=fresh", share("a", "/srv", false, Cache::Fresh)),
            ("a=/srv:cache=never", share("a", "/srv", false, Cache::Never)),
            ("a=/srv:ro:cache=always", share("a", "/srv", true, Cache::Always)),
            ("a=/srv:cache=always:ro", share("a", "/srv", true, Cache::Always)),
            ("a=/s:ro:v:ro", share("a", "/s:ro:v", true, Cache::Auto)),
            ("a=/srv:rw", share("a", "/srv:rw", false, Cache::Auto)),
            ("a=/srv:cache=some", None),
            ("a=/srv:cache=", None),
            ("a=:ro", None),
            ("a=:cache=never", None),
            ("/srv", None),
            ("=x", None),
            ("x=", None),
        ] {
            assert_eq!(Share::parse(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn shares_with_news() {
        for (text, expected) in [
            ("a=/srv:news=70000", Some(("/srv", false, News::from(70000)))),
            ("a=/srv:news=70000:ro", Some(("/srv", true, News::from(70000)))),
            ("a=/srv:ro:news=4294967291", Some(("/srv", true, News::from(u32::MAX - 4)))),
            ("a=/srv:news", Some(("/srv:news", false, None))),
            ("a=/srv:news=", None),
            ("a=/srv:news=0", None),
            ("a=/srv:news=-1", None),
            ("a=/srv:news=staff", None),
            ("a=/srv:news=4294967292", None),
            ("a=/srv:news=4294967296", None),
            ("a=:news=1", None),
        ] {
            let expected = expected.map(|(directory, read_only, news)| Share {
                tag: "a".into(),
                directory: directory.into(),
                read_only,
                cache: Cache::Auto,
                news,
            });
            assert_eq!(Share::parse(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn consoles() {
        for (text, console) in [
            ("stdio", Some(Console::Stdio)),
            ("none", Some(Console::None)),
            ("file:/a:b", Some(Console::File("/a:b".into()))),
            ("unix:s", Some(Console::Unix("s".into()))),
            ("file:", None),
            ("tcp:1", None),
            ("", None),
        ] {
            assert_eq!(Console::parse(text).ok(), console, "{text:?}");
        }
    }

    #[test]
    fn a_guest_that_can_grow_keeps_what_it_is_given_movable() {
        for (max, growing) in [("1G", true), ("512M", false)] {
            let args = ["--kernel", "k", "--memory", "512M", "--memory-max", max, "--append", "quiet"];
            let Origin::Boot(boot) = parse(lexopt::Parser::from_args(args)).unwrap().origin else { panic!() };
            let line = boot.command_line();
            assert_eq!(line.contains(GROWING), growing, "{line}");
            assert!(line.starts_with(COMMAND_LINE) && line.ends_with(" quiet"), "{line}");
        }
    }

    #[test]
    fn a_kernel_there_must_be_or_a_snapshot() {
        let parse = |args: &[&str]| parse(lexopt::Parser::from_args(args));
        for (args, ok) in [
            (&[][..], false),
            (&["--kernel", "k", "--cpus", "x"], false),
            (&["--kernel", "k", "extra"], false),
            (&["--kernel", "k", "--restore", "d"], false),
            (&["--restore", "d", "--vsock", "v"], true),
            (&["--restore", "d", "--cpus", "2"], false),
            (&["--restore", "d", "--append", ""], false),
            (&["--restore", "d", "--memory=1G"], false),
            (&["--restore", "d", "--memory-max=1G"], false),
            (&["--restore", "d", "--initrd=i"], false),
            (&["--restore", "d", "--psci=kernel"], false),
        ] {
            assert_eq!(parse(args).is_ok(), ok, "{args:?}");
        }
        let options = parse(&["--kernel", "k", "--cpus", "4", "--memory=1G"]).unwrap();
        let Origin::Boot(boot) = options.origin else { panic!("it boots") };
        assert_eq!(boot.command_line(), COMMAND_LINE);
        assert_eq!((boot.vcpus, boot.memory), (4, 1 << 30));
    }
}
