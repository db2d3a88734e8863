//! What a guest cannot say of itself on its interface: that it is somebody else.
//!
//! A program of the kernel's looks at what leaves the tap, before it reaches the interface. It lets no frame go that has
//! another hardware address than the interface's, no word of ARP (RFC 826) or neighbour discovery (RFC 4861) that claims
//! another address than the interface's, and none that makes the guest a router of the others. Addresses that the guest makes
//! of the hardware address are its own, too.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bpf::code::{
    ADD_NUMBER, CALL, EXIT, JUMP, JUMP_IF, JUMP_IF_WORD, JUMP_UNLESS, JUMP_UNLESS_WORD, LOAD_BYTE, LOAD_HALF,
    LOAD_WORD, MOVE, MOVE_NUMBER,
};
use bpf::{Assembly, Instruction, Kind, Program, instruction};
use rtnl::{Interface, Mac};

/// More make the program longer than is sensible; an interface of a container has a few.
const ADDRESSES_MAX: usize = 1000;

/// What an interface is called by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    mac: Mac,
    addresses: Vec<IpAddr>,
}

impl Names {
    /// Those of an interface, unless they are too many.
    pub fn of(interface: &Interface) -> io::Result<Self> {
        let mut addresses: Vec<_> = interface.addresses.iter().map(|prefix| prefix.address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.len() > ADDRESSES_MAX {
            return Err(io::Error::other(format!(
                "it has {} addresses, and at most {ADDRESSES_MAX} can be kept from others; take some away, or set policy.spoofing = \
                 \"allow\" in the configuration",
                addresses.len()
            )));
        }
        Ok(Self { mac: interface.mac, addresses })
    }

    /// What lets go on to the interface `to` what is said in these names.
    pub fn guard(&self, to: u32) -> io::Result<Program> {
        Program::load(Kind::Frame, &self.compile(to)?)
    }

    fn v4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    fn v6(&self) -> impl Iterator<Item = Ipv6Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        })
    }
}

/// Functions of the kernel's.
const LOAD_BYTES: u32 = 26;
const REDIRECT: u32 = 23;
/// What becomes of a frame: TC_ACT_SHOT.
const DROP: u32 = 2;
/// Registers: the answer, arguments, and what stays over a call.
const ANSWER: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const FOURTH: u8 = 4;
const FRAME: u8 = 6;
const STACK: u8 = 10;

/// An Ethernet header: where its parts are, and its length.
const SOURCE: i16 = 6;
const TYPE: i16 = 12;
const ETHERNET: u32 = 14;
const TYPE_ARP: u16 = 0x0806;
const TYPE_V6: u16 = 0x86dd;

/// ARP of Ethernet and IPv4: what is always in it, and who says it.
const ARP_LENGTH: u32 = 28;
const ARP_FIXED: [(i16, u16); 3] = [(0, 1), (2, 0x0800), (4, 0x0604)];
const ARP_HARDWARE: i16 = 8;
const ARP_ADDRESS: i16 = 14;

/// An IPv6 header.
const V6_LENGTH: u32 = 40;
const V6_NEXT: i16 = 6;
const V6_HOPS: i16 = 7;
const V6_SOURCE: i16 = 8;
/// Neighbour discovery has come from no further than this, or is not heeded.
const HOPS: u32 = 255;
/// Headers behind which a word of it could hide; nothing else with so many hops has them.
const EXTENSIONS: [u32; 5] = [0, 43, 44, 51, 60];
const ICMP: u32 = 58;
const ROUTER_SOLICITATION: u32 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECTION: u32 = 137;
/// Where in a neighbour advertisement it says who is meant, and how long that is.
const TARGET: u32 = 8;
const V6_ADDRESS: u32 = 16;

/// Where a part of the frame is put to be looked at, so that what has four bytes lies where four bytes may be read.
const ROOM: i16 = -64;
const ETHERNET_ROOM: i16 = ROOM + 2;
const ARP_ROOM: i16 = ROOM + 2;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Arp,
    V6,
    Words,
    Advertisement,
    Source,
    Next,
    Go,
    Drop,
}

/// `length` bytes of the frame, from `from` on, are put into the stack at `room`; a frame that has not so many is dropped.
fn look(program: &mut Assembly<Place>, from: u32, length: u32, room: i16) {
    program.then([
        instruction(MOVE, FIRST, FRAME, 0, 0),
        instruction(MOVE_NUMBER, SECOND, 0, 0, from),
        instruction(MOVE, THIRD, STACK, 0, 0),
        instruction(ADD_NUMBER, THIRD, 0, 0, i32::from(room).cast_unsigned()),
        instruction(MOVE_NUMBER, FOURTH, 0, 0, length),
        instruction(CALL, 0, 0, 0, LOAD_BYTES),
    ]);
    program.jump(JUMP_UNLESS, ANSWER, 0, Place::Drop);
}

