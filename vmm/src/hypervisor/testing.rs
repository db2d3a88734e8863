//! The hypervisor's side of a wire, for tests.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Error, IrqLine};

/// An interrupt line that counts how often it was raised.
#[derive(Debug, Default)]
pub struct Wire(pub AtomicU32);

impl IrqLine for Wire {
    fn set(&self, high: bool) -> Result<(), Error> {
        self.0.fetch_add(u32::from(high), Ordering::SeqCst);
        Ok(())
    }
}
