//! What a network namespace has.

use std::io;
use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteMessage;

use crate::{Mac, Netlink, Prefix, Route, Rule};

/// What can be brought from one namespace into another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Those that are Ethernet, in the order in which they came.
    pub interfaces: Vec<Interface>,
    /// Those that somebody has added, those without a gateway first.
    pub routes: Vec<Route>,
    /// Those that somebody has written down.
    pub neighbours: Vec<Neighbour>,
    /// Those that somebody has added.
    pub rules: Vec<Rule>,
}

/// A device with which frames leave a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number, which no other has as long as its namespace lives.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// The one that it came with.
    pub permanent: Option<Mac>,
    /// The largest packet, without the Ethernet header.
    pub mtu: u32,
    /// Whether it is to be used.
    pub is_up: bool,
    /// A bridge, or a bond, has it.
    pub is_port: bool,
    /// Those that somebody has given it, and not those of its link.
    pub addresses: Vec<Prefix>,
}

/// A neighbour's hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The number of the interface.
    pub interface: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

impl Network {
    /// Looks at the namespace that `netlink` is about.
    pub fn look(netlink: &mut Netlink) -> io::Result<Self> {
        let mut interfaces: Vec<_> = netlink.links()?.iter().filter_map(Interface::of).collect();
        interfaces.sort_by_key(|interface| interface.index);
        for message in netlink.dump(&Message::GetAddress(AddressMessage::default()))? {
            if let Message::NewAddress(address) = message
                && let Some(found) = interfaces.iter_mut().find(|found| found.index == address.header.index)
            {
                found.addresses.extend(prefix(&address));
            }
        }
        let is_known = |index| interfaces.iter().any(|interface: &Interface| interface.index == index);
        let routes = netlink.dump(&Message::GetRoute(RouteMessage::default()))?;
        let routes = routes.iter().filter_map(|message| match message {
            Message::NewRoute(message) => Route::of(message),
            _ => None,
        });
        let mut routes: Vec<_> = routes.filter_map(|route| route.by_those(is_known)).collect();
        // A gateway has to be reachable before there is a route by it.
        routes.sort_by_key(Route::has_gateway);
        let neighbours = netlink.dump(&Message::GetNeighbour(NeighbourMessage::default()))?;
        let neighbours = neighbours.iter().filter_map(|message| match message {
            Message::NewNeighbour(message) => Neighbour::of(message),
            _ => None,
        });
        let neighbours = neighbours.filter(|neighbour| is_known(neighbour.interface)).collect();
        let rules = netlink.rules()?;
        Ok(Self { interfaces, routes, neighbours, rules })
    }
}

impl Interface {
    /// Loopback and tunnels are none.
    fn of(link: &LinkMessage) -> Option<Self> {
        if link.header.link_layer_type != LinkLayerType::Ether {
            return None;
        }
        let mut found = Self {
            index: link.header.index,
            name: crate::name(link)?.to_owned(),
            mac: Mac([0; 6]),
            permanent: None,
            mtu: 0,
            is_up: link.header.flags.contains(LinkFlags::Up),
            is_port: false,
            addresses: Vec::new(),
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => found.mac = mac(bytes)?,
                LinkAttribute::PermAddress(bytes) => found.permanent = mac(bytes),
                LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
                LinkAttribute::Controller(_) => found.is_port = true,
                _ => {}
            }
        }
        Some(found)
    }
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

/// The address, unless the kernel has made it.
fn prefix(message: &AddressMessage) -> Option<Prefix> {
    let is_v6 = message.header.family == AddressFamily::Inet6;
    if is_v6 && message.header.scope == AddressScope::Link {
        return None;
    }
    let (mut own, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    // Where there are two, the other is the peer's.
    Some(Prefix { address: own.or(other)?, length: message.header.prefix_len })
}

impl Neighbour {
    fn of(message: &NeighbourMessage) -> Option<Self> {
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let (mut address, mut hardware) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                    address = Some((*found).into());
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                    address = Some((*found).into());
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => hardware = mac(bytes),
                _ => {}
            }
        }
        Some(Self { interface: message.header.ifindex, address: address?, mac: hardware? })
    }
}
