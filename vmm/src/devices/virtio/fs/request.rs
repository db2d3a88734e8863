//! What a FUSE request says of itself at its beginning, and the few decisions that are taken by it before the file
//! server sees it.

use std::io::{self, Read, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::bitmap::BitmapSlice;

/// Bytes of `struct fuse_in_header` and of `struct fuse_out_header`.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;
/// Bytes of `struct fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;

/// The header of a request of our own about the file that the server knows by a number, with `body` bytes behind it.
pub fn header(opcode: u32, file: u64, body: usize) -> [u8; IN_HEADER] {
    let mut header = [0; IN_HEADER];
    header[..4].copy_from_slice(&((IN_HEADER + body) as u32).to_le_bytes());
    header[4..8].copy_from_slice(&opcode.to_le_bytes());
    header[16..24].copy_from_slice(&file.to_le_bytes());
    header
}

/// The beginning of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Bytes that it says it has, with its header.
    pub len: u32,
    pub opcode: u32,
    unique: u64,
    /// The file that it is about, or the directory in which there is a name.
    pub node: u64,
    uid: u32,
    pub gid: u32,
    /// The first eight bytes behind the header, or zeroes: for what is about an open file, its handle; for what opens
    /// a file, how.
    pub first: u64,
}

impl Request {
    /// Reads it, and nothing more.
    pub fn peek<B: BitmapSlice>(mut reader: Reader<'_, B>) -> io::Result<Self> {
        let mut header = [0; IN_HEADER];
        reader.read_exact(&mut header)?;
        let mut first = [0; 8];
        // Not every request has a body.
        let _ = reader.read(&mut first)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Ok(Self {
            len: word(0),
            opcode: word(4),
            unique: long(8),
            node: long(16),
            uid: word(24),
            gid: word(28),
            first: u64::from_le_bytes(first),
        })
    }

    /// Forgetting and interrupting are not answered.
    pub fn wants_reply(&self) -> bool {
        ![FORGET, INTERRUPT, BATCH_FORGET].contains(&self.opcode)
    }

    /// Whether a whole request, as bytes, is one to mount the share.
    pub fn is_mount(bytes: &[u8]) -> bool {
        bytes.get(4..8) == Some(&INIT.to_le_bytes())
    }

    /// Whether the guest mounts the share by it.
    pub fn mounts(&self) -> bool {
        self.opcode == INIT
    }

    /// Whether the guest takes the share off by it.
    pub fn unmounts(&self) -> bool {
        self.opcode == DESTROY
    }

    /// Whether a file that is changed by this loses its setuid and setgid bits, as it does when its guest's user
    /// has no right to keep them. For other requests the guest says so and the server heeds it.
    pub fn clears_setuid(&self) -> bool {
        [FALLOCATE, COPY_FILE_RANGE].contains(&self.opcode) && self.uid != 0
    }

    /// Whether this empties a file while opening it, be it only for reading.
    pub fn truncates(&self) -> bool {
        [OPEN, CREATE].contains(&self.opcode) && self.first & libc::O_TRUNC as u64 != 0
    }

    /// Whether this opens a file only to read it.
    pub fn reads_only(&self) -> bool {
        self.opcode == OPEN && self.first as i32 & libc::O_ACCMODE == libc::O_RDONLY
    }

    /// Answers it with an error and says how many bytes that took.
    pub fn refuse<B: BitmapSlice>(&self, writer: Writer<'_, B>, errno: i32) -> io::Result<usize> {
        self.write(writer, errno, &[])
    }

    /// Answers it with `body`, which is short, and says how many bytes that took.
    pub fn reply<B: BitmapSlice>(&self, writer: Writer<'_, B>, body: &[u8]) -> io::Result<usize> {
        self.write(writer, 0, body)
    }

    fn write<B: BitmapSlice>(&self, mut writer: Writer<'_, B>, errno: i32, body: &[u8]) -> io::Result<usize> {
        let answer = self.answer(errno, body);
        writer.write_all(&answer)?;
        Ok(answer.len())
    }

    /// An answer to it, whole. The body is short.
    pub fn answer(&self, errno: i32, body: &[u8]) -> Vec<u8> {
        let len = (OUT_HEADER + body.len()) as u32;
        [&len.to_le_bytes()[..], &(-errno).to_le_bytes(), &self.unique.to_le_bytes(), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let request =
            |opcode, uid, first| Request { len: 48, opcode, unique: 1, node: 1, uid, gid: 0, first };
        let trunc = libc::O_TRUNC as u64;
        for (request, reply, clears, truncates) in [
            (request(LOOKUP, 1, trunc), true, false, false),
            (request(FORGET, 1, 0), false, false, false),
            (request(BATCH_FORGET, 1, 0), false, false, false),
            (request(INTERRUPT, 1, 0), false, false, false),
            (request(FALLOCATE, 1, 0), true, true, false),
            (request(FALLOCATE, 0, 0), true, false, false),
            (request(COPY_FILE_RANGE, 1, 0), true, true, false),
            (request(OPEN, 0, trunc), true, false, true),
            (request(OPEN, 0, 0), true, false, false),
            (request(OPEN, 0, 1), true, false, false),
            (request(OPEN, 0, 2), true, false, false),
            (request(CREATE, 0, trunc | 1), true, false, true),
            (request(OPEN, 0, trunc << 32), true, false, false),
        ] {
            assert_eq!(request.wants_reply(), reply, "{request:?}");
            assert_eq!(request.clears_setuid(), clears, "{request:?}");
            assert_eq!(request.truncates(), truncates, "{request:?}");
            let reads = request.opcode == OPEN && [0, trunc, trunc << 32].contains(&request.first);
            assert_eq!(request.reads_only(), reads, "{request:?}");
        }
    }
}
