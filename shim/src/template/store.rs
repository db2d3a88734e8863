//! The templates on this host's disk.
//!
//! ```text
//! DIRECTORY/
//!   digests.json   what files were found to be
//!   KEY/           a template
//!     state, memory   the snapshot
//!     base            what its memory lies over, if it does: a link to another one's
//!     about.json      what it is made of
//!     ahead           a hint, by the first who ran on it: what of the memory machines use first
//!     used            locked by all whose machines run on it; as old as its last use
//!   KEY.lock       locked by whoever makes or removes it
//!   KEY.new/       one that is being made, or was by somebody who died
//!   KEY.old/       one that is being removed
//!   KEY.failed     why it could not be made, or could not be used
//! ```
//!
//! A template is there under its name when it is whole and on the disk, and is never changed, but for the hint. A machine
//! that runs on one keeps the files open that it needs, so they may be removed.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;
use runtime_spec::config;
use serde::{Deserialize, Serialize};
use vmm::snapshot::{AHEAD_FILE, BASE_FILE, MEMORY_FILE as MEMORY, STATE_FILE as STATE};

use super::key::{Key, Of};
use super::lock::{Lock, With};
use crate::error::{Attempt, Error, Result};
use crate::time;

const ABOUT: &str = "about.json";
const USED: &str = "used";
/// Longer descriptions are not ours.
const LARGEST_ABOUT: u64 = 1 << 20;
/// So long it is not tried again to make what could not be made.
const PAUSE: Duration = Duration::from_secs(600);
const AT_ONCE: Duration = Duration::ZERO;

/// A directory of templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    directory: PathBuf,
    max_bytes: u64,
}

/// What there is to know of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What it is made of.
    pub of: Of,
    /// When, in nanoseconds since the epoch.
    pub made: i64,
    /// The length of its state's file.
    pub state_bytes: u64,
    /// The length of its memory's file.
    pub memory_bytes: u64,
}

/// A template that nobody removes while it is held.
#[derive(Debug)]
pub struct Template {
    /// Its name.
    pub key: Key,
    /// The snapshot.
    pub directory: PathBuf,
    /// Whether a machine has run on it before.
    pub proven: bool,
    used: Lock,
}

impl Template {
    /// A machine runs on it.
    pub fn worked(&self) {
        if let Err(error) = self.used.touch() {
            log::debug!("noting the use of {}: {error}", self.directory.display());
        }
    }

    /// A file for the hint of where machines write first; none, if somebody has left one.
    pub fn new_hint(&self) -> io::Result<Option<Hint>> {
        let path = self.directory.join(AHEAD_FILE);
        if path.exists() {
            return Ok(None);
        }
        let unnamed =
            OpenOptions::new().write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(&self.directory);
        unnamed.map(|file| Some(Hint { file, path }))
    }
}

/// A hint that is being written. It has no name, so nothing is left of it if nobody keeps it.
#[derive(Debug)]
pub struct Hint {
    /// Where it goes.
    pub file: File,
    path: PathBuf,
}

impl Hint {
    /// Gives it its name, once it is on the disk; unless another one has it by now, which is as good.
    pub fn keep(self) -> io::Result<()> {
        self.file.sync_all()?;
        let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, &self.path, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What is under a key.
#[derive(Debug)]
pub enum Found {
    /// One that can be used.
    Template(Template),
    /// Nothing.
    Nothing,
    /// One that cannot be used, and why.
    Spoilt(String),
}

/// One that is being made.
#[derive(Debug)]
pub struct Making {
    /// For its state.
    pub state: File,
    /// For its memory.
    pub memory: File,
    directory: PathBuf,
}

impl Making {
    /// Where what goes beside them is to be.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// For another thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        let (state, memory) = (self.state.try_clone()?, self.memory.try_clone()?);
        Ok(Self { state, memory, directory: self.directory.clone() })
    }
}

/// For an operator.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its name.
    pub key: Key,
    /// What it is made of, if that can be read.
    pub about: Option<About>,
    /// The length of its files.
    pub bytes: u64,
    /// What they take of the disk. What several lie over counts once.
    pub on_disk: u64,
    /// When it was used last, or made.
    pub used: Option<SystemTime>,
    /// Whether somebody's machine runs on it.
    pub in_use: bool,
}

