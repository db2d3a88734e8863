//! A network behind a unix socket: where that is, and which addresses a machine has there.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// More than anybody needs, and few enough for a line.
const ADDRESSES_MAX: usize = 16;

/// The network of machines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Who moves the packets of interfaces.
    pub vhost: Vhost,
    /// Who has the network of machines that have none of a namespace's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<NetworkSocket>,
    /// The addresses of the machine in it.
    pub address: Addresses,
    /// By whom all else is reached from them.
    #[serde(skip_serializing_if = "Gateways::is_empty")]
    pub gateway: Gateways,
}

impl Network {
    pub(super) fn check(&self) -> Result<(), String> {
        for gateway in &self.gateway.0 {
            let known = match &self.address {
                Addresses::Dhcp => false,
                Addresses::Given(list) => list.iter().any(|subnet| subnet.0.is_ipv4() == gateway.is_ipv4()),
            };
            if !known {
                return Err(format!(
                    "network.gateway is {gateway}, and network.address {:?} has no address of its kind; give one there \
                     (by DHCP comes the gateway, too)",
                    self.address.to_string()
                ));
            }
        }
        Ok(())
    }
}

/// How frames are kept apart on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    /// It is a stream, and each is behind its length.
    Stream,
    /// Each is a datagram.
    Datagram,
}

/// Whether the host's kernel moves the packets between a guest and an interface of its namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// It does where it has vhost-net.
    #[default]
    Auto,
    /// The monitor does.
    Off,
}

/// Where a network is: `stream:/path` or `datagram:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkSocket {
    /// How its frames are kept apart.
    pub frames: Frames,
    /// The host's path.
    pub path: String,
}

impl NetworkSocket {
    /// That of one container, or pod.
    pub(crate) fn of(&self, id: &str) -> Self {
        Self { frames: self.frames, path: self.path.replace("{id}", id) }
    }
}

impl FromStr for NetworkSocket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = match text.split_once(':') {
            Some(("stream", path)) => Some((Frames::Stream, path)),
            Some(("datagram", path)) => Some((Frames::Datagram, path)),
            _ => None,
        };
        let found = found.filter(|(_, path)| path.starts_with('/') && !path.contains('\0'));
        let socket = found.map(|(frames, path)| Self { frames, path: path.to_owned() });
        socket.ok_or_else(|| "it is `stream:/path` or `datagram:/path`, of a socket on the host".to_owned())
    }
}

impl fmt::Display for NetworkSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames = match self.frames {
            Frames::Stream => "stream",
            Frames::Datagram => "datagram",
        };
        write!(f, "{frames}:{}", self.path)
    }
}

/// An address and how many bits of it are its network's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet(pub IpAddr, pub u8);

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address with the length of its network, like 10.0.2.15/24");
        let (address, length) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = length.parse().ok().filter(|length| *length <= most).ok_or_else(wrong)?;
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return Err(format!("{text:?} is no address that an interface can have"));
        }
        Ok(Self(address, length))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

/// Which addresses a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Addresses {
    /// The v4 one that it is given.
    #[default]
    Dhcp,
    /// These.
    Given(Vec<Subnet>),
}

impl FromStr for Addresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "dhcp" {
            return Ok(Self::Dhcp);
        }
        let list = text.split(',').map(|part| part.trim().parse()).collect::<Result<Vec<_>, String>>();
        let list = list.map_err(|why| format!("it is `dhcp`, or addresses: {why}"))?;
        if list.len() > ADDRESSES_MAX {
            return Err(format!("{} addresses are more than {ADDRESSES_MAX}", list.len()));
        }
        Ok(Self::Given(list))
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dhcp => f.write_str("dhcp"),
            Self::Given(list) => f.write_str(&joined(list)),
        }
    }
}

/// At most one of each family.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Gateways(pub Vec<IpAddr>);

impl Gateways {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for Gateways {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |part: &str| part.trim().parse().map_err(|_| format!("{part:?} is no address"));
        let list = text.split(',').map(parse).collect::<Result<Vec<IpAddr>, String>>()?;
        match &list[..] {
            [_] => Ok(Self(list)),
            [one, other] if one.is_ipv4() != other.is_ipv4() => Ok(Self(list)),
            _ => Err("there is one gateway for v4 and one for v6".to_owned()),
        }
    }
}

impl fmt::Display for Gateways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&joined(&self.0))
    }
}

fn joined(list: &[impl fmt::Display]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// As they are written in the configuration.
macro_rules! written {
    ($($name:ty),+) => {$(
        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )+};
}

written!(NetworkSocket, Addresses, Gateways);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_written_and_what_cannot() {
        fn check<T: FromStr<Err = String> + ToString>(good: &[&str], bad: &[&str]) {
            for text in good {
                assert_eq!(text.parse::<T>().map(|value| value.to_string()), Ok((*text).to_owned()));
            }
            for text in bad {
                assert!(text.parse::<T>().is_err(), "{text:?}");
            }
        }
        check::<NetworkSocket>(
            &["stream:/a:b", "datagram:/run/{id}"],
            &["", "/a", "stream", "stream:", "stream:a", "unix:/a", "datagram:/a\0"],
        );
        check::<Addresses>(
            &["dhcp", "10.0.2.15/24", "10.0.2.15/24,fd00::5/64"],
            &[
                "",
                "DHCP",
                "10.0.2.15",
                "10.0.2.15/33",
                "fd00::5/129",
                "10.0.2.15/24,",
                "127.0.0.1/8",
                "0.0.0.0/0",
                "ff02::1/64",
            ],
        );
        assert!(vec!["10.0.2.15/24"; ADDRESSES_MAX + 1].join(",").parse::<Addresses>().is_err());
        check::<Gateways>(&["10.0.2.2", "fd00::2,10.0.2.2"], &["", "10.0.2.2,10.0.2.3", "x", "10.0.2.2/24"]);
    }

    #[test]
    fn a_gateway_needs_an_address_of_its_kind() {
        for (address, gateway, good) in [
            ("10.0.2.15/24", "10.0.2.2", true),
            ("10.0.2.15/24,fd00::5/64", "10.0.2.2,fd00::2", true),
            ("10.0.2.15/24", "fd00::2", false),
            ("dhcp", "10.0.2.2", false),
        ] {
            let (address, gateway) = (address.parse().unwrap(), gateway.parse().unwrap());
            let network = Network { address, gateway, ..Network::default() };
            assert_eq!(network.check().is_ok(), good, "{network:?}");
        }
    }
}
