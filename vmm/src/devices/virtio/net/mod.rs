//! The network device, section 5.1, on a tap of the host, or on a socket behind which somebody has a network.
//!
//! `tap` and `socket` are the host's side, as `cable` has them; `pair` moves packets between one queue pair and one
//! queue of the tap, or the socket, on a thread of its own, or lets the host's kernel do so (`vhost`); `movers` begins these
//! threads when there is something to move; `control` hears how many pairs the driver wants, and that it
//! has announced itself after it came from elsewhere. To a tap, checksums and the cutting of large packets are left to
//! whoever is last to see them, in both directions: the header that the driver and the tap put before each packet is the
//! same, and goes through as it is. Through a socket go finished frames and no header.

mod cable;
mod checksum;
mod control;
mod counters;
pub mod dial;
mod movers;
mod pair;
mod port;
mod socket;
pub mod tap;
pub mod vhost;

use std::ffi::c_uint;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::limit::{Limiter, Limits};
use super::state::{decode, encode};
use super::{ActivateError, Activation, AtOnce, Device, Signals, StateError};

use cable::Cable;
use control::Control;
pub use counters::{Counts, DirectionCounts};
use movers::{Movers, Waiting};
use pair::Pair;
use port::Port;
pub use socket::Kind;
use socket::Socket;
use tap::Tap;

const KIND: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 16;
/// More queue pairs than this find no work.
pub const PAIRS_MAX: usize = 8;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_MQ: u64 = 1 << 22;
const F_GUEST_USO4: u64 = 1 << 54;
const F_GUEST_USO6: u64 = 1 << 55;
const F_HOST_USO: u64 = 1 << 56;

const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// Which large or unfinished packets the driver takes, and how the tap is told.
const OFFLOADS: [(u64, c_uint); 5] = [
    (F_GUEST_CSUM, libc::TUN_F_CSUM),
    (F_GUEST_TSO4, libc::TUN_F_TSO4),
    (F_GUEST_TSO6, libc::TUN_F_TSO6),
    (F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    // The tap knows these two together only.
    (F_GUEST_USO4 | F_GUEST_USO6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
];

/// What a device is made from.
#[derive(Debug)]
pub struct Config {
    /// Queue pairs.
    pub pairs: usize,
    /// Descriptors of one tap, one for each queue pair or for the first ones, opened with IFF_TAP, IFF_NO_PI and
    /// IFF_VNET_HDR, and with IFF_MULTI_QUEUE when there are several. None at all: the link is down until
    /// [`Handle::attach`] or [`Handle::connect`].
    pub taps: Vec<OwnedFd>,
    /// Descriptors of [`vhost::PATH`], one for each tap, or none: the host's kernel is to move the packets, which it does
    /// where it can and no limit is set.
    pub vhost: Vec<OwnedFd>,
    /// A connected socket instead of them: the driver is not offered to send packets that are to be cut up.
    pub socket: Option<OwnedFd>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet without its Ethernet header, where the driver is to be told.
    pub mtu: Option<u16>,
    /// Limits of what goes to the guest.
    pub rx: Limits,
    /// Limits of what comes from the guest.
    pub tx: Limits,
}

/// The device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device has as many.
    #[error("{0} queue pairs of a network device: it has 1 to {PAIRS_MAX}")]
    Pairs(usize),
    /// Each is a pair's own.
    #[error(
        "{given} descriptors of a tap for {pairs} queue pair(s): give one for each, or for the first ones"
    )]
    Descriptors {
        /// How many there are.
        given: usize,
        /// How many there can be.
        pairs: usize,
    },
    /// As many as taps, or none.
    #[error("{given} descriptors of vhost-net for {taps} of a tap: give one for each, or none")]
    Vhost {
        /// How many there are.
        given: usize,
        /// How many there can be.
        taps: usize,
    },
    /// The host gave no descriptor.
    #[error("cannot make a network device: {0}; raise the limit of open files")]
    Host(std::io::Error),
    /// It names many, or nobody.
    #[error("{} is no hardware address for a guest: it must be one machine's, and not all zeroes", Mac(*.0))]
    Mac([u8; 6]),
    /// Nothing works with so little.
    #[error("an MTU of {0}: it must be at least 68")]
    Mtu(u16),
    /// The host gave none.
    #[error("cannot start the thread of a network device: {0}; raise the limit of processes")]
    Thread(std::io::Error),
    /// From the tap.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// From the socket.
    #[error(transparent)]
    Socket(#[from] socket::Error),
}

