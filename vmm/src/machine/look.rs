//! Where a machine stands, for people who wonder why its guest does not go on.

use super::{Error, Machine, Status};
use crate::arch::native::Registers;
use crate::devices::virtio::mmio::Sight;
use crate::slots::SlotId;

/// What is to be seen of a machine.
#[derive(Debug, Clone)]
pub struct Look {
    /// Each processor.
    pub processors: Vec<Registers>,
    /// Each virtio device.
    pub devices: Vec<(SlotId, Sight)>,
}

impl Machine {
    /// Looks at its processors and devices. It must be paused, and stays so.
    pub fn look(&self) -> Result<Look, Error> {
        let _turn = self.turn();
        match self.status() {
            Status::Paused => {}
            status => return Err(Error::Order { what: "look at", status }),
        }
        let devices = self.devices.iter().map(|device| (device.id.clone(), device.transport.look()));
        Ok(Look { processors: self.native.registers()?, devices: devices.collect() })
    }
}
