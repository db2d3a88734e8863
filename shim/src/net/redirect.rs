//! An interface and a tap beside it: what comes in on one goes out on the other.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rtnl::route::RouteNetlinkMessage as Message;
use rtnl::route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage};
use rtnl::route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType,
    TcOption,
};
use rtnl::{Interface, NLM_F_CREATE, NLM_F_EXCL, Netlink};
use vmm::devices::virtio::net::tap;

/// What the names of our taps begin with.
const OURS: &str = "smtap";
/// Before all other filters: the host's own have no say in what is the guest's.
const PRIORITY: u32 = 1;
/// ETH_P_ALL, as it is on the wire.
const ALL: u32 = 3_u16.to_be() as u32;
const FILTERS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// Whether an interface is one of our taps.
pub fn is_ours(name: &str) -> bool {
    name.strip_prefix(OURS).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Makes a tap beside an interface of this thread's namespace, and joins them. The tap goes with its descriptors.
/// `note` is told, before, whether what is hung into the interface is all that will be there.
pub fn join(interface: &Interface, note: impl FnOnce(bool) -> io::Result<()>) -> io::Result<Vec<OwnedFd>> {
    let mut netlink = Netlink::open()?;
    // No other has it, also while one that is gone still has its tap.
    let name = format!("{OURS}{}", interface.index);
    let taps = tap::make(&name, 1).map_err(io::Error::other)?;
    let links = netlink.links()?;
    let index = links.iter().find(|link| rtnl::name(link) == Some(&name)).map(|link| link.header.index);
    let index = index.ok_or_else(|| io::Error::other(format!("the tap {name} is gone")))?;
    netlink
        .ask(up(index, interface.mtu), 0)
        .map_err(|error| about(&error, format_args!("bringing up {name}")))?;
    note(!has_hook(&mut netlink, interface.index)?)?;
    for (from, to) in [(index, interface.index), (interface.index, index)] {
        hook(&mut netlink, from)?;
        netlink.ask(Message::NewTrafficFilter(filter(from, to)), NLM_F_CREATE | NLM_F_EXCL).map_err(
            |error| match error.kind() {
                io::ErrorKind::NotFound => about(
                    &error,
                    "the kernel cannot send on what comes in; load its modules cls_matchall and act_mirred",
                ),
                _ => about(&error, format_args!("sending on what comes in on {}", interface.name)),
            },
        )?;
    }
    Ok(taps)
}

/// Up, with nothing of the host's own said on it.
fn up(index: u32, mtu: u32) -> Message {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up;
    link.header.flags = LinkFlags::Up;
    let silent = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    link.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![silent])]));
    if mtu != 0 {
        link.attributes.push(LinkAttribute::Mtu(mtu));
    }
    Message::SetLink(link)
}

fn about(error: &io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Whether there is a place for filters of what comes in.
fn has_hook(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let all = netlink.dump(&Message::GetQueueDiscipline(TcMessage::default()))?;
    Ok(all.iter().any(|message| match message {
        Message::NewQueueDiscipline(found) => {
            found.header.index == index.cast_signed() && found.header.parent == TcHandle::INGRESS
        }
        _ => false,
    }))
}

/// Makes a place for filters of what comes in, unless there is one.
fn hook(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
    match netlink.ask(Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(about(
            &error,
            "the kernel has no place for filters of what comes in; load its module sch_ingress",
        )),
        other => other,
    }
}

fn filter(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = at(from);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    message
}

/// Our filter of an interface.
fn at(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = FILTERS;
    message.header.info = PRIORITY << 16 | ALL;
    message
}

/// Takes off what was hung into an interface of a namespace, if both are there: all, or our filter.
pub fn undo(namespace: &Path, interface: &str, whole: bool) -> io::Result<()> {
    let namespace = match File::open(namespace) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let within = rtnl::within(namespace, || {
        let mut netlink = Netlink::open()?;
        let links = netlink.links()?;
        let Some(link) = links.iter().find(|link| rtnl::name(link) == Some(interface)) else { return Ok(()) };
        let index = link.header.index;
        let undone = if whole {
            let mut message = TcMessage::default();
            message.header.index = index.cast_signed();
            message.header.parent = TcHandle::INGRESS;
            netlink.ask(Message::DelQueueDiscipline(message), 0)
        } else {
            netlink.ask(Message::DelTrafficFilter(at(index)), 0)
        };
        match undone {
            // It is not there.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
            other => other,
        }
    });
    match within {
        // What is left of a namespace that is gone is a file.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}
