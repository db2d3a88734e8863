//! A process beside a container's own: this process enters the container's cgroup and namespaces, and its child
//! becomes the program.
//!
//! Not by libcontainer, whose way neither enters a user namespace nor lays the container's seccomp profile on the
//! process. The steps and their order are those of a container's own process.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    ForkResult, Gid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setgroups, setsid,
};
use oci_spec::runtime::{IOPriorityClass, PosixRlimitType, Process};

use super::finish::{Finish, words};
use super::terminal::{self, Pair};
use super::{Join, NOT_STARTED, Streams, home};

/// The namespaces there are, by their files.
const KINDS: &[(&str, CloneFlags)] = &[
    ("user", CloneFlags::CLONE_NEWUSER),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("time", CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Starts it, and returns when the program runs.
pub fn join(join: &Join, streams: Streams) -> Result<(i32, Option<OwnedFd>)> {
    let process = &join.process;
    let root = home::place(Path::new(&format!("/proc/{}/root", join.pid)))
        .context("the container has no process any more")?;
    let mut environment = process.env().clone().unwrap_or_default();
    home::complete(&mut environment, &root, process.user().uid());
    let finish = Finish::new(process, &environment, join.seccomp.clone())?;
    if let Some(score) = process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string()).context("setting oom_score_adj")?;
    }
    fs::write(join.cgroup.join("cgroup.procs"), "0").context("entering the container's cgroup")?;
    // From here on the container sees this process, and is not to look into it.
    nix::sys::prctl::set_dumpable(false).context("hiding from the container")?;
    enter(join.pid)?;
    let pair = if process.terminal() == Some(true) { Some(terminal::open_pair()?) } else { None };
    if let (Some(pair), Some(size)) = (&pair, join.size) {
        let _ = terminal::resize(&pair.master, size);
    }
    let (mut failure, teller) =
        pipe2(OFlag::O_CLOEXEC).map(|(r, w)| (File::from(r), w)).context("making a pipe")?;
    // SAFETY: this process has one thread, so the child owns every lock that it could need.
    match unsafe { fork() }.context("making a process")? {
        ForkResult::Child => {
            drop(failure);
            let error = become_program(process, &finish, &streams, pair.as_ref());
            let _ = File::from(teller).write_all(format!("{error:#}").as_bytes());
            // SAFETY: the process ends; nothing of its is needed any more.
            unsafe { libc::_exit(255) }
        }
        ForkResult::Parent { child } => {
            drop((teller, streams));
            let mut told = String::new();
            failure.read_to_string(&mut told).context("waiting for the program")?;
            if !told.is_empty() {
                let _ = nix::sys::wait::waitpid(child, None);
                return Err(anyhow!("{NOT_STARTED}: {told}"));
            }
            Ok((child.as_raw(), pair.map(|pair| pair.master)))
        }
    }
}

/// Enters the namespaces of `pid` that are not this process's.
fn enter(pid: i32) -> Result<()> {
    // SAFETY: the call takes two numbers and gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd).context("the container has no process any more")?;
    // SAFETY: the kernel has just made it, and nobody else knows its number.
    let container = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    let mut flags = CloneFlags::empty();
    for (name, flag) in KINDS {
        let of = |who: &str| fs::metadata(format!("/proc/{who}/ns/{name}")).map(|meta| meta.ino());
        match (of("self"), of(&pid.to_string())) {
            (Ok(own), Ok(its)) if own != its => flags |= *flag,
            (Err(error), _) | (_, Err(error)) => {
                return Err(error).with_context(|| format!("looking at the {name} namespace"));
            }
            _ => {}
        }
    }
    if flags.is_empty() {
        bail!("the container has no namespaces of its own");
    }
    setns(container, flags).context("entering the container's namespaces")
}

