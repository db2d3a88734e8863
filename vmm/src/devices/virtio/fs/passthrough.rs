//! A directory of the host as a share, by virtiofsd's file system, in this process.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use vhost::vhost_user::Backend;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::passthrough::credentials::drop_effective_cap;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{
    CachePolicy, Config, MigrationMode, MigrationOnError, NegotiationMode, PassthroughFs,
};

use super::super::queue::Chain;
use super::super::state::{MAX, at_most, decode, encode, same};
use super::super::{Broken, StateError};
use super::news::{Answer, Newsroom};
use super::orphan::{self, FILES_MAX, Made, Orphan};
use super::query::Query;
use super::replay::{REQUEST_MAX, Replay};
use super::reply::Room;
use super::request::{OUT_HEADER, Request};
use super::saved::Tree;
use super::{Cache, News, Server};

/// Files that are named in one message.
const NAMED_MAX: usize = 5;
/// Bytes of the reply to a request to mount it.
const REPLY_MAX: u32 = 0x1000;

/// The directory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {}: {source}{}", path.display(), crate::mend::of(source))]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// What has to be known to go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    read_only: bool,
    cache: Cache,
    /// Whether its guest tells itself what the host changes: one that has mounted it otherwise does not say whose its requests are.
    news: bool,
    mounted: Option<Mounted>,
}

/// What there is to know of a guest that has mounted it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Mounted {
    /// The request by which it did.
    request: Vec<u8>,
    /// The files that it knows since.
    tree: Tree,
    /// Those of them that it has open and that have no name.
    #[serde(deserialize_with = "at_most::<FILES_MAX, _, _>")]
    orphans: Vec<Orphan>,
}

