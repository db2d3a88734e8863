//! The FIFOs through which a container's streams come over gRPC.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// The reading end of a FIFO that something else writes.
pub struct Output {
    path: PathBuf,
    file: File,
}

impl Output {
    /// Makes the FIFO at `path` and opens it. Nobody needs to write yet.
    pub fn create(path: PathBuf) -> Result<Self> {
        make(&path)?;
        Self::open(path)
    }

    /// Opens the FIFO at `path`, which is there.
    pub fn open(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&path)
            .with_context(|| format!("opening the FIFO {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads until every writer has closed it. Before the first one has come this waits.
    pub fn read_to_end(&mut self, deadline: Duration) -> Result<Vec<u8>> {
        let mut found = Vec::new();
        self.read(deadline, &mut found, |_| false).with_context(|| {
            format!(
                "reading {} to its end; so far {:?}",
                self.path.display(),
                String::from_utf8_lossy(&found)
            )
        })?;
        Ok(found)
    }

    /// Reads until `text` has come. What has come with it is part of the answer, and is not read again.
    pub fn read_until(&mut self, text: &str, deadline: Duration) -> Result<Vec<u8>> {
        let mut found = Vec::new();
        let has_it = |found: &[u8]| crate::command::contains(found, text.as_bytes());
        self.read(deadline, &mut found, has_it).with_context(|| {
            format!(
                "waiting for {text:?} in {}; so far {:?}",
                self.path.display(),
                String::from_utf8_lossy(&found)
            )
        })?;
        if !has_it(&found) {
            bail!("{} ended without {text:?}: {:?}", self.path.display(), String::from_utf8_lossy(&found));
        }
        Ok(found)
    }

    fn read(&mut self, deadline: Duration, found: &mut Vec<u8>, done: impl Fn(&[u8]) -> bool) -> Result<()> {
        let ends = Instant::now() + deadline;
        let mut buffer = vec![0; 64 * 1024];
        while !done(found) {
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("it is still open after {:.1} s", deadline.as_secs_f64());
            }
            let mut wanted = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error).context("polling it"),
            }
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => found.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("reading it"),
            }
        }
        Ok(())
    }
}

/// The writing end of a FIFO that something else reads.
pub struct Input {
    path: PathBuf,
    file: File,
}

impl Input {
    /// Makes the FIFO at `path` and opens it. Nobody needs to read yet.
    pub fn create(path: PathBuf) -> Result<Self> {
        make(&path)?;
        // Opened for reading too, since a FIFO without a reader cannot be opened for writing.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening the FIFO {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `bytes`, which must fit the FIFO's buffer of 64 KiB.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| format!("writing to {}", self.path.display()))
    }
}

fn make(path: &Path) -> Result<()> {
    mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).with_context(|| format!("making the FIFO {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const LONG: Duration = Duration::from_secs(20);

    fn path(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("fifo-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn the_end_comes_after_the_last_writer_not_before_the_first() {
        let mut output = Output::create(path("end")).unwrap();
        let fifo = output.path().to_owned();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let bytes = vec![b'x'; 200_000];
            OpenOptions::new().write(true).open(&fifo).unwrap().write_all(&bytes).unwrap();
        });
        assert_eq!(output.read_to_end(LONG).unwrap().len(), 200_000);
        writer.join().unwrap();
        std::fs::remove_file(output.path()).unwrap();
    }

    #[test]
    fn a_silent_writer_is_given_up() {
        let mut output = Output::create(path("silent")).unwrap();
        let mut writer = OpenOptions::new().write(true).open(output.path()).unwrap();
        writer.write_all(b"half").unwrap();
        let error = format!("{:#}", output.read_to_end(Duration::from_millis(100)).unwrap_err());
        assert!(error.contains("half") && error.contains("still open"), "{error}");
        std::fs::remove_file(output.path()).unwrap();
    }

    #[test]
    fn text_is_waited_for() {
        let mut input = Input::create(path("text")).unwrap();
        let mut reader = File::open(input.path()).unwrap();
        input.write(b"hello").unwrap();
        let mut buffer = [0; 5];
        reader.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");
        std::fs::remove_file(input.path()).unwrap();
    }
}
