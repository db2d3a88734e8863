//! The machine's network, by netlink: what the shim has found in the pod's namespace on the host.
//!
//! The machine's network devices are there from the start, though nobody has a use for them yet. Until then they are in
//! a namespace of their own, so that containers see no more than they were given.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use agent_api::agent::{Interface, Neighbour, Route, SetNetworkRequest};
use anyhow::{Context, Error, Result, ensure};
use rtnl::{Mac, Netlink, Network, Prefix};

/// More than any pod has.
const MOST: usize = 256;
/// The number of `lo` in every namespace.
const LOOPBACK: u32 = 1;
/// RTNH_F_ONLINK.
const ONLINK: u32 = 4;

/// Brings up `lo`.
pub fn loopback_up() -> Result<()> {
    Ok(Netlink::open()?.set_up(LOOPBACK, true)?)
}

/// Where the network devices are that nobody uses.
pub struct Parked(OwnedFd);

/// Parks all network devices, if there are any.
pub fn park() -> Result<Option<Parked>> {
    let mut netlink = Netlink::open()?;
    let devices = Network::look(&mut netlink).context("listing the network devices")?.interfaces;
    if devices.is_empty() {
        return Ok(None);
    }
    let parked = Parked(rtnl::create_namespace().context("making a network namespace")?);
    for device in &devices {
        parked.take(&mut netlink, device)?;
    }
    Ok(Some(parked))
}

impl Parked {
    fn take(&self, netlink: &mut Netlink, device: &rtnl::Interface) -> Result<()> {
        if device.is_up {
            netlink.set_up(device.index, false)?;
        }
        // A name that nobody is given: numbers are not used twice.
        let name = format!("parked{}", device.index);
        netlink.move_to(device.index, &self.0, &name).with_context(|| format!("parking {}", device.name))
    }

    /// Gives the devices with these hardware addresses back, if they are here.
    fn give(&self, macs: &HashSet<Mac>) -> Result<()> {
        let here = rtnl::current_namespace()?;
        let moving = || {
            let mut netlink = Netlink::open()?;
            for device in Network::look(&mut netlink)?.interfaces {
                if device.permanent.is_some_and(|mac| macs.contains(&mac)) {
                    netlink.move_to(device.index, &here, &device.name)?;
                }
            }
            Ok(())
        };
        rtnl::within(&self.0, moving).context("taking network devices out of where they are parked")
    }
}

/// An interface as it is to be.
struct Wanted {
    permanent: Mac,
    name: String,
    mac: Mac,
    mtu: u32,
    addresses: Vec<Prefix>,
}

impl Wanted {
    fn parse(interface: &Interface) -> Result<Self> {
        let permanent = interface.mac.parse().map_err(Error::msg)?;
        let mac = match interface.new_mac.as_str() {
            "" => permanent,
            text => text.parse().map_err(Error::msg)?,
        };
        ensure!(!interface.name.is_empty(), "the interface {permanent} has no name");
        let addresses = interface.addresses.iter().map(|text| text.parse().map_err(Error::msg));
        Ok(Self {
            permanent,
            name: interface.name.clone(),
            mac,
            mtu: interface.mtu,
            addresses: addresses.collect::<Result<_>>()?,
        })
    }

    fn find<'a>(&self, network: &'a Network) -> Result<&'a rtnl::Interface> {
        let found = network.interfaces.iter().find(|device| device.permanent == Some(self.permanent));
        found.with_context(|| format!("no network device has come with the address {}", self.permanent))
    }
}

/// Makes the network what is asked for: what is not named goes.
pub fn set(parked: Option<&Parked>, request: &SetNetworkRequest) -> Result<()> {
    let SetNetworkRequest { interfaces, routes, neighbours, .. } = request;
    for count in [interfaces.len(), routes.len(), neighbours.len()] {
        ensure!(count <= MOST, "{count} are more than {MOST} of a kind");
    }
    let wanted: Vec<_> = interfaces.iter().map(Wanted::parse).collect::<Result<_>>()?;
    let mut netlink = Netlink::open().context("opening netlink")?;
    choose(&mut netlink, parked, &wanted)?;
    name(&mut netlink, &wanted)?;
    for interface in &wanted {
        address(&mut netlink, interface)
            .with_context(|| format!("setting up the interface {}", interface.name))?;
    }
    let network = Network::look(&mut netlink)?;
    let index_of = |name: &str| {
        let found = network.interfaces.iter().find(|device| device.name == name);
        found.map(|device| device.index).with_context(|| format!("there is no interface {name:?}"))
    };
    let routes: Vec<_> = routes.iter().map(|route| parse_route(route, index_of)).collect::<Result<_>>()?;
    for route in network.routes.iter().filter(|route| !routes.contains(route)) {
        netlink
            .remove_route(route)
            .with_context(|| format!("removing the route to {}", route.destination))?;
    }
    for route in routes.iter().filter(|route| !network.routes.contains(route)) {
        netlink.add_route(route).with_context(|| format!("adding a route to {}", route.destination))?;
    }
    let neighbours: Vec<_> =
        neighbours.iter().map(|neighbour| parse_neighbour(neighbour, index_of)).collect::<Result<_>>()?;
    for neighbour in network.neighbours.iter().filter(|known| !neighbours.contains(known)) {
        let removed = netlink.remove_neighbour(neighbour);
        removed.with_context(|| format!("forgetting the neighbour {}", neighbour.address))?;
    }
    for neighbour in neighbours.iter().filter(|wanted| !network.neighbours.contains(wanted)) {
        let added = netlink.add_neighbour(neighbour);
        added.with_context(|| format!("adding the neighbour {}", neighbour.address))?;
    }
    Ok(())
}

