//! An interface and a tap beside it, joined.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rtnl::{Interface, Netlink};
use serde::{Deserialize, Serialize};
use vmm::devices::virtio::net::tap;

use super::guard::Names;

/// What the names of our taps begin with.
const OURS: &str = "smtap";

/// An interface of a namespace that outlives the machine, into which something was hung.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirected {
    /// The namespace.
    pub namespace: PathBuf,
    /// Which it is, as another one may be there by now.
    pub inode: u64,
    /// The interface's name.
    pub interface: String,
    /// Whether there was no hook before.
    pub hooked: bool,
}

/// Whether an interface is one of our taps.
pub fn is_ours(name: &str) -> bool {
    name.strip_prefix(OURS).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The tap beside an interface, which no other machine has, also while one that is gone still has its tap.
fn tap_of(interface: &Interface) -> String {
    format!("{OURS}{}", interface.index)
}

/// Makes a tap with so many queues beside an interface of this thread's namespace, and joins them. The tap goes with its
/// descriptors.
/// Before anything is hung into the interface, `note` is told whether it has no hook. What comes from the tap has to be in
/// these names, if there are any.
pub fn join(
    interface: &Interface,
    queues: usize,
    names: Option<&Names>,
    note: impl FnOnce(bool) -> io::Result<()>,
) -> io::Result<Vec<OwnedFd>> {
    let mut netlink = Netlink::open()?;
    let name = tap_of(interface);
    let taps = tap::make(&name, queues).map_err(|error| match error {
        tap::Error::Busy(_) => io::Error::other(
            "another machine has it; containers with one network namespace have to be in one pod, or have a namespace each",
        ),
        other => io::Error::other(other),
    })?;
    let tap = netlink.index_of(&name)?.ok_or_else(|| io::Error::other(format!("the tap {name} is gone")))?;
    netlink.set_silent(tap)?;
    let mtu = netlink.set_mtu(tap, interface.mtu);
    mtu.map_err(|error| {
        io::Error::new(error.kind(), format!("an MTU of {} for a tap: {error}", interface.mtu))
    })?;
    netlink.set_up(tap, true)?;
    note(!netlink.has_hook(interface.index)?)?;
    netlink.add_hook(tap)?;
    match names {
        Some(names) => netlink.decide(tap, &names.guard(interface.index)?)?,
        None => netlink.redirect(tap, interface.index)?,
    }
    netlink.add_hook(interface.index)?;
    netlink.redirect(interface.index, tap)?;
    Ok(taps)
}

/// What comes from the tap that is joined to an interface of this thread's namespace has to be in these names from now on.
pub fn rename(interface: &Interface, names: &Names) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let name = tap_of(interface);
    let tap = netlink.index_of(&name)?.ok_or_else(|| io::Error::other(format!("the tap {name} is gone")))?;
    netlink.decide(tap, &names.guard(interface.index)?)
}

/// Takes off what was hung into an interface, if it and its namespace are there.
pub fn undo(made: &Redirected) -> io::Result<()> {
    let namespace = match File::open(&made.namespace) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if namespace.metadata()?.ino() != made.inode {
        return Ok(());
    }
    rtnl::within(namespace, || {
        let mut netlink = Netlink::open()?;
        let Some(index) = netlink.index_of(&made.interface)? else { return Ok(()) };
        netlink.remove_redirect(index)?;
        if made.hooked { netlink.remove_hook(index) } else { Ok(()) }
    })
}
