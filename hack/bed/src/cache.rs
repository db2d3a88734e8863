//! The cache directory: what was built, by content; and the hosts that run.
//!
//! Nothing appears under its final name before it is whole: it is made in a directory beside and
//! renamed. Whoever makes something holds its lock meanwhile, so two runs at once build it once.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use sha2::{Digest, Sha256};

use crate::progress::{Step, say};

/// Begins the name of a link in a host's directory to an entry that it needs.
const STANDS_ON: &str = "on-";
/// What was used this short ago is not pruned.
const RECENT: Duration = Duration::from_mins(30);

/// A short content hash, for names.
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())[..12].to_owned()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The tool's directory under the user's cache directory.
#[derive(Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    pub fn open(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "making the cache {}: set XDG_CACHE_HOME to a directory that can be written",
                root.display()
            )
        })?;
        Ok(Self { root })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// `dir/NAME`, made by `make` in a directory beside it if it is not there or `again` is asked.
    ///
    /// `room` is how many bytes making it takes: too little is said before hours of download.
    pub fn entry(
        &self,
        dir: &str,
        name: &str,
        room: u64,
        again: bool,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let parent = self.path(dir);
        let done = parent.join(name);
        if done.is_dir() && !again {
            // The time of its lock's file is when it was last used.
            open_lock(&parent.join(format!("{name}.lock")))?.set_modified(SystemTime::now())?;
            return Ok(done);
        }
        fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
        let _lock = lock(&parent.join(format!("{name}.lock")), &format!("another run makes {name}"))?;
        if done.is_dir() && !again {
            return Ok(done);
        }
        self.require_room(room)?;
        let aside = parent.join(format!("{name}.new"));
        remove_tree(&aside)?;
        fs::create_dir(&aside)?;
        if let Err(error) = make(&aside) {
            remove_tree(&aside)?;
            return Err(error);
        }
        remove_tree(&done)?;
        fs::rename(&aside, &done).with_context(|| format!("moving {} into place", done.display()))?;
        Ok(done)
    }

    fn require_room(&self, bytes: u64) -> Result<()> {
        let stat = statvfs(&self.root).with_context(|| format!("looking at {}", self.root.display()))?;
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        if free < bytes {
            bail!(
                "no space in {}: {} MiB are needed and {} MiB are free; free some, or set XDG_CACHE_HOME to a larger file system",
                self.root.display(),
                bytes >> 20,
                free >> 20
            );
        }
        Ok(())
    }

    /// Removes what `keep`, called `NAME-DIGEST`, replaces: other digests of the same name that no
    /// host uses, and what was left half made.
    pub fn prune(&self, dir: &str, keep: &str) -> Result<()> {
        let in_use: Vec<PathBuf> = self
            .runs()?
            .iter()
            .filter_map(|run| fs::read_link(run.join(format!("{STANDS_ON}{dir}"))).ok())
            .collect();
        for path in children(&self.path(dir))? {
            let entry = file_name(&path);
            let name = entry.strip_suffix(".new").unwrap_or(&entry);
            if !path.is_dir() || entry == keep || in_use.contains(&path) || !replaces(keep, name) {
                continue;
            }
            let lock_path = self.path(dir).join(format!("{name}.lock"));
            // Another work tree's, perhaps, about to start a host on it.
            if age(&lock_path).is_some_and(|age| age < RECENT) {
                continue;
            }
            // Whoever makes it right now holds its lock.
            if let Some(_lock) = try_lock(&lock_path)? {
                remove_tree(&path)?;
                remove_file(&lock_path)?;
            }
        }
        Ok(())
    }

    /// The directories of hosts that run, or died without tidying up.
    pub fn runs(&self) -> Result<Vec<PathBuf>> {
        let mut runs = children(&self.path("run"))?;
        runs.retain(|path| path.is_dir());
        Ok(runs)
    }

    /// A directory for one host. Its lock is held by this process and, inherited, by QEMU: while
    /// either lives, the directory is in use.
    pub fn new_run(&self, name: &str) -> Result<Run> {
        // Between making a directory and locking it, another run must not take it for a dead one's.
        let _making = self.lock_runs()?;
        self.sweep_locked()?;
        let dir = self.path("run").join(name);
        fs::create_dir_all(self.path("run"))?;
        // Only its owner may reach the sockets of a host.
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => anyhow::anyhow!("a host named {name} is up already"),
            _ => anyhow::Error::new(error).context(format!("making {}", dir.display())),
        })?;
        let lock = try_lock(&dir.join("lock"))?.context("a fresh directory is locked")?;
        Ok(Run { dir, lock: Some(lock) })
    }

    /// Removes what dead hosts left.
    pub fn sweep(&self) -> Result<()> {
        let _making = self.lock_runs()?;
        self.sweep_locked()
    }

    fn lock_runs(&self) -> Result<Flock<File>> {
        lock(&self.path("run.lock"), "another run starts or ends a host")
    }

    fn sweep_locked(&self) -> Result<()> {
        for dir in self.runs()? {
            if let Some(_lock) = try_lock(&dir.join("lock"))? {
                remove_tree(&dir)?;
            }
        }
        Ok(())
    }

    /// Removes everything but hosts that run.
    pub fn clean(&self) -> Result<()> {
        self.sweep()?;
        let up = self.runs()?;
        if let Some(run) = up.first() {
            bail!("a host still runs in {}: hack/testbed down first", run.display());
        }
        let step = Step::begin(format!("removing {}", self.root.display()));
        remove_tree(&self.root)?;
        step.done("");
        Ok(())
    }
}

/// Whether two names differ in nothing but the digest at their end.
fn replaces(one: &str, other: &str) -> bool {
    let stem = |name: &str| name.rsplit_once('-').map(|(stem, _)| stem.to_owned());
    stem(one).is_some() && stem(one) == stem(other)
}

