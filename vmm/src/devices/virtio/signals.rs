//! From the device to the driver: interrupts, and the two facts they stand for.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mmio::{CONFIG, CONFIG_GENERATION, INTERRUPT_STATUS, S_NEEDS_RESET, STATUS};
use crate::hypervisor::IrqLine;
use crate::registers::Page;

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
    /// What the driver sees. These have InterruptStatus, ConfigGeneration, the configuration space and their bit of Status.
    page: Page,
    /// Held by whoever shows what is also kept elsewhere, so that nothing old is shown after what is new.
    showing: Mutex<()>,
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
    /// On an [edge](crate::hypervisor::Trigger::Edge) interrupt, with registers that hold nothing yet.
    pub fn new(irq: Arc<dyn IrqLine>, page: Page) -> Self {
        Self {
            irq,
            page,
            showing: Mutex::new(()),
            needs_reset: AtomicBool::new(false),
            silent: AtomicU32::new(0),
            counters: Arc::default(),
        }
    }

    /// Has the host's kernel use buffers and interrupt the driver by itself, through what this returns, as long as it
    /// lives. Whoever was interrupted finds that buffers were used, if any were or not. None where it cannot.
    pub fn silently(self: &Arc<Self>) -> Option<Silently> {
        self.irq.event()?;
        let _showing = self.showing();
        self.silent.fetch_add(1, Ordering::AcqRel);
        self.page.raise(INTERRUPT_STATUS, USED_BUFFER);
        Some(Silently(Arc::clone(self)))
    }

    /// What the device has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn interrupt(&self, cause: u32) {
        self.counters.interrupts.fetch_add(1, Ordering::Relaxed);
        self.page.raise(INTERRUPT_STATUS, cause);
        if let Err(error) = self.irq.set(true).and_then(|()| self.irq.set(false)) {
            log::error!("a virtio interrupt is lost: {error}");
        }
    }

    /// Buffers have been used.
    pub fn used(&self) {
        self.interrupt(USED_BUFFER);
    }

    /// What the driver sees.
    pub(super) fn page(&self) -> &Page {
        &self.page
    }

    fn showing(&self) -> MutexGuard<'_, ()> {
        self.showing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the driver the part of its configuration space that begins at `offset`, a multiple of four. What that is may be
    /// asked for while others show theirs, so it must not wait for what a caller holds.
    pub(super) fn show(&self, offset: u64, configuration: impl FnOnce() -> Vec<u8>) {
        let _showing = self.showing();
        self.page.fill(CONFIG + offset, &configuration());
    }

    /// The part of the configuration space that begins at `offset` is another from now on, as for [`Self::show`].
    pub fn config_changed(&self, offset: u64, configuration: impl FnOnce() -> Vec<u8>) {
        self.show(offset, configuration);
        self.page.set(CONFIG_GENERATION, self.config_generation().wrapping_add(1));
        self.interrupt(CONFIGURATION);
    }

    /// The driver broke the rules; nothing works until it resets the device.
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.page.raise(STATUS, S_NEEDS_RESET);
        self.interrupt(CONFIGURATION);
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// What the driver was interrupted for and has not acknowledged; of used buffers it may have.
    pub(super) fn interrupt_status(&self) -> u32 {
        self.page.get(INTERRUPT_STATUS)
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        let _showing = self.showing();
        self.page.lower(INTERRUPT_STATUS, causes & !self.silent());
    }

    /// What is always among the causes.
    fn silent(&self) -> u32 {
        if self.silent.load(Ordering::Acquire) == 0 { 0 } else { USED_BUFFER }
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.page.get(CONFIG_GENERATION)
    }

    /// Becomes what was saved, and interrupts the driver for `causes`: what it may not have heard of.
    pub(super) fn restore(&self, config_generation: u32, status: u32, causes: u32, needs_reset: bool) {
        self.page.set(CONFIG_GENERATION, config_generation);
        self.page.raise(INTERRUPT_STATUS, status);
        self.needs_reset.store(needs_reset, Ordering::Release);
        if causes != 0 {
            self.interrupt(causes);
        }
    }

    pub(super) fn reset(&self) {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.needs_reset.store(false, Ordering::Release);
        let _showing = self.showing();
        self.page.set(INTERRUPT_STATUS, self.silent());
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
        assert!(Arc::new(Signals::new(Arc::new(Wire::default()), Page::alone())).silently().is_none());
        let bell = Arc::new(Bell(Event::new().unwrap()));
        let signals = Arc::new(Signals::new(bell.clone(), Page::alone()));
        let [one, other] = [(); 2].map(|()| signals.silently().unwrap());
        assert!(one.event().is_some());
        signals.acknowledge(USED_BUFFER);
        assert_eq!(signals.interrupt_status(), USED_BUFFER);
        signals.config_changed(4, || vec![7]);
        assert_eq!(signals.page().get(CONFIG + 4), 7);
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
