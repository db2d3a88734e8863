//! A machine that stands still, put back to where the snapshot that it came from was taken.
//!
//! What was made stays: processors and their threads, the interrupt controller, descriptors, and of its memory all that it
//! has not written to. Only what is in them is replaced, in the order of a [restore](Machine::restore), and the guest is told
//! the same as then: a new generation id, and that its vsock streams are gone.

use std::os::unix::fs::MetadataExt;

use super::board::restore_power;
use super::shell::Rewind;
use super::{Error, Machine, Outcome, Status};
use crate::snapshot::{self, Layers, Snapshot};

impl Machine {
    /// Goes back to `snapshot`, which must be the one that it came from. The machine must be paused, and stays so; what a
    /// snapshot of another machine is refused for changes nothing, but whatever fails later is the machine's end.
    pub fn reset(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let _turn = self.turn();
        let status = self.status();
        if status != Status::Paused {
            return Err(Error::Order { what: "reset", status });
        }
        self.came_from(snapshot)?;
        let native = self.native.read(snapshot)?;
        let done = self.rewind(snapshot, native);
        if let Err(error) = &done {
            self.shared.end(Outcome::Failed(format!("it was left half way back to its snapshot: {error}")));
        }
        done
    }

    fn came_from(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let under = self.under.as_ref().ok_or(Error::Booted("reset"))?;
        let devices = self.devices.iter().map(|device| device.id.as_str());
        let same = files(under)? == files(&snapshot.memory)?
            && snapshot.state.shape == self.shape
            && snapshot.state.vcpus.len() == self.shape.vcpus as usize
            && devices.eq(snapshot.state.devices.iter().map(|(id, _)| id.as_str()));
        if same { Ok(()) } else { Err(Error::Origin) }
    }

    fn rewind(&self, snapshot: &Snapshot, native: Rewind<'_>) -> Result<(), Error> {
        // Nothing interrupts, or writes to memory, until each device goes on.
        for device in &self.devices {
            device.transport.rest();
        }
        snapshot::rewind_memory(&self.ram)
            .map_err(|source| Error::Host { what: "give back the machine's memory", source })?;
        native()?;
        self.chips.restore(&snapshot.state.board)?;
        restore_power(self.power.as_deref(), &snapshot.state).map_err(|why| Error::Tables(why.to_owned()))?;
        for (device, (_, state)) in self.devices.iter().zip(&snapshot.state.devices) {
            let restored = device.transport.restore(state);
            restored.map_err(|source| Error::RestoreDevice { id: device.id.clone(), source })?;
        }
        // Somebody else may go on from there, too.
        self.generation.renew()
    }
}

/// Which files these are, whatever they are called.
fn files(layers: &Layers) -> Result<Vec<(u64, u64)>, Error> {
    let all = std::iter::once(&layers.base).chain(layers.over.as_ref().map(|(file, _)| file));
    let ids = all.map(|file| file.metadata().map(|meta| (meta.dev(), meta.ino())));
    ids.collect::<Result<_, _>>().map_err(|source| Error::Host { what: "look at the snapshot's RAM", source })
}
