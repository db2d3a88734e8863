//! The network of a machine: what is in its namespace on the host is in the guest.
//!
//! Each interface of the namespace gets a tap beside it, and what comes in on the one goes out on the other
//! (`redirect`); the tap is the cable of one of the machine's network devices, which are there from the start, with no
//! cable in. The agent is told what is to be seen of the interface in the guest (`told`).
//!
//! A network that is behind a socket (`uplink`) is one interface more, of which the namespace knows nothing.

mod forward;
mod guard;
mod redirect;
mod resolver;
mod told;
mod uplink;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::agent::SetNetworkRequest;
use log::info;
use rtnl::{Changes, Interface, Mac, Netlink};
use runtime_spec::config::{Spoofing, Vhost};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, OnceCell};
use tokio::time::sleep;
use vmm::control::Request;
use vmm::devices::virtio::net::vhost;

use crate::blocking::blocking;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::journal::{Journal, Made};

use super::monitor::Monitor;
use forward::Localhost;
use guard::Names;

pub use redirect::{Redirected, undo};
pub use resolver::Resolvers;
pub use uplink::Uplink;

/// Network devices of a machine.
pub const SLOTS: usize = 5;
/// Queue pairs of the first network device, which most machines have no more than: the guest uses one for each of its
/// processors. Each costs memory in the guest as soon as it is used.
const PAIRS: usize = 4;
/// Changes come in groups: an interface, its addresses, its routes.
const TOGETHER: Duration = Duration::from_millis(50);

/// What the monitor calls a device.
fn slot_name(slot: usize) -> String {
    format!("net.{slot}")
}

/// The hardware address that a device comes with, by which the agent knows it.
pub fn slot_mac(slot: usize) -> Mac {
    Mac([0x02, b's', b'm', 0, 0, slot as u8 + 1])
}

/// How many queue pairs a device has.
pub fn slot_pairs(slot: usize) -> usize {
    if slot == 0 { PAIRS } else { 1 }
}

/// The network namespace of a machine, and what of it the machine has.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    inode: u64,
    /// Where it can be found again by whoever tidies up, if it outlives the machine.
    path: Option<PathBuf>,
    rules: Rules,
    /// What the machine has besides.
    uplink: Option<Uplink>,
    /// Hears of changes since before the namespace was first looked at.
    watch: OnceCell<AsyncFd<Changes>>,
    plugged: Mutex<Plugged>,
    /// Whether connections to localhost are the guest's by now.
    forwards: AtomicBool,
    /// Who answers questions for names in it.
    pub resolvers: Resolvers,
}

/// How a machine's interfaces are plugged in.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// What a guest may say of itself there.
    pub spoofing: Spoofing,
    /// Who moves the packets.
    pub vhost: Vhost,
}

#[derive(Debug, Default)]
struct Plugged {
    /// For each device, the interface that it stands for.
    slots: [Option<Plug>; SLOTS],
    /// The device that is connected with the uplink, and the number of that connection.
    uplink: Option<(usize, u64)>,
    /// What the guest was told.
    told: SetNetworkRequest,
    /// It is about to be tidied up.
    is_left: bool,
}

/// An interface that a device stands for.
#[derive(Debug)]
struct Plug {
    /// Its number.
    interface: u32,
    /// In which names the guest speaks there, if it is not free to choose.
    names: Option<Names>,
}

impl Plugged {
    fn slot_of(&self, interface: u32) -> Option<usize> {
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(|plug| plug.interface == interface))
    }
}

/// Those of a machine that take part.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// What was made.
    pub journal: &'a Arc<Journal>,
    /// Who has the devices.
    pub monitor: &'a Monitor,
    /// Who sets them up.
    pub guest: &'a Guest,
}

