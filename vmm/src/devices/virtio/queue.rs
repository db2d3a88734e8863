//! A split virtqueue with its doorbell, on top of `virtio-queue`.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

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

/// One queue of an active device.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    doorbell: Arc<Event>,
    counters: Arc<Counters>,
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
        Self { queue, ram, doorbell, counters }
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

    /// Takes the next request.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let mut available = self.queue.iter(Arc::clone(&self.ram))?;
        Ok(available.next())
    }

    /// Puts the last request that was taken back, as if it had not been.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back, with `len` bytes written to it.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        self.counters.request(len);
        Ok(self.queue.add_used(&*self.ram, head, len)?)
    }

    /// Tells the driver about all that was given back, if it wants to know.
    pub fn notify(&mut self, signals: &Signals) -> Result<(), Broken> {
        if self.queue.needs_notification(&*self.ram)? {
            signals.used();
        }
        Ok(())
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