/// A hardware address as people write it.
struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&bytes.join(":"))
    }
}

/// What the host's side and the threads of a device share.
#[derive(Debug)]
struct Shared {
    mac: [u8; 6],
    ports: Vec<Arc<Port>>,
    /// What the driver takes, as taps are told. Locked while taps or driver come.
    offload: Mutex<c_uint>,
    link: AtomicBool,
    /// The driver is to tell the network where it is now, as soon as the cable is in.
    announce: AtomicBool,
    counters: counters::Counters,
    signals: Mutex<Option<Arc<Signals>>>,
    movers: Mutex<Movers>,
}

impl Shared {
    fn new(mac: [u8; 6], ports: Vec<Arc<Port>>) -> Self {
        Self {
            mac,
            ports,
            offload: Mutex::new(0),
            link: AtomicBool::new(false),
            announce: AtomicBool::new(false),
            counters: counters::Counters::default(),
            signals: Mutex::new(None),
            movers: Mutex::default(),
        }
    }

    fn movers(&self) -> MutexGuard<'_, Movers> {
        self.movers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offload(&self) -> MutexGuard<'_, c_uint> {
        self.offload.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, taps: Vec<OwnedFd>, vhost: Vec<OwnedFd>) -> Result<(), Error> {
        let (pairs, given) = (self.ports.len(), taps.len());
        if !(1..=pairs).contains(&given) {
            return Err(Error::Descriptors { given, pairs });
        }
        if !vhost.is_empty() && vhost.len() != given {
            return Err(Error::Vhost { given: vhost.len(), taps: given });
        }
        let taps: Result<Vec<_>, _> = taps.into_iter().map(|fd| Tap::new(fd, given)).collect();
        let mut taps = taps?;
        for (tap, vhost) in taps.iter_mut().zip(vhost) {
            tap.set_vhost(vhost);
        }
        self.plug(taps.into_iter().map(Cable::Tap).collect())
    }

    fn connect(&self, socket: OwnedFd) -> Result<(), Error> {
        // It has one queue.
        self.plug(vec![Cable::Socket(Socket::new(socket)?)])
    }

    /// One for each port, or for the first ones.
    fn plug(&self, cables: Vec<Cable>) -> Result<(), Error> {
        {
            let offload = self.offload();
            cables.iter().try_for_each(|cable| cable.set_offload(*offload))?;
            let cables = cables.into_iter().map(|cable| Some(Arc::new(cable)));
            for (port, cable) in self.ports.iter().zip(cables.chain(std::iter::repeat(None))) {
                port.plug(cable)?;
            }
        }
        self.set_link(true);
        self.wake()
    }

    /// Moves the packets of the pairs that the driver uses, if the cable is in.
    fn wake(&self) -> Result<(), Error> {
        let mut movers = self.movers();
        if self.link() { movers.wake().map_err(Error::Thread) } else { Ok(()) }
    }

    fn set_signals(&self, signals: Option<Arc<Signals>>) {
        *self.signals.lock().unwrap_or_else(PoisonError::into_inner) = signals;
    }

    fn set_link(&self, up: bool) {
        if self.link.swap(up, Ordering::AcqRel) == up {
            return;
        }
        for port in &self.ports {
            port.changed().set();
        }
        if let Some(signals) = &*self.signals.lock().unwrap_or_else(PoisonError::into_inner) {
            signals.config_changed(4, || self.second_word());
        }
    }

    fn link(&self) -> bool {
        self.link.load(Ordering::Acquire)
    }

    /// Whether so many pairs have a cable, or will have one: without any, it is not known which.
    fn has_room_for(&self, pairs: usize) -> bool {
        !self.link() || self.ports.iter().take_while(|port| port.cable().is_some()).count() >= pairs
    }

    fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }

    /// The configuration space from its fourth byte on: the end of the hardware address, and the status.
    fn second_word(&self) -> Vec<u8> {
        let [.., fifth, last] = self.mac;
        let [low, high] = self.status().to_le_bytes();
        vec![fifth, last, low, high]
    }

    /// The status in the configuration space.
    fn status(&self) -> u16 {
        match (self.link(), self.announce.load(Ordering::Acquire)) {
            (false, _) => 0,
            (true, false) => S_LINK_UP,
            (true, true) => S_LINK_UP | S_ANNOUNCE,
        }
    }
}

