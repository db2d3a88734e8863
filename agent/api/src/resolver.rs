//! Questions for names that are asked in the guest and answered on the host.
//!
//! Docker, say, has a resolver on 127.0.0.11 of each container's network namespace. Whoever asks it in a guest asks the
//! agent, which connects to [`RESOLVER_PORT`](crate::RESOLVER_PORT) of the host and sends a [`Header`]. What follows is,
//! of a question that came by TCP, the connection's bytes in both directions; of one that came by UDP, the question, and
//! then the answer, each as a [message](write_message): its length in two bytes, the higher first, as DNS has it on TCP.

use std::io::{Error, ErrorKind, Result};
use std::net::Ipv4Addr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Where resolvers listen.
pub const DNS_PORT: u16 = 53;

/// By what a question came, and by what it is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One question, one answer.
    Udp,
    /// A stream of them.
    Tcp,
}

/// What a connection is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the resolver is asked.
    pub transport: Transport,
    /// Which one.
    pub resolver: Ipv4Addr,
}

impl Header {
    const LENGTH: usize = 5;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let [a, b, c, d] = self.resolver.octets();
        let transport = match self.transport {
            Transport::Udp => b'U',
            Transport::Tcp => b'T',
        };
        [transport, a, b, c, d]
    }

    /// Reads one, and not a byte beyond it.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self> {
        let mut bytes = [0; Self::LENGTH];
        from.read_exact(&mut bytes).await?;
        let [transport, a, b, c, d] = bytes;
        let transport = match transport {
            b'U' => Transport::Udp,
            b'T' => Transport::Tcp,
            other => return Err(Error::new(ErrorKind::InvalidData, format!("no transport is {other:#x}"))),
        };
        Ok(Self { transport, resolver: Ipv4Addr::new(a, b, c, d) })
    }
}

/// Sends a question or an answer.
pub async fn write_message(to: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|_| Error::new(ErrorKind::InvalidInput, "a message has at most 65535 bytes"))?;
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    to.write_all(&bytes).await
}

/// Reads one.
pub async fn read_message(from: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>> {
    let mut message = vec![0; from.read_u16().await?.into()];
    from.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn headers_are_read_as_they_are_sent() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let header = Header { transport, resolver: Ipv4Addr::new(127, 0, 0, 11) };
            let mut bytes = header.encode().to_vec();
            bytes.push(b'x');
            let mut rest = bytes.as_slice();
            assert_eq!(Header::read(&mut rest).await.unwrap(), header);
            assert_eq!(rest, b"x");
        }
        for wrong in [&b"X\x7f\0\0\x0b"[..], b"", b"U\x7f\0\0"] {
            assert!(Header::read(&mut &*wrong).await.is_err(), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn messages_are_read_as_they_are_sent() {
        for message in [vec![], vec![7], vec![1; 65535]] {
            let mut bytes = Vec::new();
            write_message(&mut bytes, &message).await.unwrap();
            assert_eq!(read_message(&mut bytes.as_slice()).await.unwrap(), message);
            assert!(read_message(&mut &bytes[..bytes.len() - 1]).await.is_err());
        }
        assert!(write_message(&mut Vec::new(), &vec![0; 65536]).await.is_err());
    }
}
