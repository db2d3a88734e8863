//! Systems without network devices.

use vmm::control::{OnCable, Refusal, RefusalKind};
use vmm::devices::virtio::Device;
use vmm::slots::SlotId;

use super::Port;

/// The network devices of a machine: none.
#[derive(Default)]
pub(in crate::cli) struct Network;

impl Network {
    pub(in crate::cli) fn open(ports: &[Port]) -> anyhow::Result<Self> {
        anyhow::ensure!(ports.is_empty(), "cannot make a network device: this system has none yet");
        Ok(Self)
    }

    pub(in crate::cli) fn add_to(&mut self, _slots: &mut Vec<(SlotId, Box<dyn Device>)>) {}

    pub(in crate::cli) fn on_cable(self) -> OnCable {
        Box::new(|slot, _cable| {
            let why = format!("there is no network device {slot}: this system has none yet");
            Err(Refusal::new(RefusalKind::Unsupported, why))
        })
    }
}
