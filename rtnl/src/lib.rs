//! The network configuration of Linux, by netlink: a question, and the kernel's answer.
//!
//! The shim reads with it what a network namespace has, and joins taps to that; the agent gives it to the guest.
#![cfg(target_os = "linux")]

mod addresses;
mod change;
mod namespace;
mod redirect;
mod route;
mod rule;
mod state;
mod watch;

use std::io;
use std::time::Duration;

pub use addresses::{Mac, Prefix};
pub use namespace::{create as create_namespace, current as current_namespace, within};
pub use route::{Hop, NOWHERE, Route, UNICAST};
pub use rule::Rule;
pub use state::{Interface, Neighbour, Network};
pub use watch::Changes;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// Larger than any part of an answer.
const BUFFER: usize = 64 * 1024;
/// The kernel answers at once, but for a lock that others hold while they change interfaces.
const PATIENCE: Duration = Duration::from_secs(10);
/// A list that changes while it is read is read again, so often.
const ATTEMPTS: u32 = 10;

/// A conversation with the kernel about one network namespace: that of the thread that opened it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// About the namespace of this thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for a change.
    fn ask(&mut self, message: Message, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
    }

    /// Asks what there is.
    fn dump(&mut self, message: &Message) -> io::Result<Vec<Message>> {
        for _ in 0..ATTEMPTS {
            if let Some(list) = self.exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)? {
                return Ok(list);
            }
        }
        Err(io::Error::other("what is there changes faster than it can be read"))
    }

    /// The messages of the answer, unless something has changed between them.
    fn exchange(&mut self, message: Message, flags: u16) -> io::Result<Option<Vec<Message>>> {
        let mut request = NetlinkMessage::from(message);
        self.sequence = self.sequence.wrapping_add(1);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (mut buffer, mut list, mut steady) = (Vec::with_capacity(BUFFER), Vec::new(), true);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the kernel did not answer within {PATIENCE:?}"),
                ),
                _ => error,
            })?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<Message>::deserialize(rest)
                    .map_err(|error| io::Error::other(format!("the kernel's answer: {error}")))?;
                rest = rest.get((answer.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
                // Of a question that was given up.
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                steady &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(Some(list)),
                            Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                        };
                    }
                    NetlinkPayload::Done(_) => return Ok(steady.then_some(list)),
                    NetlinkPayload::InnerMessage(message) => list.push(message),
                    _ => {}
                }
            }
        }
    }

    fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let links = self.dump(&Message::GetLink(LinkMessage::default()))?;
        let links = links.into_iter().filter_map(|message| match message {
            Message::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// The number of the interface of that name, if there is one.
    pub fn index_of(&mut self, wanted: &str) -> io::Result<Option<u32>> {
        let links = self.links()?;
        let found = links.iter().find(|link| name(link) == Some(wanted));
        Ok(found.map(|link| link.header.index))
    }
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// An empty namespace, where this process may make one.
    fn empty() -> Option<OwnedFd> {
        match create_namespace() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: no right to make a network namespace");
                None
            }
            other => Some(other.unwrap()),
        }
    }

    #[test]
    fn a_namespace_is_looked_at_from_outside() {
        let Some(namespace) = empty() else { return };
        let own = Netlink::open().unwrap().links().unwrap().len();
        let mut there = within(&namespace, Netlink::open).unwrap();
        // Asked from here.
        let names: Vec<_> = there.links().unwrap().iter().filter_map(name).map(str::to_owned).collect();
        // Some systems put tunnels into each.
        assert!(names.contains(&"lo".to_owned()), "{names:?}");
        assert_eq!(Network::look(&mut there).unwrap(), Network::default(), "loopback is no interface");
        assert_eq!(Netlink::open().unwrap().links().unwrap().len(), own);
    }

    #[test]
    fn routes_to_nowhere_come_and_go() {
        let Some(namespace) = empty() else { return };
        let mut there = within(&namespace, Netlink::open).unwrap();
        for (destination, kind) in
            [("10.9.0.0/16", NOWHERE[0]), ("10.8.0.0/16", NOWHERE[1]), ("fd00::/64", NOWHERE[2])]
        {
            let route = Route {
                table: 254,
                kind,
                destination: destination.parse().unwrap(),
                hops: vec![],
                source: None,
                scope: 0,
                metric: 7,
                mtu: 0,
            };
            there.add_route(&route).unwrap();
            assert_eq!(Network::look(&mut there).unwrap().routes, std::slice::from_ref(&route));
            there.remove_route(&route).unwrap();
        }
        assert_eq!(Network::look(&mut there).unwrap(), Network::default());
    }

    #[test]
    fn rules_come_and_go() {
        let Some(namespace) = empty() else { return };
        let mut there = within(&namespace, Netlink::open).unwrap();
        let v4 = Rule {
            is_v6: false,
            priority: 100,
            source: Some("10.0.0.2/32".parse().unwrap()),
            destination: Some("10.1.0.0/16".parse().unwrap()),
            input: None,
            output: None,
            mark: (1, 3),
            tos: 0,
            more: Vec::new(),
            is_inverted: false,
            action: rule::ROUTED,
            table: 1000,
        };
        let v6 =
            Rule { is_v6: true, source: None, destination: None, input: Some("lo".to_owned()), ..v4.clone() };
        // TCP to port 80, by none but default routes.
        let more = vec![(14, vec![0; 4]), (22, vec![6]), (24, [80u16.to_ne_bytes(); 2].concat())];
        let much = Rule { tos: 0x10, more, is_inverted: true, ..v6.clone() };
        let nowhere = Rule { action: 8, table: 0, ..v4.clone() };
        let goes_on =
            Rule { action: 2, more: vec![(4, 200u32.to_ne_bytes().to_vec())], table: 0, ..v4.clone() };
        for rule in [v4, v6, much, nowhere, goes_on] {
            match there.add_rule(&rule) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => return,
                added => added.unwrap(),
            }
            assert_eq!(Network::look(&mut there).unwrap().rules, std::slice::from_ref(&rule));
            there.remove_rule(&rule).unwrap();
        }
        assert_eq!(Network::look(&mut there).unwrap(), Network::default());
    }

    #[test]
    fn changes_are_heard_of_where_they_are() {
        let Some(namespace) = empty() else { return };
        let there = within(&namespace, Changes::open).unwrap();
        assert!(!there.take().unwrap());
        within(&namespace, || Netlink::open()?.set_up(1, true)).unwrap();
        assert!(there.take().unwrap());
        assert!(!there.take().unwrap(), "it is told once");
    }

    #[test]
    fn what_is_refused_is_told_with_its_reason() {
        let Some(namespace) = empty() else { return };
        let refused = within(&namespace, || Netlink::open()?.set_up(4711, true)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(19), "there is no such device");
        // It goes on after that.
        let mut netlink = within(&namespace, Netlink::open).unwrap();
        let default: Prefix = "0.0.0.0/0".parse().unwrap();
        let route = Route {
            table: 1000,
            kind: UNICAST,
            destination: default,
            hops: vec![Hop { gateway: "10.0.0.1".parse().ok(), interface: 1, is_onlink: false, weight: 0 }],
            source: None,
            scope: 0,
            metric: 0,
            mtu: 0,
        };
        assert!(netlink.add_route(&route).is_err());
        assert!(netlink.links().is_ok());
    }
}
