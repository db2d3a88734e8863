//! The block device, section 5.2, on a raw image file or a block device of the host; or a drive, into which such a disk
//! is put later, and from which it is taken.
//!
//! `medium` is what is in it; `drive` how it gets there, and out; `request` says what a request does to the image, and
//! does it; `uring` leaves the common ones to the kernel, many at a time.

mod counters;
mod drive;
mod medium;
mod request;
#[cfg(target_os = "linux")]
mod uring;

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::limit::{Limiter, Limits};
use super::state::{decode, encode, same};
use super::{ActivateError, Activation, Device, StateError, Worker};

use counters::Counters;
pub use counters::Counts;
use drive::Bay;
pub use drive::{Drive, Rings, Unplaced};
#[cfg(target_os = "linux")]
pub(crate) use medium::BLKSSZGET;
pub use medium::{Error, Medium, open};
use request::{Disk, SECTOR};

/// Bytes of the longest serial number.
pub const SERIAL_MAX: usize = request::ID;

const KIND: u32 = 2;
const QUEUES: [u16; 1] = [256];

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// What a guest has learned of its disk and relies on. What is on the disk is not part of it: whoever saves a
/// machine keeps the image as it is until the machine goes on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    sectors: u64,
    unit: u32,
    read_only: bool,
    serial: String,
}

impl State {
    fn of(medium: &Medium) -> Self {
        // A guest is told no more of it.
        let serial: Vec<u8> = medium.id.bytes().take(SERIAL_MAX).collect();
        Self {
            sectors: medium.len / SECTOR,
            unit: medium.unit,
            read_only: medium.read_only,
            serial: String::from_utf8_lossy(&serial).into_owned(),
        }
    }

    fn check(&self, here: &Self) -> Result<(), StateError> {
        let access = |read_only| if read_only { "read-only" } else { "writable" };
        same("access", &access(self.read_only), &access(here.read_only))?;
        same("capacity in sectors", &self.sectors, &here.sectors)?;
        same("logical block", &self.unit, &here.unit)?;
        same("serial number", &self.serial, &here.serial)
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    bay: Arc<Bay>,
    limiter: Limiter,
    counters: Arc<Counters>,
    /// Made before the process gives up the right to; with the engine while it works.
    rings: Rings,
    engine: Option<Engine>,
}

/// What serves the requests.
#[derive(Debug)]
enum Engine {
    /// One after the other.
    Worker(Worker<Disk>),
    /// Many at a time.
    #[cfg(target_os = "linux")]
    Uring(uring::Running),
}

/// What the host can ask. It stays valid when the device is gone.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Counters>);

impl Handle {
    /// What the disk was asked for.
    pub fn counts(&self) -> Counts {
        self.0.get()
    }
}

impl Block {
    /// The image or block device at `path`, which stays in it. It is locked against other machines: shared when read-only.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        Ok(Self::new(Medium::of(open(path, read_only)?, path, read_only)?))
    }

    /// This disk, which stays in it.
    pub fn new(medium: Medium) -> Self {
        Self::on(Bay::fixed(medium), Rings::new(1))
    }

    /// A drive with this disk in it, or with none yet. Drives of one machine share `rings`: as many disks as there are have
    /// their requests served many at a time.
    pub fn drive(medium: Option<Medium>, rings: &Rings) -> Self {
        Self::on(Bay::drive(medium), rings.clone())
    }

    fn on(bay: Bay, rings: Rings) -> Self {
        Self {
            bay: Arc::new(bay),
            limiter: Limiter::default(),
            counters: Arc::default(),
            rings,
            engine: None,
        }
    }

    /// The same with limits, of reads and writes together.
    #[must_use]
    pub fn limited(self, limits: Limits) -> Self {
        Self { limiter: Limiter::new(limits), ..self }
    }

    /// The host's side of it.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.counters))
    }

    /// What disks are put into and taken out of, if it is a drive.
    pub fn slot(&self) -> Option<Drive> {
        Drive::of(&self.bay)
    }

    fn start(&mut self, activation: Activation) -> io::Result<Engine> {
        let (limiter, counters) = (self.limiter.clone(), Arc::clone(&self.counters));
        let (disk, empty) =
            self.bay.take_up(|medium| (Disk::new(medium, limiter, counters), medium.is_none()));
        #[cfg(target_os = "linux")]
        if let Some(ring) = Some(&self.rings).filter(|_| !empty).and_then(Rings::take) {
            return uring::Running::spawn(disk, ring, activation).map(Engine::Uring);
        }
        let _ = empty;
        Worker::spawn("block", disk, activation).map(Engine::Worker)
    }

    fn config(&self) -> [u8; 60] {
        let (sectors, unit) = self.bay.look(|medium| match medium {
            Some(medium) => (medium.len / SECTOR, medium.unit),
            None => (0, SECTOR as u32),
        });
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        // A header and a status beside the data.
        put(12, &u32::from(QUEUES[0] - 2).to_le_bytes());
        put(20, &unit.to_le_bytes());
        for (sectors_at, count_at) in [(36, 40), (48, 52)] {
            put(sectors_at, &request::RANGE_SECTORS_MAX.to_le_bytes());
            put(count_at, &request::RANGES_MAX.to_le_bytes());
        }
        put(44, &(unit / SECTOR as u32).to_le_bytes());
        // Zeroes may be written by taking the blocks away.
        put(56, &[1]);
        config
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        let ranges = if cfg!(target_os = "linux") { F_DISCARD | F_WRITE_ZEROES } else { 0 };
        common
            | if self.bay.look(|medium| medium.is_none_or(|medium| medium.read_only)) { F_RO } else { ranges }
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn shares_wire(&self) -> bool {
        self.bay.is_drive()
    }

    fn is_idle(&self) -> bool {
        self.bay.look(|medium| medium.is_none())
    }

    fn configuration(&self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let engine = self.start(activation).map_err(|source| ActivateError { device: "block", source })?;
        self.engine = Some(engine);
        Ok(())
    }

    /// No request is under way: the kernel has finished what it was given before the machine stood still, and
    /// what a limit holds up is in the queue.
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.bay.look(|medium| medium.map(State::of)))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let saved: Option<State> = decode(state)?;
        let here = self.bay.look(|medium| medium.map(State::of));
        match (saved, here) {
            (None, None) => Ok(()),
            (Some(saved), Some(here)) => saved.check(&here),
            (Some(saved), None) => Err(StateError(format!("the disk {} is not in its drive", saved.serial))),
            (None, Some(here)) => Err(StateError(format!("it had no disk and has {} here", here.serial))),
        }
    }

    fn rest(&mut self) {
        self.bay.without_later();
    }

    fn reset(&mut self) {
        match self.engine.take() {
            #[cfg(target_os = "linux")]
            Some(Engine::Uring(running)) => {
                if let Some(ring) = running.stop() {
                    self.rings.give_back(ring);
                }
            }
            Some(Engine::Worker(worker)) => drop(worker),
            None => {}
        }
        self.bay.let_go();
    }
}

#[cfg(test)]
mod tests;
