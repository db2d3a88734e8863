//! A FUSE request that the monitor itself makes, where the guest's is long past.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::super::Broken;
use super::super::queue::Chain;
use crate::memory::{self, GuestRam};

const AVAILABLE: u64 = 0x1000;
const REQUEST: u64 = 0x2000;
const REPLY: u64 = 0x3000;
const ROOM: u32 = 0x1000;
/// Bytes of a request.
pub const REQUEST_MAX: usize = 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The request in memory of its own, and where its reply goes.
pub struct Replay {
    ram: Arc<GuestRam>,
}

impl Replay {
    /// Of at most [`REQUEST_MAX`] bytes.
    pub fn new(request: &[u8]) -> Result<Self, Broken> {
        let failed = |error: GuestMemoryError| Broken(format!("a request of our own: {error}"));
        if request.len() > REQUEST_MAX {
            return Err(Broken(format!("a request of our own has {} bytes", request.len())));
        }
        let ram = memory::anonymous(&[(0, REPLY + u64::from(ROOM))])
            .map_err(|error| Broken(format!("a request of our own: {error}")))?;
        ram.write_slice(request, GuestAddress(REQUEST)).map_err(failed)?;
        // At most REQUEST_MAX.
        let parts = [(REQUEST, request.len() as u32, NEXT), (REPLY, ROOM, WRITE)];
        for (index, (address, len, flags)) in (0u16..).zip(parts) {
            let at = u64::from(index) * 16;
            ram.write_obj(address, GuestAddress(at)).map_err(failed)?;
            ram.write_obj(len, GuestAddress(at + 8)).map_err(failed)?;
            ram.write_obj(flags, GuestAddress(at + 12)).map_err(failed)?;
            ram.write_obj(index + 1, GuestAddress(at + 14)).map_err(failed)?;
        }
        ram.write_obj(1u16, GuestAddress(AVAILABLE + 2)).map_err(failed)?;
        Ok(Self { ram: Arc::new(ram) })
    }

    /// The request, as it comes out of a queue.
    pub fn chain(&self) -> Result<Chain, Broken> {
        let mut queue = Queue::new(2)?;
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(AVAILABLE as u32 + 0x800), None);
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(&self.ram))?.next();
        chain.ok_or_else(|| Broken("a request of our own is not there".into()))
    }

    /// The error number of the reply.
    pub fn error(&self) -> Result<i32, Broken> {
        Ok(self.ram.read_obj(GuestAddress(REPLY + 4))?)
    }
}
