//! A directory of the host as a share, by virtiofsd's file system, in this process.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use vhost::vhost_user::Backend;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};

use super::super::Broken;
use super::super::queue::Chain;
use super::Server;

/// What the guest may keep of what it has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Nothing: whatever the host changes is seen at once.
    Never,
    /// Until a file is opened again, names and attributes for seconds.
    #[default]
    Auto,
    /// Everything: nobody else changes the directory.
    Always,
}

/// The directory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {}: {source}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// The share.
pub struct Passthrough {
    inner: Inner,
}

enum Inner {
    ReadOnly(virtiofsd::server::Server<PassthroughFsRo>),
    ReadWrite(virtiofsd::server::Server<PassthroughFs>),
}

impl fmt::Debug for Passthrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passthrough")
    }
}

impl Passthrough {
    /// Of the directory at `path`.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> Result<Self, Error> {
        let failed = |source| Error { path: path.to_owned(), source };
        let metadata = path.metadata().map_err(failed)?;
        if !metadata.is_dir() {
            return Err(failed(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let root_dir =
            path.to_str().ok_or_else(|| failed(io::Error::other("its path is not UTF-8")))?.to_owned();
        let config = Config {
            root_dir,
            cache_policy: match cache {
                Cache::Never => CachePolicy::Never,
                Cache::Auto => CachePolicy::Auto,
                Cache::Always => CachePolicy::Always,
            },
            xattr: true,
            announce_submounts: true,
            readdirplus: cache != Cache::Never,
            killpriv_v2: true,
            ..Config::default()
        };
        // The server clears the mask of the whole process; it is its threads that need it clear.
        let before = umask(Mode::empty());
        let made = if read_only {
            PassthroughFsRo::new(config).map(|fs| Inner::ReadOnly(virtiofsd::server::Server::new(fs)))
        } else {
            PassthroughFs::new(config).map(|fs| Inner::ReadWrite(virtiofsd::server::Server::new(fs)))
        };
        umask(before);
        Ok(Self { inner: made.map_err(failed)? })
    }
}

fn handle<F: FileSystem + Sync>(server: &virtiofsd::server::Server<F>, chain: Chain) -> Result<u32, Broken> {
    let broken = |error: &dyn fmt::Display| Broken(error.to_string());
    let ram = chain.memory().clone();
    let reader = Reader::new(&ram, chain.clone()).map_err(|error| broken(&error))?;
    let writer = Writer::new(&ram, chain).map_err(|error| broken(&error))?;
    let len = server.handle_message(reader, writer, None::<&mut Backend>).map_err(|error| broken(&error))?;
    // A reply is bounded by the request's size, which is bounded by the server.
    Ok(u32::try_from(len).unwrap_or(u32::MAX))
}

impl Server for Passthrough {
    /// The server sets the umask, and goes to directories, of the thread that asks: threads must not
    /// share them.
    fn enter_thread(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        umask(Mode::empty());
        Ok(())
    }

    fn handle(&self, chain: Chain) -> Result<u32, Broken> {
        match &self.inner {
            Inner::ReadOnly(server) => handle(server, chain),
            Inner::ReadWrite(server) => handle(server, chain),
        }
    }

    fn forget(&self) {
        match &self.inner {
            Inner::ReadOnly(server) => server.destroy(),
            Inner::ReadWrite(server) => server.destroy(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_directory_that_is_there() {
        for (path, word) in [("/nonexistent", "No such file"), ("/proc/self/status", "directory")] {
            let error = Passthrough::open(Path::new(path), false, Cache::Auto).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains(word), "{error}");
        }
        for read_only in [false, true] {
            Passthrough::open(&std::env::temp_dir(), read_only, Cache::Auto).unwrap();
        }
    }
}
