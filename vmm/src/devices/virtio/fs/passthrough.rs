//! A directory of the host as a share, by virtiofsd's file system, in this process.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use vhost::vhost_user::Backend;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::credentials::drop_effective_cap;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{CachePolicy, Config, NegotiationMode, PassthroughFs};

use super::super::Broken;
use super::super::queue::Chain;
use super::request::{OUT_HEADER, Request};
use super::{Cache, Server};

/// The directory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {}: {source}{}", path.display(), crate::mend::of(source))]
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
        let kept = match cache {
            Cache::Never | Cache::Fresh => Duration::ZERO,
            Cache::Auto => Duration::from_secs(1),
            Cache::Always => Duration::from_hours(24),
        };
        let config = Config {
            root_dir,
            entry_timeout: kept,
            attr_timeout: kept,
            cache_policy: match cache {
                Cache::Never => CachePolicy::Never,
                Cache::Auto | Cache::Fresh => CachePolicy::Auto,
                Cache::Always => CachePolicy::Always,
            },
            xattr: true,
            announce_submounts: true,
            readdirplus: !kept.is_zero(),
            killpriv_v2: true,
            // The host applies them, and with them the umask, which a default list of a directory replaces.
            posix_acl: NegotiationMode::Auto,
            // Without it nothing could be mapped shared where the guest keeps nothing.
            allow_mmap: true,
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

fn handle<F: FileSystem + Sync>(
    server: &virtiofsd::server::Server<F>,
    chain: Chain,
    read_only: bool,
) -> Result<u32, Broken> {
    let broken = |error: &dyn fmt::Display| Broken(error.to_string());
    let ram = chain.memory().clone();
    let reader = Reader::new(&ram, chain.clone()).map_err(|error| broken(&error))?;
    let writer = Writer::new(&ram, chain).map_err(|error| broken(&error))?;
    let request = Request::peek(reader.clone())
        .map_err(|error| Broken(format!("a request without a header: {error}")))?;
    // The server takes this room for granted in some replies, and panics where there is none.
    if writer.available_bytes() < OUT_HEADER && request.wants_reply() {
        return Err(Broken("a request without room for the header of its reply".into()));
    }
    let len = if read_only && request.truncates() {
        request.refuse(writer, libc::EROFS).map_err(|error| broken(&error))?
    } else {
        // With this right the host would leave the bits alone, whoever asks.
        let _without = request
            .clears_setuid()
            .then(|| drop_effective_cap("FSETID"))
            .transpose()
            .map_err(|error| broken(&error))?;
        server.handle_message(reader, writer, None::<&mut Backend>).map_err(|error| broken(&error))?
    };
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
            Inner::ReadOnly(server) => handle(server, chain, true),
            Inner::ReadWrite(server) => handle(server, chain, false),
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
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::super::testing;
    use super::*;
    use crate::memory::{self, GuestRam};

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

    /// A directory with a file in it, gone when it is dropped.
    struct Directory(PathBuf);

    impl Directory {
        fn new() -> Self {
            let thread = std::thread::current().id();
            let path = std::env::temp_dir().join(format!("vmm-fs-{}-{thread:?}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("file"), "content").unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const ROOM: u32 = 0x2000;

    /// A FUSE request in two parts, and where its answer goes.
    fn request(ram: &Arc<GuestRam>, header: &[u8; 40], body: &[u8], room: u32) -> Chain {
        let at = testing::DATA;
        ram.write_slice(header, GuestAddress(at)).unwrap();
        ram.write_slice(body, GuestAddress(at + 0x1000)).unwrap();
        let parts = [(at, 40, 0), (at + 0x1000, body.len() as u32, 0), (at + 0x4000, room, testing::WRITE)];
        testing::chain(ram, &parts)
    }

    fn header(len: u32, opcode: u32, node: u64) -> [u8; 40] {
        let mut header = [0; 40];
        header[..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&opcode.to_le_bytes());
        header[8..16].copy_from_slice(&7u64.to_le_bytes());
        header[16..24].copy_from_slice(&node.to_le_bytes());
        header
    }

    /// What a driver says first: FUSE 7.31, nothing special.
    fn greet(share: &Passthrough, ram: &Arc<GuestRam>) {
        const INIT: u32 = 26;
        let body: Vec<u8> = [7u32, 31, 0x2_0000, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let chain = request(ram, &header(40 + body.len() as u32, INIT, 0), &body, ROOM);
        share.handle(chain).unwrap();
    }

    fn ram() -> Arc<GuestRam> {
        Arc::new(memory::anonymous(&[(0, 0x4_0000)]).unwrap())
    }

    #[test]
    fn an_answer_fits_the_room_and_names_its_request() {
        const LOOKUP: u32 = 1;
        let directory = Directory::new();
        let share = Passthrough::open(&directory.0, false, Cache::Auto).unwrap();
        let ram = ram();
        greet(&share, &ram);
        for (name, error) in [("file", 0), ("none", -libc::ENOENT)] {
            let body = [name.as_bytes(), &[0]].concat();
            let chain = request(&ram, &header(40 + body.len() as u32, LOOKUP, 1), &body, ROOM);
            let len = share.handle(chain).unwrap();
            let answer: [u32; 3] =
                [0, 4, 8].map(|at| ram.read_obj(GuestAddress(testing::DATA + 0x4000 + at)).unwrap());
            assert_eq!((answer[0], answer[1].cast_signed(), answer[2]), (len, error, 7), "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Requests of any kind with anything in them are answered within the room there is, or break
        /// the queue. The requests are made on a thread of their own, as in a machine.
        #[test]
        fn no_request_upsets_it(
            requests in proptest::collection::vec(
                (prop_oneof![8 => 1u32..53, 1 => any::<u32>()],
                 prop_oneof![4 => 0u64..5, 1 => any::<u64>()],
                 prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
                 prop_oneof![
                     Just(b"file\0other\0".to_vec()),
                     proptest::collection::vec(any::<u8>(), 0..200),
                     proptest::collection::vec(prop_oneof![Just(0u8), 0..8u8], 0..120),
                 ],
                 prop_oneof![2 => Just(ROOM), 1 => 1..200u32]),
                1..12),
            read_only in any::<bool>(),
        ) {
            let directory = Directory::new();
            let share = Passthrough::open(&directory.0, read_only, Cache::Auto).unwrap();
            let ram = ram();
            let answered = std::thread::spawn(move || {
                share.enter_thread().unwrap();
                greet(&share, &ram);
                for (opcode, node, len, body, room) in requests {
                    let len = len.unwrap_or(40 + body.len() as u32);
                    let chain = request(&ram, &header(len, opcode, node), &body, room);
                    if let Ok(written) = share.handle(chain) {
                        assert!(written <= room, "{written} bytes into {room}");
                    }
                }
                share.forget();
            });
            prop_assert!(answered.join().is_ok());
        }
    }
}
