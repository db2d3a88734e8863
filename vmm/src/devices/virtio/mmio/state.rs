//! What has to be known of a device in its slot to go on elsewhere: what the driver has written to the registers,
//! how far each queue is, and what the device itself has to say.
//!
//! A state comes from a file, so nothing in it is believed: it is compared with the device that is to go on,
//! and checked as what a driver writes is.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState as Parts, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::Position;
use super::super::signals::{CONFIGURATION, USED_BUFFER};
use super::super::state::same;
use super::super::{Device, StateError};
use super::{
    F_EVENT_IDX, F_VERSION_1, Inner, S_ACKNOWLEDGE, S_DRIVER, S_DRIVER_OK, S_FAILED, S_FEATURES_OK, Transport,
};
use crate::memory::GuestRam;

/// The state of a device in its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The device id.
    pub kind: u32,
    /// What was offered to the driver.
    pub features: u64,
    /// What the driver set, without the device's own bit.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// What the driver takes of what was offered.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// What the driver was interrupted for and has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration has changed.
    pub config_generation: u32,
    /// The driver broke the rules, and has not started over.
    pub needs_reset: bool,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// What the device itself has saved.
    pub device: Vec<u8>,
}

/// The state of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The largest size, by the device.
    pub max_size: u16,
    /// The size, by the driver.
    pub size: u16,
    /// Whether the driver uses it.
    pub ready: bool,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// How far it is.
    pub position: Position,
}

impl QueueState {
    pub(super) fn of(queue: &Queue, position: Position) -> Self {
        Self {
            max_size: queue.max_size(),
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            position,
        }
    }

    /// What the registers say of it, if they can.
    fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(Parts {
            max_size: self.max_size,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
            ..Parts::default()
        })
    }

    /// Answers of which the driver may not have heard.
    fn is_silent(&self) -> bool {
        self.position.given != self.position.signalled
    }

    /// Whether the driver has seen all answers and waits for the next, as one says that wants to be told of each
    /// ([`F_EVENT_IDX`]).
    fn is_seen(&self, ram: &GuestRam) -> bool {
        // Behind the flags, the index and the entries.
        let at = self.available.checked_add(4 + u64::from(self.size) * 2);
        let seen = at.and_then(|at| ram.load::<u16>(GuestAddress(at), Ordering::Relaxed).ok());
        seen.map(u16::from_le) == Some(self.position.given)
    }
}

impl State {
    fn has(&self, status: u32) -> bool {
        self.status & status != 0
    }

    /// Compares it with a device that is to go on from it, which offers `features`.
    fn check(&self, device: &dyn Device, features: u64) -> Result<(), StateError> {
        let refuse = |why: String| Err(StateError(why));
        same("device id", &self.kind, &device.kind())?;
        // A driver that is still deciding may take anything that it has seen.
        let relied = match self.status {
            0 => 0,
            _ if self.has(S_FEATURES_OK) => self.driver_features,
            _ => self.features,
        };
        let missing = relied & !features;
        if missing != 0 {
            let bits = (0..u64::BITS).filter(|bit| missing >> bit & 1 != 0).map(|bit| bit.to_string());
            let bits: Vec<_> = bits.collect();
            return refuse(format!(
                "its driver relies on features that are not offered here (bits {}); give it the same backend",
                bits.join(", ")
            ));
        }
        let known = S_ACKNOWLEDGE | S_DRIVER | S_DRIVER_OK | S_FEATURES_OK | S_FAILED;
        let agreed = !self.has(S_FEATURES_OK) || self.driver_features & F_VERSION_1 != 0;
        let ordered = !self.has(S_DRIVER_OK) || self.has(S_FEATURES_OK);
        if self.status & !known != 0 || !agreed || !ordered {
            return refuse(format!("no driver sets a status of {:#x}", self.status));
        }
        if self.interrupt_status & !(USED_BUFFER | CONFIGURATION) != 0 {
            return refuse(format!("no device interrupts for {:#x}", self.interrupt_status));
        }
        same("number of queues", &self.queues.len(), &device.queues().len())?;
        for (queue, max_size) in self.queues.iter().zip(device.queues()) {
            same("largest queue", &queue.max_size, max_size)?;
        }
        Ok(())
    }

