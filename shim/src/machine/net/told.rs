//! What the agent is told of a namespace.

use agent_api::agent::{Attribute, Hop, Interface, Neighbour, Route, Rule, SetNetworkRequest};
use rtnl::{Mac, Network, UNICAST};

/// All that is in it of the interfaces that have devices, by the addresses that these came with.
pub fn of(seen: &Network, device: impl Fn(u32) -> Option<Mac>) -> SetNetworkRequest {
    let interfaces = seen.interfaces.iter().filter_map(|interface| {
        Some(Interface {
            mac: device(interface.index)?.to_string(),
            name: interface.name.clone(),
            addresses: interface.addresses.iter().map(ToString::to_string).collect(),
            mtu: interface.mtu,
            new_mac: interface.mac.to_string(),
            down: !interface.is_up,
            ..Interface::default()
        })
    });
    let name = |index: u32| {
        let found = seen.interfaces.iter().find(|interface| interface.index == index);
        found.filter(|_| device(index).is_some()).map(|interface| interface.name.clone())
    };
    let text =
        |address: Option<std::net::IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    let routes = seen.routes.iter().filter_map(|route| {
        let hops = route.hops.iter().filter_map(|hop| {
            Some(Hop {
                gateway: text(hop.gateway),
                interface: name(hop.interface)?,
                onlink: hop.is_onlink,
                weight: hop.weight.into(),
                ..Hop::default()
            })
        });
        let mut hops = hops.collect::<Vec<_>>().into_iter();
        let first = hops.next();
        // It leads somewhere, but by nothing that is there.
        if first.is_none() && route.kind == UNICAST {
            return None;
        }
        let Hop { gateway, interface, onlink, weight, .. } = first.unwrap_or_default();
        Some(Route {
            kind: route.kind.into(),
            destination: route.destination.to_string(),
            gateway,
            interface,
            onlink,
            weight,
            more: hops.collect(),
            source: text(route.source),
            scope: route.scope.into(),
            metric: route.metric,
            mtu: route.mtu,
            table: route.table,
            ..Route::default()
        })
    });
    let neighbours = seen.neighbours.iter().filter_map(|neighbour| {
        Some(Neighbour {
            address: neighbour.address.to_string(),
            mac: neighbour.mac.to_string(),
            interface: name(neighbour.interface)?,
            ..Neighbour::default()
        })
    });
    let prefix = |prefix: Option<rtnl::Prefix>| prefix.map(|prefix| prefix.to_string()).unwrap_or_default();
    let attribute = |(kind, value): &(u16, Vec<u8>)| Attribute {
        kind: (*kind).into(),
        value: value.clone(),
        ..Attribute::default()
    };
    let rules = seen.rules.iter().map(|rule| Rule {
        v6: rule.is_v6,
        priority: rule.priority,
        source: prefix(rule.source),
        destination: prefix(rule.destination),
        input: rule.input.clone().unwrap_or_default(),
        output: rule.output.clone().unwrap_or_default(),
        mark: rule.mark.0,
        mask: rule.mark.1,
        table: rule.table,
        tos: rule.tos.into(),
        inverted: rule.is_inverted,
        action: rule.action.into(),
        more: rule.more.iter().map(attribute).collect(),
        ..Rule::default()
    });
    SetNetworkRequest {
        interfaces: interfaces.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        rules: rules.collect(),
        ..SetNetworkRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use rtnl::{self, Prefix};

    use super::*;

    #[test]
    fn only_what_has_a_device_is_told() {
        let interface = |index, name: &str| rtnl::Interface {
            index,
            name: name.to_owned(),
            mac: Mac([2, 0, 0, 0, 0, 9]),
            permanent: None,
            mtu: 1400,
            is_up: true,
            is_port: false,
            addresses: vec!["10.0.0.2/24".parse().unwrap(), "fd00::2/64".parse().unwrap()],
        };
        let hop = |interface, gateway: Option<&str>| rtnl::Hop {
            gateway: gateway.map(|text| text.parse().unwrap()),
            interface,
            is_onlink: gateway.is_some(),
            weight: 2,
        };
        let route = |interface, destination: &str, gateway: Option<&str>| rtnl::Route {
            table: 254,
            kind: UNICAST,
            destination: destination.parse::<Prefix>().unwrap(),
            hops: vec![hop(interface, gateway)],
            source: None,
            scope: 0,
            metric: 3,
            mtu: 0,
        };
        let by_both = rtnl::Route {
            hops: vec![hop(5, Some("10.0.0.7")), hop(4, Some("10.0.0.8")), hop(4, None)],
            ..route(4, "10.7.0.0/16", None)
        };
        let nowhere = rtnl::Route { kind: rtnl::NOWHERE[0], hops: vec![], ..route(4, "10.6.0.0/16", None) };
        let neighbour = |interface| rtnl::Neighbour {
            interface,
            address: "10.0.0.1".parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, 7]),
        };
        let off = rtnl::Interface { is_up: false, ..interface(4, "eth0") };
        let seen = Network {
            interfaces: vec![interface(4, "eth0"), interface(5, "eth1")],
            routes: vec![
                route(4, "::/0", Some("fe80::1")),
                route(5, "10.9.0.0/16", None),
                route(6, "10.8.0.0/16", None),
                by_both,
                nowhere,
            ],
            neighbours: vec![neighbour(4), neighbour(5)],
            rules: vec![rtnl::Rule {
                is_v6: false,
                priority: 9,
                source: Some("10.0.0.2/32".parse().unwrap()),
                destination: None,
                input: None,
                output: None,
                mark: (1, 2),
                tos: 4,
                more: vec![(22, vec![17])],
                is_inverted: true,
                action: 6,
                table: 100,
            }],
        };
        let told = of(&seen, |index| (index == 4).then_some(Mac([2, 0, 0, 0, 0, 1])));
        let [interface] = &*told.interfaces else { panic!("{told:?}") };
        assert_eq!(
            (interface.mac.as_str(), interface.new_mac.as_str()),
            ("02:00:00:00:00:01", "02:00:00:00:00:09")
        );
        assert_eq!((interface.name.as_str(), interface.mtu, interface.down), ("eth0", 1400, false));
        assert_eq!(interface.addresses, ["10.0.0.2/24", "fd00::2/64"]);
        let [route, several, nowhere] = &*told.routes else { panic!("{told:?}") };
        let words = [&route.destination, &route.gateway, &route.interface, &route.source].map(String::as_str);
        assert_eq!((words, route.metric, route.onlink), (["::/0", "fe80::1", "eth0", ""], 3, true));
        assert_eq!((route.table, route.kind, route.weight, route.more.len()), (254, 1, 2, 0));
        assert_eq!((several.gateway.as_str(), several.interface.as_str()), ("10.0.0.8", "eth0"));
        let [more] = &*several.more else { panic!("{several:?}") };
        assert_eq!((more.gateway.as_str(), more.interface.as_str(), more.weight), ("", "eth0", 2));
        assert_eq!((nowhere.kind, nowhere.interface.as_str(), nowhere.more.len()), (6, "", 0));
        let [rule] = &*told.rules else { panic!("{told:?}") };
        let words = [&rule.source, &rule.destination, &rule.input, &rule.output].map(String::as_str);
        assert_eq!((words, rule.priority, rule.table), (["10.0.0.2/32", "", "", ""], 9, 100));
        assert_eq!((rule.v6, rule.mark, rule.mask), (false, 1, 2));
        assert_eq!((rule.tos, rule.inverted, rule.action), (4, true, 6));
        let [more] = &*rule.more else { panic!("{rule:?}") };
        assert_eq!((more.kind, &*more.value), (22, &[17][..]));
        let [neighbour] = &*told.neighbours else { panic!("{told:?}") };
        let words = [&neighbour.address, &neighbour.mac, &neighbour.interface].map(String::as_str);
        assert_eq!(words, ["10.0.0.1", "02:00:00:00:00:07", "eth0"]);
        let nothing = SetNetworkRequest {
            rules: told.rules.clone(),
            routes: vec![nowhere.clone()],
            ..SetNetworkRequest::default()
        };
        assert_eq!(of(&seen, |_| None), nothing);
        let off = Network { interfaces: vec![off], ..seen };
        assert!(of(&off, |_| Some(Mac([2, 0, 0, 0, 0, 1]))).interfaces[0].down);
    }
}
