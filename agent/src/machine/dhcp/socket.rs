//! IPv4 packets of one interface, as they are below its addresses: whoever asks for one has none.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, recvfrom, sendto, socket,
};
use rtnl::Mac;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// No answer to DHCP is larger.
const LONGEST: usize = 2048;
/// Everybody on the wire.
pub const EVERYBODY: Mac = Mac([0xff; 6]);

/// A packet socket (packet(7)). It gets what all others on the interface get, so it is not kept.
pub struct PacketSocket {
    fd: AsyncFd<OwnedFd>,
    index: u32,
}

impl PacketSocket {
    /// Of the interface with this number.
    pub fn open(index: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Without a protocol nothing comes, until it is bound.
        let fd = socket(AddressFamily::Packet, SockType::Datagram, flags, None)?;
        bind(fd.as_raw_fd(), &address(index, EVERYBODY)?)?;
        Ok(Self { fd: crate::polled(fd)?, index })
    }

    /// Sends a packet to who has this hardware address.
    pub fn send(&self, packet: &[u8], to: Mac) -> io::Result<()> {
        let to = address(self.index, to)?;
        sendto(self.fd.get_ref().as_raw_fd(), packet, &to, MsgFlags::empty())?;
        Ok(())
    }

    /// The next packet, or its beginning, and who has sent it.
    pub async fn receive(&self) -> io::Result<(Vec<u8>, Option<Mac>)> {
        let receive = |fd: &OwnedFd| {
            let mut packet = vec![0; LONGEST];
            let (len, from) = recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut packet)?;
            packet.truncate(len);
            Ok((packet, from.and_then(|from| from.addr()).map(Mac)))
        };
        self.fd.async_io(Interest::READABLE, receive).await
    }
}

fn address(index: u32, Mac(bytes): Mac) -> io::Result<LinkAddr> {
    let mut sll_addr = [0; 8];
    sll_addr[..6].copy_from_slice(&bytes);
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: (libc::ETH_P_IP as u16).to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr,
    };
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer is to a whole `sockaddr_ll`, of which the call makes a copy.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(len)) };
    address.ok_or_else(|| Errno::EINVAL.into())
}
