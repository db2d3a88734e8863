//! Running one command for the tool: its input and output in frames, its exit as the last one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::listen::Stream;
use testbed::{Exec, Kind, Reply, read_frame, write_frame, write_json};

/// Where programs are looked for.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long output may still come after the command itself is gone.
const AFTER_EXIT: Duration = Duration::from_secs(2);
/// How long the tool may take to hang up after it has the reply.
const HANG_UP: Duration = Duration::from_secs(10);

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

/// The connection, written to by whoever has output.
type Out = Arc<Mutex<Stream>>;

/// Runs the command to its end, or until the tool hangs up: then its process group is killed.
pub fn run(stream: &Stream, what: &Exec) -> Result<()> {
    let out: Out = Arc::new(Mutex::new(stream.try_clone()?));
    let (mut child, pipes) = match spawn(what) {
        Ok(started) => started,
        Err(error) => {
            write_json(stream, Kind::Reply, &Reply::Failed(format!("{error:#}")))?;
            return Ok(());
        }
    };
    let group = Pid::from_raw(child.id().cast_signed());
    let reader = stream.try_clone()?;
    let (stdin, terminal) = (pipes.stdin, pipes.terminal);
    let exited = Arc::new(AtomicBool::new(false));
    let command_exited = Arc::clone(&exited);
    thread::spawn(move || {
        let hung_up = forward_input(&reader, stdin, terminal.as_ref(), group).is_err();
        // The tool is gone and nobody waits for this command any more. After a regular exit the
        // group may hold what the command left in the background on purpose.
        if hung_up && !command_exited.load(Ordering::Acquire) {
            let _ = killpg(group, Signal::SIGKILL);
        }
    });
    let copies: Vec<_> = pipes
        .outputs
        .into_iter()
        .map(|(kind, from)| {
            let out = Arc::clone(&out);
            thread::spawn(move || forward_output(&from, kind, &out))
        })
        .collect();
    let status = child.wait()?;
    exited.store(true, Ordering::Release);
    // What the command itself wrote is in the pipes; a daemon it left behind may hold them open for
    // ever, so the copies are joined only for a moment after the exit.
    let deadline = Instant::now() + AFTER_EXIT;
    while copies.iter().any(|copy| !copy.is_finished()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
    let stream = out.lock().unwrap_or_else(PoisonError::into_inner);
    write_json(&*stream, Kind::Reply, &reply(status))?;
    // Only this direction is closed: the thread that reads input goes on until the tool hangs up,
    // because a socket closed with unread input resets the connection, and the reply with it.
    stream.set_read_timeout(Some(HANG_UP))?;
    let _ = stream.shutdown(Shutdown::Write);
    Ok(())
}

fn reply(status: ExitStatus) -> Reply {
    match (status.code(), status.signal()) {
        (Some(code), _) => Reply::Exited(code),
        (None, Some(signal)) => Reply::Signalled(signal),
        (None, None) => Reply::Failed(format!("ended with {status}")),
    }
}

struct Pipes {
    stdin: Option<File>,
    terminal: Option<OwnedFd>,
    outputs: Vec<(Kind, File)>,
}

fn spawn(what: &Exec) -> Result<(Child, Pipes)> {
    let program = what.argv.first().context("no command given")?;
    let mut command = Command::new(program);
    command
        .args(&what.argv[1..])
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .envs(what.env.iter().cloned())
        .current_dir("/root");
    let failed = || format!("cannot run {program:?} in the test bed");
    if let Some((rows, columns)) = what.terminal {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None)?;
        command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave.try_clone()?);
        // SAFETY: setsid and ioctl are async-signal-safe; fd 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                Errno::result(libc::setsid())?;
                Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(failed)?;
        let master = File::from(pty.master);
        let pipes = Pipes {
            stdin: Some(master.try_clone()?),
            terminal: Some(master.try_clone()?.into()),
            outputs: vec![(Kind::Stdout, master)],
        };
        return Ok((child, pipes));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(failed)?;
    let file = |fd: Option<OwnedFd>| fd.map(File::from);
    let pipes = Pipes {
        stdin: file(child.stdin.take().map(OwnedFd::from)),
        terminal: None,
        outputs: [
            (Kind::Stdout, file(child.stdout.take().map(OwnedFd::from))),
            (Kind::Stderr, file(child.stderr.take().map(OwnedFd::from))),
        ]
        .into_iter()
        .filter_map(|(kind, file)| Some((kind, file?)))
        .collect(),
    };
    Ok((child, pipes))
}

/// Feeds frames to the command until the connection ends, which is an error.
fn forward_input(
    stream: &Stream,
    mut stdin: Option<File>,
    terminal: Option<&OwnedFd>,
    group: Pid,
) -> Result<()> {
    loop {
        let (kind, payload) = read_frame(stream)?.context("the tool hung up")?;
        match kind {
            Kind::Stdin if payload.is_empty() => stdin = None,
            Kind::Stdin => {
                // A command that closed its input does not want it; that is no error.
                if stdin.as_mut().is_some_and(|to| to.write_all(&payload).is_err()) {
                    stdin = None;
                }
            }
            Kind::Signal => {
                let number = i32::from(*payload.first().context("an empty signal frame")?);
                let _ = killpg(group, Signal::try_from(number)?);
            }
            Kind::Resize => {
                if let (Some(fd), &[r1, r0, c1, c0]) = (terminal, payload.as_slice()) {
                    let size = Winsize {
                        ws_row: u16::from_be_bytes([r1, r0]),
                        ws_col: u16::from_be_bytes([c1, c0]),
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    // SAFETY: the fd is an open pty master and the argument a valid winsize.
                    unsafe { set_window_size(fd.as_raw_fd(), &raw const size) }?;
                }
            }
            other => anyhow::bail!("a frame of kind {other:?} while a command runs"),
        }
    }
}

/// Copies until the end, or until the tool is gone.
fn forward_output(from: &File, kind: Kind, out: &Out) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match { from }.read(&mut buffer) {
            // A terminal whose last user is gone reads as EIO.
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let stream = out.lock().unwrap_or_else(PoisonError::into_inner);
        if write_frame(&*stream, kind, &buffer[..length]).is_err() {
            return;
        }
    }
}
