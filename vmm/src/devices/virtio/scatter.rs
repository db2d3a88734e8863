//! Guest buffers in the form in which the kernel takes them: for calls that move data between a
//! descriptor and guest RAM without a copy on the way.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::GuestMemory;

use super::Broken;
use super::queue::Chain;
use crate::memory::GuestRam;

/// Parts of one call: what the kernel takes (UIO_MAXIOV). Also the most parts of one request.
pub const PARTS_MAX: usize = 1024;

/// The parts of a request that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What the driver wrote for the device.
    Readable,
    /// What the device writes.
    Writable,
}

/// Pieces of guest RAM, in order. It is bound to the thread that made it, and keeps the RAM.
#[derive(Debug)]
pub struct Scatter {
    ram: Arc<GuestRam>,
    // Each points at as many bytes of `ram`.
    parts: VecDeque<libc::iovec>,
    bytes: u64,
}

impl Scatter {
    /// Of nothing.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        Self { ram, parts: VecDeque::new(), bytes: 0 }
    }

    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of pieces.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.bytes = 0;
    }

    /// Appends the buffers of a request, and says how many (pieces, bytes) they are.
    pub fn add(&mut self, chain: Chain, wanted: Part) -> Result<(usize, u64), Broken> {
        let (mut parts, mut bytes) = (0, 0);
        for descriptor in chain {
            let part = if descriptor.is_write_only() { Part::Writable } else { Part::Readable };
            if part != wanted || descriptor.len() == 0 {
                continue;
            }
            for slice in self.ram.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice?;
                if parts == PARTS_MAX {
                    return Err(Broken(format!("a request of more than {PARTS_MAX} parts")));
                }
                let base = slice.ptr_guard_mut().as_ptr().cast();
                self.parts.push_back(libc::iovec { iov_base: base, iov_len: slice.len() });
                parts += 1;
                bytes += slice.len() as u64;
            }
        }
        self.bytes += bytes;
        Ok((parts, bytes))
    }

    /// Drops that many bytes at the front.
    pub fn trim_front(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(part) = self.parts.front_mut()
        {
            let now = bytes.min(part.iov_len);
            // SAFETY: `now` is at most the length of the part, so the result is within it or at its end.
            part.iov_base = unsafe { part.iov_base.byte_add(now) };
            part.iov_len -= now;
            (bytes, self.bytes) = (bytes - now, self.bytes - now as u64);
            if part.iov_len == 0 {
                self.parts.pop_front();
            }
        }
    }

    /// Drops that many bytes at the end.
    pub fn trim_back(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(part) = self.parts.back_mut()
        {
            let now = bytes.min(part.iov_len);
            part.iov_len -= now;
            (bytes, self.bytes) = (bytes - now, self.bytes - now as u64);
            if part.iov_len == 0 {
                self.parts.pop_back();
            }
        }
    }

    /// Drops that many pieces at the front.
    pub fn consume(&mut self, parts: usize) {
        for part in self.parts.drain(..parts.min(self.parts.len())) {
            self.bytes -= part.iov_len as u64;
        }
    }

    /// Writes `bytes` at `offset` from the start. What does not fit is not written.
    pub fn put(&self, mut offset: usize, bytes: &[u8]) {
        let mut left = bytes;
        for part in &self.parts {
            if left.is_empty() {
                return;
            }
            let Some(room) = part.iov_len.checked_sub(offset) else {
                offset -= part.iov_len;
                continue;
            };
            let (now, rest) = left.split_at(room.min(left.len()));
            // SAFETY: the part is `iov_len` bytes of guest RAM, which `self.ram` keeps mapped, and
            // `offset + now.len()` is within them. `now` is memory of this process and no guest RAM.
            unsafe {
                let to = part.iov_base.cast::<u8>().add(offset);
                std::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len());
            }
            (left, offset) = (rest, 0);
        }
    }

    /// Copies what is at `offset` from the start into `bytes`, as far as there is any.
    pub fn get(&self, mut offset: usize, bytes: &mut [u8]) {
        let mut left = bytes;
        for part in &self.parts {
            if left.is_empty() {
                return;
            }
            let Some(there) = part.iov_len.checked_sub(offset) else {
                offset -= part.iov_len;
                continue;
            };
            let now = there.min(left.len());
            let (to, rest) = left.split_at_mut(now);
            // SAFETY: the part is `iov_len` bytes of guest RAM, which `self.ram` keeps mapped, and `offset + now` is
            // within them. `to` is memory of this process and no guest RAM.
            unsafe {
                let from = part.iov_base.cast::<u8>().add(offset);
                std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), now);
            }
            (left, offset) = (rest, 0);
        }
    }

    /// Fills the pieces from a descriptor with one call, and says how far it came.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let parts = self.call_parts();
        // SAFETY: each part is writable guest RAM that `self.ram` keeps mapped; the kernel writes to no
        // more than what the parts say.
        let len = unsafe { libc::readv(fd.as_raw_fd(), parts.as_ptr(), count(parts)) };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the pieces to a descriptor with one call, and says how far it came.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let parts = self.call_parts();
        // SAFETY: each part is guest RAM that `self.ram` keeps mapped; the kernel only reads it.
        let len = unsafe { libc::writev(fd.as_raw_fd(), parts.as_ptr(), count(parts)) };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    /// What one call takes, for the kernel: the pointers are good while nothing is added or dropped.
    pub fn call_parts(&mut self) -> &[libc::iovec] {
        let parts = self.parts.make_contiguous();
        &parts[..parts.len().min(PARTS_MAX)]
    }
}

