//! From the device to the driver: interrupts, and the two facts they stand for.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::hypervisor::IrqLine;

/// InterruptStatus: a used buffer.
pub const USED_BUFFER: u32 = 1 << 0;
/// InterruptStatus: the configuration, or the status, has changed.
pub const CONFIGURATION: u32 = 1 << 1;

/// What a device has done since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    written: AtomicU64,
    interrupts: AtomicU64,
    resets: AtomicU64,
}

/// What [`Counters`] count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that were given back.
    pub requests: u64,
    /// Bytes written to guest RAM by them.
    pub written: u64,
    /// Interrupts.
    pub interrupts: u64,
    /// Resets by the driver, of which the first comes before its first use.
    pub resets: u64,
}

impl Counters {
    /// The counts so far.
    pub fn get(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            requests: of(&self.requests),
            written: of(&self.written),
            interrupts: of(&self.interrupts),
            resets: of(&self.resets),
        }
    }

    pub(super) fn request(&self, written: u32) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.written.fetch_add(written.into(), Ordering::Relaxed);
    }
}

/// Shared by the transport and the device's threads.
pub struct Signals {
    irq: Arc<dyn IrqLine>,
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    /// How many of the host's own are at work, who interrupt and cannot say why.
    silent: AtomicU32,
    counters: Arc<Counters>,
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signals(interrupt status {:#x})", self.interrupt_status())
    }
}

impl Signals {
    /// On an [edge](crate::hypervisor::Trigger::Edge) interrupt.
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self {
            irq,
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            silent: AtomicU32::new(0),
            counters: Arc::default(),
        }
    }

    /// Has the host's kernel use buffers and interrupt the driver by itself, through what this returns, as long as it
    /// lives. Whoever was interrupted finds that buffers were used, if any were or not. None where it cannot.
    pub fn silently(self: &Arc<Self>) -> Option<Silently> {
        self.irq.event()?;
        self.silent.fetch_add(1, Ordering::AcqRel);
        Some(Silently(Arc::clone(self)))
    }

    /// What the device has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn interrupt(&self, cause: u32) {
        self.counters.interrupts.fetch_add(1, Ordering::Relaxed);
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        if let Err(error) = self.irq.set(true).and_then(|()| self.irq.set(false)) {
            log::error!("a virtio interrupt is lost: {error}");
        }
    }

    /// Buffers have been used.
    pub fn used(&self) {
        self.interrupt(USED_BUFFER);
    }

    /// The configuration space reads differently from now on.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(CONFIGURATION);
    }

    /// The driver broke the rules; nothing works until it resets the device.
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.interrupt(CONFIGURATION);
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        let said = self.interrupt_status.load(Ordering::Acquire);
        if self.silent.load(Ordering::Acquire) == 0 { said } else { said | USED_BUFFER }
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        self.interrupt_status.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Becomes what was saved, and interrupts the driver for `causes`: what it has not acknowledged, and what it may
    /// not have heard of.
    pub(super) fn restore(&self, config_generation: u32, causes: u32, needs_reset: bool) {
        self.config_generation.store(config_generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
        if causes != 0 {
            self.interrupt(causes);
        }
    }

    pub(super) fn reset(&self) {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.interrupt_status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// The host's kernel interrupts the driver by itself. At its end the driver is interrupted once more, as the last may not have
/// come to it.
#[derive(Debug)]
pub struct Silently(Arc<Signals>);

impl Silently {
    /// An eventfd, of which each write is an interrupt.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.irq.event()
    }
}

impl Drop for Silently {
    fn drop(&mut self) {
        self.0.used();
        self.0.silent.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::event::Event;
    use crate::hypervisor::Error;
    use crate::hypervisor::testing::Wire;

    struct Bell(Event);

    impl IrqLine for Bell {
        fn set(&self, high: bool) -> Result<(), Error> {
            if high {
                self.0.set();
            }
            Ok(())
        }

        fn event(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
    }

    #[test]
    fn while_somebody_else_interrupts_buffers_may_have_been_used() {
        assert!(Arc::new(Signals::new(Arc::new(Wire::default()))).silently().is_none());
        let bell = Arc::new(Bell(Event::new().unwrap()));
        let signals = Arc::new(Signals::new(bell.clone()));
        let [one, other] = [(); 2].map(|()| signals.silently().unwrap());
        assert!(one.event().is_some());
        signals.acknowledge(USED_BUFFER);
        assert_eq!(signals.interrupt_status(), USED_BUFFER);
        signals.config_changed();
        assert_eq!(signals.interrupt_status(), USED_BUFFER | CONFIGURATION);
        bell.0.take();
        drop(one);
        assert!(bell.0.take(), "the driver looks once more");
        signals.acknowledge(USED_BUFFER | CONFIGURATION);
        assert_eq!(signals.interrupt_status(), USED_BUFFER, "another is at it");
        drop(other);
        assert_eq!(signals.interrupt_status(), USED_BUFFER, "and was heard of");
        signals.acknowledge(USED_BUFFER);
        assert_eq!(signals.interrupt_status(), 0);
    }
}