/// The directory of one host.
pub struct Run {
    dir: PathBuf,
    lock: Option<Flock<File>>,
}

impl Run {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Notes that this host needs an entry of `kind`, so that nobody prunes it.
    pub fn stands_on(&self, kind: &str, entry: &Path) -> Result<()> {
        let link = self.dir.join(format!("{STANDS_ON}{kind}"));
        match std::os::unix::fs::symlink(entry, &link) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            made => made.with_context(|| format!("making {}", link.display())),
        }
    }

    /// The lock's file, for QEMU to inherit.
    pub fn lock_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.lock.as_ref().map(|lock| lock.as_fd())
    }

    /// Leaves the directory to QEMU, which holds the lock too.
    pub fn leave(mut self) -> PathBuf {
        // Unlocking would unlock for QEMU as well: they share the open file.
        std::mem::forget(self.lock.take());
        std::mem::take(&mut self.dir)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.dir.as_os_str().is_empty() {
            let _ = remove_tree(&self.dir);
        }
    }
}

/// When a saved host was last used, for people.
pub fn age(path: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("opening the lock {}", path.display()))
}

fn try_lock(path: &Path) -> Result<Option<Flock<File>>> {
    match Flock::lock(open_lock(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno).with_context(|| format!("locking {}", path.display())),
    }
}

fn lock(path: &Path, wait: &str) -> Result<Flock<File>> {
    if let Some(lock) = try_lock(path)? {
        return Ok(lock);
    }
    say(format_args!("{wait}: waiting for it"));
    Flock::lock(open_lock(path)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
}

/// The entries of a directory; none if it does not exist.
pub fn children(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => {
            let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
            paths.sort();
            Ok(paths)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", dir.display())),
    }
}

/// The bytes that a directory's files take on the disk.
pub fn disk_use(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for path in children(dir)? {
        let meta = path.symlink_metadata()?;
        total += if meta.is_dir() { disk_use(&path)? } else { meta.blocks() * 512 };
    }
    Ok(total)
}

pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache in a directory of its own, which goes with it.
    struct Scratch(Cache);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("testbed-cache-{name}-{}", std::process::id()));
            let _ = remove_tree(&dir);
            Self(Cache::open(dir).unwrap())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = remove_tree(&self.0.root);
        }
    }

    #[test]
    fn an_entry_is_made_once_and_whole() {
        let Scratch(cache) = &Scratch::new("entry");
        let make = |again, text: &'static str| {
            cache.entry("d", "e-1", 0, again, |dir| Ok(fs::write(dir.join("f"), text)?)).unwrap()
        };
        let read = |path: PathBuf| fs::read_to_string(path.join("f")).unwrap();
        assert_eq!(read(make(false, "one")), "one");
        assert_eq!(read(make(false, "two")), "one", "it is there");
        assert_eq!(read(make(true, "two")), "two", "made again");
        let failed = cache.entry("d", "e-2", 0, false, |dir| {
            fs::write(dir.join("f"), "half")?;
            bail!("no")
        });
        assert!(failed.is_err());
        assert!(!cache.path("d/e-2").exists() && !cache.path("d/e-2.new").exists());
    }

    #[test]
    fn no_room_is_said_before_anything_is_made() {
        let Scratch(cache) = &Scratch::new("room");
        let error = cache.entry("d", "e-1", u64::MAX, false, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("no space in") && error.contains("XDG_CACHE_HOME"), "{error}");
    }

    #[test]
    fn only_what_is_replaced_is_pruned() {
        let Scratch(cache) = &Scratch::new("prune");
        for name in ["a-1", "a-2", "a-2.new", "a-b-1", "a-3", "a-4", "b-1"] {
            fs::create_dir_all(cache.path("d").join(name)).unwrap();
        }
        let used = |name: &str, when| open_lock(&cache.path(name)).unwrap().set_modified(when).unwrap();
        let long_ago = SystemTime::now() - 2 * RECENT;
        used("d/a-4.lock", SystemTime::now());
        fs::create_dir_all(cache.path("run/x")).unwrap();
        std::os::unix::fs::symlink(cache.path("d/a-3"), cache.path("run/x/on-d")).unwrap();
        used("d/a-2.lock", long_ago);
        let made_by_another = try_lock(&cache.path("d/a-2.lock")).unwrap().unwrap();
        cache.prune("d", "a-1").unwrap();
        let left: Vec<String> = children(&cache.path("d"))
            .unwrap()
            .iter()
            .filter(|path| path.is_dir())
            .map(|path| file_name(path))
            .collect();
        // a-2 is locked by whoever makes it, a-3 is used by a host, a-4 was a moment ago.
        assert_eq!(left, ["a-1", "a-2", "a-2.new", "a-3", "a-4", "a-b-1", "b-1"]);
        drop(made_by_another);
        used("d/a-4.lock", long_ago);
        cache.prune("d", "a-1").unwrap();
        for gone in ["a-2", "a-2.new", "a-4"] {
            assert!(!cache.path("d").join(gone).exists(), "{gone}");
        }
    }

    #[test]
    fn dead_hosts_are_swept_and_living_ones_are_not() {
        let Scratch(cache) = &Scratch::new("sweep");
        let alive = cache.new_run("alive").unwrap();
        fs::create_dir_all(cache.path("run/dead")).unwrap();
        cache.sweep().unwrap();
        assert_eq!(cache.runs().unwrap(), [alive.dir().to_owned()]);
        assert!(cache.new_run("alive").is_err(), "the name is taken");
        assert!(cache.clean().is_err(), "a host runs");
        drop(alive);
        assert!(cache.runs().unwrap().is_empty());
        cache.clean().unwrap();
    }
}
