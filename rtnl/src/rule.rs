//! Rules, which say by which table a packet is routed, if at all.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, Nla};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use crate::{Netlink, Prefix};

/// A rule. What is not said fits all packets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// For v6 packets, and not for v4.
    pub is_v6: bool,
    /// The lower is asked first.
    pub priority: u32,
    /// From whom packets come.
    pub source: Option<Prefix>,
    /// To whom they go.
    pub destination: Option<Prefix>,
    /// The name of the interface by which they have come.
    pub input: Option<String>,
    /// The name of the interface to which their socket is bound.
    pub output: Option<String>,
    /// The mark that they have, in the bits of the mask.
    pub mark: (u32, u32),
    /// The type of service that they have, unless it is 0.
    pub tos: u8,
    /// What else is asked of them, and what the action takes: numbers and values of attributes (FRA_*), those of
    /// [`MORE`], in the order of their numbers.
    pub more: Vec<(u16, Vec<u8>)>,
    /// For packets that do not fit.
    pub is_inverted: bool,
    /// What is done with them (FR_ACT_*).
    pub action: u8,
    /// The table.
    pub table: u32,
}

/// Attributes that mean the same in every namespace: FRA_GOTO, FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_UID_RANGE,
/// FRA_IP_PROTO, FRA_SPORT_RANGE and FRA_DPORT_RANGE.
const MORE: [u16; 7] = [4, 13, 14, 20, 22, 23, 24];

/// FR_ACT_TO_TBL.
#[cfg(test)]
pub(crate) const ROUTED: u8 = 1;
/// What every namespace has: priorities and tables.
const BY_ITSELF: [(u32, u32); 3] = [(0, 255), (32766, 254), (32767, 253)];

/// Masks of ports: FRA_SPORT_MASK and FRA_DPORT_MASK.
const MASKS: [u16; 2] = [28, 29];

/// Whether it says, as the kernel does since Linux 6.15 of a rule for one port, that all of its bits are meant.
fn is_whole_mask(attribute: &RuleAttribute) -> bool {
    MASKS.contains(&attribute.kind()) && value_of(attribute) == [0xff; 2]
}

fn value_of(attribute: &RuleAttribute) -> Vec<u8> {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    value
}

impl Rule {
    /// Rules that ask for what is not known here are none.
    pub(crate) fn of(message: &RuleMessage) -> Option<Self> {
        let header = &message.header;
        let is_v6 = match header.family {
            AddressFamily::Inet => false,
            AddressFamily::Inet6 => true,
            _ => return None,
        };
        let mut rule = Self {
            is_v6,
            priority: 0,
            source: None,
            destination: None,
            input: None,
            output: None,
            mark: (0, 0),
            tos: header.tos,
            more: Vec::new(),
            is_inverted: header.flags.contains(RuleFlags::Invert),
            action: header.action.into(),
            table: header.table.into(),
        };
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Source(address) => {
                    rule.source = Some(Prefix { address: *address, length: header.src_len });
                }
                RuleAttribute::Destination(address) => {
                    rule.destination = Some(Prefix { address: *address, length: header.dst_len });
                }
                RuleAttribute::Iifname(name) => rule.input = Some(name.clone()),
                RuleAttribute::Oifname(name) => rule.output = Some(name.clone()),
                RuleAttribute::Priority(priority) => rule.priority = *priority,
                RuleAttribute::FwMark(mark) => rule.mark.0 = *mark,
                RuleAttribute::FwMask(mask) => rule.mark.1 = *mask,
                RuleAttribute::Table(table) => rule.table = *table,
                // Of whom it is; and a condition that suppresses nothing.
                RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
                other if is_whole_mask(other) => {}
                other if MORE.contains(&other.kind()) => {
                    rule.more.push((other.kind(), value_of(other)));
                }
                _ => return None,
            }
        }
        rule.more.sort();
        (!BY_ITSELF.contains(&(rule.priority, rule.table))).then_some(rule)
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        let header = &mut message.header;
        header.family = if self.is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        header.action = RuleAction::from(self.action);
        header.tos = self.tos;
        if self.is_inverted {
            header.flags = RuleFlags::Invert;
        }
        header.src_len = self.source.map_or(0, |prefix| prefix.length);
        header.dst_len = self.destination.map_or(0, |prefix| prefix.length);
        let address = |prefix: Option<Prefix>| prefix.map(|prefix| prefix.address);
        let (mark, mask) = self.mark;
        let marked = mask != 0;
        message.attributes = [
            address(self.source).map(RuleAttribute::Source),
            address(self.destination).map(RuleAttribute::Destination),
            self.input.clone().map(RuleAttribute::Iifname),
            self.output.clone().map(RuleAttribute::Oifname),
            marked.then_some(RuleAttribute::FwMark(mark)),
            marked.then_some(RuleAttribute::FwMask(mask)),
            Some(RuleAttribute::Priority(self.priority)),
            Some(RuleAttribute::Table(self.table)),
        ]
        .into_iter()
        .flatten()
        .chain(
            self.more.iter().map(|(kind, value)| RuleAttribute::Other(DefaultNla::new(*kind, value.clone()))),
        )
        .collect();
        message
    }
}

