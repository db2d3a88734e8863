//! What a network namespace has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};

use crate::{Mac, Netlink, Prefix, Rule};

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

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// The table that it is in.
    pub table: u32,
    /// For whom it is.
    pub destination: Prefix,
    /// By whom it goes on.
    pub gateway: Option<IpAddr>,
    /// The number of the interface.
    pub interface: u32,
    /// The source address to prefer.
    pub source: Option<IpAddr>,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// The lower goes first.
    pub metric: u32,
    /// Smaller than the interface's, if it is not 0.
    pub mtu: u32,
    /// The gateway is there, whatever the addresses say.
    pub is_onlink: bool,
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

/// RT_TABLE_LOCAL.
const LOCAL: u8 = 255;

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
        let mut routes: Vec<_> = routes.filter(|route| is_known(route.interface)).collect();
        // A gateway has to be reachable before there is a route by it.
        routes.sort_by_key(|route| route.gateway.is_some());
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

impl Route {
    fn of(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        // Those of the kernel come with addresses; others come and go by themselves.
        let comes_by_itself = matches!(
            header.protocol,
            RouteProtocol::Kernel | RouteProtocol::IcmpRedirect | RouteProtocol::Ra
        );
        // Those of the table of local addresses are the kernel's.
        if header.table == LOCAL
            || header.kind != RouteType::Unicast
            || comes_by_itself
            || header.flags.contains(RouteFlags::Cloned)
        {
            return None;
        }
        let all: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut route = Self {
            table: header.table.into(),
            destination: Prefix { address: all, length: header.destination_prefix_length },
            gateway: None,
            interface: 0,
            source: None,
            scope: header.scope.into(),
            metric: 0,
            mtu: 0,
            is_onlink: header.flags.contains(RouteFlags::Onlink),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => route.destination.address = plain(address)?,
                RouteAttribute::Gateway(address) => route.gateway = Some(plain(address)?),
                RouteAttribute::PrefSource(address) => route.source = Some(plain(address)?),
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Oif(index) => route.interface = *index,
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        if let RouteMetric::Mtu(mtu) = metric {
                            route.mtu = *mtu;
                        }
                    }
                }
                _ => {}
            }
        }
        (route.interface != 0).then_some(route)
    }
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
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
