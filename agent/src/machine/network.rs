//! The machine's network, by netlink: interfaces are found by their hardware addresses, and get what the
//! shim found in the pod's namespace on the host.

use std::net::IpAddr;

use agent_api::agent::{Interface, Neighbour, Route};
use anyhow::{Context, Result, anyhow, bail, ensure};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, route::RouteAddress};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// Larger than any part of an answer.
const BUFFER: usize = 64 * 1024;
/// More than any pod has.
const MOST: usize = 256;
const ONLINK: u32 = 4;

/// Brings up `lo`.
pub fn loopback_up() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let mut link = LinkMessage::default();
    link.header.index = 1;
    link.header.change_mask = LinkFlags::Up;
    link.header.flags = LinkFlags::Up;
    netlink.ask(Message::SetLink(link), 0)
}

/// Sets up interfaces, then routes and neighbours.
pub fn configure(interfaces: &[Interface], routes: &[Route], neighbours: &[Neighbour]) -> Result<()> {
    for count in [interfaces.len(), routes.len(), neighbours.len()] {
        ensure!(count <= MOST, "{count} are more than {MOST} of a kind");
    }
    let mut netlink = Netlink::open()?;
    for interface in interfaces {
        netlink.set_up(interface).with_context(|| format!("setting up the interface {}", interface.name))?;
    }
    for route in routes {
        netlink
            .add_route(route)
            .with_context(|| format!("adding a route to {:?} by {:?}", route.destination, route.gateway))?;
    }
    for neighbour in neighbours {
        netlink
            .add_neighbour(neighbour)
            .with_context(|| format!("adding the neighbour {}", neighbour.address))?;
    }
    Ok(())
}

struct Netlink {
    socket: Socket,
}