/// The share.
pub struct Passthrough {
    inner: Inner,
    path: PathBuf,
    cache: Cache,
    news: Option<Newsroom>,
    /// The request by which the guest mounted it: what was agreed on then follows from it, and the server does not
    /// save all of that.
    mounted_by: Mutex<Vec<u8>>,
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
        let kept = kept(cache);
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
            // A place in the tree is what another host, or a copy of the tree, has in common with this one; handles
            // and inode numbers are not, and overlays have no handles. What is not there was left out before the
            // server is asked for it; what is lost since is an error and not a file that fails later. Nothing moves
            // between finding the places and saving them, as the guest stands still.
            migration_mode: MigrationMode::FindPaths,
            migration_on_error: MigrationOnError::Abort,
            migration_verify_handles: false,
            migration_confirm_paths: false,
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
        Ok(Self {
            inner: made.map_err(failed)?,
            path: path.to_owned(),
            cache,
            news: None,
            mounted_by: Mutex::default(),
        })
    }

    /// The same, whose guest tells itself what the host changes.
    #[must_use]
    pub fn with_news(self, news: News) -> Self {
        Self { news: Some(Newsroom::new(news)), ..self }
    }

    fn is_read_only(&self) -> bool {
        matches!(self.inner, Inner::ReadOnly(_))
    }

    /// How long its guest remembers more of names than the server says: not where it is told what becomes of them.
    fn names_kept(&self) -> Duration {
        if self.news.is_some() { Duration::ZERO } else { kept(self.cache) }
    }

    fn mounted_by(&self) -> MutexGuard<'_, Vec<u8>> {
        self.mounted_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serializable(&self) -> &dyn SerializableFileSystem {
        match &self.inner {
            Inner::ReadOnly(server) => server,
            Inner::ReadWrite(server) => server,
        }
    }

    fn serialize(&self) -> io::Result<Vec<u8>> {
        let (ours, theirs) = UnixStream::pair()?;
        thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut bytes = Vec::new();
                ours.take(MAX as u64 + 1).read_to_end(&mut bytes).map(|_| bytes)
            });
            let server = self.serializable();
            server.prepare_serialization(Arc::new(AtomicBool::new(false)));
            let written = server.serialize(File::from(OwnedFd::from(theirs)));
            let bytes = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.and(bytes)
        })
    }

    fn deserialize(&self, bytes: &[u8]) -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        thread::scope(|scope| {
            // The server reads to the end, which comes when this one is dropped.
            scope.spawn(move || ours.write_all(bytes));
            self.serializable().deserialize_and_apply(File::from(OwnedFd::from(theirs)))
        })
    }

    /// What is in the files that have no place in the tree, and that the guest has open.
    fn keep(&self, tree: &Tree) -> Result<Vec<Orphan>, String> {
        let lost = tree.lost();
        if lost.is_empty() {
            return Ok(Vec::new());
        }
        let refused = |why: &dyn fmt::Display| {
            let names = match deleted(&self.path) {
                names if names.is_empty() => String::new(),
                names => format!(" (among those that were removed: {})", names.join(", ")),
            };
            let count = lost.len();
            format!(
                "its guest has {count} files open that have no name in it any more{names}: {why}; close them first"
            )
        };
        if self.is_read_only() {
            return Err(refused(&"it is read-only, so they could not be made anew"));
        }
        let query = Query::new(self).map_err(|error| refused(&error))?;
        orphan::keep(&query, &lost).map_err(|error| refused(&error))
    }

    /// Has the server agree on what it once did with the guest.
    fn mount_again(&self, request: &[u8]) -> io::Result<()> {
        if !Request::is_mount(request) {
            return Err(io::Error::other("what was saved as the request to mount it is another"));
        }
        Replay::new(REPLY_MAX)?.ask(self, request, REPLY_MAX).map(drop)
    }

    /// The directory, to look in.
    fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(nix::fcntl::open(&self.path, flags, Mode::empty())?)
    }

    /// Goes on for the guest that has mounted it. What had to be made for that is gone again from the directory
    /// afterwards, whatever comes of it.
    fn go_on(&self, mounted: Mounted) -> Result<(), StateError> {
        let failed = |error: &dyn fmt::Display| {
            StateError(format!("its files are not found again in {}: {error}", self.path.display()))
        };
        let Mounted { request, mut tree, orphans } = mounted;
        if self.is_read_only() && !orphans.is_empty() {
            return Err(StateError("removed files were saved of it, and it is read-only".into()));
        }
        orphan::check(&orphans)?;
        let names = orphan::names(&orphans)?;
        tree.place(&names)?;
        tree.check(self.is_read_only())?;
        let root = Rc::new(self.root().map_err(|error| failed(&error))?);
        let tree = tree.present(&root, &names.keys().copied().collect()).map_err(|error| failed(&error))?;
        let tree = tree.to_server()?;
        self.mount_again(&request).map_err(|error| failed(&error))?;
        let removed = |error| failed(&format!("what was removed there cannot be made anew: {error}"));
        let made = Made::make(&root, &orphans, &names).map_err(removed)?;
        self.deserialize(&tree).map_err(|error| failed(&error))?;
        made.settle().map_err(removed)
    }
}

/// How long a guest keeps what it was told of names and files.
fn kept(cache: Cache) -> Duration {
    match cache {
        Cache::Never | Cache::Fresh => Duration::ZERO,
        Cache::Auto => Duration::from_secs(1),
        Cache::Always => Duration::from_hours(24),
    }
}

/// Files below `root` that this process has open and that have no name any more, as far as it can be found out.
fn deleted(root: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let names = targets.filter_map(|path| {
        let name = path.strip_prefix(root).ok()?.to_str()?.strip_suffix(" (deleted)")?.to_owned();
        Some(name)
    });
    let names: std::collections::BTreeSet<_> = names.collect();
    names.into_iter().take(NAMED_MAX).collect()
}

