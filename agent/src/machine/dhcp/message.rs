//! DHCP messages (RFC 2131, options RFC 2132), in the UDP and IPv4 packets that carry them. What comes is from whoever is
//! on the network, and believed only as far as it makes sense.

use std::net::Ipv4Addr;
use std::time::Duration;

use rtnl::Mac;

/// Ports of BOOTP.
const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// Bytes of the headers.
const IP: usize = 20;
const UDP: usize = 8;
/// Bytes of a message up to its options, and where in it is what.
const FIXED: usize = 240;
const HLEN: usize = 2;
const XID: usize = 4;
const CIADDR: usize = 12;
const YIADDR: usize = 16;
const CHADDR: usize = 28;
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// No message is smaller on its way: some servers want that of BOOTP.
const SMALLEST: usize = 300;
/// The largest answer, which is told the server: what any network takes.
const LARGEST: u16 = 576;
const BROADCAST: u8 = 0x80;

const PAD: u8 = 0;
const SUBNET_MASK: u8 = 1;
const ROUTERS: u8 = 3;
const MTU: u8 = 26;
const REQUESTED: u8 = 50;
const LEASE: u8 = 51;
const OVERLOAD: u8 = 52;
const KIND: u8 = 53;
const SERVER_ID: u8 = 54;
const WISHES: u8 = 55;
const MAX_SIZE: u8 = 57;
const T1: u8 = 58;
const T2: u8 = 59;
const END: u8 = 255;

/// A lease without end.
const FOR_EVER: u32 = u32::MAX;
/// None is shorter, whatever a server says: it is asked again and again.
const SHORTEST: Duration = Duration::from_secs(20);
/// Nothing speaks IP with less.
const LEAST_MTU: u16 = 576;

/// What a client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Who is there?
    Discover,
    /// That offer, please.
    Request {
        /// What was offered.
        address: Ipv4Addr,
        /// By whom.
        server: Ipv4Addr,
    },
    /// This address for longer.
    Renew(Ipv4Addr),
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// This can be had.
    Offer(Lease),
    /// It is yours.
    Ack(Lease),
    /// No.
    Nak,
}

/// An address, for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// It.
    pub address: Ipv4Addr,
    /// Bits of it that are the network's.
    pub length: u8,
    /// By whom all else is reached.
    pub router: Option<Ipv4Addr>,
    /// The largest packet.
    pub mtu: Option<u16>,
    /// Whose it is.
    pub server: Ipv4Addr,
    /// Until it is to be renewed, by anybody, and given up.
    pub times: Option<Times>,
}

/// Counted from when it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Its server is asked again.
    pub renew: Duration,
    /// Any server is.
    pub rebind: Duration,
    /// It is over.
    pub end: Duration,
}

/// Who asks, in one conversation.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// Its hardware address.
    pub mac: Mac,
    /// By which it knows its answers.
    pub xid: u32,
}

impl Asker {
    /// The IPv4 packet with a question; to `server` alone, if there is one.
    pub fn ask(&self, question: Question, server: Option<Ipv4Addr>) -> Vec<u8> {
        let own = if let Question::Renew(address) = question { address } else { Ipv4Addr::UNSPECIFIED };
        packet(own, server.unwrap_or(Ipv4Addr::BROADCAST), &self.message(question, own))
    }

    fn message(&self, question: Question, own: Ipv4Addr) -> Vec<u8> {
        let mut message = vec![0; FIXED];
        // BOOTREQUEST, Ethernet.
        message[..3].copy_from_slice(&[1, 1, 6]);
        message[XID..XID + 4].copy_from_slice(&self.xid.to_be_bytes());
        if own.is_unspecified() {
            message[10] = BROADCAST;
        }
        message[CIADDR..CIADDR + 4].copy_from_slice(&own.octets());
        message[CHADDR..CHADDR + 6].copy_from_slice(&self.mac.0);
        message[FIXED - 4..].copy_from_slice(&COOKIE);
        let mut option = |code: u8, value: &[u8]| {
            // All are a few bytes.
            message.extend([code, value.len() as u8]);
            message.extend(value);
        };
        option(KIND, &[if question == Question::Discover { 1 } else { 3 }]);
        if let Question::Request { address, server } = question {
            option(REQUESTED, &address.octets());
            option(SERVER_ID, &server.octets());
        }
        option(MAX_SIZE, &LARGEST.to_be_bytes());
        option(WISHES, &[SUBNET_MASK, ROUTERS, MTU, LEASE, T1, T2]);
        message.push(END);
        message.resize(message.len().max(SMALLEST), PAD);
        message
    }

    /// What an IPv4 packet says to this one, if it is an answer at all.
    pub fn hear(&self, packet: &[u8]) -> Option<Answer> {
        let message = payload(packet)?;
        let fixed: &[u8; FIXED] = message.first_chunk()?;
        // BOOTREPLY.
        let is_mine = fixed[0] == 2
            && fixed[HLEN] == 6
            && fixed[XID..XID + 4] == self.xid.to_be_bytes()
            && fixed[CHADDR..CHADDR + 6] == self.mac.0
            && fixed.ends_with(&COOKIE);
        if !is_mine {
            return None;
        }
        let options = Options::of(message);
        let lease = || options.lease(four(&fixed[YIADDR..])?);
        match options.kind? {
            2 => lease().map(Answer::Offer),
            5 => lease().map(Answer::Ack),
            6 => Some(Answer::Nak),
            _ => None,
        }
    }
}

fn four(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes))
}

