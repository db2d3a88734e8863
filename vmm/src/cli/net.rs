//! `--tap` and `--nic`: network devices, on taps that are there or will come, or behind sockets.

#[cfg(not(target_os = "linux"))]
mod none;

use std::os::fd::RawFd;

#[cfg(target_os = "linux")]
pub(super) use linux::{Network, open_vhost};
#[cfg(not(target_os = "linux"))]
pub(super) use none::Network;

/// A network device as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    cable: Cable,
    /// Bytes a second to the guest and from it.
    rate: [Option<u64>; 2],
    /// Its hardware address, where that is not to be drawn.
    mac: Option<[u8; 6]>,
    /// The host's kernel moves the packets.
    vhost: bool,
}

/// Where its cable comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cable {
    /// It is opened by its name, so many queues of it.
    Name(String, usize),
    /// It is open already, a descriptor for each queue.
    Open(Vec<RawFd>),
    /// It comes later, by the control socket, with so many queues.
    Later(usize),
    /// Who has the network is connected with: `stream:PATH` or `datagram:PATH`.
    Socket(String),
}

impl Port {
    /// Of `--tap`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (tap, rates) = text.split_once(',').map_or((text, None), |(tap, rates)| (tap, Some(rates)));
        let mut port = Self { cable: Cable::parse(tap)?, rate: [None; 2], mac: None, vhost: false };
        for part in rates.into_iter().flat_map(|rates| rates.split(',')) {
            if part == "vhost" {
                port.vhost = true;
            } else if !port.set(part)? {
                return Err(format!(
                    "{part} says nothing of a tap: give rx=SIZE or tx=SIZE, a second, mac=ADDRESS or vhost"
                ));
            }
        }
        if port.vhost && port.waits() {
            return Err(format!("{text}: vhost comes with the tap (ctl tap)"));
        }
        if port.vhost && port.rate != [None; 2] {
            return Err(format!("{text}: vhost has no limits: take it, or rx and tx, away"));
        }
        Ok(port)
    }

    /// Of `--nic`. Options are taken from the end, so that a path may have commas in its name.
    pub(super) fn parse_socket(text: &str) -> Result<Self, String> {
        let mut port = Self { cable: Cable::Later(1), rate: [None; 2], mac: None, vhost: false };
        let mut rest = text;
        while let Some((before, option)) = rest.rsplit_once(',') {
            if !port.set(option)? {
                break;
            }
            rest = before;
        }
        if !["stream:", "datagram:"].iter().any(|kind| rest.len() > kind.len() && rest.starts_with(kind)) {
            return Err(format!("{rest} is no network: give stream:PATH or datagram:PATH"));
        }
        Ok(Self { cable: Cable::Socket(rest.into()), ..port })
    }

    /// Whether it is an option.
    fn set(&mut self, option: &str) -> Result<bool, String> {
        match option.split_once('=') {
            Some(("rx", size)) => self.rate[0] = Some(super::options::size(size)?),
            Some(("tx", size)) => self.rate[1] = Some(super::options::size(size)?),
            Some(("mac", address)) => self.mac = Some(hardware_address(address)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Descriptors that were handed in for it.
    #[cfg(target_os = "linux")]
    pub(super) fn descriptors(&self) -> &[RawFd] {
        match &self.cable {
            Cable::Open(fds) => fds,
            _ => &[],
        }
    }

    /// Whether it waits for a tap.
    pub(super) fn waits(&self) -> bool {
        matches!(self.cable, Cable::Later(_))
    }
}

/// Six bytes like 02:00:00:00:00:01.
fn hardware_address(text: &str) -> Result<[u8; 6], String> {
    let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2);
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("{text} is no hardware address: give one like 02:00:00:00:00:01"))
}

