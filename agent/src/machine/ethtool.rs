//! What a network device does for the kernel, which is asked as `ethtool` asks (`linux/ethtool.h`).

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// ETHTOOL_STSO: whether TCP's large packets are the device's to cut up.
const SET_TSO: u32 = 0x1f;

/// ETHTOOL_GCHANNELS and ETHTOOL_SCHANNELS: how many queue pairs a device uses.
const GET_CHANNELS: u32 = 0x3c;
const SET_CHANNELS: u32 = 0x3d;

/// What a command reads and writes: it begins with the command's number.
///
/// # Safety
/// The number is that of a command whose structure this is.
unsafe trait Command {}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

// SAFETY: it is made for SET_TSO only.
unsafe impl Command for Value {}

/// `struct ethtool_channels`. Those that are not combined no device of the machine has.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

// SAFETY: it is made for GET_CHANNELS and SET_CHANNELS only.
unsafe impl Command for Channels {}

/// Leaves large packets to the device of this name, or to the kernel, before the device sees them.
pub fn set_segmentation(name: &str, by_device: bool) -> Result<()> {
    call(name, &mut Value { command: SET_TSO, data: by_device.into() })
}

/// Has the device of this name use a queue pair for each of so many processors, as far as it has them.
pub fn set_queues(name: &str, processors: u32) -> Result<()> {
    let mut channels = Channels { command: GET_CHANNELS, ..Channels::default() };
    call(name, &mut channels)?;
    let wanted = processors.min(channels.max_combined);
    if wanted == channels.combined {
        return Ok(());
    }
    call(name, &mut Channels { command: SET_CHANNELS, combined: wanted, ..channels })
}

fn call(name: &str, command: &mut impl Command) -> Result<()> {
    let bytes = name.as_bytes();
    ensure!(bytes.len() < libc::IFNAMSIZ && !bytes.contains(&0), "{name:?} is no name of an interface");
    // SAFETY: it is made of numbers, and of pointers that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(command).cast();
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: SIOCETHTOOL reads the `ifreq`, and behind its pointer a command, which is one that reads and writes no more
    // than the structure that it has here. Both live until the call returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(done).map(drop).context("SIOCETHTOOL")
}
