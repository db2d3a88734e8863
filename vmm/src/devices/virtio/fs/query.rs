//! What the monitor itself asks a file server about a file that the guest knows, by the number that both have for it:
//! it needs no name for that.

use std::io;

use super::Server;
use super::replay::Replay;
use super::request::{GETATTR, LSEEK, OPEN, READ, RELEASE, header};

/// Bytes that are read at once.
const READ_MAX: u32 = 1 << 20;

/// Bytes of any reply but one with what was read.
const REPLY_MAX: u32 = 0x100;

/// A time of a file: seconds since 1970, and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// What a file system says about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub inode: u64,
    pub size: u64,
    pub accessed: Time,
    pub modified: Time,
    pub changed: Time,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Attributes {
    /// Of the reply to GETATTR.
    fn parse(reply: &[u8]) -> io::Result<Self> {
        let bytes: &[u8; 104] = reply.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let time = |seconds, nanoseconds| Time {
            seconds: long(seconds).cast_signed(),
            nanoseconds: word(nanoseconds),
        };
        Ok(Self {
            inode: long(16),
            size: long(24),
            accessed: time(40, 64),
            modified: time(48, 68),
            changed: time(56, 72),
            mode: word(76),
            links: word(80),
            uid: word(84),
            gid: word(88),
        })
    }
}

/// Asks a server, one question at a time.
pub struct Query<'a> {
    server: &'a dyn Server,
    replay: Replay,
}

impl<'a> Query<'a> {
    pub fn new(server: &'a dyn Server) -> io::Result<Self> {
        Ok(Self { server, replay: Replay::new(READ_MAX)? })
    }

    fn ask(&self, opcode: u32, file: u64, body: &[u8]) -> io::Result<Vec<u8>> {
        self.ask_for(opcode, file, body, REPLY_MAX)
    }

    fn ask_for(&self, opcode: u32, file: u64, body: &[u8], room: u32) -> io::Result<Vec<u8>> {
        self.replay.ask(self.server, &[&header(opcode, file, body.len())[..], body].concat(), room)
    }

    pub fn attributes(&self, file: u64) -> io::Result<Attributes> {
        Attributes::parse(&self.ask(GETATTR, file, &[0; 16])?)
    }

    /// Opens a file to read it.
    pub fn open(&self, file: u64) -> io::Result<Open<'_>> {
        let body = (libc::O_RDONLY as u64).to_le_bytes();
        let handle = number(&self.ask(OPEN, file, &body)?)?;
        Ok(Open { query: self, file, handle })
    }
}

/// A file that the monitor has open at the server, until it is dropped.
pub struct Open<'a> {
    query: &'a Query<'a>,
    file: u64,
    handle: u64,
}

impl Open<'_> {
    /// At most as many bytes, and at most [`READ_MAX`]; fewer only where the file ends.
    pub fn read(&self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        let len = len.min(u64::from(READ_MAX));
        // No more than READ_MAX.
        self.query.ask_for(READ, self.file, &longs(&[self.handle, at, len, 0, 0]), len as u32)
    }

    /// The next place from `at` on that may be no hole.
    pub fn data(&self, at: u64) -> io::Result<Option<u64>> {
        self.seek(at, libc::SEEK_DATA.cast_unsigned())
    }

    /// The next hole from `at` on; there is one at the end.
    pub fn hole(&self, at: u64) -> io::Result<Option<u64>> {
        self.seek(at, libc::SEEK_HOLE.cast_unsigned())
    }

    fn seek(&self, at: u64, whence: u32) -> io::Result<Option<u64>> {
        match self.query.ask(LSEEK, self.file, &longs(&[self.handle, at, whence.into()])) {
            Ok(reply) => number(&reply).map(Some),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Nothing depends on it: the server closes all files in the end.
        let _ = self.query.ask(RELEASE, self.file, &longs(&[self.handle, 0, 0]));
    }
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn number(reply: &[u8]) -> io::Result<u64> {
    let bytes = reply.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(u64::from_le_bytes(*bytes))
}