impl Cable {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text} is no tap: give NAME, NAME:N for N queues of it, fd:N+N..., none or none:N");
        if let Some(numbers) = text.strip_prefix("fd:") {
            let fds: Option<Vec<RawFd>> =
                numbers.split('+').map(|number| number.parse().ok().filter(|fd| *fd > 2)).collect();
            return fds.map(Self::Open).ok_or_else(wrong);
        }
        let (name, queues) = text.split_once(':').unwrap_or((text, "1"));
        match queues.parse() {
            Ok(queues) if name == "none" => Ok(Self::Later(queues)),
            Ok(queues) if !name.is_empty() => Ok(Self::Name(name.into(), queues)),
            _ => Err(wrong()),
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::{FromRawFd, OwnedFd};

    use anyhow::anyhow;
    use vmm::control::{self, OnCable, Refusal, RefusalKind};
    use vmm::devices::virtio::Device;
    use vmm::devices::virtio::limit::{Limits, Rate};
    use vmm::devices::virtio::net::dial::Address;
    use vmm::devices::virtio::net::{Config, Handle, Net, tap, vhost};
    use vmm::slots::SlotId;

    use super::super::WITHIN;
    use super::{Cable, Port};

    /// The network devices of a machine, on their way from names to slots.
    #[derive(Default)]
    pub(in crate::cli) struct Network {
        devices: Vec<Net>,
        handles: Vec<(String, Handle)>,
    }

    impl Network {
        /// Opens what `ports` name: in the network namespace of the taps, with the right to use them.
        pub(in crate::cli) fn open(ports: &[Port]) -> anyhow::Result<Self> {
            let mut network = Self::default();
            for (index, port) in ports.iter().enumerate() {
                let device = device(port)?;
                network.handles.push((format!("net.{index}"), device.handle()));
                network.devices.push(device);
            }
            Ok(network)
        }

        /// Gives the devices slots, once.
        pub(in crate::cli) fn add_to(&mut self, slots: &mut Vec<(SlotId, Box<dyn Device>)>) {
            for ((name, _), device) in self.handles.iter().zip(self.devices.drain(..)) {
                slots.push((SlotId::new(name), Box::new(device)));
            }
        }

        /// What the control socket does with a cable for one of the slots.
        pub(in crate::cli) fn on_cable(self) -> OnCable {
            Box::new(move |slot, cable| {
                let refuse = |why| Refusal::new(RefusalKind::Invalid, why);
                let found = self.handles.iter().find(|(name, _)| name == slot);
                let (_, handle) = found.ok_or_else(|| {
                    let known: Vec<_> = self.handles.iter().map(|(name, _)| name.as_str()).collect();
                    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                    refuse(format!("there is no network device {slot}: this machine has {known}"))
                })?;
                let plugged = match cable {
                    control::Cable::Taps { taps, vhost } => handle.attach(taps, vhost),
                    control::Cable::Socket(socket) => handle.connect(socket),
                };
                plugged.map_err(|error| refuse(error.to_string()))
            })
        }
    }

    fn device(port: &Port) -> anyhow::Result<Net> {
        let mut socket = None;
        let (pairs, taps, mtu) = match &port.cable {
            Cable::Name(name, queues) => (*queues, tap::open(name, *queues)?, Some(tap::mtu(name)?)),
            Cable::Open(fds) => {
                // SAFETY: they were given for this use, once, by whoever started this process; should one not
                // be an open tap, the device refuses it.
                let taps: Vec<_> = fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
                let name = taps.first().map(tap::name).transpose()?;
                (taps.len(), taps, name.map(|name| tap::mtu(&name)).transpose()?)
            }
            Cable::Later(queues) => (*queues, Vec::new(), None),
            Cable::Socket(address) => {
                let address: Address = address.parse().map_err(|error: String| anyhow!(error))?;
                socket = Some(address.connect(None, WITHIN)?);
                (1, Vec::new(), None)
            }
        };
        let mac = port.mac.map_or_else(drawn, Ok)?;
        let [rx, tx] = port.rate.map(limits);
        let vhost = if port.vhost { open_vhost(pairs)? } else { Vec::new() };
        Ok(Net::new(Config { pairs, taps, vhost, socket, mac, mtu, rx, tx })?)
    }

    /// One for each queue pair.
    pub(in crate::cli) fn open_vhost(pairs: usize) -> anyhow::Result<Vec<OwnedFd>> {
        vhost::open(pairs).map_err(|error| {
            anyhow!("cannot open {}: {error}; load the module vhost_net, or leave vhost away", vhost::PATH)
        })
    }

    /// A hardware address of one machine's, given by nobody.
    fn drawn() -> anyhow::Result<[u8; 6]> {
        let mut mac = [0; 6];
        vmm::entropy::fill(&mut mac).map_err(|error| anyhow!("no randomness for an address: {error}"))?;
        mac[0] = mac[0] & !1 | 2;
        Ok(mac)
    }

    /// A second's worth may come at once.
    fn limits(rate: Option<u64>) -> Limits {
        let bytes = rate.map_or(Rate::default(), |rate| Rate { per_second: rate, burst: rate, once: 0 });
        Limits { bytes, operations: Rate::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps() {
        let name = |name: &str, queues| Cable::Name(name.into(), queues);
        for (text, tap, rate) in [
            ("tap0", Some(name("tap0", 1)), [None; 2]),
            ("tap0:4", Some(name("tap0", 4)), [None; 2]),
            ("tap0:4,rx=1K", Some(name("tap0", 4)), [Some(1024), None]),
            ("tap0,tx=5,rx=6", Some(name("tap0", 1)), [Some(6), Some(5)]),
            ("fd:3", Some(Cable::Open(vec![3])), [None; 2]),
            ("fd:3+7", Some(Cable::Open(vec![3, 7])), [None; 2]),
            ("none", Some(Cable::Later(1)), [None; 2]),
            ("none:2,rx=1", Some(Cable::Later(2)), [Some(1), None]),
            ("none,mac=02:00:00:00:00", None, [None; 2]),
            ("none,vhost", None, [None; 2]),
            ("tap0,vhost,rx=1", None, [None; 2]),
            ("none,mac=02:00:00:00:00:0g", None, [None; 2]),
            ("none,mac=02:00:00:00:00:001", None, [None; 2]),
            ("fd:", None, [None; 2]),
            ("fd:2", None, [None; 2]),
            ("fd:3+x", None, [None; 2]),
            ("tap0:", None, [None; 2]),
            ("tap0:x", None, [None; 2]),
            ("tap0,fast", None, [None; 2]),
            ("tap0,rx=fast", None, [None; 2]),
            (":2", None, [None; 2]),
            ("", None, [None; 2]),
        ] {
            assert_eq!(
                Port::parse(text).ok(),
                tap.map(|cable| Port { cable, rate, mac: None, vhost: false }),
                "{text:?}"
            );
        }
        let port = Port {
            cable: Cable::Later(1),
            rate: [None, Some(9)],
            mac: Some([2, 0, 0, 0, 1, 0xff]),
            vhost: false,
        };
        assert_eq!(Port::parse("none,mac=02:00:00:00:01:fF,tx=9").unwrap(), port);
        let port = Port { cable: name("tap0", 2), rate: [None; 2], mac: None, vhost: true };
        assert_eq!(Port::parse("tap0:2,vhost").unwrap(), port);
    }

    #[test]
    fn sockets() {
        for (text, path, rate) in [
            ("stream:/s", Some("stream:/s"), [None; 2]),
            ("datagram:/s,rx=1K", Some("datagram:/s"), [Some(1024), None]),
            ("stream:/a,b:c,tx=5,rx=6", Some("stream:/a,b:c"), [Some(6), Some(5)]),
            ("stream:/s,rx=fast", None, [None; 2]),
            ("stream:/s,vhost", Some("stream:/s,vhost"), [None; 2]),
            ("stream:,rx=1", None, [None; 2]),
            ("stream:", None, [None; 2]),
            ("/s", None, [None; 2]),
            ("", None, [None; 2]),
        ] {
            let port =
                path.map(|path| Port { cable: Cable::Socket(path.into()), rate, mac: None, vhost: false });
            assert_eq!(Port::parse_socket(text).ok(), port, "{text:?}");
        }
    }
}
