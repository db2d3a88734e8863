//! The machine's network, by netlink: what the shim has found in the pod's namespace on the host.
//!
//! The machine's network devices are there from the start, though nobody has a use for them yet. Until then they are in
//! a namespace of their own, so that containers see no more than they were given.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::thread;

use agent_api::agent::{Attribute, Hop, Interface, Neighbour, Route, Rule, SetNetworkRequest};
use anyhow::{Context, Error, Result, ensure};
use log::warn;
use rtnl::{Mac, Netlink, Network, Prefix};

use super::ethtool;

/// More than any pod has.
const MOST: usize = 256;
/// The number of `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// Brings up `lo`.
pub fn loopback_up() -> Result<()> {
    Ok(Netlink::open()?.set_up(LOOPBACK, true)?)
}

/// The machine's network devices.
pub struct Devices {
    /// Where those are that nobody uses.
    park: OwnedFd,
    /// The hardware addresses that they came with. Others are the containers' own.
    all: HashSet<Mac>,
    /// Of these, those by which packets go that nobody cuts up.
    whole: HashSet<Mac>,
    given: Given,
}

/// What the shim had the network given, and can have taken away again: the rest is the containers' own.
#[derive(Default, Clone)]
struct Given {
    addresses: HashSet<(Mac, Prefix)>,
    routes: HashSet<rtnl::Route>,
    neighbours: HashSet<rtnl::Neighbour>,
    rules: HashSet<rtnl::Rule>,
}

/// Finds the network devices, and parks all of them.
pub fn devices() -> Result<Devices> {
    let mut netlink = Netlink::open()?;
    let found = Network::look(&mut netlink).context("listing the network devices")?.interfaces;
    let devices = Devices {
        park: rtnl::create_namespace().context("making a network namespace")?,
        all: found.iter().filter_map(|device| device.permanent).collect(),
        whole: HashSet::new(),
        given: Given::default(),
    };
    for device in &found {
        devices.put_away(&mut netlink, device)?;
    }
    Ok(devices)
}