/// Two bytes of the stack are these, or the frame is dropped.
fn is_half(program: &mut Assembly<Place>, at: i16, bytes: [u8; 2]) {
    program.then([instruction(LOAD_HALF, SECOND, STACK, at, 0)]);
    program.jump(JUMP_UNLESS, SECOND, u16::from_ne_bytes(bytes).into(), Place::Drop);
}

fn is_mac(program: &mut Assembly<Place>, at: i16, mac: Mac) {
    let bytes = mac.0;
    for (further, index) in [(0, 0), (2, 2), (4, 4)] {
        is_half(program, at + further, [bytes[index], bytes[index + 1]]);
    }
}

/// The four words of an address, as they are on the wire.
fn words(address: Ipv6Addr) -> [u32; 4] {
    let bytes = address.octets();
    let word = |index: usize| {
        let word = [bytes[index], bytes[index + 1], bytes[index + 2], bytes[index + 3]];
        u32::from_ne_bytes(word)
    };
    [word(0), word(4), word(8), word(12)]
}

/// The last half of the addresses that are made of a hardware address (RFC 4291, appendix A).
fn made_of(mac: Mac) -> [u32; 2] {
    let mac = mac.0;
    [
        u32::from_ne_bytes([mac[0] ^ 2, mac[1], mac[2], 0xff]),
        u32::from_ne_bytes([0xfe, mac[3], mac[4], mac[5]]),
    ]
}

impl Names {
    fn compile(&self, to: u32) -> io::Result<Vec<Instruction>> {
        let mut program = Assembly::default();
        program.then([instruction(MOVE, FRAME, FIRST, 0, 0)]);
        look(&mut program, 0, ETHERNET, ETHERNET_ROOM);
        is_mac(&mut program, ETHERNET_ROOM + SOURCE, self.mac);
        program.then([instruction(LOAD_HALF, SECOND, STACK, ETHERNET_ROOM + TYPE, 0)]);
        program.jump(JUMP_IF, SECOND, TYPE_ARP.to_be().into(), Place::Arp);
        program.jump(JUMP_IF, SECOND, TYPE_V6.to_be().into(), Place::V6);
        program.jump(JUMP, 0, 0, Place::Go);
        self.compile_arp(&mut program);
        self.compile_v6(&mut program);
        program.place(Place::Drop);
        program.then([instruction(MOVE_NUMBER, ANSWER, 0, 0, DROP), instruction(EXIT, 0, 0, 0, 0)]);
        program.place(Place::Go);
        program.then([
            instruction(MOVE_NUMBER, FIRST, 0, 0, to),
            instruction(MOVE_NUMBER, SECOND, 0, 0, 0),
            instruction(CALL, 0, 0, 0, REDIRECT),
            instruction(EXIT, 0, 0, 0, 0),
        ]);
        program.finish()
    }

    fn compile_arp(&self, program: &mut Assembly<Place>) {
        program.place(Place::Arp);
        look(program, ETHERNET, ARP_LENGTH, ARP_ROOM);
        for (at, wanted) in ARP_FIXED {
            is_half(program, ARP_ROOM + at, wanted.to_be_bytes());
        }
        is_mac(program, ARP_ROOM + ARP_HARDWARE, self.mac);
        program.then([instruction(LOAD_WORD, SECOND, STACK, ARP_ROOM + ARP_ADDRESS, 0)]);
        // Who has no address asks whether anybody has one (RFC 5227).
        program.jump(JUMP_IF_WORD, SECOND, 0, Place::Go);
        for address in self.v4() {
            program.jump(JUMP_IF_WORD, SECOND, u32::from_ne_bytes(address.octets()), Place::Go);
        }
        program.jump(JUMP, 0, 0, Place::Drop);
    }

