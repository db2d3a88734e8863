//! What a FUSE request says of itself at its beginning, and the few decisions that are taken by it before the file
//! server sees it.

use std::io::{self, Read, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::bitmap::BitmapSlice;

/// Bytes of `struct fuse_in_header` and of `struct fuse_out_header`.
const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;

const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const RELEASE: u32 = 18;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
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
    opcode: u32,
    unique: u64,
    uid: u32,
    /// The first word behind the header: for what opens a file, how.
    first: u32,
}

impl Request {
    /// Reads it, and nothing more.
    pub fn peek<B: BitmapSlice>(mut reader: Reader<'_, B>) -> io::Result<Self> {
        let mut header = [0; IN_HEADER];
        reader.read_exact(&mut header)?;
        let mut first = [0; 4];
        // Not every request has a body.
        let _ = reader.read(&mut first)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Ok(Self {
            opcode: word(4),
            unique: u64::from(word(8)) | u64::from(word(12)) << 32,
            uid: word(24),
            first: u32::from_le_bytes(first),
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
        [OPEN, CREATE].contains(&self.opcode) && self.first & libc::O_TRUNC as u32 != 0
    }

    /// Answers it with an error and says how many bytes that took.
    pub fn refuse<B: BitmapSlice>(&self, mut writer: Writer<'_, B>, errno: i32) -> io::Result<usize> {
        let mut reply = [0; OUT_HEADER];
        reply[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
        reply[4..8].copy_from_slice(&(-errno).to_le_bytes());
        reply[8..].copy_from_slice(&self.unique.to_le_bytes());
        writer.write_all(&reply)?;
        Ok(OUT_HEADER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        const LOOKUP: u32 = 1;
        let request = |opcode, uid, first| Request { opcode, unique: 1, uid, first };
        let trunc = libc::O_TRUNC as u32;
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
            (request(CREATE, 0, trunc | 1), true, false, true),
        ] {
            assert_eq!(request.wants_reply(), reply, "{request:?}");
            assert_eq!(request.clears_setuid(), clears, "{request:?}");
            assert_eq!(request.truncates(), truncates, "{request:?}");
        }
    }
}
