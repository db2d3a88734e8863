//! A machine that stands still, written down.

use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Error, Machine, Status};
use crate::snapshot::{self, Form, Header, MachineState, Slot};

impl Machine {
    /// Writes down, as a hint for whoever goes on from the same snapshot, what this machine has used of its memory since it was
    /// restored; says whether there is one. It may run on meanwhile.
    pub fn record_use(&self, out: &File) -> Result<bool, Error> {
        if self.under.is_none() {
            return Err(Error::Booted("record the use of"));
        }
        snapshot::record_use(&self.ram, out)
            .map_err(|source| Error::Host { what: "write down what the machine uses", source })
    }

    /// Writes the machine into two empty files: its state, and its RAM. It must be paused, and stays so, whatever
    /// comes of it. The files are the caller's to name and to sync; so is it to [link](crate::snapshot::link) what a RAM that is
    /// written [`Form::Over`] something lies over, which a machine that has booted does not have.
    pub fn snapshot(&self, state: &File, memory: &File, form: Form) -> Result<Header, Error> {
        let _turn = self.turn();
        let status = self.status();
        if status != Status::Paused {
            return Err(Error::Order { what: "save", status });
        }
        if form == Form::Over && self.under.is_none() {
            return Err(Error::Booted("save no more than the changes of"));
        }
        // Devices first: what their drivers are to hear of it is heard by the interrupt controller.
        let mut devices = Vec::new();
        for device in &self.devices {
            let saved = device.transport.save();
            let saved = saved.map_err(|source| Error::SaveDevice { id: device.id.clone(), source })?;
            devices.push((device.id.as_str().to_owned(), saved));
        }
        let board = self.chips.save();
        let power = self.power.as_ref().map(|power| power.save());
        let native = self.native.save()?;
        // Last, as some of the above writes to it.
        let written = snapshot::write_memory(&self.ram, self.under.as_ref(), memory, form)
            .map_err(|source| Error::Host { what: "write the RAM of the snapshot", source })?;
        let (base, over) = written.over.unzip();
        let fingerprint = postcard::to_stdvec(&self.fingerprint)
            .map_err(|error| snapshot::Error::Unfit(error.to_string()))?;
        let header = Header {
            architecture: std::env::consts::ARCH.to_owned(),
            hypervisor: self.hypervisor.to_owned(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            page_size: crate::memory::page_size(),
            vcpus: self.shape.vcpus,
            memory: self.shape.memory,
            memory_max: self.shape.memory_max.unwrap_or(self.shape.memory),
            devices: self
                .devices
                .iter()
                .map(|device| Slot { id: device.id.as_str().to_owned(), kind: device.kind })
                .collect(),
            fingerprint,
            memory_len: written.len,
            memory_data: written.data,
            memory_crc: written.crc,
            base,
        };
        let machine = MachineState {
            shape: self.shape,
            ram: written.regions,
            parts: written.parts,
            over,
            vcpus: native.vcpus,
            power,
            vm: native.vm,
            board,
            devices,
        };
        snapshot::write_state(state, &header, &machine)?;
        // Nobody may take it for a snapshot of a machine that has ended meanwhile.
        match self.status() {
            Status::Paused => Ok(header),
            status => Err(Error::Order { what: "save", status }),
        }
    }
}
