//! The MMIO transport, section 4.2, without the legacy interface.

mod look;
mod state;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};

use super::queue::{Position, Track};
use super::{Activation, Counters, Device, F_COMMON, F_EVENT_IDX, F_VERSION_1, Signals, VirtQueue};
use crate::bus::{self, BusDevice};
use crate::event::Event;
use crate::memory::GuestRam;
use crate::standstill::Standstill;

pub use look::{QueueSight, Sight};
pub use state::{QueueState, State};

const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Where a driver rings, with the queue's index as the value.
pub const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
/// Where it acknowledges an interrupt, with its causes as the value.
pub const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
pub(super) const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"SUPR");

const S_ACKNOWLEDGE: u32 = 1;
const S_DRIVER: u32 = 2;
const S_DRIVER_OK: u32 = 4;
const S_FEATURES_OK: u32 = 8;
pub(super) const S_NEEDS_RESET: u32 = 64;
const S_FAILED: u32 = 128;

/// One device at its slot.
pub struct Transport {
    inner: Mutex<Inner>,
    ram: Arc<GuestRam>,
    signals: Arc<Signals>,
    standstill: Arc<Standstill>,
    doorbells: Vec<Arc<Event>>,
    /// So many of the queues, the first ones, have somebody who waits for their doorbells.
    heard: usize,
    /// How far each queue is, also while a device's thread has it.
    tracks: Vec<Arc<Track>>,
}

struct Inner {
    device: Box<dyn Device>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    queues: Vec<Queue>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        write!(f, "Transport(device {}, status {:#x})", inner.device.kind(), inner.status)
    }
}

/// The transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no descriptor for a doorbell.
    #[error("cannot make a doorbell: {0}; raise the limit of open files")]
    Doorbell(std::io::Error),
    /// The device asks for a queue that cannot be.
    #[error("a queue of {0} entries: it takes a power of two")]
    QueueSize(u16),
}

impl Transport {
    /// For a device that no driver has touched.
    pub fn new(
        device: Box<dyn Device>,
        ram: Arc<GuestRam>,
        signals: Signals,
        standstill: Arc<Standstill>,
    ) -> Result<Self, Error> {
        let queues = fresh(&*device)?;
        let heard = queues.len().saturating_sub(device.served_at_once());
        let tracks = queues.iter().map(|_| Arc::default()).collect();
        let doorbells: Result<_, _> = queues.iter().map(|_| Event::new().map(Arc::new)).collect();
        let inner = Inner {
            device,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            queues,
        };
        let transport = Self {
            inner: Mutex::new(inner),
            ram,
            signals: Arc::new(signals),
            standstill,
            doorbells: doorbells.map_err(Error::Doorbell)?,
            heard,
            tracks,
        };
        transport.show(&transport.lock());
        Ok(transport)
    }

    /// Puts where the driver finds it what it has changed by a store, or a restore.
    fn show(&self, inner: &Inner) {
        let page = self.signals.page();
        let queue = inner.queue();
        for (register, value) in [
            (MAGIC_VALUE, MAGIC),
            (VERSION, TRANSPORT_VERSION),
            (DEVICE_ID, inner.device.kind()),
            (VENDOR_ID, VENDOR),
            (DEVICE_FEATURES, half(inner.offered(), inner.device_features_sel)),
            (QUEUE_NUM_MAX, queue.map_or(0, |queue| u32::from(queue.max_size()))),
            (QUEUE_READY, queue.map_or(0, |queue| u32::from(queue.ready()))),
            (STATUS, inner.status),
        ] {
            page.set(register, value);
        }
        // That it was set before, or is set after what was just put there.
        if self.signals.is_reset_needed() {
            page.raise(STATUS, S_NEEDS_RESET);
        }
        // A region that is not there has all bits set in length and base.
        for register in (SHM_LEN_LOW..=SHM_BASE_HIGH).step_by(4) {
            page.set(register, u32::MAX);
        }
        self.signals.show(0, || inner.device.configuration());
    }

    /// What the device has done.
    pub fn counters(&self) -> &Arc<Counters> {
        self.signals.counters()
    }

