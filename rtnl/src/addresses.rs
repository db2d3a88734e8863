//! Addresses as people write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use netlink_packet_route::AddressFamily;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&parts.join(":"))
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no hardware address");
        let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2);
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(wrong)
    }
}

/// An address with the length of its network's prefix: `10.4.0.7/24`, or an address alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// How many bits of it are the network's.
    pub length: u8,
}

impl Prefix {
    /// What the kernel calls the kind of its address.
    pub fn family(&self) -> AddressFamily {
        if self.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| format!("{text:?} has no address"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => most,
            Some(length) => length.parse().map_err(|_| format!("{text:?} has no length"))?,
        };
        if length > most {
            return Err(format!("{text:?} has a length over {most}"));
        }
        Ok(Self { address, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, expected) in [
            ("10.4.0.7/24", Some("10.4.0.7/24")),
            ("10.4.0.7", Some("10.4.0.7/32")),
            ("fd00::7/64", Some("fd00::7/64")),
            ("fd00::7", Some("fd00::7/128")),
            ("fd00::7/129", None),
            ("10.4.0.7/33", None),
            ("10.4.0/24", None),
            ("10.4.0.7/", None),
        ] {
            let found = text.parse::<Prefix>().ok().map(|prefix| prefix.to_string());
            assert_eq!(found.as_deref(), expected, "{text}");
        }
        let mac: Mac = "02:00:00:00:00:fF".parse().unwrap();
        assert_eq!((mac, mac.to_string().as_str()), (Mac([2, 0, 0, 0, 0, 255]), "02:00:00:00:00:ff"));
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "02:00:00:00:00:0g", "02:00:00:00:00:001"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