    fn queues(&self) -> Result<Vec<Queue>, StateError> {
        let queues = self.queues.iter().enumerate().map(|(index, queue)| {
            queue.queue().map_err(|error| StateError(format!("queue {index} cannot be as it was: {error}")))
        });
        queues.collect()
    }
}

impl Transport {
    /// Its state, while the machine stands still. It goes on as if nothing had been asked.
    pub fn save(&self) -> Result<State, StateError> {
        let mut inner = self.lock();
        let device = inner.device.save()?;
        Ok(State {
            kind: inner.device.kind(),
            features: inner.offered(),
            status: inner.status,
            device_features_sel: inner.device_features_sel,
            driver_features_sel: inner.driver_features_sel,
            driver_features: inner.driver_features,
            queue_sel: inner.queue_sel,
            interrupt_status: self.signals.interrupt_status(),
            config_generation: self.signals.config_generation(),
            needs_reset: self.signals.is_reset_needed(),
            queues: inner
                .queues
                .iter()
                .zip(&self.tracks)
                .map(|(queue, track)| QueueState::of(queue, track.get()))
                .collect(),
            device,
        })
    }

    /// What a driver may not have heard of whose InterruptStatus is `said`: that buffers were used may be there when it has.
    pub(super) fn unheard(&self, said: u32, driver_features: u64, queues: &[QueueState]) -> u32 {
        let (told, event_idx) = (said & USED_BUFFER != 0, driver_features & F_EVENT_IDX != 0);
        let unseen = |queue: &QueueState| !(event_idx && queue.is_seen(&self.ram));
        let waits = |queue: &QueueState| queue.ready && (queue.is_silent() || told && unseen(queue));
        said & CONFIGURATION | if queues.iter().any(waits) { USED_BUFFER } else { 0 }
    }

    /// Nothing of it touches the guest until it is [restored](Self::restore) or its driver starts over.
    pub fn rest(&self) {
        let mut inner = self.lock();
        self.reset(&mut inner);
        inner.device.rest();
        self.show(&inner);
    }

    /// Becomes what was saved, over the RAM that was saved with it, on a machine that stands still and whose
    /// interrupt controller is as it was. A device whose driver was at work is at work when the machine runs.
    /// After an error the device is as after a reset.
    pub fn restore(&self, state: &State) -> Result<(), StateError> {
        let mut inner = self.lock();
        if inner.status != 0 {
            self.reset(&mut inner);
        }
        let done = self.become_saved(&mut inner, state).inspect_err(|_| self.reset(&mut inner));
        self.show(&inner);
        done
    }

    fn become_saved(&self, inner: &mut Inner, state: &State) -> Result<(), StateError> {
        state.check(&*inner.device, inner.offered())?;
        let queues = state.queues()?;
        inner.device.restore(&state.device)?;
        inner.queues = queues;
        inner.status = state.status;
        inner.device_features_sel = state.device_features_sel;
        inner.driver_features_sel = state.driver_features_sel;
        inner.driver_features = state.driver_features;
        inner.queue_sel = state.queue_sel;
        for (track, queue) in self.tracks.iter().zip(&state.queues) {
            track.set(queue.position);
        }
        // An interrupt may have been on its way to a processor, and one too many is no harm.
        let causes = self.unheard(state.interrupt_status, state.driver_features, &state.queues);
        let status = state.interrupt_status | causes;
        self.signals.restore(state.config_generation, status, causes, state.needs_reset);
        // A broken device does nothing before the driver starts over.
        if state.has(S_DRIVER_OK) && !state.needs_reset {
            let activation = self.activation(inner).map_err(StateError)?;
            inner.device.activate(activation).map_err(|error| StateError(error.to_string()))?;
        }
        // So may a kick.
        for doorbell in &self.doorbells {
            doorbell.set();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
