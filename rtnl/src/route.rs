//! Routes: where packets for a destination go on, by one gateway or by several, or that they go nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType,
};

use crate::Prefix;

/// RT_TABLE_LOCAL.
const LOCAL: u8 = 255;
/// RTN_UNICAST.
pub const UNICAST: u8 = 1;
/// RTN_BLACKHOLE, RTN_UNREACHABLE and RTN_PROHIBIT: packets go nowhere, and whoever sends them is told so or not.
pub const NOWHERE: [u8; 3] = [6, 7, 8];

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Route {
    /// The table that it is in.
    pub table: u32,
    /// RTN_*: [`UNICAST`], or one that leads [`NOWHERE`].
    pub kind: u8,
    /// For whom it is.
    pub destination: Prefix,
    /// How it goes on: by each of these for a part of the connections. None if it leads nowhere.
    pub hops: Vec<Hop>,
    /// The source address to prefer.
    pub source: Option<IpAddr>,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// The lower goes first.
    pub metric: u32,
    /// Smaller than the interface's, if it is not 0.
    pub mtu: u32,
}

/// The next one on a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hop {
    /// By whom it goes on.
    pub gateway: Option<IpAddr>,
    /// The number of the interface.
    pub interface: u32,
    /// The gateway is there, whatever the addresses say.
    pub is_onlink: bool,
    /// How much goes by it, beside others; 0 is once, as the kernel counts.
    pub weight: u8,
}

impl Route {
    /// Unless it is the kernel's own, or of a kind of which nobody has to know.
    pub(crate) fn of(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        // Those of the kernel come with addresses; others come and go by themselves.
        let comes_by_itself = matches!(
            header.protocol,
            RouteProtocol::Kernel | RouteProtocol::IcmpRedirect | RouteProtocol::Ra
        );
        let kind = u8::from(header.kind);
        // Those of the table of local addresses are the kernel's.
        if header.table == LOCAL
            || (kind != UNICAST && !NOWHERE.contains(&kind))
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
            kind,
            destination: Prefix { address: all, length: header.destination_prefix_length },
            hops: Vec::new(),
            source: None,
            scope: header.scope.into(),
            metric: 0,
            mtu: 0,
        };
        let is_onlink = header.flags.contains(RouteFlags::Onlink);
        let mut only = Hop { gateway: None, interface: 0, is_onlink, weight: 0 };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => route.destination.address = plain(address)?,
                RouteAttribute::Gateway(address) => only.gateway = Some(plain(address)?),
                RouteAttribute::PrefSource(address) => route.source = Some(plain(address)?),
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Oif(index) => only.interface = *index,
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::MultiPath(hops) => route.hops = hops.iter().map(Hop::of).collect(),
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
        if kind != UNICAST {
            // Those of v6 name the loopback.
            route.hops.clear();
        } else if only.interface != 0 {
            route.hops = vec![only];
        }
        Some(route)
    }

    /// As far as it goes by such interfaces; none if it does not.
    pub(crate) fn by_those(mut self, is_one: impl Fn(u32) -> bool) -> Option<Self> {
        self.hops.retain(|hop| is_one(hop.interface));
        (self.kind != UNICAST || !self.hops.is_empty()).then_some(self)
    }

    /// Whether somebody has to be reachable for it.
    pub fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    pub(crate) fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        let is_v4 = self.destination.address.is_ipv4();
        message.header.address_family = if is_v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.destination_prefix_length = self.destination.length;
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.attributes.push(RouteAttribute::Table(self.table));
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::from(self.kind);
        message.header.scope = self.scope.into();
        if self.destination.length > 0 {
            message
                .attributes
                .push(RouteAttribute::Destination(RouteAddress::from(self.destination.address)));
        }
        match &*self.hops {
            [] => {}
            [only] => {
                if only.is_onlink {
                    message.header.flags = RouteFlags::Onlink;
                }
                message
                    .attributes
                    .extend(only.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
                message.attributes.push(RouteAttribute::Oif(only.interface));
            }
            several => {
                let several = several.iter().map(Hop::message).collect();
                message.attributes.push(RouteAttribute::MultiPath(several));
            }
        }
        if let Some(source) = self.source {
            message.attributes.push(RouteAttribute::PrefSource(source.into()));
        }
        if self.metric != 0 {
            message.attributes.push(RouteAttribute::Priority(self.metric));
        }
        if self.mtu != 0 {
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(self.mtu)]));
        }
        message
    }
}

impl Hop {
    fn of(hop: &RouteNextHop) -> Self {
        let mut gateways = hop.attributes.iter().filter_map(|attribute| match attribute {
            RouteAttribute::Gateway(address) => plain(address),
            _ => None,
        });
        Self {
            gateway: gateways.next(),
            interface: hop.interface_index,
            is_onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
            weight: hop.hops,
        }
    }

    fn message(&self) -> RouteNextHop {
        let mut message = RouteNextHop::default();
        message.interface_index = self.interface;
        message.hops = self.weight;
        if self.is_onlink {
            message.flags = RouteNextHopFlags::Onlink;
        }
        message.attributes.extend(self.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
        message
    }
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
