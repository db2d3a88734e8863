//! The generation id (Microsoft's "Virtual Machine Generation ID"): sixteen bytes in the guest's memory
//! that change whenever the same guest might run a second time, after a restore or in a clone. A guest
//! that sees them change reseeds its random numbers.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::Error;
use super::board::Wire;
use crate::arch::native::layout::GENERATION_ID;
use crate::memory::GuestRam;

/// The id of one machine.
pub(super) struct Generation {
    ram: Arc<GuestRam>,
    notify: Wire,
}

impl Generation {
    /// With a first id, of which the guest need not be told.
    pub(super) fn new(ram: Arc<GuestRam>, notify: Wire) -> Result<Self, Error> {
        let generation = Self { ram, notify };
        generation.write()?;
        Ok(generation)
    }

    fn write(&self) -> Result<(), Error> {
        let mut id = [0; 16];
        crate::entropy::fill(&mut id).map_err(|source| Error::Host { what: "get randomness", source })?;
        self.ram
            .write_slice(&id, GuestAddress(GENERATION_ID))
            .map_err(|error| Error::Tables(format!("cannot write the generation id: {error}")))
    }

    /// Makes a new id and tells the guest.
    pub(super) fn renew(&self) -> Result<(), Error> {
        self.write()?;
        Ok((self.notify)()?)
    }
}