impl Store {
    /// As configured.
    pub fn new(config: &config::Template) -> Self {
        Self { directory: config.directory.clone(), max_bytes: config.max_bytes.0 }
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory. Whoever could write there could run code in every machine, so it has to be ours alone.
    pub fn prepare(&self) -> Result<()> {
        let what = format!("making {}", self.directory.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).attempt(&what)?;
        let found = fs::metadata(&self.directory).attempt(&what)?;
        // SAFETY: the call takes nothing and cannot fail.
        let us = unsafe { libc::geteuid() };
        if found.uid() == us && found.mode() & 0o022 == 0 {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "{} can be written to by others: chown and chmod 700 it, or set template.directory",
            self.directory.display()
        )))
    }

    fn path(&self, key: &Key, end: &str) -> PathBuf {
        self.directory.join(format!("{key}{end}"))
    }

    /// Looks for a template, and holds it.
    pub fn open(&self, key: &Key) -> io::Result<Found> {
        let directory = self.path(key, "");
        let Some(used) = Lock::of_existing(&directory.join(USED), With::Others)? else {
            // One without it is not whole; one that is locked is being removed.
            let spoilt = directory.exists() && !directory.join(USED).exists();
            return Ok(if spoilt { Found::Spoilt(format!("{USED} is missing")) } else { Found::Nothing });
        };
        match check(&directory, key) {
            Ok(proven) => Ok(Found::Template(Template { key: key.clone(), directory, proven, used })),
            Err(why) => Ok(Found::Spoilt(why)),
        }
    }

    /// The right to make or remove it; none, if somebody else has it for longer than that.
    pub fn lock(&self, key: &Key, within: Duration) -> io::Result<Option<Lock>> {
        Lock::take(&self.path(key, ".lock"), With::Nobody, within)
    }

    /// Begins to make one, in the place of whatever died on the way.
    pub fn begin(&self, key: &Key, _lock: &Lock) -> io::Result<Making> {
        let directory = self.path(key, ".new");
        remove_all(&directory)?;
        DirBuilder::new().mode(0o700).create(&directory)?;
        let file = |name: &str| {
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(directory.join(name))
        };
        Ok(Making { state: file(STATE)?, memory: file(MEMORY)?, directory })
    }

    /// Gives it its name, once it is on the disk.
    pub fn finish(&self, key: &Key, lock: &Lock, making: &Making, of: Of) -> io::Result<()> {
        let about = About {
            of,
            made: time::now(),
            state_bytes: making.state.metadata()?.len(),
            memory_bytes: making.memory.metadata()?.len(),
        };
        let about = serde_json::to_vec_pretty(&about)?;
        let path = making.directory.join(ABOUT);
        fs::write(&path, about)?;
        let used = File::create(making.directory.join(USED))?;
        // Never used.
        used.set_modified(SystemTime::UNIX_EPOCH)?;
        making.state.sync_all()?;
        making.memory.sync_all()?;
        File::open(&path)?.sync_all()?;
        sync(&making.directory)?;
        self.remove_locked(key, lock)?;
        fs::rename(&making.directory, self.path(key, ""))?;
        let _ = fs::remove_file(self.path(key, ".failed"));
        File::open(&self.directory)?.sync_all()
    }

    /// Where one is made.
    pub fn making(&self, key: &Key) -> PathBuf {
        self.path(key, ".new")
    }

    /// Removes what is left of one that was not made.
    pub fn abandon(&self, key: &Key, _lock: &Lock) {
        if let Err(error) = remove_all(&self.path(key, ".new")) {
            log::warn!("removing what there is of template {key}: {error}");
        }
    }

    /// Removes a template; also one that machines run on.
    pub fn remove_locked(&self, key: &Key, _lock: &Lock) -> io::Result<()> {
        let (directory, old) = (self.path(key, ""), self.path(key, ".old"));
        remove_all(&old)?;
        match fs::rename(&directory, &old) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            done => done?,
        }
        remove_all(&old)
    }

    /// It could not be made, or not be used: nobody tries for a while.
    pub fn note_failure(&self, key: &Key, why: &str) {
        if let Err(error) = fs::write(self.path(key, ".failed"), why) {
            log::debug!("noting the failure of template {key}: {error}");
        }
    }

    /// Why nobody is to try now, if so.
    pub fn failure(&self, key: &Key) -> Option<String> {
        let path = self.path(key, ".failed");
        let noted = fs::metadata(&path).and_then(|found| found.modified()).ok()?;
        // One from the future is of a clock that was wrong.
        let age = SystemTime::now().duration_since(noted).unwrap_or(PAUSE);
        (age < PAUSE).then(|| fs::read_to_string(&path).unwrap_or_default())
    }

    /// Tries again, whatever has failed.
    pub fn forget_failure(&self, key: &Key) {
        let _ = fs::remove_file(self.path(key, ".failed"));
    }

    /// Everything that is there, the last used first.
    pub fn list(&self) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        let mut names = self.names()?;
        names.retain(|(_, end)| end.is_empty());
        let memories = names.iter().filter_map(|(key, _)| file_id(&self.path(key, "").join(MEMORY)));
        let mut counted: HashSet<_> = memories.collect();
        for (key, _) in names {
            let directory = self.path(&key, "");
            let (mut bytes, mut on_disk) = size(&directory);
            if let Ok(base) = fs::metadata(directory.join(BASE_FILE)) {
                bytes = bytes.saturating_sub(base.len());
                if !counted.insert((base.dev(), base.ino())) {
                    on_disk = on_disk.saturating_sub(base.blocks() * 512);
                }
            }
            let about = about(&directory).ok();
            let path = directory.join(USED);
            let touched = fs::metadata(&path).and_then(|found| found.modified()).ok();
            let made = about.as_ref().and_then(|about| u64::try_from(about.made).ok());
            let made = made.map(|made| SystemTime::UNIX_EPOCH + Duration::from_nanos(made));
            let in_use = path.exists() && Lock::of_existing(&path, With::Nobody)?.is_none();
            listed.push(Listed { key, about, bytes, on_disk, used: touched.max(made), in_use });
        }
        listed.sort_by_key(|one| std::cmp::Reverse(one.used));
        Ok(listed)
    }

    /// Removes what nobody who lives is making or removing, and then, as long as all take more than they may, the
    /// template that was used longest ago; but neither `keep` nor one that is in use, which would free nothing. Returns
    /// those that were removed.
    pub fn prune(&self, keep: Option<&Key>) -> io::Result<Vec<Key>> {
        self.sweep()?;
        let mut listed = self.list()?;
        let mut total: u64 = listed.iter().map(|one| one.on_disk).sum();
        let mut removed = Vec::new();
        while total > self.max_bytes {
            let Some(oldest) = listed.pop() else { break };
            if Some(&oldest.key) != keep && !oldest.in_use && self.remove(&oldest.key, false)? {
                total = total.saturating_sub(oldest.on_disk);
                removed.push(oldest.key);
            }
        }
        Ok(removed)
    }

    /// Removes a template. Says whether it did: not while it is made, nor, unless that is wanted, while machines run on
    /// it.
    pub fn remove(&self, key: &Key, although_used: bool) -> io::Result<bool> {
        let Some(lock) = self.lock(key, AT_ONCE)? else { return Ok(false) };
        // Nobody begins to use it between the look and the removal.
        let used = Lock::of_existing(&self.path(key, "").join(USED), With::Nobody)?;
        let may = used.is_some() || although_used || !self.path(key, "").join(USED).exists();
        if may {
            self.remove_locked(key, &lock)?;
            self.forget_failure(key);
        }
        lock.remove()?;
        Ok(may)
    }

    fn sweep(&self) -> io::Result<()> {
        let names = self.names()?;
        for (key, end) in &names {
            let stale = match end.as_str() {
                ".new" | ".old" => true,
                ".lock" => !names.contains(&(key.clone(), String::new())),
                ".failed" => self.failure(key).is_none(),
                _ => false,
            };
            if stale && let Some(lock) = self.lock(key, AT_ONCE)? {
                for end in [".new", ".old"] {
                    remove_all(&self.path(key, end))?;
                }
                if self.failure(key).is_none() {
                    self.forget_failure(key);
                }
                lock.remove()?;
            }
        }
        Ok(())
    }

    /// What is there, as keys and what stands behind them.
    fn names(&self) -> io::Result<Vec<(Key, String)>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let (key, end) = name.split_at(name.find('.').unwrap_or(name.len()));
            names.extend(Key::parse(key).map(|key| (key, end.to_owned())));
        }
        names.sort();
        Ok(names)
    }
}

