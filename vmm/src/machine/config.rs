//! What a machine is to be.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use super::Error;
use crate::arch::native::layout;
use crate::console::Marker;
use crate::devices::virtio::Device;
use crate::hypervisor::PsciBy;
use crate::slots::SlotId;
use crate::snapshot::{Shape, Snapshot};

/// The most processors a machine can have.
pub const VCPUS_MAX: u32 = 32;
/// The least memory that a kernel gets anywhere with.
const MEMORY_MIN: u64 = 32 << 20;
/// More is beyond what every host can address for a guest.
const MEMORY_MAX: u64 = 512 << 30;
/// Memory comes in pages of any host.
const MEMORY_GRAIN: u64 = 64 << 10;

/// Everything that a machine is built from.
pub struct Config {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, complete.
    pub command_line: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of RAM to which it can grow while it runs, where it can.
    pub memory_max: Option<u64>,
    /// Processors.
    pub vcpus: u32,
    /// Where the console's output goes.
    pub console: Box<dyn Write + Send>,
    /// What to look for in it.
    pub markers: Vec<Marker>,
    /// Who answers the PSCI calls of a guest of aarch64.
    pub psci: PsciBy,
    /// Virtio devices by name, in the order of their addresses.
    pub devices: Vec<(SlotId, Box<dyn Device>)>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("kernel", &self.kernel)
            .field("initrd", &self.initrd)
            .field("command_line", &self.command_line)
            .field("memory", &self.memory)
            .field("memory_max", &self.memory_max)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// A machine that goes on from a snapshot.
pub struct Restore {
    /// Where from.
    pub snapshot: Snapshot,
    /// Where the console's output goes from now on.
    pub console: Box<dyn Write + Send>,
    /// What to look for in it.
    pub markers: Vec<Marker>,
    /// Virtio devices by name: the same that the snapshot has, in any order.
    pub devices: Vec<(SlotId, Box<dyn Device>)>,
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore").field("snapshot", &self.snapshot.header).finish_non_exhaustive()
    }
}

/// Whether there are machines like that.
pub(super) fn check_shape(shape: &Shape) -> Result<(), Error> {
    if !(1..=VCPUS_MAX).contains(&shape.vcpus) {
        return Err(Error::Vcpus(shape.vcpus));
    }
    let memory = |why| Err(Error::Memory { bytes: shape.memory, why });
    if shape.memory < MEMORY_MIN {
        return memory("a machine needs at least 32 MiB");
    }
    if shape.memory > MEMORY_MAX {
        return memory("a machine has at most 512 GiB");
    }
    if !shape.memory.is_multiple_of(MEMORY_GRAIN) {
        return memory("it must be a multiple of 64 KiB");
    }
    if let Some(bytes) = shape.memory_max {
        if bytes > MEMORY_MAX {
            return Err(Error::Memory { bytes, why: "a machine has at most 512 GiB" });
        }
        super::ram::check_max(shape.memory, bytes).map_err(|why| Error::Memory { bytes, why })?;
    }
    Ok(())
}

impl Config {
    /// What the machine is made of.
    pub(super) fn shape(&self) -> Shape {
        Shape { vcpus: self.vcpus, memory: self.memory, memory_max: self.memory_max, psci: self.psci }
    }

    /// What can be found wrong without touching the host.
    pub(super) fn check(&self) -> Result<(), Error> {
        check_shape(&self.shape())?;
        let line = |why| Err(Error::CommandLine { why });
        if self.command_line.len() >= layout::COMMAND_LINE_MAX {
            let max = layout::COMMAND_LINE_MAX - 1;
            return line(format!("has {} bytes; Linux reads {max}", self.command_line.len()));
        }
        if let Some(byte) = self.command_line.bytes().find(u8::is_ascii_control) {
            return line(format!("has a control character ({byte:#04x}) in it"));
        }
        Ok(())
    }
}

#[cfg(test)]
impl Config {
    /// With nothing but memory.
    pub(super) fn small(memory: u64) -> Self {
        Self {
            kernel: "vmlinux".into(),
            initrd: None,
            command_line: String::new(),
            memory,
            memory_max: None,
            vcpus: 1,
            console: Box::new(std::io::sink()),
            markers: vec![],
            psci: PsciBy::default(),
            devices: vec![],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_named() {
        const MIB: u64 = 1 << 20;
        let ok = ("quiet".to_owned(), 128 * MIB, 1);
        for ((command_line, memory, vcpus), word) in [
            (ok.clone(), None),
            (("x".repeat(2047), 32 * MIB, 32), None),
            ((ok.0.clone(), ok.1, 0), Some("0 processors")),
            ((ok.0.clone(), ok.1, 33), Some("33 processors")),
            ((ok.0.clone(), ok.1, 1000), Some("1 to 32")),
            ((ok.0.clone(), 0, 1), Some("at least")),
            ((ok.0.clone(), 128 * MIB + 4096, 1), Some("multiple")),
            ((ok.0.clone(), u64::MAX, 1), Some("at most")),
            (("x".repeat(2048), ok.1, 1), Some("2047")),
            (("a\nb".into(), ok.1, 1), Some("0x0a")),
            (("a\0b".into(), ok.1, 1), Some("0x00")),
        ] {
            let config = Config { command_line, vcpus, ..Config::small(memory) };
            match (config.check(), word) {
                (Ok(()), None) => {}
                (Err(error), Some(word)) => assert!(error.to_string().contains(word), "{error}"),
                (result, word) => panic!("{result:?}, expected {word:?}"),
            }
        }
    }

    #[test]
    fn what_it_can_grow_to_is_more_and_whole_blocks() {
        const MIB: u64 = 1 << 20;
        for (max, word) in [
            (128 * MIB, None),
            (130 * MIB, None),
            (512 << 30, None),
            (126 * MIB, Some("must not be less")),
            (129 * MIB, Some("multiple of 2 MiB")),
            (513 << 30, Some("at most 512 GiB")),
            (u64::MAX, Some("at most")),
        ] {
            let config = Config { memory_max: Some(max), ..Config::small(128 * MIB) };
            match (config.check(), word) {
                (Ok(()), None) => {}
                (Err(error), Some(word)) => assert!(error.to_string().contains(word), "{error}"),
                (result, word) => panic!("{result:?}, expected {word:?}"),
            }
        }
    }
}
