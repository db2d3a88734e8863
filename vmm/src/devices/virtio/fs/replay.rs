//! A FUSE request that the monitor itself makes: the guest's that is long past, or one of its own.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::super::Broken;
use super::super::queue::Chain;
use super::Server;
use super::request::OUT_HEADER;
use crate::memory::{self, GuestRam};

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1800;
const REQUEST: u64 = 0x2000;
const REPLY: u64 = 0x3000;
/// Bytes of a request.
pub const REQUEST_MAX: usize = 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Memory of its own for one request at a time, and for its reply.
pub struct Replay {
    ram: Arc<GuestRam>,
    /// Bytes for a reply, with its header.
    most: u32,
}

impl Replay {
    /// For replies of at most `most` bytes behind their header.
    pub fn new(most: u32) -> io::Result<Self> {
        let most = most.saturating_add(OUT_HEADER as u32);
        let len = (REPLY + u64::from(most)).next_multiple_of(memory::page_size());
        let ram = memory::anonymous(&[(0, len)]).map_err(failed)?;
        Ok(Self { ram: Arc::new(ram), most })
    }

    /// What `server` replies, behind the header. The request has at most [`REQUEST_MAX`] bytes. There is room for
    /// `room` bytes, which must be as many as it asks for where it reads, since the server fills the room. What it
    /// refuses is an error by its number.
    pub fn ask(&self, server: &dyn Server, request: &[u8], room: u32) -> io::Result<Vec<u8>> {
        let room = room.saturating_add(OUT_HEADER as u32).min(self.most);
        let len = self.hand(server, request, room)?;
        let body = (len.min(room) as usize)
            .checked_sub(OUT_HEADER)
            .ok_or_else(|| failed("its reply has no header"))?;
        match self.ram.read_obj::<i32>(GuestAddress(REPLY + 4)).map_err(failed)? {
            0 => {
                let mut reply = vec![0; body];
                self.ram.read_slice(&mut reply, GuestAddress(REPLY + OUT_HEADER as u64)).map_err(failed)?;
                Ok(reply)
            }
            error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        }
    }

    /// Hands `server` what is not replied to. It has at most [`REQUEST_MAX`] bytes.
    pub fn tell(&self, server: &dyn Server, request: &[u8]) -> io::Result<()> {
        self.hand(server, request, OUT_HEADER as u32).map(drop)
    }

    /// How many bytes `server` has replied, with their header, into as much room.
    fn hand(&self, server: &dyn Server, request: &[u8], room: u32) -> io::Result<u32> {
        if request.len() > REQUEST_MAX {
            return Err(failed(format!("it has {} bytes", request.len())));
        }
        self.lay(request, room).map_err(failed)?;
        server.handle(self.chain().map_err(failed)?).map_err(failed)
    }

    /// Writes it down, as a driver would.
    fn lay(&self, request: &[u8], room: u32) -> Result<(), GuestMemoryError> {
        let ram = &self.ram;
        ram.write_slice(request, GuestAddress(REQUEST))?;
        // At most REQUEST_MAX.
        let parts = [(REQUEST, request.len() as u32, NEXT), (REPLY, room, WRITE)];
        for (index, (address, len, flags)) in (0u16..).zip(parts) {
            let at = u64::from(index) * 16;
            ram.write_obj(address, GuestAddress(at))?;
            ram.write_obj(len, GuestAddress(at + 8))?;
            ram.write_obj(flags, GuestAddress(at + 12))?;
            ram.write_obj(index + 1, GuestAddress(at + 14))?;
        }
        ram.write_obj(1u16, GuestAddress(AVAILABLE + 2))
    }

    /// The request, as it comes out of a queue.
    fn chain(&self) -> Result<Chain, Broken> {
        let mut queue = Queue::new(2)?;
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(&self.ram))?.next();
        chain.ok_or_else(|| Broken("it is not there".into()))
    }
}

fn failed(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("a request of our own: {error}"))
}
