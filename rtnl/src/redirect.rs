//! What comes in on one interface goes out on another (tc-mirred).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType,
    TcOption,
};

use crate::Netlink;

/// Before all other filters: the host's own have no say in what is the guest's.
const PRIORITY: u32 = 1;
/// By which our filter is told from another one in its place.
const OURS: TcHandle = TcHandle { major: 0x736d, minor: 0x736d };
/// ETH_P_ALL, as it is on the wire.
const ALL: u32 = 3_u16.to_be() as u32;
const HOOK: TcHandle = TcHandle { major: 0xffff, minor: 0 };
const FILTERS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

impl Netlink {
    /// Whether an interface has a hook: a place for filters of what comes in.
    pub fn has_hook(&mut self, index: u32) -> io::Result<bool> {
        let all = self.dump(&Message::GetQueueDiscipline(TcMessage::default()))?;
        Ok(all.iter().any(|message| match message {
            Message::NewQueueDiscipline(found) => {
                found.header.index == index.cast_signed() && found.header.parent == TcHandle::INGRESS
            }
            _ => false,
        }))
    }

    /// Makes a hook, unless there is one.
    pub fn add_hook(&mut self, index: u32) -> io::Result<()> {
        let mut message = at(index, TcHandle::INGRESS);
        message.header.handle = HOOK;
        message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
        match self.ask(Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(about(
                &error,
                "the kernel has no place for filters of what comes in; load its module sch_ingress",
            )),
            other => other,
        }
    }

    /// Removes a hook, if there is one in which no filter is.
    pub fn remove_hook(&mut self, index: u32) -> io::Result<()> {
        if !self.has_hook(index)? {
            return Ok(());
        }
        let filters = self.dump(&Message::GetTrafficFilter(at(index, FILTERS)))?;
        if !filters.is_empty() {
            return Ok(());
        }
        self.ask(Message::DelQueueDiscipline(at(index, TcHandle::INGRESS)), 0)
    }

    /// Sends on what comes in, by a filter in the hook. One of ours that is there gives way.
    pub fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        self.remove_redirect(from)?;
        let mut mirror = TcMirror::default();
        mirror.generic.action = TcActionType::Stolen;
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = to;
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
        ];
        let mut message = filter(from);
        message.attributes = vec![
            TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
            TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
        ];
        let added = self.ask(Message::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL);
        added.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => about(
                &error,
                "the kernel cannot send on what comes in; load its modules cls_matchall and act_mirred",
            ),
            _ => error,
        })
    }

    /// Has a program of the kernel's (`BPF_PROG_TYPE_SCHED_CLS`) say what becomes of what comes in, by a filter in the hook. It
    /// takes the place of another one that was given so, with no frame between them.
    pub fn decide(&mut self, from: u32, program: &impl AsFd) -> io::Result<()> {
        const FD: u16 = 6;
        const NAME: u16 = 7;
        const FLAGS: u16 = 8;
        const ACTS_ITSELF: u32 = 1;
        let option = |kind, value: &[u8]| TcOption::Other(DefaultNla::new(kind, value.to_vec()));
        let mut message = filter(from);
        message.attributes = vec![
            TcAttribute::Kind("bpf".to_owned()),
            TcAttribute::Options(vec![
                option(FD, &program.as_fd().as_raw_fd().to_ne_bytes()),
                option(NAME, b"supermachine\0"),
                option(FLAGS, &ACTS_ITSELF.to_ne_bytes()),
            ]),
        ];
        let added = self.ask(Message::NewTrafficFilter(message), NLM_F_CREATE);
        added.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                about(&error, "the kernel cannot ask a program about what comes in; load its module cls_bpf")
            }
            _ => error,
        })
    }

    /// Removes our filter, if there is a hook and it is there.
    pub fn remove_redirect(&mut self, from: u32) -> io::Result<()> {
        if !self.has_hook(from)? {
            return Ok(());
        }
        match self.ask(Message::DelTrafficFilter(filter(from)), 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn at(index: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = parent;
    message
}

/// Our filter of an interface.
fn filter(index: u32) -> TcMessage {
    let mut message = at(index, FILTERS);
    message.header.handle = OURS;
    message.header.info = PRIORITY << 16 | ALL;
    message
}

fn about(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