    fn compile_v6(&self, program: &mut Assembly<Place>) {
        program.place(Place::V6);
        look(program, ETHERNET, V6_LENGTH, ROOM);
        program.then([instruction(LOAD_BYTE, SECOND, STACK, ROOM + V6_HOPS, 0)]);
        program.jump(JUMP_UNLESS, SECOND, HOPS, Place::Go);
        program.then([instruction(LOAD_BYTE, SECOND, STACK, ROOM + V6_NEXT, 0)]);
        for extension in EXTENSIONS {
            program.jump(JUMP_IF, SECOND, extension, Place::Drop);
        }
        program.jump(JUMP_UNLESS, SECOND, ICMP, Place::Go);
        // Behind the header in the stack, which has to stay.
        let behind = ROOM + 40;
        look(program, ETHERNET + V6_LENGTH, 1, behind);
        program.then([instruction(LOAD_BYTE, SECOND, STACK, behind, 0)]);
        for to_routers in [ROUTER_ADVERTISEMENT, REDIRECTION] {
            program.jump(JUMP_IF, SECOND, to_routers, Place::Drop);
        }
        program.jump(JUMP_IF, SECOND, ROUTER_SOLICITATION, Place::Words);
        program.jump(JUMP_IF, SECOND, NEIGHBOUR_SOLICITATION, Place::Words);
        program.jump(JUMP_IF, SECOND, NEIGHBOUR_ADVERTISEMENT, Place::Advertisement);
        program.jump(JUMP, 0, 0, Place::Go);
        // Who has no address yet asks with none.
        program.place(Place::Words);
        for part in 0..4 {
            program.then([instruction(LOAD_WORD, SECOND, STACK, ROOM + V6_SOURCE + part * 4, 0)]);
            program.jump(JUMP_UNLESS_WORD, SECOND, 0, Place::Source);
        }
        program.jump(JUMP, 0, 0, Place::Go);
        program.place(Place::Source);
        self.compile_own(program, ROOM + V6_SOURCE);
        program.place(Place::Advertisement);
        look(program, ETHERNET + V6_LENGTH + TARGET, V6_ADDRESS, ROOM);
        self.compile_own(program, ROOM);
    }