/// Those that are wanted are here, and no others.
fn choose(netlink: &mut Netlink, parked: Option<&Parked>, wanted: &[Wanted]) -> Result<()> {
    let Some(parked) = parked else { return Ok(()) };
    let wanted: HashSet<_> = wanted.iter().map(|interface| interface.permanent).collect();
    for device in Network::look(netlink)?.interfaces {
        if !device.permanent.is_some_and(|mac| wanted.contains(&mac)) {
            parked.take(netlink, &device)?;
        }
    }
    parked.give(&wanted)
}

/// Names and hardware addresses, which can be changed of an interface that is down.
fn name(netlink: &mut Netlink, wanted: &[Wanted]) -> Result<()> {
    let network = Network::look(netlink)?;
    let mut changed = Vec::new();
    for interface in wanted {
        let device = interface.find(&network)?;
        if device.name != interface.name || device.mac != interface.mac {
            changed.push((interface, device));
        }
    }
    // Two of them may change names with each other.
    for (interface, device) in &changed {
        let about = || format!("freeing the name of {}", device.name);
        if device.is_up {
            netlink.set_up(device.index, false).with_context(about)?;
        }
        if device.name != interface.name {
            netlink.set_name(device.index, &format!("moving{}", device.index)).with_context(about)?;
        }
    }
    for (interface, device) in &changed {
        let about = || format!("naming the interface {}", interface.name);
        if device.mac != interface.mac {
            netlink.set_mac(device.index, interface.mac).with_context(about)?;
        }
        if device.name != interface.name {
            netlink.set_name(device.index, &interface.name).with_context(about)?;
        }
    }
    Ok(())
}

/// What an interface has when it has its name.
fn address(netlink: &mut Netlink, wanted: &Wanted) -> Result<()> {
    let network = Network::look(netlink)?;
    let device = wanted.find(&network)?;
    if wanted.mtu != 0 && device.mtu != wanted.mtu {
        netlink.set_mtu(device.index, wanted.mtu).with_context(|| format!("its MTU of {}", wanted.mtu))?;
    }
    if !device.is_up {
        netlink.set_up(device.index, true).context("bringing it up")?;
    }
    for prefix in device.addresses.iter().filter(|prefix| !wanted.addresses.contains(prefix)) {
        let removed = netlink.remove_address(device.index, *prefix);
        removed.with_context(|| format!("removing the address {prefix}"))?;
    }
    // With an address go others of the same network.
    let network = Network::look(netlink)?;
    let device = wanted.find(&network)?;
    for prefix in wanted.addresses.iter().filter(|prefix| !device.addresses.contains(prefix)) {
        let added = netlink.add_address(device.index, *prefix);
        added.with_context(|| format!("adding the address {prefix}"))?;
    }
    Ok(())
}

fn parse_route(route: &Route, index_of: impl Fn(&str) -> Result<u32>) -> Result<rtnl::Route> {
    let address = |text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).with_context(|| format!("{text:?} is no address")),
    };
    Ok(rtnl::Route {
        destination: route.destination.parse().map_err(Error::msg)?,
        gateway: address(&route.gateway)?,
        interface: index_of(&route.interface)?,
        source: address(&route.source)?,
        scope: u8::try_from(route.scope)?,
        metric: route.metric,
        mtu: route.mtu,
        is_onlink: route.flags & ONLINK != 0,
    })
}

fn parse_neighbour(neighbour: &Neighbour, index_of: impl Fn(&str) -> Result<u32>) -> Result<rtnl::Neighbour> {
    Ok(rtnl::Neighbour {
        interface: index_of(&neighbour.interface)?,
        address: neighbour
            .address
            .parse()
            .with_context(|| format!("{:?} is no address", neighbour.address))?,
        mac: neighbour.mac.parse().map_err(Error::msg)?,
    })
}
