//! Programs run from files, and what passes through names that are no files: sockets and pipes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::super::words::{Told, shown, wrong};
use super::super::world::World;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("script", [path, bits]) => script(path, bits),
        ("program", [path, bits]) => program(path, bits),
        ("exec", [path]) => exec(path, &[]),
        ("exec", [path, rest @ ..]) => exec(path, rest),
        ("write-while-running", [path]) => write_while_running(path),
        ("listen", [slot, path]) => {
            UnixListener::bind(path).map_err(Into::into).and_then(|socket| world.put(slot, socket.into()))
        }
        ("connect", [path]) => UnixStream::connect(path).map(|_| String::new()).map_err(Into::into),
        ("talk", [slot, path]) => talk(world, slot, path),
        ("datagram", [path]) => datagram(path),
        ("fifo-talk", [path]) => fifo(path),
        _ => return None,
    })
}

fn finish(path: &str, bits: &str) -> Told {
    let Ok(bits) = u32::from_str_radix(bits, 8) else { return wrong(format!("{bits} is no mode")) };
    fs::set_permissions(path, fs::Permissions::from_mode(bits))?;
    Ok(String::new())
}

fn script(path: &str, bits: &str) -> Told {
    fs::write(path, "#!/bin/sh\nexit 7\n")?;
    finish(path, bits)
}

/// A copy of this very program.
fn program(path: &str, bits: &str) -> Told {
    fs::copy("/proc/self/exe", path)?;
    finish(path, bits)
}

/// What it printed, or its exit code.
fn exec(path: &str, args: &[&str]) -> Told {
    let output = Command::new(format!("./{path}")).args(args).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(match output.status.code() {
        Some(0) => said,
        Some(code) => format!("code-{code}"),
        None => "killed".to_owned(),
    })
}

/// The outcome of opening a program for writing while it runs, and after that.
fn write_while_running(path: &str) -> Told {
    let open = || match nix::fcntl::open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(_) => "ok".to_owned(),
        Err(errno) => format!("{errno:?}"),
    };
    let mut running = Command::new(format!("./{path}"))
        .args(["posix", "wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    // It has been loaded when it says something.
    if let Some(stdout) = &mut running.stdout {
        stdout.read_exact(&mut [0])?;
    }
    let meanwhile = open();
    drop(running.stdin.take());
    running.wait()?;
    Ok(format!("{meanwhile},{}", open()))
}

/// What the program of [`write_while_running`] does.
pub fn wait() -> std::io::Result<()> {
    std::io::stdout().write_all(b"w")?;
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

/// A word by a stream to the listening socket and back.
fn talk(world: &World, slot: &str, path: &str) -> Told {
    let listener = UnixListener::from(world.fd(slot)?.try_clone_to_owned()?);
    let mut one = UnixStream::connect(path)?;
    let (mut other, _) = listener.accept()?;
    let mut heard = [0; 5];
    one.write_all(b"hello")?;
    other.read_exact(&mut heard)?;
    Ok(shown(&heard))
}

fn datagram(path: &str) -> Told {
    let socket = UnixDatagram::bind(path)?;
    let mut heard = [0; 16];
    UnixDatagram::unbound()?.send_to(b"datagram", path)?;
    let length = socket.recv(&mut heard)?;
    Ok(shown(&heard[..length]))
}

/// A word through a pipe that has a name.
fn fifo(path: &str) -> Told {
    let mut pipe = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mut heard = [0; 4];
    pipe.write_all(b"word")?;
    pipe.read_exact(&mut heard)?;
    Ok(shown(&heard))
}