    /// The address in the stack at `at` is one of these names', or the frame is dropped.
    fn compile_own(&self, program: &mut Assembly<Place>, at: i16) {
        let mut try_one = |skipped: i16, wanted: &[u32]| {
            for (part, word) in (skipped..).zip(wanted) {
                program.then([instruction(LOAD_WORD, SECOND, STACK, at + part * 4, 0)]);
                program.jump(JUMP_UNLESS_WORD, SECOND, *word, Place::Next);
            }
            program.jump(JUMP, 0, 0, Place::Go);
            program.place(Place::Next);
        };
        try_one(2, &made_of(self.mac));
        for address in self.v6() {
            try_one(0, &words(address));
        }
        program.jump(JUMP, 0, 0, Place::Drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x77, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0x77, 0, 0, 0, 9];
    const ALL: [u8; 6] = [0xff; 6];
    /// TC_ACT_REDIRECT.
    const GO: u32 = 7;

    fn names(addresses: &[&str]) -> Names {
        let interface = Interface {
            index: 1,
            name: "eth0".to_owned(),
            mac: Mac(MAC),
            permanent: None,
            mtu: 1500,
            is_up: true,
            is_port: false,
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        };
        Names::of(&interface).unwrap()
    }

    /// None, where this process may not.
    fn guard(addresses: &[&str]) -> Option<Program> {
        match names(addresses).guard(1) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: no right to load programs");
                None
            }
            other => Some(other.unwrap()),
        }
    }

    fn frame(source: [u8; 6], kind: u16, content: &[u8]) -> Vec<u8> {
        [ALL.as_slice(), &source, &kind.to_be_bytes(), content].concat()
    }

    fn arp(hardware: [u8; 6], address: &str) -> Vec<u8> {
        let address: Ipv4Addr = address.parse().unwrap();
        let content =
            [[0, 1, 8, 0, 6, 4, 0, 1].as_slice(), &hardware, &address.octets(), &[0; 6], &[10, 0, 0, 1]];
        frame(MAC, TYPE_ARP, &content.concat())
    }

    fn v6(next: u8, hops: u8, source: &str, content: &[u8]) -> Vec<u8> {
        let source: Ipv6Addr = source.parse().unwrap();
        let header = [0x60, 0, 0, 0, 0, content.len() as u8, next, hops];
        frame(MAC, TYPE_V6, &[header.as_slice(), &source.octets(), &[0xff; 16], content].concat())
    }

    /// Of neighbour discovery, of this kind, about `target`.
    fn discovery(kind: u32, source: &str, target: &str) -> Vec<u8> {
        let target: Ipv6Addr = target.parse().unwrap();
        let content = [[kind as u8, 0, 0, 0, 0, 0, 0, 0].as_slice(), &target.octets()].concat();
        v6(58, 255, source, &content)
    }

    #[test]
    fn a_guest_speaks_in_its_own_names() {
        let Some(guard) = guard(&["10.0.0.2/24", "10.0.0.3/32", "fd00::2/64", "fe80::1234/64"]) else {
            return;
        };
        let own = "fe80::77:ff:fe00:1";
        let mut strange = arp(MAC, "10.0.0.2");
        strange[14] = 9;
        let cases = [
            ("a frame of its own", frame(MAC, 0x0800, &[0x45; 40]), GO),
            ("a short one", frame(MAC, 0x88b5, &[0]), GO),
            ("of somebody else", frame(OTHER, 0x0800, &[0x45; 40]), DROP),
            ("of somebody else's ARP", frame(OTHER, TYPE_ARP, &[0; 28]), DROP),
            ("ARP", arp(MAC, "10.0.0.2"), GO),
            ("ARP of its second address", arp(MAC, "10.0.0.3"), GO),
            ("ARP of none", arp(MAC, "0.0.0.0"), GO),
            ("ARP of a neighbour's address", arp(MAC, "10.0.0.1"), DROP),
            ("ARP with a neighbour's hardware address", arp(OTHER, "10.0.0.2"), DROP),
            ("ARP of another kind of network", strange, DROP),
            ("ARP cut short", frame(MAC, TYPE_ARP, &[0; 27]), DROP),
            ("a ping", v6(58, 64, "fd00::9", &[128, 0, 0, 0]), GO),
            ("a ping from far", v6(58, 255, "fd00::9", &[128, 0, 0, 0]), GO),
            ("a datagram", v6(17, 255, "fd00::9", &[0; 8]), GO),
            ("nothing behind it", v6(59, 64, "fd00::2", &[]), GO),
            ("no word", v6(58, 255, "fd00::2", &[]), DROP),
            ("hidden", v6(0, 255, own, &[58, 0, 0, 0, 0, 0, 0, 0, 136]), DROP),
            ("a report of groups", v6(0, 1, own, &[58, 0, 5, 2, 0, 0, 0, 0, 143]), GO),
            ("asking with its address", discovery(NEIGHBOUR_SOLICITATION, "fd00::2", "fd00::1"), GO),
            ("asking with that of its link", discovery(NEIGHBOUR_SOLICITATION, own, "fd00::1"), GO),
            ("asking with none", discovery(NEIGHBOUR_SOLICITATION, "::", "fd00::1"), GO),
            ("asking with another's", discovery(NEIGHBOUR_SOLICITATION, "fd00::1", "fd00::2"), DROP),
            (
                "asking with one that begins with zeroes",
                discovery(NEIGHBOUR_SOLICITATION, "::1", "fd00::2"),
                DROP,
            ),
            ("looking for routers", discovery(ROUTER_SOLICITATION, own, "::"), GO),
            ("looking for them for another", discovery(ROUTER_SOLICITATION, "fe80::1", "::"), DROP),
            ("saying who it is", discovery(NEIGHBOUR_ADVERTISEMENT, "fd00::2", "fd00::2"), GO),
            ("saying one it was given", discovery(NEIGHBOUR_ADVERTISEMENT, own, "fe80::1234"), GO),
            ("saying one it has made", discovery(NEIGHBOUR_ADVERTISEMENT, own, "fd01::77:ff:fe00:1"), GO),
            ("saying another", discovery(NEIGHBOUR_ADVERTISEMENT, "fd00::2", "fd00::1"), DROP),
            ("saying nobody", discovery(NEIGHBOUR_ADVERTISEMENT, "fd00::2", "::"), DROP),
            ("saying half", v6(58, 255, own, &[136, 0, 0, 0, 0, 0, 0, 0, 0xfd]), DROP),
            ("being a router", discovery(ROUTER_ADVERTISEMENT, own, "::"), DROP),
            ("sending elsewhere", discovery(REDIRECTION, own, "fd00::1"), DROP),
        ];
        for (about, frame, expected) in cases {
            assert_eq!(guard.ask(&frame).ok(), Some(expected), "{about}");
        }
    }

    #[test]
    fn many_addresses_are_one_program() {
        let many = |count: usize| (0..count).map(|number| format!("fd00::{number:x}/64"));
        let most: Vec<_> = many(ADDRESSES_MAX).collect();
        let most: Vec<_> = most.iter().map(String::as_str).collect();
        let Some(guard) = guard(&most) else { return };
        let say = |target: &str| guard.ask(&discovery(NEIGHBOUR_ADVERTISEMENT, "::", target)).unwrap();
        assert_eq!([say("fd00::0"), say("fd00::3e7"), say("fd00::3e8")], [GO, GO, DROP]);
        let mut interface = Interface {
            index: 1,
            name: "eth0".to_owned(),
            mac: Mac(MAC),
            permanent: None,
            mtu: 1500,
            is_up: true,
            is_port: false,
            addresses: many(ADDRESSES_MAX + 1).map(|address| address.parse().unwrap()).collect(),
        };
        let error = Names::of(&interface).unwrap_err().to_string();
        assert!(error.contains("policy.spoofing"), "{error}");
        interface.addresses = vec![interface.addresses[0]; ADDRESSES_MAX + 1];
        Names::of(&interface).unwrap();
    }
}