/// Removes what somebody left who died while he made a template there, unless another one makes it now.
pub fn abandoned(making: &Path) -> io::Result<()> {
    if !making.exists() {
        return Ok(());
    }
    match Lock::take(&making.with_extension("lock"), With::Nobody, AT_ONCE)? {
        Some(_lock) => remove_all(making),
        None => Ok(()),
    }
}

/// Whether a template is what its name says, and as long as it was; the rest is for the monitor to see. Says whether it
/// was used.
fn check(directory: &Path, key: &Key) -> std::result::Result<bool, String> {
    let about = about(directory).map_err(|error| error.text)?;
    if about.of.key().map_err(|error| error.text)? != *key {
        return Err("it is of something else".to_owned());
    }
    for (name, wanted) in [(STATE, about.state_bytes), (MEMORY, about.memory_bytes)] {
        let path = directory.join(name);
        let length = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
        if length != wanted {
            return Err(format!("{} has {length} bytes, not {wanted}", path.display()));
        }
    }
    let used = fs::metadata(directory.join(USED)).and_then(|found| found.modified());
    Ok(used.is_ok_and(|used| used > SystemTime::UNIX_EPOCH))
}

/// Directories, and what is in them beside state and memory, which may be other directories.
fn sync(directory: &Path) -> io::Result<()> {
    let opened = File::open(directory)?;
    opened.sync_all()?;
    let nested =
        fs::read_dir(directory)?.flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    if nested { Ok(nix::unistd::syncfs(opened)?) } else { Ok(()) }
}

/// Which file it is, by whatever name.
fn file_id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// The length of all files in it, and what they take of the disk.
fn size(directory: &Path) -> (u64, u64) {
    let (mut bytes, mut on_disk) = (0, 0);
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() {
                directories.push(entry.path());
            } else {
                bytes += found.len();
                on_disk += found.blocks() * 512;
            }
        }
    }
    (bytes, on_disk)
}

fn about(directory: &Path) -> Result<About> {
    let path = directory.join(ABOUT);
    let what = format!("reading {}", path.display());
    let mut text = String::new();
    let file = File::open(&path).attempt(&what)?;
    io::Read::read_to_string(&mut io::Read::take(file, LARGEST_ABOUT), &mut text).attempt(&what)?;
    serde_json::from_str(&text).map_err(io::Error::from).attempt(what)
}

fn remove_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
