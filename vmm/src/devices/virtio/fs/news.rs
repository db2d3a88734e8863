//! News: what the host has changed in a directory that programs of a guest watch.
//!
//! FUSE has no message by which a guest could be told over virtio. So somebody in the guest does there what has been
//! done on the host already, the guest's kernel asks for it, and having been answered it tells whoever watches. Such a
//! request is known by its group and answered here as if it were done.
//!
//! Nothing else tells it apart, and any guest may use these groups. It fools its own kernel by that and nobody else:
//! on the host nothing is done, and the server is asked only what any guest can ask it.
//!
//! A guest that maps ids where it mounts the share says of few requests whose they are. So that is not agreed on.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtiofsd::descriptor_utils::Reader;
use vm_memory::bitmap::BitmapSlice;

use super::super::Broken;
use super::replay::{REQUEST_MAX, Replay};
use super::request::{
    BATCH_FORGET, ENTRY_OUT, FALLOCATE, FLUSH, FORGET, FSYNC, GETATTR, IN_HEADER, INIT, LOOKUP, MKDIR, MKNOD,
    OPEN, RELEASE, RMDIR, Request, SETATTR, SYMLINK, UNLINK, header,
};
use super::{News, Server};

/// What is made up has this bit, in the numbers of files and of handles. The server counts from 1.
const MADE_UP: u64 = 1 << 63;
/// The handle of every file that was not opened.
const HANDLE: u64 = MADE_UP;

/// FUSE_ALLOW_IDMAP, a bit of the second word of flags of `struct fuse_init_in`: in which byte of a request, and where.
const INIT_IDMAP: usize = IN_HEADER + 17;
const IDMAP: u8 = 1;

/// Bytes of `struct fuse_mknod_in` and of `struct fuse_mkdir_in`, behind which the name is.
const MKNOD_IN: usize = 16;
const MKDIR_IN: usize = 8;
/// Bytes of a name, with its end (FUSE_NAME_MAX and one).
const NAME_MAX: usize = 1025;

/// Bytes of `struct fuse_open_out`.
const OPEN_OUT: usize = 16;
/// Where in an entry the number of the file is, and in its attributes its inode number, its mode and its links.
const ENTRY_NODE: usize = 0;
const ENTRY_INODE: usize = 40;
const ENTRY_MODE: usize = 100;
const ENTRY_LINKS: usize = 104;
/// Bytes of any reply to what is asked here.
const REPLY_MAX: u32 = 0x100;

/// Bytes of `struct fuse_batch_forget_in`, and of each `struct fuse_forget_one` behind it.
const BATCH_FORGET_IN: usize = 8;
const FORGET_ONE: usize = 16;
/// Bytes of what is forgotten at once; the server refuses more.
const FORGETS_MAX: usize = 1 << 20;
/// How many fit a request of our own.
const FORGETS_AT_ONCE: usize = (REQUEST_MAX - IN_HEADER - BATCH_FORGET_IN) / FORGET_ONE;

/// What the host has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// There is a name that was not there.
    Appears,
    /// A name is gone, of a file of this type.
    Vanishes(u32),
    /// Content or attributes of a file are others.
    Changes,
}

/// How a request is answered that the server does not see.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It wants none.
    Silence,
    /// An error, by its number.
    Refusal(i32),
    /// What is behind the header.
    Reply(Vec<u8>),
}

impl Answer {
    /// What was to be done is done, and there is nothing to say of it.
    fn done() -> Self {
        Self::Reply(Vec::new())
    }

    fn of(reply: io::Result<Vec<u8>>) -> Self {
        reply.map_or_else(|error| Self::Refusal(error.raw_os_error().unwrap_or(libc::EIO)), Self::Reply)
    }
}

/// Answers requests by which a guest tells itself of what the host has done.
pub struct Newsroom {
    news: News,
    /// Files that were made up so far.
    made_up: AtomicU64,
    /// Memory for questions of our own that nobody uses: at most one for each thread that answers requests.
    idle: Mutex<Vec<Replay>>,
}

impl Newsroom {
    pub fn new(news: News) -> Self {
        Self { news, made_up: AtomicU64::new(0), idle: Mutex::default() }
    }

