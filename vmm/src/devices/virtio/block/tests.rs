use std::fs::{self, File};
use std::path::{Path, PathBuf};

use virtio_queue::{Queue, QueueT};

use super::*;
use crate::devices::virtio::{Signals, VirtQueue};
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::memory;
use crate::registers::Page;
use crate::standstill::Standstill;

/// Images of these lengths in a directory of their own.
struct Images(PathBuf);

impl Images {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("vmm-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        Self(directory)
    }

    fn medium(&self, name: &str, len: u64, read_only: bool) -> Medium {
        let path = self.0.join(name);
        File::options().create(true).truncate(false).write(true).open(&path).unwrap().set_len(len).unwrap();
        Medium::of(open(&path, read_only).unwrap(), Path::new(name), read_only).unwrap()
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Its driver is ready.
fn activate(block: &mut Block) {
    let ram = Arc::new(memory::anonymous(&[(0, 0x1000)]).unwrap());
    let queue = Queue::new(QUEUES[0]).unwrap();
    let queue = VirtQueue::new(queue, ram.clone(), Arc::new(Event::new().unwrap()), Arc::default());
    let activation = Activation {
        ram,
        queues: vec![queue],
        signals: Arc::new(Signals::new(Arc::new(Wire::default()), Page::alone())),
        standstill: Arc::new(Standstill::new().unwrap()),
        features: 0,
    };
    block.activate(activation).unwrap();
}

fn sectors(block: &Block) -> u64 {
    u64::from_le_bytes(block.configuration()[..8].try_into().unwrap())
}

#[test]
fn what_a_guest_relies_on_is_there_when_it_goes_on() {
    let images = Images::new("block-state");
    let disk = |len, read_only, serial| Block::new(images.medium("image", len, read_only).named(serial));
    let mut before = disk(4096, false, "c0b0");
    let bytes = before.save().unwrap();
    before.restore(&bytes).unwrap();
    before.restore(&bytes[1..]).unwrap_err();
    drop(before);
    for (len, read_only, serial, word) in [
        (4096, false, "c0b0", ""),
        (4608, false, "c0b0", "capacity in sectors was 8 and is 9 here"),
        (4096, true, "c0b0", "access was writable and is read-only here"),
        (4096, false, "c0b1", "serial number was c0b0 and is c0b1 here"),
    ] {
        let said = disk(len, read_only, serial).restore(&bytes).err();
        let said = said.map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains(word) && said.is_empty() == word.is_empty(), "{said}");
    }
}

#[test]
fn a_drive_takes_another_disk_when_no_driver_is_at_work() {
    let images = Images::new("drive");
    let mut block = Block::drive(None, &Rings::new(1));
    let drive = block.slot().unwrap();
    assert!(block.is_idle() && block.shares_wire());
    assert_eq!((sectors(&block), block.features() & F_RO), (0, F_RO));
    assert_eq!(drive.eject(), Ok(false));
    drive.insert(images.medium("a", 4096, false)).unwrap();
    assert_eq!((sectors(&block), block.features() & F_RO, block.is_idle()), (8, 0, false));
    assert_eq!(drive.insert(images.medium("b", 512, true)), Err(Unplaced::Full));
    activate(&mut block);
    assert_eq!(drive.eject(), Err(Unplaced::Used));
    block.reset();
    assert_eq!(drive.eject(), Ok(true));
    drive.insert(images.medium("b", 512, true)).unwrap();
    assert_eq!((sectors(&block), block.features() & F_RO), (1, F_RO));
    drop(images.medium("a", 4096, false));
}

#[test]
fn a_drive_that_is_used_without_a_disk_gets_none() {
    let images = Images::new("drive-used");
    let mut block = Block::drive(None, &Rings::new(1));
    let drive = block.slot().unwrap();
    activate(&mut block);
    assert_eq!(drive.insert(images.medium("a", 4096, false)), Err(Unplaced::Used));
    block.reset();
    drive.insert(images.medium("a", 4096, false)).unwrap();
}

#[test]
fn what_is_fixed_is_no_drive() {
    let images = Images::new("fixed");
    let block = Block::new(images.medium("a", 4096, false));
    assert!(block.slot().is_none() && !block.shares_wire() && !block.is_idle());
}

#[test]
fn a_drive_becomes_what_it_was() {
    let images = Images::new("drive-state");
    let rings = Rings::new(0);
    let empty = Block::drive(None, &rings).save().unwrap();
    let full = Block::drive(Some(images.medium("a", 4096, true)), &rings).save().unwrap();
    Block::drive(None, &rings).restore(&empty).unwrap();
    Block::drive(Some(images.medium("a", 4096, true)), &rings).restore(&full).unwrap();
    let missing = Block::drive(None, &rings).restore(&full).unwrap_err();
    assert_eq!(missing.to_string(), "the disk a is not in its drive");
    let given = Block::drive(Some(images.medium("a", 4096, true)), &rings).restore(&empty).unwrap_err();
    assert_eq!(given.to_string(), "it had no disk and has a here");
    // Of one that goes back in place, what came later goes.
    let mut block = Block::drive(None, &rings);
    block.slot().unwrap().insert(images.medium("a", 4096, true)).unwrap();
    block.restore(&empty).unwrap_err();
    block.rest();
    block.restore(&empty).unwrap();
    assert!(block.is_idle());
    drop(block);
    // And what was there stays.
    let mut block = Block::drive(Some(images.medium("a", 4096, true)), &rings);
    block.rest();
    block.restore(&full).unwrap();
}
