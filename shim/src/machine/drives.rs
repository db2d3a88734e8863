//! A machine's drives, and which disk is in which.
//!
//! All machines have the same drives, empty in a template. A container's disks are opened here, as the monitor in its jail
//! cannot, and handed over; they go with the machine, or before it, when the guest has let go of them.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::warn;
use runtime_spec::plan::{Block, BlockSource, DRIVES};
use vmm::control::Request;
use vmm::devices::virtio::block;

use super::monitor::Monitor;
use crate::error::{Error, Result};
use crate::{deadlines, host};

/// Which disk each drive has, by its serial number.
#[derive(Debug)]
pub(super) struct Drives(Mutex<[Option<String>; DRIVES]>);

impl Drives {
    /// Those of a machine that has had these disks from the beginning.
    pub(super) fn holding(blocks: &[Block]) -> Self {
        let mut serials = blocks.iter().map(|block| block.serial.clone());
        Self(Mutex::new(std::array::from_fn(|_| serials.next())))
    }

    fn all(&self) -> MutexGuard<'_, [Option<String>; DRIVES]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In how many there is none.
    pub(super) fn free(&self) -> usize {
        self.all().iter().filter(|disk| disk.is_none()).count()
    }

    /// The first that is free is this disk's.
    fn take(&self, serial: &str) -> Option<usize> {
        let mut all = self.all();
        let index = all.iter().position(Option::is_none)?;
        all[index] = Some(serial.to_owned());
        Some(index)
    }

    fn of(&self, serial: &str) -> Option<usize> {
        self.all().iter().position(|disk| disk.as_deref() == Some(serial))
    }

    fn free_up(&self, index: usize) {
        self.all()[index] = None;
    }

    /// Puts these disks in, all or none.
    pub(super) async fn insert(&self, monitor: &Monitor, blocks: &[Block]) -> Result<()> {
        for (index, block) in blocks.iter().enumerate() {
            if let Err(error) = self.insert_one(monitor, block).await {
                self.eject(monitor, &blocks[..index]).await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn insert_one(&self, monitor: &Monitor, block: &Block) -> Result<()> {
        let (path, read_only) = (path_of(block)?, block.readonly);
        let index = self.take(&block.serial).ok_or_else(|| {
            let path = path.display();
            Error::precondition(format!(
                "no drive of the machine is free for the disk {path}: it has {DRIVES}, for all containers of a pod; \
                 mount some on the host and bind them"
            ))
        })?;
        let request = Request::InsertDisk { drive: name(index), serial: block.serial.clone(), read_only };
        let insert = move |control: &mut vmm::control::Client| match block::open(&path, read_only) {
            Ok(file) => control.call(request, &[file.as_fd()], deadlines::MONITOR_CALL).map(|_| Ok(())),
            Err(error) => Ok(Err(Error::invalid(error.to_string()))),
        };
        let inserted = monitor.ask("putting in a disk", insert).await.and_then(|inserted| inserted);
        inserted.inspect_err(|_| self.free_up(index))
    }

    /// Takes these disks out. What the guest does not let go of stays in until the machine ends.
    pub(super) async fn eject(&self, monitor: &Monitor, blocks: &[Block]) {
        for block in blocks {
            let Some(index) = self.of(&block.serial) else { continue };
            let request = Request::EjectDisk { drive: name(index) };
            let eject = |control: &mut vmm::control::Client| {
                control.call(request, &[], deadlines::MONITOR_CALL).map(drop)
            };
            match monitor.ask("taking out a disk", eject).await {
                Ok(()) => self.free_up(index),
                Err(error) => warn!("{error}"),
            }
        }
    }
}

/// As the monitor calls it.
fn name(index: usize) -> String {
    format!("drive.{index}")
}

/// Where a disk is.
pub fn path_of(block: &Block) -> Result<PathBuf> {
    match &block.source {
        BlockSource::Path(path) => Ok(path.clone()),
        BlockSource::Device { major, minor } => host::disk(*major, *minor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_drive_that_is_free_is_the_next() {
        let block = |serial: &str| Block {
            serial: serial.to_owned(),
            source: BlockSource::Path("/a".into()),
            readonly: true,
        };
        let drives = Drives::holding(&[block("a"), block("b")]);
        assert_eq!(drives.free(), DRIVES - 2);
        assert_eq!((drives.of("b"), drives.of("c")), (Some(1), None));
        assert_eq!(drives.take("c"), Some(2));
        drives.free_up(0);
        assert_eq!(drives.take("d"), Some(0));
        for index in 3..DRIVES {
            assert_eq!(drives.take("e"), Some(index));
        }
        assert_eq!((drives.take("f"), drives.free()), (None, 0));
    }
}
