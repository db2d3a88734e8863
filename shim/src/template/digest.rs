//! What files are, by their content, without reading them each time; and what the monitor says of itself and of this
//! host.
//!
//! What was found is kept beside the templates. A file is known by what the file system says of it, so one that has
//! just been written is looked at again: two versions may look the same within a tick of the clock.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Attempt, Error, Result};
use crate::paths::hex;

/// The file's name.
const NAME: &str = "digests.json";
/// More than there is reason for.
const LARGEST: u64 = 256 * 1024;
/// Files that are known: those of a few versions.
const MOST: usize = 64;
/// A file that is younger may change and look the same.
const SETTLED: Duration = Duration::from_secs(2);
/// As much as a monitor has to say of itself.
const LONGEST_FINGERPRINT: usize = 64 * 1024;
/// Another after each boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What tells that a file is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
    /// Of what may be another after the host has booted.
    boot: Option<String>,
}

impl Identity {
    fn of(file: &File, boot: Option<String>) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            dev: found.dev(),
            ino: found.ino(),
            size: found.size(),
            mtime: (found.mtime(), found.mtime_nsec()),
            ctime: (found.ctime(), found.ctime_nsec()),
            boot,
        })
    }

    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let last = self.mtime.0.max(self.ctime.0);
        now.as_secs().checked_add_signed(-last).is_some_and(|age| age > SETTLED.as_secs())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Known {
    identity: Identity,
    text: String,
}

/// What is known, by paths.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Digests of files.
    contents: BTreeMap<PathBuf, Known>,
    /// What monitors say.
    monitors: BTreeMap<PathBuf, Known>,
}

/// What is known.
#[derive(Debug)]
pub struct Digests {
    path: PathBuf,
    kept: Kept,
    changed: bool,
}

/// What is asked of a file.
#[derive(Debug, Clone)]
enum Ask {
    /// Its digest.
    Content,
    /// What it says, if it is a monitor, in this boot of the host.
    Monitor(String),
}

impl Ask {
    fn boot(&self) -> Option<String> {
        match self {
            Self::Content => None,
            Self::Monitor(boot) => Some(boot.clone()),
        }
    }
}

impl Kept {
    fn of(&mut self, ask: &Ask) -> &mut BTreeMap<PathBuf, Known> {
        match ask {
            Ask::Content => &mut self.contents,
            Ask::Monitor(_) => &mut self.monitors,
        }
    }

    /// Of each kind some, and none of files that are gone.
    fn thin(&mut self) {
        for known in [&mut self.contents, &mut self.monitors] {
            known.retain(|path, _| path.exists());
            while known.len() > MOST {
                known.pop_first();
            }
        }
    }
}