/// Those that matter; of one that comes twice the last.
#[derive(Default)]
struct Options {
    kind: Option<u8>,
    server: Option<Ipv4Addr>,
    mask: Option<Ipv4Addr>,
    router: Option<Ipv4Addr>,
    mtu: Option<u16>,
    lease: Option<u32>,
    renew: Option<u32>,
    rebind: Option<u32>,
    overload: u8,
}

impl Options {
    fn of(message: &[u8]) -> Self {
        let mut options = Self::default();
        options.read(message.get(FIXED..).unwrap_or_default());
        // They may go on where else there are names.
        for (flag, range) in [(1, FILE), (2, SNAME)] {
            if options.overload & flag != 0 {
                options.read(message.get(range).unwrap_or_default());
            }
        }
        options
    }

    fn read(&mut self, mut rest: &[u8]) {
        while let [code, after @ ..] = rest {
            if *code == PAD {
                rest = after;
                continue;
            }
            let [len, after @ ..] = after else { return };
            let Some((value, after)) = after.split_at_checked(usize::from(*len)) else { return };
            if *code == END {
                return;
            }
            self.take(*code, value);
            rest = after;
        }
    }

    fn take(&mut self, code: u8, value: &[u8]) {
        let word = || value.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes));
        match code {
            KIND => self.kind = value.first().copied(),
            SERVER_ID => self.server = four(value),
            SUBNET_MASK => self.mask = four(value),
            ROUTERS => self.router = four(value),
            MTU => self.mtu = value.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes)),
            LEASE => self.lease = word(),
            T1 => self.renew = word(),
            T2 => self.rebind = word(),
            OVERLOAD => self.overload = value.first().copied().unwrap_or(0),
            _ => {}
        }
    }

    /// None when it could not be an interface's.
    fn lease(&self, address: Ipv4Addr) -> Option<Lease> {
        let server = self.server.filter(|server| !server.is_unspecified())?;
        if !is_hosts(address) {
            return None;
        }
        let length = match self.mask.map(u32::from) {
            Some(mask) if mask != 0 && mask.leading_ones() == mask.count_ones() => mask.leading_ones() as u8,
            Some(_) => return None,
            // As it was before there were masks.
            None => match address.octets()[0] {
                ..128 => 8,
                128..192 => 16,
                _ => 24,
            },
        };
        Some(Lease {
            address,
            length,
            router: self.router.filter(|router| is_hosts(*router) && *router != address),
            mtu: self.mtu.filter(|mtu| *mtu >= LEAST_MTU),
            server,
            times: self.times(),
        })
    }

    fn times(&self) -> Option<Times> {
        // A server that does not say is asked again soon.
        let end = self.lease.unwrap_or(0);
        if end == FOR_EVER {
            return None;
        }
        let end = Duration::from_secs(end.into()).max(SHORTEST);
        let within = |number: Option<u32>, most: Duration| {
            let time = Duration::from_secs(number?.into());
            (SHORTEST / 2..=most).contains(&time).then_some(time)
        };
        let rebind = within(self.rebind, end).unwrap_or(end / 8 * 7);
        let renew = within(self.renew, rebind).unwrap_or_else(|| (end / 2).min(rebind));
        Some(Times { renew, rebind, end })
    }
}

/// One that a machine can have.
fn is_hosts(address: Ipv4Addr) -> bool {
    let odd = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    !odd && address.octets()[0] != 0 && address.octets()[0] < 240
}

fn packet(from: Ipv4Addr, to: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; IP + UDP];
    // A question has less than a thousand bytes.
    let (whole, behind) = ((IP + UDP + message.len()) as u16, (UDP + message.len()) as u16);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&whole.to_be_bytes());
    // TTL, UDP.
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    let header = !sum(&[&packet[..IP]]);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    packet[20..22].copy_from_slice(&CLIENT.to_be_bytes());
    packet[22..24].copy_from_slice(&SERVER.to_be_bytes());
    packet[24..26].copy_from_slice(&behind.to_be_bytes());
    packet.extend(message);
    let checksum = !udp_sum(&packet[12..20], &packet[IP..]);
    // Zero would say that there is none.
    packet[26..28].copy_from_slice(&if checksum == 0 { u16::MAX } else { checksum }.to_be_bytes());
    packet
}

/// Of a whole datagram from a server to a client, what it carries.
fn payload(packet: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    let first = *packet.first()?;
    let header = usize::from(first & 15) * 4;
    let is_udp = first >> 4 == 4 && header >= IP && *packet.get(9)? == 17;
    // No fragment.
    if !is_udp || word(6)? & 0x3fff != 0 {
        return None;
    }
    // Behind it may be padding.
    let packet = packet.get(..usize::from(word(2)?))?;
    let datagram = packet.get(header..)?;
    let of = |at: usize| Some(u16::from_be_bytes(*datagram.get(at..)?.first_chunk()?));
    let datagram = datagram.get(..usize::from(of(4)?))?;
    let is_ours = of(0)? == SERVER && of(2)? == CLIENT;
    let is_whole = of(6)? == 0 || udp_sum(packet.get(12..20)?, datagram) == u16::MAX;
    if is_ours && is_whole { datagram.get(UDP..) } else { None }
}

fn udp_sum(addresses: &[u8], datagram: &[u8]) -> u16 {
    // No packet is larger.
    let len = (datagram.len() as u16).to_be_bytes();
    sum(&[addresses, &[0, 17], &len, datagram])
}

/// Of 16-bit words (RFC 1071); all but the last part have an even number of bytes.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests;
