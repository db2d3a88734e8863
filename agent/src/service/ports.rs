//! Who listens in a container.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};

use anyhow::{Context, Result};

/// As many as are told.
const MOST: usize = 1024;
/// Of a table, far more than has so many that listen.
const LONGEST: u64 = 1 << 20;
/// The kernel's number for a socket that listens.
const LISTENS: &str = "0A";

/// The TCP ports on which somebody listens in the network of the process `pid`.
pub fn listening(pid: i32) -> Result<Vec<u32>> {
    let mut ports = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{pid}/net/{table}");
        match File::open(&path) {
            // A kernel without this version of the protocol.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            file => ports.extend(read(file.with_context(|| format!("opening {path}"))?)?),
        }
    }
    Ok(ports.into_iter().take(MOST).collect())
}

/// Those who listen come first in a table.
fn read(table: impl Read) -> Result<Vec<u32>> {
    let mut ports = Vec::new();
    for line in BufReader::new(table.take(LONGEST)).lines().skip(1) {
        let line = line.context("reading the table of sockets")?;
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, state) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
        if state != LISTENS || ports.len() >= MOST {
            break;
        }
        let port = address.rsplit(':').next().and_then(|port| u32::from_str_radix(port, 16).ok());
        ports.extend(port);
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n";

    #[test]
    fn those_who_listen_are_found_and_others_are_not() {
        let table = format!(
            "{HEAD}   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
             1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
             2: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0\n"
        );
        assert_eq!(read(table.as_bytes()).unwrap(), [8080, 80]);
        let six = format!("{HEAD}   0: {}:0016 {}:0000 0A 0\n", "0".repeat(32), "0".repeat(32));
        assert_eq!(read(six.as_bytes()).unwrap(), [22]);
        for nothing in ["", HEAD, "x\nx\n\n"] {
            assert!(read(nothing.as_bytes()).unwrap().is_empty(), "{nothing:?}");
        }
        let many = HEAD.to_owned() + &"  0: 0:0001 0:0 0A\n".repeat(MOST + 9);
        assert_eq!(read(many.as_bytes()).unwrap().len(), MOST);
    }

    #[test]
    fn a_port_of_our_own_is_listened_on() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = u32::from(socket.local_addr().unwrap().port());
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(listening(pid).unwrap().contains(&port));
        assert!(listening(i32::MAX).unwrap().is_empty(), "a process that is not there");
    }
}
