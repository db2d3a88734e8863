//! The block device, section 5.2, on a raw image file or a block device of the host.
//!
//! `request` says what a request does to the image, and does it; `uring` leaves the common ones to the
//! kernel, many at a time.

mod counters;
mod request;
#[cfg(target_os = "linux")]
mod uring;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::limit::{Limiter, Limits};
use super::state::{decode, encode, same};
use super::{ActivateError, Activation, Device, StateError, Worker, config_bytes};

use counters::Counters;
pub use counters::Counts;
use request::{Disk, SECTOR};
#[cfg(target_os = "linux")]
use uring::Uring;

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

/// The image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// By the host's file system.
    #[error("cannot open the disk {}: {source}{}", path.display(), crate::mend::to_write(source))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not a whole number of sectors, or none.
    #[error("the disk {} has {len} bytes: it must be a multiple of 512 and not empty; \
         truncate -s %512 fills it up", path.display())]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// The host has it.
    #[error(
        "the disk {} is mounted on the host, or part of another disk there: take it off there, or give it \
         read-only (:ro)",
        path.display()
    )]
    Mounted {
        /// Its path.
        path: PathBuf,
    },
    /// Somebody else has it.
    #[error(
        "the disk {} is in use by another machine: stop that one, or give it to both read-only",
        path.display()
    )]
    Busy {
        /// Its path.
        path: PathBuf,
    },
}

/// What a guest has learned of its disk and relies on. What is on the disk is not part of it: whoever saves a
/// machine keeps the image as it is until the machine goes on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    sectors: u64,
    unit: u32,
    read_only: bool,
    serial: String,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    file: Arc<File>,
    len: u64,
    /// What a driver should not read or write less of at once: a power of two, at least a sector.
    unit: u32,
    read_only: bool,
    id: String,
    limiter: Limiter,
    counters: Arc<Counters>,
    /// Made with the device, before the process gives up the right to; with the engine while it works.
    #[cfg(target_os = "linux")]
    ring: Option<Uring>,
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
    /// The image or block device at `path`. It is locked against other machines: shared when read-only.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let (wrong, why) = if kind.is_dir() {
                (io::ErrorKind::IsADirectory, "it is a directory")
            } else {
                (io::ErrorKind::InvalidInput, "it is neither a file nor a block device")
            };
            return Err(failed(io::Error::new(wrong, why)));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        #[cfg(target_os = "linux")]
        if kind.is_block_device() && !read_only {
            use std::os::unix::fs::OpenOptionsExt;
            // Of a block device that is not a request to make it, but to have it to oneself.
            options.custom_flags(libc::O_EXCL);
        }
        let mut file = options.open(path).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => Error::Mounted { path: path.to_owned() },
            _ => failed(error),
        })?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(Error::Size { path: path.to_owned(), len });
        }
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock => Error::Busy { path: path.to_owned() },
            TryLockError::Error(source) => failed(source),
        })?;
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self {
            unit: if kind.is_block_device() { unit(&file).map_err(failed)? } else { SECTOR as u32 },
            file: Arc::new(file),
            len,
            read_only,
            id,
            limiter: Limiter::default(),
            counters: Arc::default(),
            #[cfg(target_os = "linux")]
            ring: Uring::new().inspect_err(|error| log::debug!("no io_uring for disks: {error}")).ok(),
            engine: None,
        })
    }

    /// The same with a serial number, of which a guest is told [`SERIAL_MAX`] bytes. It is the file's name
    /// otherwise.
    #[must_use]
    pub fn named(self, serial: &str) -> Self {
        Self { id: serial.to_owned(), ..self }
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

    fn start(&mut self, activation: Activation) -> io::Result<Engine> {
        let (limiter, counters) = (self.limiter.clone(), Arc::clone(&self.counters));
        let disk = Disk::new(Arc::clone(&self.file), self.len, self.read_only, &self.id, limiter, counters);
        #[cfg(target_os = "linux")]
        if let Some(ring) = self.ring.take() {
            return uring::Running::spawn(disk, ring, activation).map(Engine::Uring);
        }
        Worker::spawn("block", disk, activation).map(Engine::Worker)
    }

    fn state(&self) -> State {
        // A guest is told no more of it.
        let serial: Vec<u8> = self.id.bytes().take(SERIAL_MAX).collect();
        State {
            sectors: self.len / SECTOR,
            unit: self.unit,
            read_only: self.read_only,
            serial: String::from_utf8_lossy(&serial).into_owned(),
        }
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.len / SECTOR).to_le_bytes());
        // A header and a status beside the data.
        put(12, &u32::from(QUEUES[0] - 2).to_le_bytes());
        put(20, &self.unit.to_le_bytes());
        for (sectors_at, count_at) in [(36, 40), (48, 52)] {
            put(sectors_at, &request::RANGE_SECTORS_MAX.to_le_bytes());
            put(count_at, &request::RANGES_MAX.to_le_bytes());
        }
        put(44, &(self.unit / SECTOR as u32).to_le_bytes());
        // Zeroes may be written by taking the blocks away.
        put(56, &[1]);
        config
    }
}