fn become_program(
    process: &Process,
    finish: &Finish,
    streams: &Streams,
    pair: Option<&Pair>,
) -> anyhow::Error {
    match prepare(process, finish, streams, pair) {
        Ok(()) => finish.execute(),
        Err(error) => error,
    }
}

fn prepare(process: &Process, finish: &Finish, streams: &Streams, pair: Option<&Pair>) -> Result<()> {
    setsid().context("beginning a session")?;
    let user = process.user();
    connect(streams, pair, user.uid())?;
    priorities(process)?;
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ());
        setrlimit(resource, limit.soft(), limit.hard())
            .with_context(|| format!("setting {}", limit.typ()))?;
    }
    if let Some(mask) = user.umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    let cwd = process.cwd();
    if let Err(errno) = chdir(cwd)
        && errno != Errno::EACCES
        && errno != Errno::EPERM
    {
        bail!("chdir to cwd ({:?}) set in config.json failed: {}", cwd.display().to_string(), words(errno));
    }
    become_user(process)?;
    // Again as the user, who may be allowed what root is not.
    if let Err(errno) = chdir(cwd) {
        bail!("chdir to cwd ({:?}) set in config.json failed: {}", cwd.display().to_string(), words(errno));
    }
    finish.confine()?;
    finish.find().map(drop)
}

fn connect(streams: &Streams, pair: Option<&Pair>, uid: u32) -> Result<()> {
    if let Some(pair) = pair {
        let _ = fchown(&pair.slave, Some(uid), None);
        dup2_stdin(&pair.slave)?;
        dup2_stdout(&pair.slave)?;
        dup2_stderr(&pair.slave)?;
        return terminal::control(pair.slave.as_raw_fd());
    }
    for stream in [&streams.stdin, &streams.stdout, &streams.stderr] {
        let _ = fchown(stream, Some(uid), None);
    }
    dup2_stdin(own_null(&streams.stdin)?.as_fd())?;
    dup2_stdout(own_null(&streams.stdout)?.as_fd())?;
    dup2_stderr(own_null(&streams.stderr)?.as_fd())?;
    Ok(())
}

/// The stream itself; or the container's `/dev/null`, where it is the agent's.
fn own_null(stream: &OwnedFd) -> Result<OwnedFd> {
    let file = File::from(stream.try_clone()?);
    let meta = file.metadata()?;
    if meta.mode() & libc::S_IFMT != libc::S_IFCHR {
        return Ok(file.into());
    }
    match File::options().read(true).write(true).open("/dev/null") {
        Ok(own) if own.metadata()?.rdev() == meta.rdev() => Ok(own.into()),
        _ => Ok(file.into()),
    }
}

fn become_user(process: &Process) -> Result<()> {
    let user = process.user();
    let groups: Vec<_> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    if fs::read_to_string("/proc/self/setgroups").is_ok_and(|may| may.trim() == "deny") && groups.is_empty() {
        // A user namespace that has given up the right.
    } else {
        setgroups(&groups).context("setting additional groups")?;
    }
    // SAFETY: the calls take numbers; this process has one thread, for which they hold.
    unsafe {
        Errno::result(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)).context("keeping capabilities")?;
        Errno::result(libc::setresgid(user.gid(), user.gid(), user.gid())).context("setting the group")?;
        Errno::result(libc::setresuid(user.uid(), user.uid(), user.uid())).context("setting the user")?;
        Errno::result(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0)).context("keeping capabilities")?;
    }
    let all = caps::read(None, caps::CapSet::Permitted)?;
    caps::set(None, caps::CapSet::Effective, &all)?;
    Ok(())
}

fn priorities(process: &Process) -> Result<()> {
    if let Some(priority) = process.io_priority() {
        let class: i64 = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        // SAFETY: the call takes numbers: this process, and its class above the level.
        let done = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, class << 13 | priority.priority()) };
        Errno::result(done).context("setting the I/O priority")?;
    }
    Ok(())
}

fn resource(typ: PosixRlimitType) -> Resource {
    match typ {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}
