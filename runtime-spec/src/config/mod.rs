//! The configuration: a struct, filled from layers of TOML.
//!
//! `/etc/supermachine/config.toml`, then its drop-ins, then the runtime options of a call, later ones over
//! earlier ones, key by key. Annotations of a container come last ([`crate::annotations`]). Nothing here
//! opens a file: the caller brings texts and says where they are from.

mod bytes;
mod keys;
mod layers;
mod network;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use bytes::Bytes;
pub use keys::{KEYS, Key, default_file};
pub use layers::{Layer, load};
pub use network::{Addresses, Frames, Gateways, Network, NetworkSocket, Subnet, Vhost};

/// Where the configuration is by default.
pub const FILE: &str = "/etc/supermachine/config.toml";
/// Where its drop-ins are (`*.toml`, in the order of their names).
pub const DROP_INS: &str = "/etc/supermachine/config.d";

/// The configuration. [`KEYS`] says what each key means.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The machines.
    pub vm: Vm,
    /// The snapshots that machines come from.
    pub template: Template,
    /// What to do about requests that reach for the host.
    pub policy: Policy,
    /// A network that comes from no namespace.
    pub network: Network,
    /// What containers may say for themselves.
    pub annotations: Annotations,
}

/// The machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vm {
    /// The guest's kernel, if not the installed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The guest's initrd, if not the installed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// How a machine comes to life.
    pub boot: Boot,
    /// Processors of a machine whose containers have no limit.
    pub cpus: u32,
    /// Memory of a machine whose containers have no limit.
    pub memory: Bytes,
    /// What a guest itself needs, on top of the limits of its containers.
    pub overhead: Bytes,
    /// The most processors; zero for those of the host.
    pub max_cpus: u32,
    /// The most memory; zero for that of the host.
    pub max_memory: Bytes,
}

impl Default for Vm {
    fn default() -> Self {
        Vm {
            kernel: None,
            initrd: None,
            boot: Boot::Restore,
            cpus: 2,
            memory: Bytes(1 << 30),
            overhead: Bytes(64 << 20),
            max_cpus: 0,
            max_memory: Bytes(0),
        }
    }
}

/// The snapshots that machines come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Template {
    /// Where they are.
    pub directory: PathBuf,
    /// What they may take of the disk, all together.
    pub max_bytes: Bytes,
}

impl Default for Template {
    fn default() -> Self {
        Template { directory: "/var/lib/supermachine/templates".into(), max_bytes: Bytes(4 << 30) }
    }
}

/// What to do about requests that reach for the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Containers without a network, PID or IPC namespace of their own.
    pub host_namespaces: Reach,
    /// Binds of the host's `/proc`, `/sys` and `/dev`.
    pub host_kernel: Reach,
    /// Devices of privileged containers that a guest does not have.
    pub privileged_devices: Absent,
    /// Frames in which a guest says that it is somebody else.
    pub spoofing: Spoofing,
}

/// What becomes of a request that reaches for the host's kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// The container is not made.
    #[default]
    Reject,
    /// It gets the guest's.
    Guest,
}

/// What becomes of a request for something that is not in a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Absent {
    /// It is left out, and noted.
    #[default]
    Omit,
    /// The container is not made.
    Reject,
}

/// What becomes of frames in which a guest says that it is somebody else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spoofing {
    /// They reach nobody.
    #[default]
    Drop,
    /// They go on as any other.
    Allow,
}

/// What containers may say for themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Annotations {
    /// The annotations `dev.supermachine.*` that are heeded, without that prefix.
    pub allow: Vec<String>,
}

impl Default for Annotations {
    fn default() -> Self {
        Annotations { allow: ["boot", "cpus", "memory", "warm"].map(str::to_owned).to_vec() }
    }
}

/// How a machine comes to life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// From the snapshot of one that has booted.
    #[default]
    Restore,
    /// By booting.
    Cold,
}

impl FromStr for Boot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "restore" => Ok(Boot::Restore),
            "cold" => Ok(Boot::Cold),
            _ => Err("it is `restore` or `cold`".to_owned()),
        }
    }
}

/// When a container is warm: the moment that a snapshot keeps, for later ones to start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warm {
    /// When it is made, and its process waits to be started.
    Created,
    /// When it listens on this TCP port, or on any.
    Listen(Option<u16>),
    /// When a line of its output matches this regular expression.
    Log(String),
    /// So many milliseconds after its process started.
    After(u32),
}

impl FromStr for Warm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|port| *port != 0);
        let warm = match text.split_once(':') {
            None if text == "created" => Some(Warm::Created),
            None if text == "listen" => Some(Warm::Listen(None)),
            Some(("listen", port)) => number(port).map(|port| Warm::Listen(Some(port))),
            Some(("log", line)) if !line.is_empty() => Some(Warm::Log(line.to_owned())),
            Some(("after", time)) => time.strip_suffix("ms").unwrap_or(time).parse().ok().map(Warm::After),
            _ => None,
        };
        warm.ok_or_else(|| "it is `created`, `listen`, `listen:PORT`, `log:REGEX` or `after:MS`".to_owned())
    }
}

impl fmt::Display for Warm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warm::Created => f.write_str("created"),
            Warm::Listen(None) => f.write_str("listen"),
            Warm::Listen(Some(port)) => write!(f, "listen:{port}"),
            Warm::Log(line) => write!(f, "log:{line}"),
            Warm::After(time) => write!(f, "after:{time}"),
        }
    }
}

/// What holds for one container: the configuration, and its annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub config: Config,
    /// Exactly so many processors, by annotation.
    pub cpus: Option<u32>,
    /// Exactly so much memory, by annotation.
    pub memory: Option<Bytes>,
    pub warm: Option<Warm>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!("cold".parse(), Ok(Boot::Cold));
        assert_eq!("restore".parse(), Ok(Boot::Restore));
        assert!("Cold".parse::<Boot>().is_err());
        for (text, warm) in [
            ("created", Some(Warm::Created)),
            ("listen", Some(Warm::Listen(None))),
            ("listen:80", Some(Warm::Listen(Some(80)))),
            ("log:a: b", Some(Warm::Log("a: b".to_owned()))),
            ("after:500", Some(Warm::After(500))),
            ("after:500ms", Some(Warm::After(500))),
            ("listen:0", None),
            ("listen:99999", None),
            ("log:", None),
            ("after:1s", None),
            ("", None),
        ] {
            assert_eq!(text.parse().ok(), warm, "{text}");
            if let Some(warm) = warm {
                assert_eq!(warm.to_string().parse(), Ok(warm), "{text}");
            }
        }
    }
}
