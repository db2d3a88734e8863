//! Helpers: processes that do one thing in the agent's stead and end.
//!
//! What makes containers changes the process that calls it, clones it without asking who else runs in it, and waits
//! for whatever a mount or a hook waits for. So it is called in a process with one thread, made of the agent's own
//! binary, which the agent gives up and kills when its time is over.
//!
//! A helper's standard input is a socket, by which it says when it waits for a request. The agent sends one message: a
//! file with a [`Request`], and the descriptors that become the container's streams. The helper answers with a [`Response`], and with the terminal's master if it
//! made one. Then it stays until the agent hangs up: until then it is the new process's parent, whose end
//! thus cannot be missed. What it writes to standard error is the story of a failure.

pub mod client;

mod create;
mod engine;
mod finish;
mod home;
mod join;
mod mounts;
mod seccomp;
mod story;
mod terminal;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use oci_spec::runtime::{LinuxSeccomp, Process};
use runtime_spec::plan::{Guest, Mount};
use serde::{Deserialize, Serialize};

pub use terminal::resize;

/// The agent's first argument that makes it a helper.
pub const WORD: &str = "helper";

/// How runc begins what it says of a program that cannot be run.
const NOT_STARTED: &str = "unable to start container process";

/// What a helper says when it waits for its request.
const WAITS: &[u8] = b"waits";

/// The longest answer.
const LONGEST: usize = 32 * 1024;
/// Standard streams and the request.
const MOST_FDS: usize = 4;

/// What a helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Makes a container.
    Create(Box<Create>),
    /// Starts a process in one.
    Join(Box<Join>),
    /// Mounts the share.
    Share,
    /// Unmounts what a container had, in reverse order.
    Unmount(Vec<PathBuf>),
}

/// A container to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    pub guest: Box<Guest>,
    /// Where its config.json goes.
    pub bundle: PathBuf,
    /// Where libcontainer keeps what it knows.
    pub states: PathBuf,
    /// Its cgroup's name.
    pub cgroup: PathBuf,
    /// Columns and rows of its terminal.
    pub size: Option<(u16, u16)>,
}

/// A process to start beside a container's own.
#[derive(Debug, Serialize, Deserialize)]
pub struct Join {
    /// The container's process.
    pub pid: i32,
    pub process: Process,
    pub seccomp: Option<LinuxSeccomp>,
    /// The directory of its cgroup.
    pub cgroup: PathBuf,
    pub size: Option<(u16, u16)>,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    /// It is done.
    Done,
    /// This process was made.
    Made(i32),
    /// It failed.
    Failed(String),
}

/// Places of what is mounted for a container, for its removal.
pub fn mounted(mounts: &[Mount]) -> Vec<PathBuf> {
    mounts.iter().map(|mount| mount.target.clone()).collect()
}

/// The descriptors of a process's streams.
pub struct Streams {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// A helper's life.
pub fn main() -> ExitCode {
    // Made by the agent, which nothing may kill; containers are made to be.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    story::tell();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<()> {
    const AGENT: RawFd = 0;
    send(AGENT, WAITS, &[])?;
    let (bytes, mut fds) = receive(AGENT, MOST_FDS)?;
    if bytes.is_empty() {
        // It is not needed.
        return Ok(());
    }
    if fds.len() != MOST_FDS {
        bail!("{} descriptors came with a request", fds.len());
    }
    let file = File::from(fds.remove(0));
    let request: Request =
        serde_json::from_reader(std::io::BufReader::new(file)).context("reading the request")?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().context("a stream is missing");
    let streams = Streams { stdin: next()?, stdout: next()?, stderr: next()? };
    let (response, terminal) = match run(request, streams) {
        Ok((response, terminal)) => (response, terminal),
        Err(error) => (Response::Failed(shortened(format!("{error:#}"))), None),
    };
    let json = serde_json::to_vec(&response)?;
    send(AGENT, &json, terminal.as_ref().map(AsRawFd::as_raw_fd).as_slice())?;
    // The agent knows the process now, or hangs up because it no longer cares.
    let _ = receive(AGENT, 0);
    Ok(())
}

fn run(request: Request, streams: Streams) -> Result<(Response, Option<OwnedFd>)> {
    match request {
        Request::Create(create) => {
            let (pid, terminal) = create::create(*create, streams)?;
            Ok((Response::Made(pid), terminal))
        }
        Request::Join(join) => {
            let (pid, terminal) = join::join(&join, streams)?;
            Ok((Response::Made(pid), terminal))
        }
        Request::Share => {
            mounts::share()?;
            Ok((Response::Done, None))
        }
        Request::Unmount(places) => {
            mounts::unmount(&places)?;
            Ok((Response::Done, None))
        }
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > LONGEST / 2 {
        let end = (0..=LONGEST / 2).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Sends one message.
fn send(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(socket, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message, which may have `most` descriptors; or nothing, at the end.
fn receive(socket: RawFd, most: usize) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST];
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows their numbers.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    bytes.truncate(length);
    fds.truncate(most);
    Ok((bytes, fds))
}