impl Network {
    /// Of a machine that is in `namespace`, and has nothing of it.
    pub fn new(
        namespace: OwnedFd,
        path: Option<PathBuf>,
        rules: Rules,
        uplink: Option<Uplink>,
    ) -> Result<Self> {
        let namespace = File::from(namespace);
        let inode = namespace.metadata().attempt("looking at the network namespace")?.ino();
        let (watch, forwards, resolvers) = (OnceCell::new(), AtomicBool::new(false), Resolvers::default());
        let plugged = Mutex::default();
        let namespace = namespace.into();
        Ok(Self { namespace, inode, path, rules, uplink, watch, plugged, forwards, resolvers })
    }

    /// Gives the guest what is in the namespace now, unless it was told so already; a guest that may have something from
    /// elsewhere is told in any case.
    pub async fn bring(&self, ends: Ends<'_>, in_any_case: bool) -> Result<()> {
        let mut plugged = self.plugged.lock().await;
        if plugged.is_left {
            return Ok(());
        }
        self.watched().await?;
        let looking = || rtnl::Network::look(&mut Netlink::open()?);
        let mut seen = within(&self.namespace, "looking at the network namespace", looking).await?;
        // A port of a bridge, or of a bond, is its master's.
        seen.interfaces.retain(|interface| !interface.is_port && !redirect::is_ours(&interface.name));
        for slot in &mut plugged.slots {
            let is_there = |plug: &Plug| seen.interfaces.iter().any(|found| found.index == plug.interface);
            *slot = slot.take().filter(is_there);
        }
        if let Some(uplink) = &self.uplink {
            uplink.check(&seen)?;
            if plugged.uplink.is_none() || uplink.is_lost() {
                // The first, as it is there before any other can come.
                plugged.uplink = Some((0, uplink.plug(&slot_name(0), ends.monitor).await?));
            }
        }
        for interface in &seen.interfaces {
            self.bring_one(&mut plugged, interface, ends)
                .await
                .map_err(|error| error.context(format_args!("the interface {}", interface.name)))?;
        }
        let slot_of = |index| plugged.slot_of(index).map(slot_mac);
        let mut request = told::of(&seen, slot_of);
        if let (Some(uplink), Some((slot, connection))) = (&self.uplink, plugged.uplink) {
            uplink.tell(&mut request, slot_mac(slot), connection);
        }
        request.resolvers = self.resolvers.look(ends.monitor, &self.namespace).await?;
        if plugged.told == request && !in_any_case {
            return Ok(());
        }
        let set = ends.guest.set_network(&request).await;
        set.map_err(|error| error.context("setting up the network of the guest"))?;
        let names: Vec<_> = request.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        info!("the guest has the interfaces {names:?}");
        plugged.told = request;
        Ok(())
    }

    /// Has connections to localhost of the namespace be the guest's, as long as the machine runs and if there is a localhost
    /// by now.
    pub async fn forward_localhost(&self, monitor: &Monitor) -> Result<()> {
        if self.forwards.load(Ordering::Relaxed) {
            return Ok(());
        }
        let namespace = self.namespace.try_clone().attempt("duplicating a descriptor")?;
        let Some(localhost) = Localhost::take(namespace).await? else { return Ok(()) };
        self.forwards.store(true, Ordering::Relaxed);
        let (vsock, ended) = (monitor.vsock(), monitor.watch());
        tokio::spawn(async move {
            tokio::select! {
                () = localhost.serve(vsock) => {}
                () = ended => {}
            }
        });
        Ok(())
    }

    /// Returns when nothing is hung into the namespace any more that is not in the journal yet.
    pub async fn leave(&self) {
        self.plugged.lock().await.is_left = true;
        if let Some(uplink) = &self.uplink {
            uplink.leave();
        }
    }

