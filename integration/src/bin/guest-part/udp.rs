//! UDP in the guest.

use std::io::Write;
use std::net::{Ipv6Addr, UdpSocket};

use anyhow::{Context, Result};

/// Sends every datagram back to where it came from, for ever. Those of v4 come to a v6 socket, too.
pub fn serve(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).context("binding")?;
    println!("listening");
    std::io::stdout().flush()?;
    let mut datagram = vec![0; 65536];
    loop {
        let (length, from) = socket.recv_from(&mut datagram).context("receiving")?;
        // Whoever is gone by now does not matter.
        let _ = socket.send_to(&datagram[..length], from);
    }
}