impl Digests {
    /// Kept in `directory`. What cannot be read is found anew.
    pub fn open(directory: &Path) -> Self {
        let path = directory.join(NAME);
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(LARGEST).read_to_string(&mut text));
        let kept = read.ok().and_then(|_| serde_json::from_str(&text).ok()).unwrap_or_default();
        Self { path, kept, changed: false }
    }

    /// The digest of a file's content.
    pub fn content(&mut self, path: &Path) -> Result<String> {
        self.find(path, &Ask::Content, |file| {
            let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
            loop {
                let length = file.read(&mut piece)?;
                if length == 0 {
                    return Ok(hex(&hash.finalize()));
                }
                hash.update(&piece[..length]);
            }
        })
    }

    /// What the monitor at `path` says of itself and of this host, by `ask`. It says the same until the host boots.
    pub fn monitor(&mut self, path: &Path, ask: impl FnOnce() -> io::Result<String>) -> Result<String> {
        let boot = fs::read_to_string(BOOT_ID).attempt(format_args!("reading {BOOT_ID}"))?;
        let line = self.find(path, &Ask::Monitor(boot.trim().to_owned()), |_| ask())?;
        if line.is_empty() || line.len() > LONGEST_FINGERPRINT {
            return Err(Error::unknown(format!(
                "{} fingerprint says {} bytes, which is no fingerprint; install shim and monitor of one release",
                path.display(),
                line.len()
            )));
        }
        Ok(line)
    }

    fn find(
        &mut self,
        path: &Path,
        ask: &Ask,
        look: impl FnOnce(&mut File) -> io::Result<String>,
    ) -> Result<String> {
        let what = format!("looking at {}", path.display());
        let mut file = File::open(path).attempt(&what)?;
        let identity = Identity::of(&file, ask.boot()).attempt(&what)?;
        if let Some(known) = self.kept.of(ask).get(path).filter(|known| known.identity == identity) {
            return Ok(known.text.clone());
        }
        let text = look(&mut file).attempt(&what)?;
        if identity.is_settled() && Identity::of(&file, ask.boot()).attempt(&what)? == identity {
            self.kept.of(ask).insert(path.to_owned(), Known { identity, text: text.clone() });
            self.changed = true;
        }
        Ok(text)
    }

    /// Keeps what was found anew. Nobody depends on it: what cannot be kept is not.
    pub fn keep(mut self) {
        if !self.changed {
            return;
        }
        self.kept.thin();
        let half = self.path.with_extension(format!("json.{}", std::process::id()));
        let written = serde_json::to_vec(&self.kept).map_err(io::Error::other);
        let written =
            written.and_then(|text| fs::write(&half, text)).and_then(|()| fs::rename(&half, &self.path));
        if let Err(error) = written {
            log::debug!("keeping {}: {error}", self.path.display());
            let _ = fs::remove_file(&half);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("digest-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    /// As if it had been written a while ago. Its ctime cannot be set: that is what the wait is for.
    fn settle() {
        std::thread::sleep(SETTLED + Duration::from_millis(1100));
    }

    #[test]
    fn a_file_is_read_once_and_again_when_it_is_another() {
        let directory = scratch("content");
        let file = directory.join("kernel");
        fs::write(&file, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let mut digests = Digests::open(&directory);
        assert_eq!(digests.content(&file).unwrap(), abc);
        digests.keep();
        assert!(!directory.join(NAME).exists(), "a file that was just written is not known");
        settle();
        let mut digests = Digests::open(&directory);
        assert_eq!(digests.content(&file).unwrap(), abc);
        digests.keep();
        assert!(directory.join(NAME).exists());

        let mut digests = Digests::open(&directory);
        let read = digests.find(&file, &Ask::Content, |_| panic!("it is read again")).unwrap();
        assert_eq!(read, abc);
        fs::write(&file, "abd").unwrap();
        assert_ne!(digests.content(&file).unwrap(), abc);
        fs::write(directory.join(NAME), "{").unwrap();
        assert_ne!(Digests::open(&directory).content(&file).unwrap(), abc);
        assert!(digests.content(&directory.join("none")).unwrap_err().text.contains("none"));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_monitor_is_asked_once_in_a_boot() {
        let directory = scratch("monitor");
        let monitor = std::env::current_exe().unwrap();
        let mut digests = Digests::open(&directory);
        let asked = std::cell::Cell::new(0);
        let ask = |digests: &mut Digests| {
            let say = || {
                asked.set(asked.get() + 1);
                Ok("{}".to_owned())
            };
            digests.monitor(&monitor, say).unwrap()
        };
        settle();
        assert_eq!((ask(&mut digests), ask(&mut digests)), ("{}".to_owned(), "{}".to_owned()));
        assert_eq!(asked.get(), 1);
        // Its digest is another thing to know of it, and both are.
        digests.content(&monitor).unwrap();
        digests.keep();
        let mut digests = Digests::open(&directory);
        ask(&mut digests);
        assert_eq!(asked.get(), 1);
        digests.find(&monitor, &Ask::Content, |_| panic!("it is read again")).unwrap();
        digests.kept.monitors.get_mut(&monitor).unwrap().identity.boot = Some("another".into());
        ask(&mut digests);
        assert_eq!(asked.get(), 2);
        let silent = digests.find(&monitor, &Ask::Monitor("new".into()), |_| Ok(String::new())).unwrap();
        assert_eq!(silent, "");
        fs::remove_dir_all(&directory).unwrap();
        let mut fresh = Digests::open(&directory);
        assert!(fresh.monitor(&monitor, || Ok(String::new())).unwrap_err().text.contains("release"));
    }
}