impl Devices {
    /// Makes the network what is asked for.
    pub fn set(&mut self, request: &SetNetworkRequest) -> Result<()> {
        let SetNetworkRequest { interfaces, routes, neighbours, rules, .. } = request;
        for count in [interfaces.len(), routes.len(), neighbours.len(), rules.len()] {
            ensure!(count <= MOST, "{count} are more than {MOST} of a kind");
        }
        let wanted: Vec<_> = interfaces.iter().map(Wanted::parse).collect::<Result<_>>()?;
        let rules: Vec<_> = rules.iter().map(parse_rule).collect::<Result<_>>()?;
        let mut netlink = Netlink::open().context("opening netlink")?;
        self.choose(&mut netlink, &wanted)?;
        name(&mut netlink, &wanted)?;

        let network = Network::look(&mut netlink)?;
        self.cut_up(&wanted)?;
        self.use_queues_of(&network);
        let index_of = |name: &str| {
            let found = network.interfaces.iter().find(|device| device.name == name);
            found.map(|device| device.index).with_context(|| format!("there is no interface {name:?}"))
        };
        let routes: Vec<_> =
            routes.iter().map(|route| parse_route(route, index_of)).collect::<Result<_>>()?;
        let neighbours: Vec<_> =
            neighbours.iter().map(|neighbour| parse_neighbour(neighbour, index_of)).collect::<Result<_>>()?;
        let addresses = wanted
            .iter()
            .flat_map(|interface| interface.addresses.iter().map(|prefix| (interface.permanent, *prefix)));
        let now = Given {
            addresses: addresses.collect(),
            routes: routes.iter().cloned().collect(),
            neighbours: neighbours.iter().copied().collect(),
            rules: rules.iter().cloned().collect(),
        };
        // If it fails on the way, any of both may be there.
        let before = self.given.clone();
        self.given.addresses.extend(&now.addresses);
        self.given.routes.extend(now.routes.iter().cloned());
        self.given.neighbours.extend(&now.neighbours);
        self.given.rules.extend(now.rules.iter().cloned());

        for rule in network.rules.iter().filter(|rule| before.rules.contains(rule)) {
            if !now.rules.contains(rule) {
                netlink.remove_rule(rule).with_context(|| format!("removing the rule {}", rule.priority))?;
            }
        }
        for route in network.routes.iter().filter(|route| before.routes.contains(route)) {
            if !now.routes.contains(route) {
                let removed = netlink.remove_route(route);
                removed.with_context(|| format!("removing the route to {}", route.destination))?;
            }
        }
        for neighbour in network.neighbours.iter().filter(|known| before.neighbours.contains(known)) {
            if !now.neighbours.contains(neighbour) {
                let removed = netlink.remove_neighbour(neighbour);
                removed.with_context(|| format!("forgetting the neighbour {}", neighbour.address))?;
            }
        }
        for interface in &wanted {
            let device = interface.find(&network)?;
            let prefixes = device.addresses.iter().map(|prefix| (interface.permanent, *prefix));
            let gone = prefixes
                .filter(|address| before.addresses.contains(address) && !now.addresses.contains(address));
            let gone: Vec<_> = gone.map(|(_, prefix)| prefix).collect();
            set_up(&mut netlink, interface, device, &gone)
                .with_context(|| format!("setting up the interface {}", interface.name))?;
        }
        // With an address go others of its network, and routes.
        let network = Network::look(&mut netlink)?;
        for interface in &wanted {
            let device = interface.find(&network)?;
            for prefix in interface.addresses.iter().filter(|prefix| !device.addresses.contains(prefix)) {
                let added = netlink.add_address(device.index, *prefix);
                added.with_context(|| format!("adding the address {prefix} to {}", interface.name))?;
            }
        }
        for route in routes.iter().filter(|route| !network.routes.contains(route)) {
            netlink.add_route(route).with_context(|| format!("adding a route to {}", route.destination))?;
        }
        for rule in rules.iter().filter(|rule| !network.rules.contains(rule)) {
            netlink.add_rule(rule).with_context(|| format!("adding the rule {}", rule.priority))?;
        }
        for neighbour in neighbours.iter().filter(|wanted| !network.neighbours.contains(wanted)) {
            let added = netlink.add_neighbour(neighbour);
            added.with_context(|| format!("adding the neighbour {}", neighbour.address))?;
        }
        self.given = now;
        Ok(())
    }

    /// Of the devices, those that are wanted are here, and no others.
    fn choose(&self, netlink: &mut Netlink, wanted: &[Wanted]) -> Result<()> {
        let mut missing: HashSet<_> = wanted.iter().map(|interface| interface.permanent).collect();
        for device in Network::look(netlink)?.interfaces {
            let Some(mac) = device.permanent.filter(|mac| self.all.contains(mac)) else { continue };
            if !missing.remove(&mac) {
                self.put_away(netlink, &device)?;
            }
        }
        if missing.is_empty() { Ok(()) } else { self.fetch(&missing) }
    }

    /// Has the kernel cut up packets where nobody else does. Elsewhere it is left as it is.
    fn cut_up(&mut self, wanted: &[Wanted]) -> Result<()> {
        for Wanted { permanent, name, is_whole, .. } in wanted {
            if *is_whole != self.whole.contains(permanent) {
                ethtool::set_segmentation(name, !is_whole)
                    .with_context(|| format!("who cuts up large packets of {name}"))?;
                if *is_whole {
                    self.whole.insert(*permanent);
                } else {
                    self.whole.remove(permanent);
                }
            }
        }
        Ok(())
    }

    /// Has the devices that are here use as many queue pairs as processors run by now.
    pub fn use_queues(&self) -> Result<()> {
        self.use_queues_of(&Network::look(&mut Netlink::open()?)?);
        Ok(())
    }

    /// One that cannot is only slower.
    fn use_queues_of(&self, network: &Network) {
        let processors = thread::available_parallelism().map_or(1, |count| count.get() as u32);
        for device in &network.interfaces {
            let Some(mac) = device.permanent.filter(|mac| self.all.contains(mac)) else { continue };
            // What is behind those has one.
            let wanted = if self.whole.contains(&mac) { 1 } else { processors };
            if let Err(error) = ethtool::set_queues(&device.name, wanted) {
                warn!("{} goes on with the queues that it has, not with {wanted}: {error:#}", device.name);
            }
        }
    }

