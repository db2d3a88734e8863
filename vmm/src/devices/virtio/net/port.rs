//! Where a queue pair finds its queue of the tap, which can come, go and be another while the driver is
//! at work.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::tap::{self, Tap};
use crate::event::Event;

/// One port.
#[derive(Debug)]
pub struct Port {
    tap: Mutex<Option<Arc<Tap>>>,
    /// One of several, which are taken into the tap and out of it.
    several: bool,
    on: AtomicBool,
    changed: Event,
}

impl Port {
    /// Without a tap, and off.
    pub fn new(several: bool) -> io::Result<Self> {
        Ok(Self { tap: Mutex::new(None), several, on: AtomicBool::new(false), changed: Event::new()? })
    }

    /// Its queue of the tap.
    pub fn tap(&self) -> Option<Arc<Tap>> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives it another, which is made to be on or off as this port is.
    pub fn plug(&self, tap: Arc<Tap>) -> Result<(), tap::Error> {
        if self.several {
            tap.attach(self.is_on())?;
        }
        *self.tap.lock().unwrap_or_else(PoisonError::into_inner) = Some(tap);
        self.changed.set();
        Ok(())
    }

    /// Whether the driver uses the pair.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// The driver begins, or ceases, to use the pair.
    pub fn switch(&self, on: bool) -> Result<(), tap::Error> {
        if self.several
            && let Some(tap) = self.tap()
        {
            tap.attach(on)?;
        }
        self.on.store(on, Ordering::Release);
        self.changed.set();
        Ok(())
    }

    /// Set when anything of this is different.
    pub fn changed(&self) -> &Event {
        &self.changed
    }
}