/// Answers a request and says how many bytes that took, and, where it changes that, by what the share is mounted now.
fn handle<F: FileSystem + Sync>(
    share: &Passthrough,
    server: &virtiofsd::server::Server<F>,
    chain: Chain,
) -> Result<(u32, Option<Vec<u8>>), Broken> {
    let broken = |error: &dyn fmt::Display| Broken(error.to_string());
    let ram = chain.memory().clone();
    let reader = Reader::new(&ram, chain.clone()).map_err(|error| broken(&error))?;
    let room = Room::of(chain.clone());
    let writer = Writer::new(&ram, chain).map_err(|error| broken(&error))?;
    let request = Request::peek(reader.clone())
        .map_err(|error| Broken(format!("a request without a header: {error}")))?;
    // The server takes this room for granted in some replies, and panics where there is none.
    if writer.available_bytes() < OUT_HEADER && request.wants_reply() {
        return Err(Broken("a request without room for the header of its reply".into()));
    }
    let news = share.news.as_ref().map(|news| news.answer(share, &request, reader.clone())).transpose()?;
    if let Some(answer) = news.flatten() {
        let len = match answer {
            Answer::Silence => Ok(0),
            Answer::Refusal(errno) => request.refuse(writer, errno),
            Answer::Reply(body) => request.reply(writer, &body),
        };
        // It is short.
        return Ok((len.map_err(|error| broken(&error))? as u32, None));
    }
    let mounted_by = if request.mounts() {
        let mut bytes = Vec::new();
        reader.clone().take(REQUEST_MAX as u64).read_to_end(&mut bytes).map_err(|error| broken(&error))?;
        Some(bytes)
    } else {
        request.unmounts().then(Vec::new)
    };
    let len = if share.is_read_only() && request.truncates() {
        request.refuse(writer, libc::EROFS).map_err(|error| broken(&error))?
    } else {
        // With this right the host would leave the bits alone, whoever asks.
        let _without = request
            .clears_setuid()
            .then(|| drop_effective_cap("FSETID"))
            .transpose()
            .map_err(|error| broken(&error))?;
        let len =
            server.handle_message(reader, writer, None::<&mut Backend>).map_err(|error| broken(&error))?;
        room.complete(&request, mounted_by.as_deref(), len, share.names_kept())
            .map_err(|error| broken(&error))?
    };
    // A reply is bounded by the request's size, which is bounded by the server.
    Ok((u32::try_from(len).unwrap_or(u32::MAX), mounted_by))
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
        let (len, mounted_by) = match &self.inner {
            Inner::ReadOnly(server) => handle(self, server, chain),
            Inner::ReadWrite(server) => handle(self, server, chain),
        }?;
        if let Some(mounted_by) = mounted_by {
            *self.mounted_by() = mounted_by;
        }
        Ok(len)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let mounted_by = self.mounted_by().clone();
        let mut mounted = None;
        if !mounted_by.is_empty() {
            let failed =
                |error| StateError(format!("the files of {} cannot be saved: {error}", self.path.display()));
            let bytes = self.serialize().map_err(|error| failed(error.to_string()))?;
            let tree = Tree::from_server(&bytes).map_err(|error| failed(error.to_string()))?;
            if !tree.is_empty() {
                let orphans = self.keep(&tree).map_err(failed)?;
                mounted = Some(Mounted { request: mounted_by, tree, orphans });
            }
        }
        let (read_only, cache, news) = (self.is_read_only(), self.cache, self.news.is_some());
        encode(&State { read_only, cache, news, mounted })
    }

    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        let State { read_only, cache, news, mounted } = decode(state)?;
        let access = |read_only| if read_only { "read-only" } else { "writable" };
        same("access", &access(read_only), &access(self.is_read_only()))?;
        same("cache", &format!("{cache:?}"), &format!("{:?}", self.cache))?;
        let hears = |news| if news { "with" } else { "without" };
        same("news", &hears(news), &hears(self.news.is_some()))?;
        mounted.map_or(Ok(()), |mounted| self.go_on(mounted))
    }

    fn forget(&self) {
        self.mounted_by().clear();
        match &self.inner {
            Inner::ReadOnly(server) => server.destroy(),
            Inner::ReadWrite(server) => server.destroy(),
        };
    }
}

#[cfg(test)]
mod tests;
