//! Where a queue pair finds its cable, such as its queue of a tap, which can come, go and be another while the driver
//! is at work.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cable::Cable;
use super::tap;
use crate::event::Event;

/// One port.
#[derive(Debug)]
pub struct Port {
    cable: Mutex<Option<Arc<Cable>>>,
    /// One of several, which are taken into the tap and out of it.
    several: bool,
    on: AtomicBool,
    changed: Event,
}

impl Port {
    /// Without a cable, and off.
    pub fn new(several: bool) -> io::Result<Self> {
        Ok(Self { cable: Mutex::new(None), several, on: AtomicBool::new(false), changed: Event::new()? })
    }

    /// What is plugged in.
    pub fn cable(&self) -> Option<Arc<Cable>> {
        self.cable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives it another, which is made to be on or off as this port is, or none.
    pub fn plug(&self, cable: Option<Arc<Cable>>) -> Result<(), tap::Error> {
        if self.several
            && let Some(cable) = &cable
        {
            cable.attach(self.is_on())?;
        }
        *self.cable.lock().unwrap_or_else(PoisonError::into_inner) = cable;
        self.changed.set();
        Ok(())
    }

    /// Lets go of one that leads nowhere, unless there is another by now.
    pub fn unplug(&self, gone: &Arc<Cable>) {
        let mut cable = self.cable.lock().unwrap_or_else(PoisonError::into_inner);
        if cable.as_ref().is_some_and(|cable| Arc::ptr_eq(cable, gone)) {
            *cable = None;
        }
    }

    /// Whether the driver uses the pair.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// The driver begins, or ceases, to use the pair.
    pub fn switch(&self, on: bool) -> Result<(), tap::Error> {
        if self.several
            && let Some(cable) = self.cable()
        {
            cable.attach(on)?;
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