impl Netlink {
    /// The rules of a namespace. A kernel that knows none has none.
    pub(crate) fn rules(&mut self) -> io::Result<Vec<Rule>> {
        let messages = match self.dump(&Message::GetRule(RuleMessage::default())) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => return Ok(Vec::new()),
            other => other?,
        };
        let rules = messages.iter().filter_map(|message| match message {
            Message::NewRule(message) => Rule::of(message),
            _ => None,
        });
        Ok(rules.collect())
    }

    /// Adds a rule.
    pub fn add_rule(&mut self, rule: &Rule) -> io::Result<()> {
        self.ask(Message::NewRule(rule.message()), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Removes a rule.
    pub fn remove_rule(&mut self, rule: &Rule) -> io::Result<()> {
        self.ask(Message::DelRule(rule.message()), 0)
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};
    use netlink_packet_route::rule::{RuleMessageBuffer, RulePortRange};

    use super::*;

    fn rule() -> Rule {
        Rule {
            is_v6: false,
            priority: 100,
            source: Some("10.0.0.2/32".parse().unwrap()),
            destination: None,
            input: None,
            output: Some("eth1".to_owned()),
            mark: (0x10, 0xff),
            tos: 0,
            more: Vec::new(),
            is_inverted: false,
            action: ROUTED,
            table: 1000,
        }
    }

    /// As the kernel gets it, and says it.
    fn through(rule: &Rule) -> Option<Rule> {
        let message = rule.message();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        Rule::of(&RuleMessage::parse(&RuleMessageBuffer::new(&bytes)).unwrap())
    }

    #[test]
    fn a_rule_is_what_its_message_says() {
        let v6 = Rule {
            is_v6: true,
            source: None,
            destination: Some("fd00::/64".parse().unwrap()),
            input: Some("lo".to_owned()),
            output: None,
            mark: (0, 0),
            ..rule()
        };
        let range = |first: u16, last: u16| [first.to_ne_bytes(), last.to_ne_bytes()].concat();
        let more = vec![(14, vec![0; 4]), (22, vec![6]), (24, range(80, 443))];
        let much = Rule { tos: 0x10, more, is_inverted: true, ..rule() };
        let goes_on =
            Rule { action: RuleAction::Goto.into(), more: vec![(4, vec![9, 0, 0, 0])], table: 0, ..rule() };
        let nowhere = Rule { action: RuleAction::Blackhole.into(), table: 0, ..rule() };
        for rule in [rule(), v6, much, goes_on, nowhere] {
            assert_eq!(through(&rule), Some(rule));
        }
    }

    #[test]
    fn the_order_of_attributes_says_nothing() {
        let mut message = rule().message();
        let ports = RulePortRange { start: 80, end: 81 };
        message.attributes.insert(0, RuleAttribute::DestinationPortRange(ports));
        message.attributes.push(RuleAttribute::SuppressPrefixLen(0));
        let kinds = Rule::of(&message).unwrap().more.into_iter().map(|(kind, _)| kind);
        assert_eq!(kinds.collect::<Vec<_>>(), [14, 24]);
    }

    #[test]
    fn what_cannot_be_brought_is_none() {
        let mut with_more = rule().message();
        with_more.attributes.push(RuleAttribute::L3MDev(true));
        let mut unknown = rule().message();
        unknown.attributes.push(RuleAttribute::Other(DefaultNla::new(25, vec![1])));
        let masked = |mask: [u8; 2]| {
            let mut message = rule().message();
            message.attributes.push(RuleAttribute::Other(DefaultNla::new(29, mask.to_vec())));
            message
        };
        assert_eq!(Rule::of(&masked([0xff; 2])), Some(rule()));
        let masked = masked([0xff, 0xf0]);
        let main = Rule { priority: 32766, table: 254, ..rule() }.message();
        for message in [with_more, unknown, masked, main] {
            assert_eq!(Rule::of(&message), None);
        }
    }
}
