//! Requests made by hand, for tests.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::queue::Chain;
use crate::memory::GuestRam;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Below this address are the rings.
pub const DATA: u64 = 0x1_0000;
const SIZE: u16 = 16;

/// Flag of a descriptor that the device may write.
pub const WRITE: u16 = 2;

/// The request of these descriptors, each (address, length, flags), chained in their order.
pub fn chain(ram: &Arc<GuestRam>, parts: &[(u64, u32, u16)]) -> Chain {
    let last = parts.len() - 1;
    for (index, (address, len, flags)) in parts.iter().enumerate() {
        let at = DESCRIPTORS + index as u64 * 16;
        ram.write_obj(*address, GuestAddress(at)).unwrap();
        ram.write_obj(*len, GuestAddress(at + 8)).unwrap();
        ram.write_obj(flags & WRITE | u16::from(index < last), GuestAddress(at + 12)).unwrap();
        ram.write_obj(index as u16 + 1, GuestAddress(at + 14)).unwrap();
    }
    ram.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    queue.iter(Arc::clone(ram)).unwrap().next().unwrap()
}