    /// The doorbells of its queues, the first one's first, for a hypervisor that can ring them without an exit.
    pub fn doorbells(&self) -> &[Arc<Event>] {
        &self.doorbells[..self.heard]
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            self.reset(inner);
            return;
        }
        // Bits are set one after the other and cleared by a reset only; the device sets its own.
        let value = value & (S_ACKNOWLEDGE | S_DRIVER | S_DRIVER_OK | S_FEATURES_OK | S_FAILED);
        let mut new = (inner.status | value) & !inner.status;
        if new & S_FEATURES_OK != 0 && !inner.features_agree() {
            new &= !S_FEATURES_OK;
        }
        // Before the features are agreed upon there is nothing to drive.
        if (inner.status | new) & S_FEATURES_OK == 0 {
            new &= !S_DRIVER_OK;
        }
        inner.status |= new;
        if new & S_DRIVER_OK != 0 {
            self.activate(inner);
        }
    }

    fn activate(&self, inner: &mut Inner) {
        match self.activation(inner) {
            Ok(activation) => {
                if let Err(error) = inner.device.activate(activation) {
                    log::error!("{error}");
                    self.signals.needs_reset();
                }
            }
            Err(why) => {
                log::warn!("device {}: {why}", inner.device.kind());
                self.signals.needs_reset();
            }
        }
    }

    fn activation(&self, inner: &Inner) -> Result<Activation, String> {
        let event_idx = inner.driver_features & F_EVENT_IDX != 0;
        let ends = self.doorbells.iter().zip(&self.tracks);
        let queues = inner.queues.iter().zip(ends).enumerate().map(|(index, (queue, (doorbell, track)))| {
            if queue.ready() && !queue.is_valid(&*self.ram) {
                return Err(format!("queue {index} is not in the guest's RAM"));
            }
            let mut queue = Queue::try_from(queue.state()).map_err(|error| error.to_string())?;
            queue.set_event_idx(event_idx);
            let counters = Arc::clone(self.signals.counters());
            let queue = VirtQueue::new(queue, Arc::clone(&self.ram), Arc::clone(doorbell), counters);
            Ok(queue.on(Arc::clone(track)))
        });
        Ok(Activation {
            ram: Arc::clone(&self.ram),
            queues: queues.collect::<Result<_, _>>()?,
            signals: Arc::clone(&self.signals),
            standstill: Arc::clone(&self.standstill),
            features: inner.driver_features,
        })
    }

    fn reset(&self, inner: &mut Inner) {
        inner.device.reset();
        inner.device_features_sel = 0;
        inner.driver_features_sel = 0;
        inner.driver_features = 0;
        inner.queue_sel = 0;
        inner.status = 0;
        inner.queues.iter_mut().for_each(Queue::reset);
        self.signals.reset();
        for doorbell in &self.doorbells {
            doorbell.take();
        }
        for track in &self.tracks {
            track.set(Position::default());
        }
    }

    fn write_register(&self, inner: &mut Inner, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => inner.device_features_sel = value,
            DRIVER_FEATURES_SEL => inner.driver_features_sel = value,
            DRIVER_FEATURES if inner.status & S_FEATURES_OK == 0 => {
                set_half(&mut inner.driver_features, inner.driver_features_sel, value);
            }
            QUEUE_SEL => inner.queue_sel = value,
            INTERRUPT_ACK => self.signals.acknowledge(value),
            STATUS => self.set_status(inner, value),
            _ => inner.write_queue(offset, value),
        }
    }
}

fn fresh(device: &dyn Device) -> Result<Vec<Queue>, Error> {
    device.queues().iter().map(|size| Queue::new(*size).map_err(|_| Error::QueueSize(*size))).collect()
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(features: &mut u64, select: u32, value: u32) {
    match select {
        0 => *features = *features & !0xffff_ffff | u64::from(value),
        1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

impl Inner {
    fn offered(&self) -> u64 {
        F_COMMON | self.device.features()
    }

    fn features_agree(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    /// Registers of the selected queue, which may change only before the driver uses it.
    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status & S_DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        match offset {
            // A size that cannot be is logged there and leaves the old one.
            QUEUE_NUM => queue.set_size(value as u16),
            QUEUE_READY => queue.set_ready(value == 1),
            _ if queue.ready() => {}
            QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

impl BusDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.signals.page().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == QUEUE_NOTIFY {
            let index = bus::value(data) as usize;
            // Only where the hypervisor does not ring by itself.
            if let Some(doorbell) = self.doorbells().get(index) {
                doorbell.set();
            } else if index < self.doorbells.len() {
                let mut inner = self.lock();
                inner.device.rung(index);
                self.show(&inner);
            }
            return;
        }
        let mut inner = self.lock();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            inner.device.write_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            self.write_register(&mut inner, offset, bus::value(data));
        }
        self.show(&inner);
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).device.reset();
    }
}

#[cfg(test)]
mod tests;
