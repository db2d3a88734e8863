//! Changes, one by one.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};

use crate::{Mac, Neighbour, Netlink, Prefix, Route};

impl Netlink {
    /// Turns an interface on, or off.
    pub fn set_up(&mut self, index: u32, up: bool) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.change_mask = LinkFlags::Up;
        link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        self.ask(Message::SetLink(link), 0)
    }

    /// Gives an interface a name.
    pub fn set_name(&mut self, index: u32, name: &str) -> io::Result<()> {
        self.set(index, [LinkAttribute::IfName(name.to_owned())])
    }

    /// Gives an interface a hardware address.
    pub fn set_mac(&mut self, index: u32, Mac(bytes): Mac) -> io::Result<()> {
        self.set(index, [LinkAttribute::Address(bytes.to_vec())])
    }

    /// Says how large the packets of an interface can be.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.set(index, [LinkAttribute::Mtu(mtu)])
    }

    /// Has the kernel say nothing of its own on an interface: without an address of its link it speaks no IPv6.
    pub fn set_silent(&mut self, index: u32) -> io::Result<()> {
        let silent = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let set = self.set(index, [LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![silent])])]);
        match set {
            // There is no IPv6.
            Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => Ok(()),
            other => other,
        }
    }

    /// Has another namespace have an interface, under that name.
    pub fn move_to(&mut self, index: u32, namespace: &impl AsRawFd, name: &str) -> io::Result<()> {
        self.set(
            index,
            [LinkAttribute::NetNsFd(namespace.as_raw_fd()), LinkAttribute::IfName(name.to_owned())],
        )
    }

    fn set(&mut self, index: u32, attributes: impl IntoIterator<Item = LinkAttribute>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.extend(attributes);
        self.ask(Message::SetLink(link), 0)
    }

    /// Gives an interface an address, which is taken for nobody else's.
    pub fn add_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        let mut message = address(index, prefix);
        message.header.flags = AddressHeaderFlags::Nodad;
        if let Prefix { address: IpAddr::V4(v4), length: ..31 } = prefix {
            let hosts = u32::MAX.checked_shr(prefix.length.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast((u32::from(v4) | hosts).into()));
        }
        self.ask(Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address from an interface.
    pub fn remove_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        self.ask(Message::DelAddress(address(index, prefix)), 0)
    }

    /// Adds a route.
    pub fn add_route(&mut self, wanted: &Route) -> io::Result<()> {
        self.ask(Message::NewRoute(wanted.message()), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Removes a route.
    pub fn remove_route(&mut self, known: &Route) -> io::Result<()> {
        self.ask(Message::DelRoute(known.message()), 0)
    }

    /// Writes a neighbour down.
    pub fn add_neighbour(&mut self, wanted: &Neighbour) -> io::Result<()> {
        self.ask(Message::NewNeighbour(neighbour(wanted)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Forgets a neighbour.
    pub fn remove_neighbour(&mut self, known: &Neighbour) -> io::Result<()> {
        self.ask(Message::DelNeighbour(neighbour(known)), 0)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address(index: u32, prefix: Prefix) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(prefix.address);
    message.header.prefix_len = prefix.length;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(prefix.address));
    message.attributes.push(AddressAttribute::Address(prefix.address));
    message
}

fn neighbour(of: &Neighbour) -> NeighbourMessage {
    let Mac(mac) = of.mac;
    let mut message = NeighbourMessage::default();
    message.header.family = family(of.address);
    message.header.ifindex = of.interface;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(of.address.into()));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message
}
