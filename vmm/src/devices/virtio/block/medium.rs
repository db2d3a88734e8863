//! What is in a drive: an image in a file, or a block device of the host.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::request::SECTOR;

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

/// A disk without a drive.
#[derive(Debug)]
pub struct Medium {
    pub(super) file: Arc<File>,
    pub(super) len: u64,
    /// What a driver should not read or write less of at once: a power of two, at least a sector.
    pub(super) unit: u32,
    pub(super) read_only: bool,
    pub(super) id: String,
}

/// Opens the image or block device at `path`, for whoever makes a [`Medium`] of it.
pub fn open(path: &Path, read_only: bool) -> Result<File, Error> {
    let failed = |source| Error::Open { path: path.to_owned(), source };
    // Before it is opened, as a FIFO would wait for its other end.
    let kind = fs::metadata(path).and_then(|meta| is_disk(&meta)).map_err(failed)?;
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only);
    #[cfg(target_os = "linux")]
    if kind.is_block_device() && !read_only {
        use std::os::unix::fs::OpenOptionsExt;
        // Of a block device that is not a request to make it, but to have it to oneself.
        options.custom_flags(libc::O_EXCL);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = kind;
    options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::Mounted { path: path.to_owned() },
        _ => failed(error),
    })
}

fn is_disk(meta: &fs::Metadata) -> io::Result<fs::FileType> {
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind);
    }
    let (wrong, why) = if kind.is_dir() {
        (io::ErrorKind::IsADirectory, "it is a directory")
    } else {
        (io::ErrorKind::InvalidInput, "it is neither a file nor a block device")
    };
    Err(io::Error::new(wrong, why))
}

impl Medium {
    /// Of what somebody has [opened](open), `path` being what errors and a guest are told of it. It is locked against other
    /// machines, for as long as anybody has it open: shared when read-only.
    pub fn of(mut file: File, path: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let kind = file.metadata().and_then(|meta| is_disk(&meta)).map_err(failed)?;
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|error| failed(error.into()))?;
        let access = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE;
        if access != OFlag::O_RDWR && (access != OFlag::O_RDONLY || !read_only) {
            let why = "it is not open for what it is to be used for";
            return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(Error::Size { path: path.to_owned(), len });
        }
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock => Error::Busy { path: path.to_owned() },
            TryLockError::Error(source) => failed(source),
        })?;
        let unit = if kind.is_block_device() { unit(&file).map_err(failed)? } else { SECTOR as u32 };
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { file: Arc::new(file), len, unit, read_only, id })
    }

    /// The same with a serial number, of which a guest is told [`SERIAL_MAX`](super::SERIAL_MAX) bytes. It is the file's
    /// name otherwise.
    #[must_use]
    pub fn named(self, serial: &str) -> Self {
        Self { id: serial.to_owned(), ..self }
    }
}

/// Asks for the size of logical blocks; of `linux/fs.h`.
#[cfg(target_os = "linux")]
pub(crate) const BLKSSZGET: libc::Ioctl = 0x1268;

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

#[cfg(test)]
mod tests {
    use super::*;

    fn medium(path: &Path, read_only: bool) -> Result<Medium, Error> {
        open(path, read_only).and_then(|file| Medium::of(file, path, read_only))
    }

    #[test]
    fn what_is_a_disk() {
        let directory = std::env::temp_dir().join(format!("vmm-disks-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let (image, fifo) = (directory.join("image"), directory.join("fifo"));
        File::create(&image).unwrap().set_len(4096).unwrap();
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let disk = medium(&image, false).unwrap();
        assert_eq!((disk.len, disk.unit, disk.id.as_str()), (4096, 512, "image"));
        assert!(matches!(medium(&image, true).unwrap_err(), Error::Busy { .. }));
        assert_eq!(disk.named("c0b0").id, "c0b0");
        let [one, other] = [(); 2].map(|()| medium(&image, true).unwrap());
        assert!(one.read_only && other.read_only);
        for len in [0, 511] {
            File::options().write(true).open(&image).unwrap().set_len(len).unwrap();
            assert!(matches!(medium(&image, true).unwrap_err(), Error::Size { .. }), "{len}");
        }
        for path in [fifo.as_path(), &directory, Path::new("/dev/null"), Path::new("/none")] {
            assert!(matches!(open(path, true).unwrap_err(), Error::Open { .. }), "{}", path.display());
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_descriptor_is_for_what_it_was_opened_for() {
        let path = std::env::temp_dir().join(format!("vmm-disk-{}", std::process::id()));
        File::create(&path).unwrap().set_len(512).unwrap();
        let opened = |read, write| File::options().read(read).write(write).open(&path).unwrap();
        for (read, write, read_only, fits) in [
            (true, false, true, true),
            (true, false, false, false),
            (true, true, true, true),
            (true, true, false, true),
            (false, true, false, false),
            (false, true, true, false),
        ] {
            let made = Medium::of(opened(read, write), &path, read_only);
            assert_eq!(made.is_ok(), fits, "{read} {write} {read_only}: {made:?}");
        }
        let null = File::options().read(true).open("/dev/null").unwrap();
        assert!(Medium::of(null, &path, true).is_err(), "not what it is said to be");
        fs::remove_file(&path).unwrap();
    }
}
