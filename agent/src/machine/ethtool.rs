//! What a network device does for the kernel, which is asked as `ethtool` asks (`linux/ethtool.h`).

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// ETHTOOL_STSO: whether TCP's large packets are the device's to cut up.
const SET_TSO: u32 = 0x1f;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Leaves large packets to the device of this name, or to the kernel, before the device sees them.
pub fn set_segmentation(name: &str, by_device: bool) -> Result<()> {
    let mut value = Value { command: SET_TSO, data: by_device.into() };
    let bytes = name.as_bytes();
    ensure!(bytes.len() < libc::IFNAMSIZ && !bytes.contains(&0), "{name:?} is no name of an interface");
    // SAFETY: it is made of numbers, and of pointers that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: SIOCETHTOOL reads the `ifreq`, and behind its pointer a command, which is one that reads and writes no more
    // than a `struct ethtool_value`. Both live until the call returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(done).map(drop).context("SIOCETHTOOL")
}