/// What the host can ask and tell. It stays valid when the device is gone, and does nothing then.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Connects the device with a tap, instead of the one it may have had, and plugs the cable in: at most as many
    /// descriptors as it has queue pairs, opened as [`Config`] says, and as many of [`vhost::PATH`] or none. The driver
    /// may use no more pairs than that.
    pub fn attach(&self, taps: Vec<OwnedFd>, vhost: Vec<OwnedFd>) -> Result<(), Error> {
        self.0.attach(taps, vhost)
    }

    /// Connects the device with a socket, instead of what it may have had, and plugs the cable in: with one that is
    /// connected, for streams or for datagrams. The driver may use one queue pair. What it sends that is to be cut up
    /// is dropped from now on.
    pub fn connect(&self, socket: OwnedFd) -> Result<(), Error> {
        self.0.connect(socket)
    }

    /// Whether the cable is in. It falls out when the tap is removed from the host, or the socket's other end closed. While
    /// it is out, packets are dropped in both directions.
    pub fn link(&self) -> bool {
        self.0.link()
    }

    /// What went through.
    pub fn counts(&self) -> Counts {
        self.0.counters.get()
    }
}

/// What has to be known to go on elsewhere. The hardware address is not among it: machines that go on from one state
/// have each their own, which somebody in the guest gives to the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    mtu: Option<u16>,
    link: bool,
    /// How many pairs the driver uses; none before it begins.
    pairs: u16,
}

/// The device.
#[derive(Debug)]
pub struct Net {
    mtu: Option<u16>,
    features: u64,
    sizes: Vec<u16>,
    rx: Limiter,
    tx: Limiter,
    shared: Arc<Shared>,
    control: Option<AtOnce<Control>>,
    /// Where the driver was that will be served.
    came_from: Option<State>,
}

impl Net {
    /// On the taps that it is given.
    pub fn new(config: Config) -> Result<Self, Error> {
        let pairs = config.pairs;
        if !(1..=PAIRS_MAX).contains(&pairs) {
            return Err(Error::Pairs(pairs));
        }
        if config.mac == [0; 6] || config.mac[0] & 1 != 0 {
            return Err(Error::Mac(config.mac));
        }
        if let Some(mtu) = config.mtu.filter(|mtu| *mtu < 68) {
            return Err(Error::Mtu(mtu));
        }
        let ports: Result<_, _> = (0..pairs).map(|_| Port::new(pairs > 1).map(Arc::new)).collect();
        let shared = Shared::new(config.mac, ports.map_err(Error::Host)?);
        if !config.taps.is_empty() {
            shared.attach(config.taps, config.vhost)?;
        }
        if let Some(socket) = config.socket {
            shared.connect(socket)?;
        }
        let mut features = offered(shared.ports[0].cable().as_deref())?;
        if config.mtu.is_some() {
            features |= F_MTU;
        }
        let mut sizes = vec![QUEUE_SIZE; pairs * 2];
        features |= F_CTRL_VQ | F_GUEST_ANNOUNCE;
        sizes.push(CONTROL_SIZE);
        if pairs > 1 {
            features |= F_MQ;
        }
        Ok(Self {
            mtu: config.mtu,
            features,
            sizes,
            rx: Limiter::new(config.rx),
            tx: Limiter::new(config.tx),
            shared: Arc::new(shared),
            control: None,
            came_from: None,
        })
    }

    /// The host's side of it.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    fn start(&mut self, activation: Activation) -> Result<(), Error> {
        let Activation { ram, queues, signals, features, standstill } = activation;
        let pairs = if features & F_MQ == 0 { 1 } else { self.shared.ports.len() };
        let ports = self.shared.ports[..pairs].to_vec();
        // The driver begins with one pair and asks for the others.
        let used = self.came_from.map_or(1, |state| usize::from(state.pairs).max(1));
        {
            let mut offload = self.shared.offload();
            *offload = tap_offload(features);
            for (index, port) in self.shared.ports.iter().enumerate() {
                if let Some(cable) = port.cable() {
                    cable.set_offload(*offload)?;
                }
                port.switch(index < used.min(pairs))?;
            }
        }
        let mut queues = queues.into_iter();
        for (index, port) in ports.iter().enumerate() {
            let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else { break };
            if !rx.is_ready() || !tx.is_ready() {
                continue;
            }
            let pair = Pair {
                port: Arc::clone(port),
                ram: Arc::clone(&ram),
                shared: Arc::clone(&self.shared),
                signals: Arc::clone(&signals),
                rx_limit: self.rx.clone(),
                tx_limit: self.tx.clone(),
                features,
                packet_max: packet_max(features, self.mtu),
                name: format!("net{index}"),
            };
            self.shared.movers().add(Waiting { pair, rx, tx, standstill: Arc::clone(&standstill) });
        }
        if let Some(queue) = queues.next().filter(|queue| features & F_CTRL_VQ != 0 && queue.is_ready()) {
            let control = Control::new(ports, Arc::clone(&self.shared));
            self.control = Some(AtOnce::new(control, queue, signals));
        }
        self.shared.wake()
    }
}

