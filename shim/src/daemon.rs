//! From `start` to a daemon that serves, and the daemon.
//!
//! The socket listens before its address is printed, and is handed to the daemon as descriptor 3. The daemon's
//! standard streams are /dev/null, since containerd waits until nobody holds its own.

use std::error::Error as Failure;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use ttrpc::r#async::Server;

use crate::args::Args;
use crate::bootstrap::{self, Dialect, Socket};
use crate::deadlines;
use crate::group::{self, Group};
use crate::ledger::Ledger;
use crate::paths::{Paths, ROOT};
use crate::process::Process;
use crate::publisher::publish;
use crate::service::Shim;
use crate::{logger, rpc, time};

/// The listening socket, as the daemon inherits it.
const LISTENER: i32 = 3;
/// The environment variable in which containerd before 2.3 says where events go.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// `start`: the answer for containerd.
pub fn start(args: &Args, input: &[u8]) -> Result<Vec<u8>, Box<dyn Failure>> {
    if args.id.is_empty() || args.namespace.is_empty() {
        return Err("start takes -namespace and -id".into());
    }
    let params = bootstrap::params(args, input);
    let group = group::of(Path::new(ROOT), &args.namespace, Path::new("config.json"), &args.id)?;
    let sockets = params.as_ref().and_then(|params| params.socket_dir.clone()).filter(|dir| !dir.is_empty());
    let sockets = sockets.map_or_else(|| PathBuf::from(bootstrap::SOCKETS), PathBuf::from);
    let path_of = |group: &str| bootstrap::socket_path(&sockets, &args.address, &args.namespace, group);
    let dialect = if params.is_some() {
        Dialect::Protobuf
    } else {
        fs::create_dir_all(ROOT)?;
        bootstrap::dialect_of(&args.publish_binary, &Path::new(ROOT).join("containerd-version"))
    };
    let (group, path, socket) = match group {
        Group::Named(name) => {
            let path = path_of(&name);
            (name, path.clone(), bootstrap::listen(&path)?)
        }
        Group::Own => own(&args.id, path_of)?,
    };
    let address = format!("unix://{}", path.display());
    let begin = || {
        if dialect == Dialect::Plain {
            leave_address(Path::new("."), &address)?;
        }
        group::leave(Path::new(ROOT), &args.namespace, &group, &args.id)?;
        // Last, as a daemon whose start fails after it would be nobody's.
        let Socket::Ours(listener) = &socket else { return Ok(()) };
        let ttrpc =
            params.map(|params| params.containerd_ttrpc_address).filter(|address| !address.is_empty());
        let ttrpc = ttrpc.or_else(|| std::env::var(TTRPC_ADDRESS).ok());
        let ttrpc = ttrpc.unwrap_or_else(|| format!("{}.ttrpc", args.address));
        launch(args, &group, &ttrpc, &path, listener)
    };
    if let Err(error) = begin() {
        group::take_back(Path::new(ROOT), &args.namespace, &group, &args.id);
        if matches!(socket, Socket::Ours(_)) {
            let _ = fs::remove_file(&path);
        }
        return Err(error.into());
    }
    Ok(bootstrap::answer(dialect, &address))
}

/// A group that nobody serves yet, its socket's path, and that.
fn own(id: &str, path_of: impl Fn(&str) -> PathBuf) -> io::Result<(String, PathBuf, Socket)> {
    for name in group::names(id) {
        let path = path_of(&name);
        if let socket @ Socket::Ours(_) = bootstrap::listen(&path)? {
            return Ok((name, path, socket));
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("each name for a shim of {id} is taken")))
}

/// By which containerd 1.x, when it is started again, finds the shim: it writes nothing itself, unlike later ones.
fn leave_address(bundle: &Path, address: &str) -> io::Result<()> {
    // It never sees half of it.
    let half = bundle.join(".address");
    fs::write(&half, address)?;
    fs::rename(half, bundle.join("address"))
}

