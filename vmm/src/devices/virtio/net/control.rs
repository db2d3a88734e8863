//! The control queue, section 5.1.6.5: how many queue pairs the driver uses, and that it has told the network where
//! it is.

use std::io::{Read, Write};
use std::sync::Arc;

use virtio_queue::{Reader, Writer};

use super::super::queue::Chain;
use super::super::{Broken, Serve};
use super::port::Port;
use super::{Error, Shared};
use crate::memory::RamSlice;

const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

const OK: u8 = 0;
const ERR: u8 = 1;

/// Does what the driver asks for.
#[derive(Debug)]
pub struct Control {
    pairs: Vec<Arc<Port>>,
    shared: Arc<Shared>,
}

impl Control {
    /// Of these pairs, by their number.
    pub fn new(pairs: Vec<Arc<Port>>, shared: Arc<Shared>) -> Self {
        Self { pairs, shared }
    }

    fn command(&self, reader: &mut impl Read) -> std::io::Result<u8> {
        let mut head = [0; 2];
        reader.read_exact(&mut head)?;
        match head {
            [CLASS_ANNOUNCE, ANNOUNCE_ACK] => {
                self.shared.announced();
                return Ok(OK);
            }
            // Which is there only where there is more than one.
            [CLASS_MQ, MQ_VQ_PAIRS_SET] => {}
            _ => return Ok(ERR),
        }
        let mut wanted = [0; 2];
        reader.read_exact(&mut wanted)?;
        let wanted = usize::from(u16::from_le_bytes(wanted));
        if !(1..=self.pairs.len()).contains(&wanted) || !self.shared.has_room_for(wanted) {
            return Ok(ERR);
        }
        let used = self.use_pairs(wanted);
        Ok(used.map_or_else(
            |error| {
                log::warn!("net: {error}");
                ERR
            },
            |()| OK,
        ))
    }

    fn use_pairs(&self, count: usize) -> Result<(), Error> {
        for (index, pair) in self.pairs.iter().enumerate() {
            pair.switch(index < count)?;
        }
        self.shared.wake()
    }
}

impl Serve for Control {
    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        let broken = |error: std::io::Error| Broken(format!("a control request: {error}"));
        let ram = chain.memory().clone();
        let mut reader: Reader<'_, RamSlice<'_>> = chain.clone().reader(&ram)?;
        let mut writer: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
        let ack = self.command(&mut reader).map_err(broken)?;
        writer.write_all(&[ack]).map_err(broken)?;
        Ok(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cable::Cable;
    use super::super::socket::Socket;
    use super::*;

    #[test]
    fn an_announcement_is_heard() {
        let shared = Arc::new(Shared::new([2; 6], vec![]));
        let control = Control::new(vec![], Arc::clone(&shared));
        shared.set_link(true);
        shared.announce.store(true, std::sync::atomic::Ordering::Release);
        for (bytes, answer, status) in [(&[3, 1][..], ERR, 3), (&[3, 0], OK, 1), (&[3, 0], OK, 1)] {
            assert_eq!((control.command(&mut &*bytes).unwrap(), shared.status()), (answer, status));
        }
    }

    #[test]
    fn only_the_number_of_pairs_can_be_set_and_only_to_what_there_is() {
        let ports: Vec<_> = (0..3).map(|_| Arc::new(Port::new(true).unwrap())).collect();
        let control = Control::new(ports.clone(), Arc::new(Shared::new([2; 6], vec![])));
        for (bytes, expected, on) in [
            (&[4, 0, 2, 0][..], Some(OK), Some([true, true, false])),
            (&[4, 0, 3, 0], Some(OK), Some([true, true, true])),
            (&[4, 0, 1, 0], Some(OK), Some([true, false, false])),
            (&[4, 0, 0, 0], Some(ERR), None),
            (&[4, 0, 4, 0], Some(ERR), None),
            (&[4, 0, 1, 1], Some(ERR), None),
            (&[4, 1, 1, 0], Some(ERR), None),
            (&[0, 0], Some(ERR), None),
            (&[4, 0, 1], None, None),
            (&[4], None, None),
            (&[], None, None),
        ] {
            assert_eq!(control.command(&mut &*bytes).ok(), expected, "{bytes:?}");
            if let Some(on) = on {
                let states: Vec<_> = ports.iter().map(|port| port.is_on()).collect();
                assert_eq!(states, on);
            }
        }
    }

    #[test]
    fn no_more_pairs_are_used_than_the_cable_has() {
        let ports: Vec<_> = (0..3).map(|_| Arc::new(Port::new(true).unwrap())).collect();
        let shared = Arc::new(Shared::new([2; 6], ports.clone()));
        let control = Control::new(ports.clone(), Arc::clone(&shared));
        let answers = || [3u8, 2, 1].map(|wanted| control.command(&mut &[4, 0, wanted, 0][..]).unwrap());
        assert_eq!(answers(), [OK; 3], "it may have any");
        let cable = || {
            let (_, socket) = std::os::unix::net::UnixDatagram::pair().unwrap();
            Cable::Socket(Socket::new(socket.into()).unwrap())
        };
        for (plugged, expected) in [(2, [ERR, OK, OK]), (1, [ERR, ERR, OK]), (3, [OK; 3])] {
            shared.plug((0..plugged).map(|_| cable()).collect()).unwrap();
            assert_eq!(answers(), expected, "{plugged}");
            assert_eq!(ports.iter().filter(|port| port.cable().is_some()).count(), plugged);
        }
    }
}
