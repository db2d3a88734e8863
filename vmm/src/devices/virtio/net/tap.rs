//! Tap devices of Linux (`Documentation/networking/tuntap.rst`): an Ethernet port of the host whose
//! other end is a descriptor. Each read and each write is one packet, behind a header that says what
//! checksum and segmentation are left to the other side.

use std::ffi::c_uint;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const CONTROL: &str = "/dev/net/tun";
/// Why it is used no longer.
pub const GONE: &str = "the tap was removed from the host";
/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER: u8 = 12;

/// The tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No interface has such a name.
    #[error("{0:?} cannot be the name of a tap: it has 1 to 15 bytes, without / and spaces")]
    Name(String),
    /// Nobody has made it, or it has been removed.
    #[error("there is no tap {0}: make it (ip tuntap add {0} mode tap) or give another")]
    Missing(String),
    /// Somebody else has it open.
    #[error("the tap {0} is in use by another process: end that one or give another tap")]
    Busy(String),
    /// It belongs to somebody else.
    #[error("no permission to use the tap {0}: make it with the owner (ip tuntap add ... user NAME)")]
    Permission(String),
    /// An interface of that name is something else.
    #[error("{name} is no tap with {queues} queue(s): make it with ip tuntap add {name} mode tap{mend}")]
    Kind {
        /// Its name.
        name: String,
        /// How many queues were wanted.
        queues: usize,
        /// What to add when there are to be several.
        mend: &'static str,
    },
    /// The descriptor that was handed in is no tap, or was opened in another way.
    #[error("the descriptor {fd} for the network is not a tap opened with {wanted}")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// The flags of TUNSETIFF.
        wanted: &'static str,
    },
    /// A call failed.
    #[error("{call} on {object} failed: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// On what.
        object: String,
        /// Why.
        source: io::Error,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// Through which the kernel can serve it.
    vhost: Option<OwnedFd>,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn request(name: &str, flags: i32) -> Result<libc::ifreq, Error> {
    let bytes = name.as_bytes();
    let valid = (1..libc::IFNAMSIZ).contains(&bytes.len())
        && !bytes.iter().any(|byte| *byte == 0 || *byte == b'/' || byte.is_ascii_whitespace());
    if !valid {
        return Err(Error::Name(name.into()));
    }
    // SAFETY: it is made of numbers, and of pointers that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // Flags of an interface are 16 bits wide.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

/// Calls TUNSETIFF, TUNGETIFF, TUNSETQUEUE or SIOCGIFMTU, all of which take an `ifreq`.
fn call(fd: BorrowedFd<'_>, call: libc::Ioctl, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: the calls named above read and write one `ifreq` and nothing else.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), call, request) }).map(drop)
}

/// Opens `queues` queues of an existing tap by its name. Whoever made it decides who may.
pub fn open(name: &str, queues: usize) -> Result<Vec<OwnedFd>, Error> {
    // TUNSETIFF makes what is not there, for a privileged caller; nobody would have set that up.
    if is_missing(name) {
        return Err(Error::Missing(name.into()));
    }
    queues_of(name, queues)
}

/// Makes a tap in the network namespace of this thread, which is down, and goes with the last of its `queues`.
pub fn make(name: &str, queues: usize) -> Result<Vec<OwnedFd>, Error> {
    if !is_missing(name) {
        return Err(Error::Busy(name.into()));
    }
    queues_of(name, queues)
}

fn is_missing(name: &str) -> bool {
    matches!(mtu(name), Err(Error::Call { source, .. }) if source.raw_os_error() == Some(libc::ENODEV))
}

fn queues_of(name: &str, queues: usize) -> Result<Vec<OwnedFd>, Error> {
    let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
    let mut fds = Vec::new();
    for _ in 0..queues {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(CONTROL)
            .map_err(|source| Error::Call { call: "open", object: CONTROL.into(), source })?;
        let mut request = request(name, flags)?;
        call(file.as_fd(), libc::TUNSETIFF, &mut request).map_err(|errno| match errno {
            Errno::EBUSY => Error::Busy(name.into()),
            Errno::EPERM | Errno::EACCES => Error::Permission(name.into()),
            Errno::EINVAL | Errno::E2BIG => {
                Error::Kind { name: name.into(), queues, mend: if queues > 1 { " multi_queue" } else { "" } }
            }
            errno => Error::Call { call: "TUNSETIFF", object: name.into(), source: errno.into() },
        })?;
        fds.push(file.into());
    }
    Ok(fds)
}

/// The name of the tap that a descriptor belongs to.
pub fn name(fd: impl AsFd) -> Result<String, Error> {
    let fd = fd.as_fd();
    let mut found = request("?", 0)?;
    call(fd, libc::TUNGETIFF, &mut found)
        .map_err(|_| Error::Descriptor { fd: fd.as_raw_fd(), wanted: "TUNSETIFF" })?;
    let bytes = found.ifr_name.map(|byte| byte.to_ne_bytes()[0]);
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

/// The largest packet that an interface takes, without the Ethernet header.
pub fn mtu(name: &str) -> Result<u16, Error> {
    let failed = |call, errno: Errno| Error::Call { call, object: name.into(), source: errno.into() };
    let mut request = request(name, 0)?;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| failed("socket", errno))?;
    call(socket.as_fd(), libc::SIOCGIFMTU, &mut request).map_err(|errno| failed("SIOCGIFMTU", errno))?;
    // SAFETY: SIOCGIFMTU has filled this member; any bytes are a number.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

impl Tap {
    /// From a descriptor on which TUNSETIFF has been called, one of `queues`.
    pub fn new(fd: OwnedFd, queues: usize) -> Result<Self, Error> {
        let tap = Self { fd, vhost: None };
        let mut found = request("?", 0)?;
        let wanted = libc::IFF_TAP
            | libc::IFF_NO_PI
            | libc::IFF_VNET_HDR
            | if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        // SAFETY: TUNGETIFF has filled this member; any bytes are a number.
        let flags = call(tap.as_fd(), libc::TUNGETIFF, &mut found)
            .map(|()| i32::from(unsafe { found.ifr_ifru.ifru_flags }));
        if !flags.is_ok_and(|flags| flags & wanted == wanted) {
            let wanted = match queues {
                1 => "IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
                _ => "IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and IFF_MULTI_QUEUE",
            };
            return Err(Error::Descriptor { fd: tap.fd.as_raw_fd(), wanted });
        }
        let header = libc::c_int::from(HEADER);
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let set = unsafe { libc::ioctl(tap.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
        Errno::result(set).map_err(|errno| tap.failed("TUNSETVNETHDRSZ", errno))?;
        let blocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&tap.fd, blocking).map_err(|errno| tap.failed("F_SETFL", errno))?;
        Ok(tap)
    }

    /// From anything that keeps packets apart and does not block.
    #[cfg(test)]
    pub fn like(fd: impl Into<OwnedFd>) -> Self {
        Self { fd: fd.into(), vhost: None }
    }

    /// Gives it a [`vhost`](super::vhost) of its own.
    pub fn set_vhost(&mut self, vhost: OwnedFd) {
        self.vhost = Some(vhost);
    }

    /// Through which the kernel can serve it.
    pub fn vhost(&self) -> Option<BorrowedFd<'_>> {
        self.vhost.as_ref().map(OwnedFd::as_fd)
    }

    fn failed(&self, call: &'static str, errno: Errno) -> Error {
        Error::Call { call, object: format!("the tap {}", self.fd.as_raw_fd()), source: errno.into() }
    }

    /// Says what this side takes: TUN_F_CSUM and the like.
    pub fn set_offload(&self, offload: c_uint) -> Result<(), Error> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        let set =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
        Errno::result(set).map(drop).map_err(|errno| self.failed("TUNSETOFFLOAD", errno))
    }

    /// Takes this queue into the tap or out of it; packets go to those that are in. Only of a tap with
    /// several queues.
    pub fn attach(&self, attached: bool) -> Result<(), Error> {
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = request("?", flags)?;
        match call(self.as_fd(), libc::TUNSETQUEUE, &mut request) {
            // It is what was asked for already.
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(errno) => Err(self.failed("TUNSETQUEUE", errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_tap_is_named() {
        for name in ["", "x/y", "a b", "sixteen-bytes-xx", "a\0b"] {
            assert!(matches!(open(name, 1), Err(Error::Name(_))), "{name:?}");
        }
        let error = open("vmm-no-such-tap", 1).unwrap_err();
        assert!(matches!(error, Error::Missing(_)), "{error}");
        assert!(error.to_string().contains("ip tuntap add vmm-no-such-tap mode tap"));
        for queues in [1, 4] {
            let file = std::fs::File::open("/dev/null").unwrap();
            let error = Tap::new(file.into(), queues).unwrap_err();
            assert!(error.to_string().contains("IFF_VNET_HDR"), "{error}");
        }
    }

    #[test]
    fn the_loopback_is_no_tap_and_has_an_mtu() {
        // Not every place where tests run has one.
        if let Ok(mtu) = mtu("lo") {
            assert!(mtu > 1000);
        }
    }
}
