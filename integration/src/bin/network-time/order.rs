//! What both ends know.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

/// The host's end of the cable.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// The end that answers.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// Where it takes orders.
pub const PORT: u16 = 7800;
/// Where it makes connections and ends them.
pub const DOOR: u16 = 7801;
/// What it says when it listens.
pub const READY: &str = "network-time listens";

/// Bytes of a read or write.
pub const CHUNK: usize = 128 << 10;
/// Bytes that a stream may have under way, which the kernel doubles. Left alone it would allow megabytes, for which a slow
/// network takes longer than it is measured.
pub const UNDER_WAY: usize = 256 << 10;
/// Bytes in a datagram: with its headers it is as long as Ethernet's packets can be.
pub const DATAGRAM: usize = 1472;
/// No order is longer.
pub const LONGEST: usize = 64;
/// For one thing that a network does, however slow it is.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What is wanted of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Take all there is, and say how many bytes that was.
    Take,
    /// Give as much as possible for so long.
    Give(Duration),
    /// Send back each byte.
    Echo,
    /// Send as many datagrams to a port as possible for so long, and say how many that was.
    Datagrams(u16, Duration),
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Take => write!(f, "take"),
            Self::Give(time) => write!(f, "give {}", time.as_millis()),
            Self::Echo => write!(f, "echo"),
            Self::Datagrams(port, time) => write!(f, "datagrams {port} {}", time.as_millis()),
        }
    }
}

impl Order {
    /// As [`fmt::Display`] writes it.
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let time = |text: &str| Some(Duration::from_millis(text.parse::<u32>().ok()?.into()));
        match words.as_slice() {
            ["take"] => Some(Self::Take),
            ["give", millis] => Some(Self::Give(time(millis)?)),
            ["echo"] => Some(Self::Echo),
            ["datagrams", port, millis] => Some(Self::Datagrams(port.parse().ok()?, time(millis)?)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_are_written() {
        let time = Duration::from_millis(2500);
        for order in [Order::Take, Order::Give(time), Order::Echo, Order::Datagrams(65535, time)] {
            let written = order.to_string();
            assert!(written.len() < LONGEST);
            assert_eq!(Order::parse(&written), Some(order));
        }
        for broken in ["", "take 1", "give", "give -1", "give 1 2", "datagrams 70000 1", "datagrams 1"] {
            assert_eq!(Order::parse(broken), None, "{broken:?}");
        }
    }
}
