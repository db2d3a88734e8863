//! What is added to replies of the file server, so that a guest asks for less.
//!
//! * Where a share's names are kept for a time, so is that there is no such name: programs look for files in one directory
//!   after the other.
//! * There, too, where a symbolic link leads is kept. A link that leads elsewhere is another inode, and the server holds those
//!   that a guest knows, so that their numbers are not used again. A guest's kernel cuts what it keeps to the length that the file
//!   system tells, which is right on those that roots are on, and wrong on some that can be bound, as sysfs: names are
//!   not kept in binds.
//! * Closing a file that was opened for reading is no request that anybody waits for: there is nothing to write, and locks
//!   are the guest's own. That it is not open any more the server is told by another one.

use std::io;
use std::time::Duration;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use super::super::queue::Chain;
use super::request::{ENTRY_OUT, IN_HEADER, INIT, LOOKUP, OPEN, OUT_HEADER, Request};
use crate::memory::GuestRam;

/// Where `struct fuse_out_header` has the error.
const ERROR: usize = 4;
/// Where `struct fuse_init_in` and `struct fuse_init_out` have their first flags.
const INIT_IN_FLAGS: usize = IN_HEADER + 12;
const INIT_OUT_FLAGS: usize = OUT_HEADER + 12;
const CACHE_SYMLINKS: u32 = 1 << 23;
/// Where `struct fuse_open_out` has its flags.
const OPEN_OUT_FLAGS: usize = OUT_HEADER + 8;
const NO_FLUSH: u32 = 1 << 5;
/// Where `struct fuse_entry_out` has the seconds and nanoseconds for which a name is kept.
const ENTRY_SECONDS: usize = 16;
const ENTRY_NANOSECONDS: usize = 32;

/// The room for a reply, which the server may have written to.
pub struct Room(Chain);

impl Room {
    /// That of this request.
    pub fn of(chain: Chain) -> Self {
        Self(chain)
    }

    /// Adds what there is to add to the server's reply to `request`, which has `len` bytes. Returns how many it has then.
    /// Names are kept for so long; `mount` is the whole request if a guest mounts the share by it. What the guest changes
    /// meanwhile fools none but itself.
    pub fn complete(
        &self,
        request: &Request,
        mount: Option<&[u8]>,
        len: usize,
        kept: Duration,
    ) -> io::Result<usize> {
        let keeps = !kept.is_zero();
        match request.opcode {
            LOOKUP if keeps && len == OUT_HEADER && self.word(ERROR)?.cast_signed() == -libc::ENOENT => {
                self.nobody(request, kept)
            }
            OPEN if request.reads_only() && len > OPEN_OUT_FLAGS => {
                self.set(OPEN_OUT_FLAGS, NO_FLUSH).map(|()| len)
            }
            INIT if keeps && len > INIT_OUT_FLAGS => {
                let flags = mount.and_then(|bytes| bytes.get(INIT_IN_FLAGS..)?.first_chunk());
                let offered = flags.map_or(0, |flags| u32::from_le_bytes(*flags));
                self.set(INIT_OUT_FLAGS, offered & CACHE_SYMLINKS).map(|()| len)
            }
            _ => Ok(len),
        }
    }

    /// An entry of nobody's, in the place of an error, if there is room for it.
    fn nobody(&self, request: &Request, kept: Duration) -> io::Result<usize> {
        let room: usize = self.0.clone().writable().map(|part| part.len() as usize).sum();
        if room < OUT_HEADER + ENTRY_OUT {
            return Ok(OUT_HEADER);
        }
        let mut entry = [0; ENTRY_OUT];
        entry[ENTRY_SECONDS..][..8].copy_from_slice(&kept.as_secs().to_le_bytes());
        entry[ENTRY_NANOSECONDS..][..4].copy_from_slice(&kept.subsec_nanos().to_le_bytes());
        let reply = request.answer(0, &entry);
        self.write(0, &reply)?;
        Ok(reply.len())
    }

    fn set(&self, at: usize, flags: u32) -> io::Result<()> {
        self.write(at, &(self.word(at)? | flags).to_le_bytes())
    }

    fn word(&self, at: usize) -> io::Result<u32> {
        let mut word = [0; 4];
        let mut done = 0;
        self.pieces(at, word.len(), |ram, address, len| {
            ram.read_slice(&mut word[done..done + len], address)?;
            done += len;
            Ok(())
        })?;
        Ok(u32::from_le_bytes(word))
    }

    fn write(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        self.pieces(at, bytes.len(), |ram, address, len| {
            let (piece, behind) = rest.split_at(len);
            rest = behind;
            ram.write_slice(piece, address)
        })
    }

    /// Calls `on` for each piece of `len` bytes from `at` on, in their order.
    fn pieces(
        &self,
        at: usize,
        len: usize,
        mut on: impl FnMut(&GuestRam, GuestAddress, usize) -> Result<(), GuestMemoryError>,
    ) -> io::Result<()> {
        let (mut skipped, mut left) = (at, len);
        for part in self.0.clone().writable() {
            let room = part.len() as usize;
            if skipped >= room {
                skipped -= room;
                continue;
            }
            let piece = left.min(room - skipped);
            let address = part.addr().checked_add(skipped as u64).ok_or(io::ErrorKind::InvalidInput)?;
            on(self.0.memory(), address, piece).map_err(io::Error::other)?;
            skipped = 0;
            left -= piece;
            if left == 0 {
                return Ok(());
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
