//! Rules, which say by which table a packet is routed.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
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
    /// The table.
    pub table: u32,
}

/// What every namespace has: priorities and tables.
const BY_ITSELF: [(u32, u32); 3] = [(0, 255), (32766, 254), (32767, 253)];

impl Rule {
    /// Rules of other kinds, and with other conditions, are none.
    pub(crate) fn of(message: &RuleMessage) -> Option<Self> {
        let header = &message.header;
        let is_v6 = match header.family {
            AddressFamily::Inet => false,
            AddressFamily::Inet6 => true,
            _ => return None,
        };
        if header.action != RuleAction::ToTable || header.tos != 0 || header.flags.contains(RuleFlags::Invert)
        {
            return None;
        }
        let mut rule = Self {
            is_v6,
            priority: 0,
            source: None,
            destination: None,
            input: None,
            output: None,
            mark: (0, 0),
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
                _ => return None,
            }
        }
        (!BY_ITSELF.contains(&(rule.priority, rule.table))).then_some(rule)
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        let header = &mut message.header;
        header.family = if self.is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        header.action = RuleAction::ToTable;
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
            table: 1000,
        }
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
        for rule in [rule(), v6] {
            assert_eq!(Rule::of(&rule.message()), Some(rule));
        }
    }

    #[test]
    fn what_cannot_be_brought_is_none() {
        let mut inverted = rule().message();
        inverted.header.flags = RuleFlags::Invert;
        let mut goes_on = rule().message();
        goes_on.header.action = RuleAction::Goto;
        let mut with_more = rule().message();
        with_more.attributes.push(RuleAttribute::L3MDev(true));
        let main = Rule { priority: 32766, table: 254, ..rule() }.message();
        for message in [inverted, goes_on, with_more, main] {
            assert_eq!(Rule::of(&message), None);
        }
    }
}