impl Netlink {
    fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("opening netlink")?;
        socket.bind_auto().context("binding netlink")?;
        Ok(Self { socket })
    }

    /// Asks for a change.
    fn ask(&mut self, message: Message, flags: u16) -> Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags, |_| {})
    }

    /// Asks what there is.
    fn dump(&mut self, message: Message, each: impl FnMut(Message)) -> Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP, each)
    }

    fn exchange(&mut self, message: Message, flags: u16, mut each: impl FnMut(Message)) -> Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).context("asking the kernel")?;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0).context("waiting for the kernel")?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<Message>::deserialize(rest)
                    .map_err(|error| anyhow!("the kernel's answer: {error}"))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                match answer.payload {
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(code) => Err(std::io::Error::from_raw_os_error(-code.get()).into()),
                        };
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }

    fn links(&mut self) -> Result<Vec<LinkMessage>> {
        let mut links = Vec::new();
        self.dump(Message::GetLink(LinkMessage::default()), |message| {
            if let Message::NewLink(link) = message {
                links.push(link);
            }
        })?;
        Ok(links)
    }

    fn index_of(&mut self, name: &str) -> Result<u32> {
        let is = |link: &LinkMessage| {
            link.attributes.iter().any(|a| matches!(a, LinkAttribute::IfName(known) if known == name))
        };
        let found = self.links()?.into_iter().find(is);
        found.map(|link| link.header.index).with_context(|| format!("there is no interface {name:?}"))
    }

    fn set_up(&mut self, interface: &Interface) -> Result<()> {
        let mac = hardware_address(&interface.mac)?;
        let has = |link: &LinkMessage| {
            link.attributes.iter().any(|a| matches!(a, LinkAttribute::Address(known) if *known == mac))
        };
        let link = self.links()?.into_iter().find(has);
        let index = link
            .map(|link| link.header.index)
            .with_context(|| format!("no interface has the address {}", interface.mac))?;
        // A name and a hardware address can be changed while it is down, which also clears its routes.
        let mut down = LinkMessage::default();
        down.header.index = index;
        down.header.change_mask = LinkFlags::Up;
        self.ask(Message::SetLink(down), 0).context("taking it down")?;
        self.remove_addresses(index).context("removing addresses")?;
        let mut change = LinkMessage::default();
        change.header.index = index;
        if !interface.name.is_empty() {
            change.attributes.push(LinkAttribute::IfName(interface.name.clone()));
        }
        if interface.mtu != 0 {
            change.attributes.push(LinkAttribute::Mtu(interface.mtu));
        }
        if !interface.new_mac.is_empty() {
            change.attributes.push(LinkAttribute::Address(hardware_address(&interface.new_mac)?));
        }
        self.ask(Message::SetLink(change), 0).context("naming it")?;
        let mut up = LinkMessage::default();
        up.header.index = index;
        up.header.change_mask = LinkFlags::Up;
        up.header.flags = LinkFlags::Up;
        self.ask(Message::SetLink(up), 0).context("bringing it up")?;
        for text in &interface.addresses {
            let (address, length) = prefix(text)?;
            let mut message = AddressMessage::default();
            message.header.family = family(address);
            message.header.prefix_len = length;
            message.header.index = index;
            // The host has made sure that it is nobody else's.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Local(address));
            message.attributes.push(AddressAttribute::Address(address));
            if let IpAddr::V4(v4) = address
                && length < 31
            {
                let hosts = u32::MAX.checked_shr(u32::from(length)).unwrap_or(0);
                message.attributes.push(AddressAttribute::Broadcast((u32::from(v4) | hosts).into()));
            }
            self.ask(Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
                .with_context(|| format!("adding the address {text}"))?;
        }
        Ok(())
    }

    fn remove_addresses(&mut self, index: u32) -> Result<()> {
        let mut there = Vec::new();
        self.dump(Message::GetAddress(AddressMessage::default()), |message| {
            if let Message::NewAddress(address) = message
                && address.header.index == index
            {
                there.push(address);
            }
        })?;
        for address in there {
            self.ask(Message::DelAddress(address), 0)?;
        }
        Ok(())
    }

    fn add_route(&mut self, route: &Route) -> Result<()> {
        let gateway = address_or_none(&route.gateway)?;
        let source = address_or_none(&route.source)?;
        let destination = if route.destination.is_empty() { None } else { Some(prefix(&route.destination)?) };
        let known = destination.map(|(address, _)| address).or(gateway).or(source);
        let mut message = RouteMessage::default();
        message.header.address_family = known.map_or(AddressFamily::Inet, family);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        message.header.scope = match u8::try_from(route.scope)? {
            0 if gateway.is_none() && known.is_some_and(|address| address.is_ipv4()) => RouteScope::Link,
            scope => RouteScope::from(scope),
        };
        if route.flags & ONLINK != 0 {
            message.header.flags = RouteFlags::Onlink;
        }
        if let Some((address, length)) = destination {
            message.header.destination_prefix_length = length;
            message.attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
        }
        if let Some(gateway) = gateway {
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        if let Some(source) = source {
            message.attributes.push(RouteAttribute::PrefSource(source.into()));
        }
        if !route.interface.is_empty() {
            message.attributes.push(RouteAttribute::Oif(self.index_of(&route.interface)?));
        }
        if route.metric != 0 {
            message.attributes.push(RouteAttribute::Priority(route.metric));
        }
        if route.mtu != 0 {
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
        }
        self.ask(Message::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn add_neighbour(&mut self, neighbour: &Neighbour) -> Result<()> {
        let address: IpAddr = neighbour.address.parse().context("its address")?;
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = self.index_of(&neighbour.interface)?;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(hardware_address(&neighbour.mac)?));
        self.ask(Message::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_or_none(text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).with_context(|| format!("{text:?} is no address"))
}

/// `10.4.0.7/24`, or an address alone.
fn prefix(text: &str) -> Result<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().with_context(|| format!("{text:?} has no address"))?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = match length {
        None => most,
        Some(length) => length.parse().with_context(|| format!("{text:?} has no length"))?,
    };
    ensure!(length <= most, "{text:?} has a length over {most}");
    Ok((address, length))
}

fn hardware_address(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    match bytes {
        Some(bytes) if bytes.len() == 6 => Ok(bytes),
        _ => bail!("{text:?} is no hardware address"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, expected) in [
            ("10.4.0.7/24", Some(("10.4.0.7", 24))),
            ("10.4.0.7", Some(("10.4.0.7", 32))),
            ("fd00::7/64", Some(("fd00::7", 64))),
            ("fd00::7/129", None),
            ("10.4.0.7/33", None),
            ("10.4.0/24", None),
            ("10.4.0.7/", None),
        ] {
            let expected = expected.map(|(address, length)| (address.parse().unwrap(), length));
            assert_eq!(prefix(text).ok(), expected, "{text}");
        }
        assert_eq!(hardware_address("02:00:00:00:00:fF").unwrap(), [2, 0, 0, 0, 0, 255]);
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "02:00:00:00:00:0g"] {
            assert!(hardware_address(text).is_err(), "{text}");
        }
    }
}