fn launch(args: &Args, group: &str, ttrpc: &str, path: &Path, listener: &UnixListener) -> io::Result<()> {
    let directory = Paths::new(Path::new(ROOT), &args.namespace, group).shim();
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("address"), path.as_os_str().as_encoded_bytes())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("containerd-shim-supermachine-v2");
    command.args(["-namespace", &args.namespace, "-id", group, "-address", &args.address, "-ttrpc", ttrpc]);
    if args.debug {
        command.arg("-debug");
    }
    command.arg("serve");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let inherited = listener.as_raw_fd();
    // SAFETY: after the fork there are only system calls that take numbers.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            let done = if inherited == LISTENER {
                // It is where it belongs, and only has to stay open.
                libc::fcntl(LISTENER, libc::F_SETFD, 0)
            } else {
                libc::dup2(inherited, LISTENER)
            };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn()?;
    let note = |process: Process| fs::write(directory.join("daemon"), serde_json::to_vec(&process)?);
    Process::of(child.id()).and_then(note).inspect_err(|_| {
        // Nobody would find it.
        let _ = child.kill();
        let _ = child.wait();
    })
}

/// `serve`: is the shim, until it is told to leave.
pub fn serve(args: &Args) -> Result<(), Box<dyn Failure>> {
    let born = time::now();
    // What is started by /proc/self/exe is "exe" in lists of processes.
    let _ = nix::sys::prctl::set_name(c"containerd-shim-supermachine-v2");
    let directory = Paths::new(Path::new(ROOT), &args.namespace, &args.id).shim();
    logger::start(Path::new("log"), &directory.join("log"), &args.id, args.debug);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(256 << 10)
        .build()?;
    let served = runtime.block_on(serving(args, born));
    if let Err(error) = &served {
        log::error!("{error}");
    }
    // Whatever still blocks, everything that was to be done is done.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serving(args: &Args, born: i64) -> Result<(), Box<dyn Failure>> {
    ignore_signals()?;
    // SAFETY: `start` has put the listener there for this process, which has opened nothing of that number.
    let listener = unsafe { UnixListener::from_raw_fd(LISTENER) };
    let address = listener.local_addr()?.as_pathname().map(Path::to_owned);
    listener.set_nonblocking(true)?;
    let paths = Paths::new(Path::new(ROOT), &args.namespace, &args.id);
    let directory = paths.shim();
    let (emit, events) = mpsc::unbounded_channel();
    let publishing = tokio::spawn(publish(args.ttrpc.clone(), args.namespace.clone(), events));
    let (leave, mut leaving) = watch::channel(false);
    let shim = Arc::new(Shim::new(paths, Ledger::new(emit), leave).born_at(born));
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let mut server = Server::new().add_listener(listener.into()).register_service(rpc::services(&shim));
    server.start().await?;
    info!("serving {} in {}", args.id, args.namespace);
    let _ = leaving.wait_for(|leave| *leave).await;
    // Whoever starts a shim of this name now gets a new one. The connections that are there end with the process, once
    // the answer to whoever asked for this is on its way.
    if let Some(address) = address {
        let _ = fs::remove_file(address);
    }
    server.stop_listen().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    shim.close();
    if timeout(deadlines::FLUSH, publishing).await.is_err() {
        warn!("containerd has not taken all events within {:?}", deadlines::FLUSH);
    }
    let _ = fs::remove_dir_all(directory);
    info!("left");
    Ok(())
}

/// A shim ends when containerd says so, not because a terminal or a service manager does.
fn ignore_signals() -> nix::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for number in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal(number, SigHandler::SigIgn) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_has_the_address_as_it_is_answered() {
        let bundle = std::env::temp_dir().join(format!("daemon-bundle-{}", std::process::id()));
        fs::create_dir_all(&bundle).unwrap();
        leave_address(&bundle, "unix:///a").unwrap();
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), "unix:///a");
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 1);
        fs::remove_dir_all(&bundle).unwrap();
    }
}
