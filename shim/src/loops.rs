//! Images that the host mounts itself, as loop devices: each is taken off when nothing uses it any more, so there is
//! nothing to undo.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Of `linux/loop.h`.
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

const CONTROL: &str = "/dev/loop-control";
/// How often somebody else may be faster with a device that was free.
const ATTEMPTS: usize = 100;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    numbers: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    image: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device. It stays as long as this value or a mount of it.
pub struct Loop {
    /// Its node.
    pub path: PathBuf,
    _device: File,
}

/// Makes a loop device of an image, which is locked as one that is a machine's disk.
pub fn attach(image: &Path, read_only: bool) -> io::Result<Loop> {
    let open = |path: &Path| OpenOptions::new().read(true).write(!read_only).open(path);
    let file = open(image)?;
    // The device keeps this open file, and with it the lock.
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "the image is in use"),
        TryLockError::Error(error) => error,
    })?;
    let control = OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|error| {
        io::Error::new(error.kind(), format!("opening {CONTROL}: {error}; load the kernel's module loop"))
    })?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the descriptor is open, and the request has no argument.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path)?;
        match configure(&device, &file, read_only) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            done => return done.map(|()| Loop { path, _device: device }),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "others were always faster with a free loop device"))
}

fn configure(device: &File, image: &File, read_only: bool) -> io::Result<()> {
    let flags = AUTOCLEAR | if read_only { READ_ONLY } else { 0 };
    let info = Info { numbers: [0; 5], number: 0, encryption: [0; 2], flags, names: [0; 160], init: [0; 2] };
    let image = image.as_raw_fd().cast_unsigned();
    let config = Config { image, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the descriptor is open; the request reads a `struct loop_config`, which `config` is.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernels_layout() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
        assert_eq!(std::mem::offset_of!(Config, info) + std::mem::offset_of!(Info, flags), 60);
    }

    #[test]
    fn an_image_that_is_in_use() {
        let path = std::env::temp_dir().join(format!("loops-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.lock().unwrap();
        let error = attach(&path, false).err().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    }
}
