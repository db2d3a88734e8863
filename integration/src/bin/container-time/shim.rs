//! A shim's `start` alone. containerd calls it in `Create`, between other things, so it is called here as containerd
//! does: in a bundle, with the same words and environment. The shim that it leaves is told to end.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output as Ended, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use containerd_shim_protos::api::ShutdownRequest;
use containerd_shim_protos::protobuf::Message;
use integration::container_time::Side;
use integration::containerd::{shim_of, spec};
use integration::fifo::Output;
use integration::wait::until_true;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::net::UnixStream;
use ttrpc::Request;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::{Bench, STEP, text};

/// Returns how long it took, in seconds. The shim is gone then.
pub fn start(bench: &Bench, side: Side, id: &str) -> Result<f64> {
    let bundle = bench.host.path(id);
    fs::create_dir(&bundle).with_context(|| format!("creating {}", bundle.display()))?;
    let config = spec(id, &bench.host.namespace, &["true"], false);
    fs::write(bundle.join("config.json"), serde_json::to_vec(&config)?).context("writing a bundle")?;
    // The shim opens it, and ends if nobody reads.
    let _log = Output::create(bundle.join("log"))?;
    let shim = Shim { bench, side, id, bundle };
    let (took, ended) = timed(shim.command(&["start"]))?;
    let told = String::from_utf8_lossy(&ended.stdout);
    ensure!(
        ended.status.success(),
        "it ended with {}: {told}{}",
        ended.status,
        String::from_utf8_lossy(&ended.stderr)
    );
    shim.shut_down(&Address::of(&told)?).context("ending it")?;
    Ok(took.as_secs_f64())
}

/// A shim that may run.
struct Shim<'a> {
    bench: &'a Bench,
    side: Side,
    id: &'a str,
    bundle: PathBuf,
}

impl Shim<'_> {
    /// What containerd runs.
    fn command(&self, verb: &[&str]) -> Command {
        let program = match self.side {
            Side::Ours | Side::Cold => "containerd-shim-supermachine-v2",
            Side::Runc | Side::Crun => "containerd-shim-runc-v2",
        };
        let bench = self.bench;
        let mut command = Command::new(program);
        command.args(["-namespace", &bench.host.namespace, "-address"]).arg(&bench.host.address);
        command.arg("-publish-binary").arg(&bench.containerd).args(["-id", self.id]).args(verb);
        command.env("MAX_SHIM_VERSION", "2").env("NAMESPACE", &bench.host.namespace);
        command.env("GRPC_ADDRESS", &bench.host.address).env("TTRPC_ADDRESS", bench.events());
        command.current_dir(&self.bundle).stdin(Stdio::null());
        command
    }

    fn shut_down(self, address: &Address) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shutdown = ShutdownRequest { id: self.id.to_owned(), now: true, ..ShutdownRequest::default() };
        let request = Request {
            service: format!("containerd.task.v{}.Task", address.version),
            method: "Shutdown".into(),
            payload: shutdown.write_to_bytes().context("writing a request")?,
            timeout_nano: i64::try_from(STEP.as_nanos())?,
            ..Request::default()
        };
        runtime.block_on(async {
            let connecting = UnixStream::connect(&address.path);
            let stream =
                connecting.await.with_context(|| format!("connecting to {}", address.path.display()))?;
            // It may be gone before it has answered; that it is gone is seen below.
            let _ = Client::new(Socket::new(stream)).request(request).await;
            Ok::<_, anyhow::Error>(())
        })?;
        until_true("the shim to end", STEP, || shim_of(self.id).is_err())?;
        Ok(())
    }
}

impl Drop for Shim<'_> {
    fn drop(&mut self) {
        if let Ok(shim) = shim_of(self.id) {
            let _ = kill(Pid::from_raw(shim.pid), Signal::SIGKILL);
            let bundle = text(&self.bundle);
            if let Err(error) = timed(self.command(&["-bundle", &bundle, "delete"])) {
                eprintln!("# removing what the shim {} left: {error:#}", self.id);
            }
        }
    }
}

/// Runs `command` to its end. A wait that looks now and then would be longer than what is measured.
fn timed(mut command: Command) -> Result<(Duration, Ended)> {
    let name = format!("{command:?}");
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let begun = Instant::now();
        let ended = command.output();
        // Nobody waits any more if it took too long.
        let _ = tell.send((begun.elapsed(), ended));
    });
    let (took, ended) = told.recv_timeout(STEP).map_err(|_| anyhow!("{name} did not end within {STEP:?}"))?;
    Ok((took, ended.with_context(|| format!("running {name}"))?))
}

/// Where a shim listens.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    path: PathBuf,
    /// Of the calls that it understands.
    version: u64,
}

impl Address {
    /// As a shim tells: the address alone, or in JSON if it is one for containerd 2.0 and later.
    fn of(told: &str) -> Result<Self> {
        let (address, version) = match serde_json::from_str::<Value>(told) {
            Ok(json) => (
                json["address"].as_str().unwrap_or_default().to_owned(),
                json["version"].as_u64().unwrap_or(2),
            ),
            Err(_) => (told.trim().to_owned(), 2),
        };
        match address.strip_prefix("unix://") {
            Some(path) => Ok(Self { path: path.into(), version }),
            None => bail!("{told:?} is no address of a shim"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_shims_tell_them() {
        let address = |version| Address { path: "/run/s/1".into(), version };
        assert_eq!(Address::of("unix:///run/s/1\n").unwrap(), address(2));
        let json = r#"{"version":3,"address":"unix:///run/s/1","protocol":"ttrpc"}"#;
        assert_eq!(Address::of(json).unwrap(), address(3));
        assert!(Address::of("").is_err() && Address::of("{}").is_err());
    }
}