/// What can be offered on this cable, or on one that is to come.
fn offered(cable: Option<&Cable>) -> Result<u64, tap::Error> {
    let large = F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
    let base = F_CSUM
        | F_GUEST_CSUM
        | F_GUEST_TSO4
        | F_GUEST_TSO6
        | F_GUEST_ECN
        | large
        | F_MAC
        | F_MRG_RXBUF
        | F_STATUS;
    let tap = match cable {
        None => return Ok(base),
        Some(Cable::Socket(_)) => return Ok(base & !large),
        Some(Cable::Tap(tap)) => tap,
    };
    let datagrams = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO;
    // The segmentation of datagrams is younger than taps: Linux 6.2.
    let features = match tap.set_offload(tap_offload(base | datagrams)) {
        Ok(()) => base | datagrams,
        Err(_) => base,
    };
    tap.set_offload(0)?;
    Ok(features)
}

fn tap_offload(features: u64) -> c_uint {
    // Nothing else can be left undone when checksums cannot.
    let usable = if features & F_GUEST_CSUM == 0 { 0 } else { features };
    OFFLOADS
        .iter()
        .filter(|(feature, _)| usable & feature == *feature)
        .fold(0, |flags, (_, flag)| flags | flag)
}

/// The largest packet that the tap hands over, with both headers.
fn packet_max(features: u64, mtu: Option<u16>) -> u64 {
    const ETHERNET_AND_VLAN: u64 = 18;
    let large = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6;
    let payload = if features & large == 0 { u64::from(mtu.unwrap_or(1500).max(1500)) } else { 65535 };
    u64::from(tap::HEADER) + ETHERNET_AND_VLAN + payload
}

impl Device for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn is_idle(&self) -> bool {
        !self.shared.link()
    }

    fn served_at_once(&self) -> usize {
        1
    }

    fn rung(&mut self, _index: usize) {
        if let Some(control) = &mut self.control {
            control.rung();
        }
    }

    fn configuration(&self) -> Vec<u8> {
        let mut config = self.shared.mac.to_vec();
        config.extend(self.shared.status().to_le_bytes());
        // At most PAIRS_MAX.
        config.extend((self.shared.ports.len() as u16).to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (signals, features) = (Arc::clone(&activation.signals), activation.features);
        self.shared.set_signals(Some(Arc::clone(&signals)));
        let failed = |error| ActivateError { device: "net", source: std::io::Error::other(error) };
        self.start(activation).map_err(failed)?;
        if let Some(state) = self.came_from.take() {
            let announces = features & F_GUEST_ANNOUNCE != 0;
            self.shared.announce.store(announces, Ordering::Release);
            if announces || state.link != self.shared.link() {
                signals.config_changed(4, || self.shared.second_word());
            }
        }
        Ok(())
    }

    /// No packet is on its way: each goes from the ring to the tap, or from the tap to the ring, at once, and what a
    /// limit holds up has not been taken. What is on its way in a socket's frames is the connection's, which stays.
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let active = !self.shared.movers().is_empty();
        let pairs = self.shared.ports.iter().filter(|port| active && port.is_on()).count();
        // At most PAIRS_MAX.
        encode(&State { mtu: self.mtu, link: self.shared.link(), pairs: pairs as u16 })
    }

    /// The cable is another, and a tap is told what the driver takes when the device is activated.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: State = decode(state)?;
        if usize::from(state.pairs) > self.shared.ports.len() {
            return Err(StateError(format!("its driver used {} queue pairs", state.pairs)));
        }
        if let (Some(saved), Some(here)) = (state.mtu, self.mtu)
            && here < saved
        {
            return Err(StateError(format!(
                "its MTU was {saved} and is {here} here, where its packets do not fit; raise that of the network"
            )));
        }
        self.came_from = Some(state);
        Ok(())
    }

    fn reset(&mut self) {
        self.came_from = None;
        self.shared.announced();
        self.control = None;
        // The threads end here: they never take this lock.
        *self.shared.movers() = Movers::default();
        self.shared.set_signals(None);
    }
}

#[cfg(test)]
mod tests;
