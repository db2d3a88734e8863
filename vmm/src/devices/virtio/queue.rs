//! A split virtqueue with its doorbell, on top of `virtio-queue`.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::{Counters, Signals};
use crate::event::Event;
use crate::memory::GuestRam;

/// The driver broke the rules: the queue cannot be used any more.
#[derive(Debug, thiserror::Error)]
#[error("the driver broke the queue: {0}")]
pub struct Broken(pub String);

impl From<virtio_queue::Error> for Broken {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<GuestMemoryError> for Broken {
    fn from(error: GuestMemoryError) -> Self {
        Self(error.to_string())
    }
}

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Bytes of a used ring before its elements, of an available ring before its entries.
const RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// How far a queue has come, as counts that run on around the end of their rings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Requests that were taken.
    pub taken: u16,
    /// Requests that were given back.
    pub given: u16,
    /// How many had been given back when the driver was last considered for an interrupt.
    pub signalled: u16,
}

/// Where the position of a queue can be read while a device's thread moves it. The three counts are one
/// word, so that what is read has been true at a time; whoever needs them to stand still pauses the machine,
/// which orders them with everything else that the thread did.
#[derive(Debug, Default)]
pub(super) struct Track(AtomicU64);

impl Track {
    pub(super) fn get(&self) -> Position {
        let word = self.0.load(Ordering::Relaxed);
        Position { taken: word as u16, given: (word >> 16) as u16, signalled: (word >> 32) as u16 }
    }

    pub(super) fn set(&self, position: Position) {
        let Position { taken, given, signalled } = position;
        let word = u64::from(taken) | u64::from(given) << 16 | u64::from(signalled) << 32;
        self.0.store(word, Ordering::Relaxed);
    }
}

/// One queue of an active device.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    doorbell: Arc<Event>,
    /// How far the used ring was when the driver was last considered for an interrupt.
    signalled: Wrapping<u16>,
    counters: Arc<Counters>,
    track: Arc<Track>,
}

/// Guest-physical addresses of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// The table of descriptors.
    pub descriptors: u64,
    /// The driver's ring.
    pub available: u64,
    /// The device's ring.
    pub used: u64,
}

/// A request: a chain of descriptors.
pub type Chain = DescriptorChain<Arc<GuestRam>>;

impl VirtQueue {
    pub(super) fn new(
        queue: Queue,
        ram: Arc<GuestRam>,
        doorbell: Arc<Event>,
        counters: Arc<Counters>,
    ) -> Self {
        let signalled = Wrapping(queue.next_used());
        Self { queue, ram, doorbell, signalled, counters, track: Arc::default() }
    }

    /// The same, but where `track` says that it is, which will say so from now on.
    pub(super) fn on(mut self, track: Arc<Track>) -> Self {
        let Position { taken, given, signalled } = track.get();
        self.queue.set_next_avail(taken);
        self.queue.set_next_used(given);
        self.signalled = Wrapping(signalled);
        Self { track, ..self }
    }

    fn moved(&self) {
        self.track.set(Position {
            taken: self.queue.next_avail(),
            given: self.queue.next_used(),
            signalled: self.signalled.0,
        });
    }

    /// Set by the driver when there is something to do.
    pub fn doorbell(&self) -> &Event {
        &self.doorbell
    }

    /// Whether the driver uses this queue.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many requests can be under way.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where its three parts are, for who else is to serve it. None of a part that is not in one piece of RAM: what is
    /// behind the end of a piece in this process is not what is behind it in the guest.
    pub fn parts(&self) -> Option<Parts> {
        let size = usize::from(self.size());
        let parts = Parts {
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        };
        // Each ring has an index more behind its end, for notifications.
        let lengths = [
            (parts.descriptors, size * 16),
            (parts.available, RING_HEADER as usize + size * 2 + 2),
            (parts.used, RING_HEADER as usize + size * USED_ELEMENT as usize + 2),
        ];
        let whole = lengths.iter().all(|(at, len)| self.ram.get_slice(GuestAddress(*at), *len).is_ok());
        whole.then_some(parts)
    }

    /// How many requests were taken. As many were given back, if whoever serves it says so.
    pub fn taken(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Somebody else has served it so far: `taken` requests were taken and given back, and the driver was told.
    pub fn go_on_from(&mut self, taken: u16) {
        self.queue.set_next_avail(taken);
        self.queue.set_next_used(taken);
        self.signalled = Wrapping(taken);
        self.moved();
    }

    /// Takes the next request.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let next = self.queue.iter(Arc::clone(&self.ram))?.next();
        self.moved();
        Ok(next)
    }