fn count(parts: &[libc::iovec]) -> libc::c_int {
    // At most PARTS_MAX.
    libc::c_int::try_from(parts.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    const DATA: u64 = 0x8000;

    /// Ten, twenty and thirty bytes, of which only the first is readable.
    fn scatter(wanted: Part) -> (Scatter, Arc<GuestRam>) {
        let ram = Arc::new(memory::anonymous(&[(0, 0x1_0000)]).unwrap());
        for (index, (len, flags)) in [(10u32, 1u16), (20, 3), (0, 3), (30, 2)].into_iter().enumerate() {
            let at = index as u64 * 16;
            ram.write_obj(DATA + at * 16, GuestAddress(at)).unwrap();
            ram.write_obj(len, GuestAddress(at + 8)).unwrap();
            ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
            ram.write_obj(index as u16 + 1, GuestAddress(at + 14)).unwrap();
        }
        ram.write_obj(1u16, GuestAddress(0x2002)).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(&ram)).unwrap().next().unwrap();
        let mut scatter = Scatter::new(Arc::clone(&ram));
        let (parts, bytes) = scatter.add(chain, wanted).unwrap();
        assert_eq!((parts, bytes), (scatter.parts(), scatter.bytes()));
        (scatter, ram)
    }

    #[test]
    fn the_wanted_parts_are_listed() {
        assert_eq!((scatter(Part::Readable).0.parts(), scatter(Part::Readable).0.bytes()), (1, 10));
        assert_eq!((scatter(Part::Writable).0.parts(), scatter(Part::Writable).0.bytes()), (2, 50));
    }

    #[test]
    fn trimming_takes_bytes_from_either_end() {
        for (front, back, lens) in [
            (0, 0, &[20, 30][..]),
            (16, 1, &[4, 29]),
            (20, 30, &[]),
            (25, 0, &[25]),
            (0, 35, &[15]),
            (100, 0, &[]),
            (0, 100, &[]),
        ] {
            let (mut scatter, _) = scatter(Part::Writable);
            scatter.trim_front(front);
            scatter.trim_back(back);
            let found: Vec<_> = scatter.call_parts().iter().map(|part| part.iov_len).collect();
            assert_eq!(found, lens, "{front} {back}");
            assert_eq!(scatter.bytes(), lens.iter().sum::<usize>() as u64);
        }
    }

    #[test]
    fn bytes_are_put_across_pieces_and_not_beyond() {
        let (scatter, ram) = scatter(Part::Writable);
        scatter.put(18, &[1, 2, 3, 4]);
        scatter.put(48, &[5, 6, 7, 8]);
        scatter.put(60, &[9]);
        let mut second = [0; 32];
        ram.read_slice(&mut second, GuestAddress(DATA + 0x300)).unwrap();
        assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(DATA + 0x100 + 18)).unwrap(), [1, 2]);
        assert_eq!((&second[..2], &second[28..]), (&[3, 4][..], &[5, 6, 0, 0][..]));
        for (offset, expected) in [(18, [1, 2, 3, 4]), (48, [5, 6, 9, 9]), (49, [6, 9, 9, 9]), (60, [9; 4])] {
            let mut bytes = [9; 4];
            scatter.get(offset, &mut bytes);
            assert_eq!(bytes, expected, "{offset}");
        }
    }
}
