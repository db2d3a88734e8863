//! Locks on files, which end with whoever holds them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

/// Between two looks at a lock that somebody else has.
const PAUSE: Duration = Duration::from_millis(10);

/// A file that nobody else locks against us, until this is dropped.
#[derive(Debug)]
pub struct Lock {
    file: Flock<File>,
    path: PathBuf,
}

/// How a lock is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum With {
    /// Nobody.
    Nobody,
    /// Others who share it.
    Others,
}

impl Lock {
    /// Of a file that is made if it is not there; none, if somebody else has it for longer than that.
    pub fn take(path: &Path, with: With, within: Duration) -> io::Result<Option<Self>> {
        let until = Instant::now() + within;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            if let Some(lock) = Self::of(file, path, with)? {
                return Ok(Some(lock));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            sleep(PAUSE);
        }
    }

    /// Of a file that is there, at once: none if it is not, or somebody else has it.
    pub fn of_existing(path: &Path, with: With) -> io::Result<Option<Self>> {
        match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            file => Self::of(file?, path, with),
        }
    }

    fn of(file: File, path: &Path, with: With) -> io::Result<Option<Self>> {
        let argument = match with {
            With::Nobody => FlockArg::LockExclusiveNonblock,
            With::Others => FlockArg::LockSharedNonblock,
        };
        let file = match Flock::lock(file, argument) {
            Err((_, nix::Error::EWOULDBLOCK)) => return Ok(None),
            locked => locked.map_err(|(_, error)| error)?,
        };
        let lock = Self { file, path: path.to_owned() };
        // Removed, or replaced, since it was opened: a lock on what nobody finds.
        Ok(lock.is_in_place()?.then_some(lock))
    }

    fn is_in_place(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            found => found.map(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())),
        }
    }

    /// Notes that it was used now.
    pub fn touch(&self) -> io::Result<()> {
        self.file.set_modified(std::time::SystemTime::now())
    }

    /// Removes the file.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("lock-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    #[test]
    fn who_may_have_it_beside_whom() {
        let directory = scratch("beside");
        let path = directory.join("a");
        assert!(Lock::of_existing(&path, With::Others).unwrap().is_none());
        for (first, second, both) in [
            (With::Others, With::Others, true),
            (With::Others, With::Nobody, false),
            (With::Nobody, With::Others, false),
            (With::Nobody, With::Nobody, false),
        ] {
            let held = Lock::take(&path, first, NOW).unwrap().unwrap();
            assert_eq!(Lock::take(&path, second, NOW).unwrap().is_some(), both, "{first:?} {second:?}");
            drop(held);
            assert!(Lock::of_existing(&path, second).unwrap().is_some());
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_lock_that_comes_free_is_taken_and_one_that_was_removed_is_not() {
        let directory = scratch("free");
        let path = directory.join("a");
        let held = Lock::take(&path, With::Nobody, NOW).unwrap().unwrap();
        let opened = File::open(&path).unwrap();
        let (waiting, begun) = (path.clone(), Instant::now());
        let waiter = std::thread::spawn(move || Lock::take(&waiting, With::Nobody, Duration::from_secs(20)));
        sleep(Duration::from_millis(50));
        held.remove().unwrap();
        let taken = waiter.join().unwrap().unwrap().unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(50) && taken.is_in_place().unwrap());
        assert!(Lock::of(opened, &path, With::Others).unwrap().is_none(), "a lock on a file that is gone");
        assert!(Lock::take(&path, With::Nobody, Duration::from_millis(30)).unwrap().is_none());
        fs::remove_dir_all(&directory).unwrap();
    }
}