/// Asks for the size of logical blocks; of `linux/fs.h`.
#[cfg(target_os = "linux")]
const BLKSSZGET: libc::Ioctl = 0x1268;

/// The logical block of a block device, by which its partitions are counted too.
#[cfg(target_os = "linux")]
fn unit(device: &File) -> io::Result<u32> {
    use std::os::fd::AsRawFd;

    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the request writes one int, which `size` is.
    if unsafe { libc::ioctl(device.as_raw_fd(), BLKSSZGET, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let size = u32::try_from(size).ok().filter(|size| size.is_power_of_two() && u64::from(*size) >= SECTOR);
    size.ok_or_else(|| io::Error::other("its logical blocks have no reasonable size"))
}

/// Not asked elsewhere.
#[cfg(not(target_os = "linux"))]
fn unit(_device: &File) -> io::Result<u32> {
    Ok(SECTOR as u32)
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        let ranges = if cfg!(target_os = "linux") { F_DISCARD | F_WRITE_ZEROES } else { 0 };
        common | if self.read_only { F_RO } else { ranges }
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let engine = self.start(activation).map_err(|source| ActivateError { device: "block", source })?;
        self.engine = Some(engine);
        Ok(())
    }

    /// No request is under way: the kernel has finished what it was given before the machine stood still, and
    /// what a limit holds up is in the queue.
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.state())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let (saved, here): (State, _) = (decode(state)?, self.state());
        let access = |read_only| if read_only { "read-only" } else { "writable" };
        same("access", &access(saved.read_only), &access(here.read_only))?;
        same("capacity in sectors", &saved.sectors, &here.sectors)?;
        same("logical block", &saved.unit, &here.unit)?;
        same("serial number", &saved.serial, &here.serial)
    }

    fn reset(&mut self) {
        match self.engine.take() {
            #[cfg(target_os = "linux")]
            Some(Engine::Uring(running)) => self.ring = running.stop(),
            Some(Engine::Worker(worker)) => drop(worker),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_disk() {
        let directory = std::env::temp_dir().join(format!("vmm-disks-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let (image, fifo) = (directory.join("image"), directory.join("fifo"));
        File::create(&image).unwrap().set_len(4096).unwrap();
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let disk = Block::open(&image, false).unwrap();
        assert_eq!((disk.len, disk.unit, disk.id.as_str()), (4096, 512, "image"));
        assert!(matches!(Block::open(&image, true).unwrap_err(), Error::Busy { .. }));
        let mut disk = disk.named("c0b0");
        assert_eq!(disk.id, "c0b0");
        let bytes = disk.save().unwrap();
        disk.restore(&bytes).unwrap();
        disk.restore(&bytes[1..]).unwrap_err();
        drop(disk);
        for (len, read_only, serial, word) in [
            (4096, false, "c0b0", ""),
            (4608, false, "c0b0", "capacity in sectors was 8 and is 9 here"),
            (4096, true, "c0b0", "access was writable and is read-only here"),
            (4096, false, "c0b1", "serial number was c0b0 and is c0b1 here"),
        ] {
            File::options().write(true).open(&image).unwrap().set_len(len).unwrap();
            let mut other = Block::open(&image, read_only).unwrap().named(serial);
            let said = other.restore(&bytes).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(said.contains(word) && said.is_empty() == word.is_empty(), "{said}");
        }
        File::options().write(true).open(&image).unwrap().set_len(4096).unwrap();
        for path in [fifo.as_path(), &directory, Path::new("/dev/null"), Path::new("/none")] {
            assert!(matches!(Block::open(path, true).unwrap_err(), Error::Open { .. }), "{}", path.display());
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