    fn put_away(&self, netlink: &mut Netlink, device: &rtnl::Interface) -> Result<()> {
        if device.is_up {
            netlink.set_up(device.index, false)?;
        }
        // A name that nobody is given: numbers are not used twice.
        let name = format!("parked{}", device.index);
        netlink.move_to(device.index, &self.park, &name).with_context(|| format!("parking {}", device.name))
    }

    /// Brings those with these hardware addresses here.
    fn fetch(&self, macs: &HashSet<Mac>) -> Result<()> {
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
        rtnl::within(&self.park, moving).context("fetching network devices from where they are parked")
    }
}

/// An interface as it is to be.
struct Wanted {
    permanent: Mac,
    name: String,
    mac: Mac,
    mtu: u32,
    is_up: bool,
    is_whole: bool,
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
            is_up: !interface.down,
            is_whole: interface.whole,
            addresses: addresses.collect::<Result<_>>()?,
        })
    }

    fn find<'a>(&self, network: &'a Network) -> Result<&'a rtnl::Interface> {
        let found = network.interfaces.iter().find(|device| device.permanent == Some(self.permanent));
        found.with_context(|| format!("no network device has come with the address {}", self.permanent))
    }
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

/// What can be set of an interface that has its name, without addresses that are to go.
fn set_up(netlink: &mut Netlink, wanted: &Wanted, device: &rtnl::Interface, gone: &[Prefix]) -> Result<()> {
    if wanted.mtu != 0 && device.mtu != wanted.mtu {
        netlink.set_mtu(device.index, wanted.mtu).with_context(|| format!("its MTU of {}", wanted.mtu))?;
    }
    if device.is_up != wanted.is_up {
        netlink.set_up(device.index, wanted.is_up).context("turning it on or off")?;
    }
    for prefix in gone {
        let removed = netlink.remove_address(device.index, *prefix);
        removed.with_context(|| format!("removing the address {prefix}"))?;
    }
    Ok(())
}

fn parse_route(route: &Route, index_of: impl Fn(&str) -> Result<u32>) -> Result<rtnl::Route> {
    let address = |text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).with_context(|| format!("{text:?} is no address")),
    };
    let hop = |gateway: &str, interface: &str, is_onlink, weight| {
        let (gateway, interface) = (address(gateway)?, index_of(interface)?);
        Ok::<_, Error>(rtnl::Hop { gateway, interface, is_onlink, weight: u8::try_from(weight)? })
    };
    let kind = if route.kind == 0 { rtnl::UNICAST } else { u8::try_from(route.kind)? };
    let mut hops = Vec::new();
    if kind == rtnl::UNICAST {
        hops.push(hop(&route.gateway, &route.interface, route.onlink, route.weight)?);
        for Hop { gateway, interface, onlink, weight, .. } in &route.more {
            hops.push(hop(gateway, interface, *onlink, *weight)?);
        }
    }
    Ok(rtnl::Route {
        table: route.table,
        kind,
        destination: route.destination.parse().map_err(Error::msg)?,
        hops,
        source: address(&route.source)?,
        scope: u8::try_from(route.scope)?,
        metric: route.metric,
        mtu: route.mtu,
    })
}

fn parse_rule(rule: &Rule) -> Result<rtnl::Rule> {
    let prefix = |text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(Error::msg),
    };
    let name = |text: &String| (!text.is_empty()).then(|| text.clone());
    let attribute = |attribute: &Attribute| Ok((u16::try_from(attribute.kind)?, attribute.value.clone()));
    Ok(rtnl::Rule {
        is_v6: rule.v6,
        priority: rule.priority,
        source: prefix(&rule.source)?,
        destination: prefix(&rule.destination)?,
        input: name(&rule.input),
        output: name(&rule.output),
        mark: (rule.mark, rule.mask),
        tos: u8::try_from(rule.tos)?,
        more: rule.more.iter().map(attribute).collect::<Result<_>>()?,
        is_inverted: rule.inverted,
        action: u8::try_from(rule.action)?,
        table: rule.table,
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