    async fn watched(&self) -> Result<&AsyncFd<Changes>> {
        let what = "watching the network namespace";
        let watch = async {
            let changes = within(&self.namespace, what, Changes::open).await?;
            // SAFETY: what is owned here has one socket, which it opened and keeps until it is dropped.
            unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }.attempt(what)
        };
        self.watch.get_or_try_init(|| watch).await
    }

    /// Waits for a change, and for those that come with it.
    pub async fn changes(&self) -> Result<()> {
        let Some(uplink) = &self.uplink else { return self.changes_of_namespace().await };
        tokio::select! {
            changed = self.changes_of_namespace() => changed,
            () = uplink.lost() => {
                info!("who has the network of the machine is gone, or another");
                Ok(())
            }
        }
    }

    async fn changes_of_namespace(&self) -> Result<()> {
        let what = "watching the network namespace";
        let watch = self.watched().await?;
        loop {
            let mut ready = watch.readable().await.attempt(what)?;
            let any = watch.get_ref().take().attempt(what)?;
            ready.clear_ready();
            if any {
                sleep(TOGETHER).await;
                watch.get_ref().take().attempt(what)?;
                return Ok(());
            }
        }
    }

    /// Gives an interface a device, or lets the guest speak there in the names that it has by now.
    async fn bring_one(&self, plugged: &mut Plugged, interface: &Interface, ends: Ends<'_>) -> Result<()> {
        let names = match self.rules.spoofing {
            Spoofing::Drop => Some(Names::of(interface).attempt("reading its addresses")?),
            Spoofing::Allow => None,
        };
        let Some(slot) = plugged.slot_of(interface.index) else {
            let taken = plugged.uplink.map(|(slot, _)| slot);
            let mut slots = plugged.slots.iter().enumerate();
            let free = slots.find(|(slot, plug)| plug.is_none() && taken != Some(*slot));
            let (slot, _) = free.ok_or_else(|| {
                Error::precondition(format!(
                    "the network namespace has more interfaces than the {SLOTS} that a machine can have; take some out of it"
                ))
            })?;
            self.plug(slot, interface, names.clone(), ends).await?;
            plugged.slots[slot] = Some(Plug { interface: interface.index, names });
            return Ok(());
        };
        let Some(plug) = &mut plugged.slots[slot] else { return Ok(()) };
        if plug.names != names
            && let Some(names) = names
        {
            let (wanted, now) = (interface.clone(), names.clone());
            let what = "having the guest speak in its new names only";
            within(&self.namespace, what, move || redirect::rename(&wanted, &now)).await?;
            plug.names = Some(names);
        }
        Ok(())
    }

    async fn plug(
        &self,
        slot: usize,
        interface: &Interface,
        names: Option<Names>,
        ends: Ends<'_>,
    ) -> Result<()> {
        let (wanted, journal) = (interface.clone(), ends.journal.clone());
        let (path, inode) = (self.path.clone(), self.inode);
        let joining = move || {
            let note = |hooked| match path {
                // A namespace of the machine's own goes with all that is in it.
                None => Ok(()),
                Some(namespace) => {
                    let interface = wanted.name.clone();
                    journal.note(Made::Redirected(Redirected { namespace, inode, interface, hooked }))
                }
            };
            redirect::join(&wanted, slot_pairs(slot), names.as_ref(), note)
        };
        let taps = within(&self.namespace, "joining a tap to it", joining).await?;
        let vhost = self.open_vhost(taps.len());
        let request = Request::AttachTap { slot: slot_name(slot), vhost: !vhost.is_empty() };
        let attach = move |control: &mut vmm::control::Client| {
            let fds: Vec<_> = taps.iter().chain(&vhost).map(AsFd::as_fd).collect();
            control.call(request, &fds, deadlines::MONITOR_CALL).map(drop)
        };
        ends.monitor.ask("plugging in a network device", attach).await
    }

    /// One for each tap, or none: a host need not have it.
    fn open_vhost(&self, taps: usize) -> Vec<OwnedFd> {
        match self.rules.vhost {
            Vhost::Off => Vec::new(),
            Vhost::Auto => vhost::open(taps).unwrap_or_else(|error| {
                info!("the monitor moves the packets itself: {}: {error}", vhost::PATH);
                Vec::new()
            }),
        }
    }
}

/// Does something on a thread that is in the namespace.
async fn within<T: Send + 'static>(
    namespace: &OwnedFd,
    what: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    let namespace = namespace.try_clone().attempt("duplicating a descriptor")?;
    blocking(what, move || rtnl::within(namespace, work).attempt(what)).await
}