    /// Puts the last request that was taken back, as if it had not been.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
        self.moved();
    }

    /// Gives a request back, with `len` bytes written to it.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        self.counters.request(len);
        self.queue.add_used(&*self.ram, head, len)?;
        self.moved();
        Ok(())
    }

    /// Gives requests back, each with the bytes written to it, such that the driver sees all of them or
    /// none.
    pub fn push_together(&mut self, used: &[(u16, u32)]) -> Result<(), Broken> {
        let Some(((last, last_len), others)) = used.split_last() else { return Ok(()) };
        let mut next = Wrapping(self.queue.next_used());
        for (head, len) in others {
            self.counters.request(*len);
            let at = u64::from(next.0 % self.queue.size()) * USED_ELEMENT;
            let element = u64::from(*head) | u64::from(*len) << 32;
            self.ram.write_obj(element.to_le(), ring(self.queue.used_ring(), RING_HEADER + at)?)?;
            next += 1;
        }
        // The index that the driver looks at moves with the last of them.
        self.queue.set_next_used(next.0);
        self.push(*last, *last_len)
    }

    /// Tells the driver about all that was given back, if it wants to know.
    pub fn notify(&mut self, signals: &Signals) -> Result<(), Broken> {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(());
        }
        self.moved();
        // What was given back is there before the driver's wish is read; it does it the other way round.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            let at = RING_HEADER + u64::from(self.queue.size()) * 2;
            let event: u16 = self.ram.load(ring(available, at)?, Ordering::Relaxed)?;
            // Whether the driver's index is among those passed since (vring_need_event).
            new - Wrapping(u16::from_le(event)) - Wrapping(1) < new - old
        } else {
            let flags: u16 = self.ram.load(ring(available, 0)?, Ordering::Relaxed)?;
            u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0
        };
        if wanted {
            signals.used();
        }
        Ok(())
    }

    /// How many requests the driver has ever offered.
    pub fn offered(&self) -> Result<u16, Broken> {
        Ok(self.queue.avail_idx(&*self.ram, Ordering::Acquire)?.0)
    }

    /// How many requests there are to take. One that breaks the rules says more than there can be.
    pub fn waiting(&self) -> Result<u16, Broken> {
        Ok(self.offered()?.wrapping_sub(self.queue.next_avail()))
    }

    /// Asks to be told about requests beyond those that are there, which stay there, and says how many have ever
    /// been offered. What comes meanwhile rings too.
    pub fn await_more(&mut self) -> Result<u16, Broken> {
        let (next, offered) = (self.queue.next_avail(), self.offered()?);
        self.queue.set_next_avail(offered);
        let more = self.queue.enable_notification(&*self.ram);
        self.queue.set_next_avail(next);
        if more? {
            self.doorbell.set();
        }
        Ok(offered)
    }

    /// Asks not to be told about new requests for now.
    pub fn disable_doorbell(&mut self) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(&*self.ram)?)
    }

    /// Asks to be told about new requests. True when there are some already, of which nobody will be
    /// told.
    pub fn enable_doorbell(&mut self) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(&*self.ram)?)
    }
}

