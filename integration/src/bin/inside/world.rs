//! Where things are in the host these tests run in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use integration::containerd::{Api, Ctr};
use integration::leaks::Scope;
use integration::{LogSources, World};
use lexopt::ValueExt;

/// The runtime of the control group.
pub const RUNC: &str = "io.containerd.runc.v2";

/// For one call to containerd. Emulated, a task's creation takes seconds.
const CALL: Duration = Duration::from_mins(3);

pub struct Inside {
    pub address: PathBuf,
    pub namespace: String,
    pub image: String,
    pub share: PathBuf,
    pub guest: PathBuf,
    pub vmm: PathBuf,
    pub guest_part: PathBuf,
    log: PathBuf,
    state: PathBuf,
    root: PathBuf,
    /// How machines come to life, by this host's configuration.
    pub boot: Boot,
    shared_host: bool,
}

/// How machines come to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    Restore,
    Cold,
}

impl Default for Inside {
    fn default() -> Self {
        Self {
            address: "/run/containerd/containerd.sock".into(),
            namespace: "default".into(),
            image: "docker.io/library/busybox:latest".into(),
            share: "/share".into(),
            guest: "/usr/share/supermachine/guest".into(),
            vmm: "supermachine-vmm".into(),
            guest_part: beside("guest-part"),
            log: "/var/log/containerd.log".into(),
            state: "/run/containerd".into(),
            root: "/var/lib/containerd".into(),
            boot: Boot::Restore,
            shared_host: false,
        }
    }
}

/// A program that lies beside this one.
fn beside(name: &str) -> PathBuf {
    std::env::current_exe().map_or_else(|_| name.into(), |path| path.with_file_name(name))
}

impl World for Inside {
    const OPTIONS: &'static str =
        "  --address SOCKET          containerd's socket (/run/containerd/containerd.sock)
  --namespace NAME          containerd's namespace to work in (default)
  --image NAME              an image with a busybox (docker.io/library/busybox:latest)
  --containerd-log FILE     containerd's log (/var/log/containerd.log)
  --containerd-state DIR    containerd's state directory (/run/containerd)
  --containerd-root DIR     containerd's root directory (/var/lib/containerd)
  --share DIR               the directory shared with whoever started this host (/share)
  --guest DIR               guest kernel and initrd (/usr/share/supermachine/guest)
  --vmm PROGRAM             the monitor (supermachine-vmm)
  --guest-part PROGRAM      what of the tests runs in a guest (guest-part, beside this program)
  --boot restore|cold       how machines come to life, by this host's configuration (restore)
  --shared-host             others use this host too: look for leaks only among what is ours";

    fn option(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool> {
        let place = match name {
            "address" => &mut self.address,
            "containerd-log" => &mut self.log,
            "containerd-state" => &mut self.state,
            "containerd-root" => &mut self.root,
            "share" => &mut self.share,
            "guest" => &mut self.guest,
            "vmm" => &mut self.vmm,
            "guest-part" => &mut self.guest_part,
            "namespace" => {
                self.namespace = parser.value()?.string()?;
                return Ok(true);
            }
            "image" => {
                self.image = parser.value()?.string()?;
                return Ok(true);
            }
            "boot" => {
                self.boot = parser.value()?.parse_with(|text| match text {
                    "restore" => Ok(Boot::Restore),
                    "cold" => Ok(Boot::Cold),
                    _ => Err("machines are restored or boot cold: restore, cold"),
                })?;
                return Ok(true);
            }
            "shared-host" => {
                self.shared_host = true;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        *place = parser.value()?.into();
        Ok(true)
    }

    fn logs(&self) -> LogSources {
        LogSources {
            files: vec![("containerd".into(), self.log.clone())],
            directories: vec![
                "/run/supermachine".into(),
                "/var/log/supermachine".into(),
                self.state.join("io.containerd.runtime.v2.task"),
            ],
            kernel: true,
            ..LogSources::default()
        }
    }

    fn leaks(&self) -> Option<Scope> {
        let text = |path: &Path| path.display().to_string();
        let only = vec![
            " containerd-shim".into(),
            " runc".into(),
            " supermachine".into(),
            "/run/supermachine".into(),
            "/var/lib/supermachine".into(),
            format!("/{}/it-", self.namespace),
            text(&self.state),
            text(&self.root),
        ];
        Some(Scope {
            containerd: self.address.clone(),
            directories: vec![
                self.state.clone(),
                self.root.clone(),
                "/run/supermachine".into(),
                "/var/lib/supermachine".into(),
                "/run/runc".into(),
                "/run/netns".into(),
            ],
            only: self.shared_host.then_some(only),
        })
    }
}

impl Inside {
    /// Whether a test may change what is the host's, its firewall say.
    pub fn owns_host(&self) -> bool {
        !self.shared_host
    }

    /// `ctr`, pointed at this containerd.
    pub fn ctr(&self) -> Ctr {
        Ctr { address: self.address.clone(), namespace: self.namespace.clone(), image: self.image.clone() }
    }

    /// Runs `body`, which runs `ctr` for the container `id`. A `ctr` that fails or is killed leaves its
    /// container, which must not become the next test's trouble.
    pub fn with_container<T>(&self, id: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        body().map_err(|error| match self.api().and_then(|api| api.purge(id)) {
            Ok(()) => error,
            Err(also) => error.context(format!("(and the container {id} could not be removed: {also:#})")),
        })
    }

    /// A gRPC connection to this containerd.
    pub fn api(&self) -> Result<Api> {
        Api::connect(&self.address, &self.namespace, CALL)
    }
}