    /// The answer to a request, unless it is for `server` to answer. Of what was made up, requests of any group are
    /// answered here: a guest's kernel forgets files, and closes them, in nobody's name.
    pub fn answer<B: BitmapSlice + 'static>(
        &self,
        server: &dyn Server,
        request: &Request,
        reader: Reader<'_, B>,
    ) -> Result<Option<Answer>, Broken> {
        use Event::{Appears, Changes, Vanishes};
        Ok(Some(match (request.opcode, self.event(request.gid)) {
            (FORGET, _) if is_made_up(request.node) => Answer::Silence,
            (BATCH_FORGET, _) => return self.forget(server, request, reader),
            _ if !request.wants_reply() => return Ok(None),
            _ if is_made_up(request.node) => Answer::Refusal(libc::ENOENT),
            (INIT, _) => return self.mount(server, reader),
            (FALLOCATE | FLUSH | FSYNC | RELEASE, _) if request.first == HANDLE => Answer::done(),
            // Or the guest's kernel would refuse to make it.
            (LOOKUP, Some(Appears)) => Answer::Refusal(libc::ENOENT),
            (MKNOD | MKDIR | SYMLINK, Some(Appears)) => Answer::of(self.look_up(server, request, reader)),
            (LOOKUP, Some(Vanishes(mode))) => Answer::Reply(self.make_up(mode)),
            (UNLINK | RMDIR, Some(Vanishes(_))) => Answer::done(),
            (OPEN, Some(Changes)) => Answer::Reply(opened()),
            (SETATTR, Some(Changes)) => Answer::of(self.ask(server, GETATTR, request.node, &[0; 16])),
            _ => return Ok(None),
        }))
    }

    fn event(&self, gid: u32) -> Option<Event> {
        match gid.checked_sub(self.news.0)? {
            0 => Some(Event::Appears),
            1 => Some(Event::Vanishes(libc::S_IFREG)),
            2 => Some(Event::Vanishes(libc::S_IFDIR)),
            3 => Some(Event::Changes),
            _ => None,
        }
    }

    /// The mount of a share by a guest that would map ids in it, as if it would not.
    fn mount<B: BitmapSlice + 'static>(
        &self,
        server: &dyn Server,
        reader: Reader<'_, B>,
    ) -> Result<Option<Answer>, Broken> {
        let mut bytes = Vec::new();
        let read = reader.take(REQUEST_MAX as u64).read_to_end(&mut bytes);
        read.map_err(|error| Broken(error.to_string()))?;
        // It is read a second time, and may be another by now.
        if !Request::is_mount(&bytes) {
            return Ok(None);
        }
        // What is asked with the flag cleared comes here as well, and goes on to the server.
        match bytes.get_mut(INIT_IDMAP).filter(|flags| **flags & IDMAP != 0) {
            None => Ok(None),
            Some(flags) => {
                *flags &= !IDMAP;
                Ok(Some(Answer::of(self.replay(|replay| replay.ask(server, &bytes, REPLY_MAX)))))
            }
        }
    }

    /// An entry for a file that there is not, or a directory, empty, of which nothing is to be remembered. Each is
    /// another: a kernel takes what has one number for one file.
    fn make_up(&self, mode: u32) -> Vec<u8> {
        let node = MADE_UP | self.made_up.fetch_add(1, Ordering::Relaxed);
        let mut entry = vec![0; ENTRY_OUT];
        for at in [ENTRY_NODE, ENTRY_INODE] {
            entry[at..at + 8].copy_from_slice(&node.to_le_bytes());
        }
        entry[ENTRY_MODE..ENTRY_MODE + 4].copy_from_slice(&mode.to_le_bytes());
        entry[ENTRY_LINKS..ENTRY_LINKS + 4].copy_from_slice(&1u32.to_le_bytes());
        entry
    }

    /// The entry of a name that a request wants to be made.
    fn look_up<B: BitmapSlice + 'static>(
        &self,
        server: &dyn Server,
        request: &Request,
        reader: Reader<'_, B>,
    ) -> io::Result<Vec<u8>> {
        let (before, kind) = match request.opcode {
            MKNOD => (MKNOD_IN, request.first as u32 & libc::S_IFMT),
            MKDIR => (MKDIR_IN, libc::S_IFDIR),
            _ => (0, libc::S_IFLNK),
        };
        let name = name(request, reader, before)?;
        let entry = self.ask(server, LOOKUP, request.node, &name)?;
        let bytes: &[u8; ENTRY_OUT] = entry.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
        let mode = number(bytes, ENTRY_MODE);
        if mode & libc::S_IFMT == kind {
            return Ok(entry);
        }
        // The guest's kernel would say the same, but it would not forget the file.
        let node = u64::from(number(bytes, ENTRY_NODE)) | u64::from(number(bytes, ENTRY_NODE + 4)) << 32;
        self.tell(server, FORGET, node, &1u64.to_le_bytes())?;
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    /// Of files to forget, those that the server knows.
    fn forget<B: BitmapSlice + 'static>(
        &self,
        server: &dyn Server,
        request: &Request,
        mut reader: Reader<'_, B>,
    ) -> Result<Option<Answer>, Broken> {
        let broken = |error: io::Error| Broken(error.to_string());
        // What it says of itself that is not true, or is too much, the server complains of.
        let len = (request.first as u32 as usize).saturating_mul(FORGET_ONE);
        if len > FORGETS_MAX || len.saturating_add(IN_HEADER + BATCH_FORGET_IN) > reader.available_bytes() {
            return Ok(None);
        }
        reader.read_exact(&mut [0; IN_HEADER + BATCH_FORGET_IN]).map_err(broken)?;
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).map_err(broken)?;
        let (forgets, _) = bytes.as_chunks::<FORGET_ONE>();
        let known: Vec<_> = forgets
            .iter()
            .filter(|one| one.first_chunk().is_some_and(|node| !is_made_up(u64::from_le_bytes(*node))))
            .copied()
            .collect();
        if known.len() == forgets.len() {
            return Ok(None);
        }
        for known in known.chunks(FORGETS_AT_ONCE) {
            // No more than fit a request.
            let count = u64::to_le_bytes(known.len() as u64);
            self.tell(server, BATCH_FORGET, 0, &[&count[..], known.as_flattened()].concat())
                .map_err(broken)?;
        }
        Ok(Some(Answer::Silence))
    }

    /// What the server replies to a request of our own about a file.
    fn ask(&self, server: &dyn Server, opcode: u32, node: u64, body: &[u8]) -> io::Result<Vec<u8>> {
        let request = [&header(opcode, node, body.len())[..], body].concat();
        self.replay(|replay| replay.ask(server, &request, REPLY_MAX))
    }

    /// The same where it replies nothing.
    fn tell(&self, server: &dyn Server, opcode: u32, node: u64, body: &[u8]) -> io::Result<()> {
        let request = [&header(opcode, node, body.len())[..], body].concat();
        self.replay(|replay| replay.tell(server, &request))
    }

    /// With memory that nobody else uses meanwhile.
    fn replay<T>(&self, ask: impl FnOnce(&Replay) -> io::Result<T>) -> io::Result<T> {
        let idle = self.idle().pop();
        let replay = idle.map_or_else(|| Replay::new(REPLY_MAX), Ok)?;
        let answer = ask(&replay);
        self.idle().push(replay);
        answer
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Replay>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_made_up(node: u64) -> bool {
    node & MADE_UP != 0
}

/// The reply to OPEN with a handle that no file is behind.
fn opened() -> Vec<u8> {
    let mut reply = HANDLE.to_le_bytes().to_vec();
    reply.resize(OPEN_OUT, 0);
    reply
}

/// The name in a request, with its end, that begins as many bytes behind the header.
fn name<B: BitmapSlice>(request: &Request, reader: Reader<'_, B>, before: usize) -> io::Result<Vec<u8>> {
    let begin = IN_HEADER + before;
    let most = (request.len as usize).min(begin + NAME_MAX);
    let mut bytes = Vec::with_capacity(most);
    reader.take(most as u64).read_to_end(&mut bytes)?;
    let name = bytes.get(begin..).and_then(|rest| {
        let end = rest.iter().position(|byte| *byte == 0)?;
        (end > 0).then(|| rest[..=end].to_vec())
    });
    name.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

fn number(entry: &[u8; ENTRY_OUT], at: usize) -> u32 {
    u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
}