/// An address in a ring.
fn ring(base: u64, offset: u64) -> Result<GuestAddress, Broken> {
    base.checked_add(offset).map(GuestAddress).ok_or_else(|| Broken("a ring beyond all addresses".into()))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::hypervisor::testing::Wire;
    use crate::memory;
    use crate::registers::Page;

    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn queue(event_idx: bool, used: u16) -> (VirtQueue, Arc<GuestRam>, Signals, Arc<Wire>) {
        let ram = Arc::new(memory::anonymous(&[(0, 0x1_0000)]).unwrap());
        let mut queue = Queue::new(16).unwrap();
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_event_idx(event_idx);
        queue.set_next_used(used);
        queue.set_ready(true);
        let wire = Arc::new(Wire::default());
        let signals = Signals::new(wire.clone(), Page::alone());
        (
            VirtQueue::new(queue, Arc::clone(&ram), Arc::new(Event::new().unwrap()), Arc::default()),
            ram,
            signals,
            wire,
        )
    }

    #[test]
    fn requests_given_back_together_appear_together_also_around_the_end_of_the_ring() {
        for start in [0, 14, u16::MAX - 1] {
            let (mut queue, ram, ..) = queue(false, start);
            queue.push_together(&[]).unwrap();
            queue.push_together(&[(3, 30), (4, 40), (5, 50)]).unwrap();
            let index: u16 = ram.read_obj(GuestAddress(USED + 2)).unwrap();
            assert_eq!(index, start.wrapping_add(3));
            for (offset, head) in [(0, 3u32), (1, 4), (2, 5)] {
                let slot = u64::from(start.wrapping_add(offset) % 16);
                let element: [u32; 2] = [
                    ram.read_obj(GuestAddress(USED + 4 + slot * 8)).unwrap(),
                    ram.read_obj(GuestAddress(USED + 8 + slot * 8)).unwrap(),
                ];
                assert_eq!(element, [head, head * 10]);
            }
        }
    }

    #[test]
    fn a_queue_says_where_it_is_and_another_goes_on_there() {
        for start in [0, u16::MAX - 1] {
            let (queue, ram, signals, wire) = queue(false, 0);
            let track = Arc::new(Track::default());
            track.set(Position { taken: start, given: start, signalled: start });
            let mut queue = queue.on(Arc::clone(&track));
            ram.write_obj(start.wrapping_add(5), GuestAddress(AVAILABLE + 2)).unwrap();
            let at = |taken: u16, given: u16, signalled: u16| Position {
                taken: start.wrapping_add(taken),
                given: start.wrapping_add(given),
                signalled: start.wrapping_add(signalled),
            };
            for _ in 0..3 {
                queue.pop().unwrap().unwrap();
            }
            assert_eq!(track.get(), at(3, 0, 0));
            queue.unpop();
            queue.push(0, 0).unwrap();
            assert_eq!(track.get(), at(2, 1, 0));
            queue.notify(&signals).unwrap();
            assert_eq!(track.get(), at(2, 1, 1));
            queue.push(0, 0).unwrap();
            // What the first one did not tell, the second one does.
            let mut other = VirtQueue::new(
                Queue::try_from(queue.queue.state()).unwrap(),
                ram,
                Arc::new(Event::new().unwrap()),
                Arc::default(),
            )
            .on(track);
            let before = wire.0.load(Ordering::SeqCst);
            other.notify(&signals).unwrap();
            assert_eq!(wire.0.load(Ordering::SeqCst), before + 1);
            for left in [2, 1, 0] {
                assert!(other.pop().unwrap().is_some(), "{left} are left after it");
            }
            assert!(other.pop().unwrap().is_none());
            assert_eq!(other.track.get(), at(5, 2, 2));
        }
    }

    #[test]
    fn who_else_serves_a_queue_finds_it_whole_and_leaves_it_where_it_came_to() {
        // In the guest they are one piece.
        let ram = Arc::new(memory::anonymous(&[(0, 0x8000), (0x8000, 0x8000)]).unwrap());
        // Entries, where the rings are, and whether each is in one piece: 256, 38 and 134 bytes.
        for (descriptors, available, used, whole) in [
            (0x1000u32, 0x2000u32, 0x3000u32, true),
            (0x7f00, 0x2000, 0x3000, true),
            (0x7f10, 0x2000, 0x3000, false),
            (0x1000, 0x7fda, 0x3000, true),
            (0x1000, 0x7fdc, 0x3000, false),
            (0x1000, 0x2000, 0x7f78, true),
            (0x1000, 0x2000, 0x7f7c, false),
            (0x1000, 0x2000, 0xff78, true),
            (0x1000, 0x2000, 0xff7c, false),
        ] {
            let mut queue = Queue::new(16).unwrap();
            queue.set_desc_table_address(Some(descriptors), None);
            queue.set_avail_ring_address(Some(available), None);
            queue.set_used_ring_address(Some(used), None);
            let bell = Arc::new(Event::new().unwrap());
            let mut queue = VirtQueue::new(queue, Arc::clone(&ram), bell, Arc::default());
            let [descriptors, available, used] = [descriptors, available, used].map(u64::from);
            let parts = Parts { descriptors, available, used };
            assert_eq!(queue.parts(), whole.then_some(parts));
            queue.go_on_from(7);
            assert_eq!(queue.taken(), 7);
            assert_eq!(queue.track.get(), Position { taken: 7, given: 7, signalled: 7 });
        }
    }

    #[test]
    fn a_driver_is_interrupted_as_it_wishes() {
        // event index, flags or used_event, before, how many given back, interrupted
        for (event_idx, wish, start, count, interrupted) in [
            (false, 0, 0, 1, true),
            (false, 1, 0, 1, false),
            (false, 0, 0, 0, false),
            (true, 0, 0, 1, true),
            (true, 1, 0, 1, false),
            (true, 1, 0, 2, true),
            (true, 2, 0, 8, true),
            (true, 8, 0, 8, false),
            (true, u16::MAX, u16::MAX, 2, true),
            (true, 0, u16::MAX, 1, false),
            (true, 0, u16::MAX, 2, true),
            (true, 5, 6, 4, false),
        ] {
            let (mut queue, ram, signals, wire) = queue(event_idx, start);
            let at = AVAILABLE + if event_idx { 4 + 32 } else { 0 };
            ram.write_obj(wish, GuestAddress(at)).unwrap();
            let used: Vec<_> = (0..count).map(|head| (head, 0)).collect();
            queue.push_together(&used).unwrap();
            queue.notify(&signals).unwrap();
            let seen = wire.0.load(Ordering::SeqCst) == 1;
            assert_eq!(seen, interrupted, "{event_idx} {wish} {start} {count}");
            queue.notify(&signals).unwrap();
            assert_eq!(wire.0.load(Ordering::SeqCst), u32::from(interrupted), "told twice");
        }
    }
}
