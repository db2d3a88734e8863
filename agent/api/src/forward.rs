//! Connections to localhost of the namespace that belongs to a guest, which are the guest's.
//!
//! Whoever forwards a port to a pod connects to localhost in the pod's namespace, on the host. The shim takes such a
//! connection, connects to [`FORWARD_PORT`](crate::FORWARD_PORT) of the guest and sends a [`Header`]; the agent connects to
//! localhost of the guest and answers with one byte, [`CONNECTED`] or [`REFUSED`]. After the first, the connection's bytes follow
//! in both directions.

use std::io::Result;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Somebody listens.
pub const CONNECTED: u8 = b'+';
/// Nobody does.
pub const REFUSED: u8 = b'-';

/// Where a connection is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// To ::1, and not to 127.0.0.1.
    pub is_v6: bool,
    /// The port.
    pub port: u16,
}

impl Header {
    const LENGTH: usize = 3;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let [high, low] = self.port.to_be_bytes();
        [u8::from(self.is_v6), high, low]
    }

    /// Reads one, and not a byte beyond it.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self> {
        let mut bytes = [0; Self::LENGTH];
        from.read_exact(&mut bytes).await?;
        let [is_v6, high, low] = bytes;
        Ok(Self { is_v6: is_v6 != 0, port: u16::from_be_bytes([high, low]) })
    }

    /// That, as an address.
    pub fn address(self) -> SocketAddr {
        let localhost: IpAddr =
            if self.is_v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        (localhost, self.port).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn headers_are_read_as_they_are_sent() {
        for (is_v6, port, address) in
            [(false, 80, "127.0.0.1:80"), (true, 65535, "[::1]:65535"), (true, 0, "[::1]:0")]
        {
            let header = Header { is_v6, port };
            let mut bytes = header.encode().to_vec();
            bytes.push(b'x');
            let mut rest = bytes.as_slice();
            assert_eq!(Header::read(&mut rest).await.unwrap(), header);
            assert_eq!((rest, header.address().to_string().as_str()), (&b"x"[..], address));
        }
        assert!(Header::read(&mut &b"\0\0"[..]).await.is_err());
    }
}
