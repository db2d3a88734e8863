//! The plan of a container: all that has to be done for it, and by whom.
//!
//! [`Guest`] goes to the agent as JSON. Everything else is the shim's and the monitor's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{ContainerState, Hook, LinuxResources, Spec, State};
use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupPath;
use crate::config::{Addresses, Boot, Gateways, NetworkSocket, Spoofing, Vhost, Warm};
use crate::kind::Kind;

/// All that has to be done for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Its id.
    pub id: String,
    /// What its machine calls it.
    pub guest_id: String,
    /// Where its config.json lies.
    pub bundle: PathBuf,
    /// Alone, the sandbox of a pod, or a member of one.
    pub kind: Kind,
    /// The machine to make; none when the container joins one.
    pub machine: Option<Machine>,
    /// What the container adds to what its machine needs.
    pub demand: Demand,
    /// What the machine that it joins has to grow by: the size of one of its own. None in a pod, whose machine is made
    /// for all its containers.
    pub room: Option<Size>,
    /// What the agent is told.
    pub guest: Guest,
    /// What the shim mounts into the shared tree.
    pub share: Share,
    /// Disks of the machine.
    pub blocks: Vec<Block>,
    /// Unix sockets of the host that the guest reaches.
    pub sockets: Vec<Socket>,
    /// The network namespace that the machine is in.
    pub network: Network,
    /// The network that its machine has besides what is in that, if it makes one.
    pub uplink: Option<Uplink>,
    /// The host's file that the container has as `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// What the shim runs, and when.
    pub hooks: HostHooks,
    /// The cgroup on the host: of the monitor, or of the process that stands for a member.
    pub cgroup: HostCgroup,
    /// What of the container's confinement may be laid on the monitor.
    pub monitor: Monitor,
    /// The environment of a logging process (`binary://`).
    pub logger: Vec<(String, String)>,
    /// What was read differently from how it stands, for the log.
    pub notes: Vec<Note>,
}

impl Plan {
    /// What a hook reads on its standard input. `pid` is the host process that stands for the container; one that
    /// has stopped has none.
    pub fn state(&self, status: ContainerState, pid: i32) -> State {
        let mut state = State::default();
        state
            .set_version(self.guest.spec.version().clone())
            .set_id(self.id.clone())
            .set_status(status)
            .set_pid((status != ContainerState::Stopped).then_some(pid))
            .set_bundle(self.bundle.clone())
            .set_annotations(self.guest.spec.annotations().clone());
        state
    }
}

/// A machine to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// How large.
    pub size: Size,
    /// How it comes to life.
    pub boot: Boot,
    /// What the machine is that it is restored from.
    pub shape: Shape,
    /// When to take a snapshot that later containers of the same image and configuration start from.
    pub warm: Option<Warm>,
    /// What its guest may say of itself on networks.
    pub spoofing: Spoofing,
    /// Who moves its packets.
    pub vhost: Vhost,
    /// The guest's kernel, if not the installed one.
    pub kernel: Option<PathBuf>,
    /// The guest's initrd, if not the installed one.
    pub initrd: Option<PathBuf>,
}

/// A network behind a unix socket of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The socket.
    pub socket: NetworkSocket,
    /// The addresses that the machine has there.
    pub addresses: Addresses,
    /// By whom it reaches all else.
    pub gateways: Gateways,
}

/// How large a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Processors.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
}

/// The machine of a template, which becomes one of a certain size when it is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The processors that it has.
    pub cpus: u32,
    /// Of these, those that run.
    pub online: u32,
    /// Bytes of memory that it has booted with.
    pub memory: u64,
    /// Bytes of memory that it can be given.
    pub memory_max: u64,
}

/// What a container is limited to, of which a machine's size is made. Nothing is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Processors, rounded up.
    pub cpus: Option<u32>,
    /// Bytes of memory.
    pub memory: Option<u64>,
}

/// What the agent is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The container, with paths as the guest sees them.
    pub spec: Spec,
    /// What to mount before the container is made, in this order. Unmounted after it, in the reverse.
    pub mounts: Vec<Mount>,
    /// The tmpfs that becomes `/dev/shm`. Containers of a pod name the same one: the first makes it.
    pub shm: Option<Shm>,
    /// Unix sockets to listen on before the container is made.
    pub sockets: Vec<GuestSocket>,
    /// Disks which the container sees as device nodes: the agent knows their numbers, and adds them to
    /// `linux.devices` and `linux.resources.devices`.
    pub devices: Vec<GuestDevice>,
    /// Sysctls of the machine's kernel and of its network.
    pub sysctls: BTreeMap<String, String>,
    /// The name of the machine, when the container has no UTS namespace of its own.
    pub hostname: Option<String>,
}

impl Guest {
    /// The serial numbers of all disks that it needs, in no order.
    pub fn disks(&self) -> Vec<String> {
        let sources = self.mounts.iter().flat_map(|mount| mount.devices.iter().chain([&mount.source]));
        let mounted = sources.filter_map(|source| match source {
            Source::Disk(serial) => Some(serial.clone()),
            Source::Path(_) => None,
        });
        mounted.chain(self.devices.iter().map(|device| device.serial.clone())).collect()
    }
}

/// A tmpfs for shared memory, with mode 1777 and neither devices, nor set-user-ids, nor programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shm {
    /// Where.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// Something to mount: in the guest, or by the shim on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The type of file system; `bind` for a bind.
    pub typ: String,
    /// What is mounted.
    pub source: Source,
    /// Where. It is created.
    pub target: PathBuf,
    /// Flags and data.
    pub options: Vec<String>,
    /// Disks beside the source which the file system is told of by `device=`, in this order.
    pub devices: Vec<Source>,
    /// Directories to make first.
    pub mkdir: Vec<Directory>,
}

/// The source of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A path on the side that mounts; or just a name, for file systems without a source.
    Path(PathBuf),
    /// The disk with this serial number ([`Block::serial`]).
    Disk(String),
}

/// A directory to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Where.
    pub path: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// Whose.
    pub owner: Option<(u32, u32)>,
}

/// A unix socket of the guest behind which one of the host answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSocket {
    /// Where the agent listens.
    pub path: PathBuf,
    /// The port of the host on which each connection goes on.
    pub port: u32,
    /// The socket's user.
    pub uid: u32,
    /// The socket's group.
    pub gid: u32,
    /// The socket's permission bits.
    pub mode: u32,
}

/// A disk as a device node of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDevice {
    /// The disk with this serial number.
    pub serial: String,
    /// The node.
    pub path: PathBuf,
    /// The node's permission bits.
    pub mode: Option<u32>,
    /// The node's user.
    pub uid: Option<u32>,
    /// The node's group.
    pub gid: Option<u32>,
    /// What the device cgroup allows: of `r`, `w`, `m`.
    pub access: String,
}

/// What the shim mounts into the shared tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    /// The root file system, if the host mounts it: in this order.
    pub rootfs: Vec<Mount>,
    /// Directories and files of the host.
    pub binds: Vec<Bind>,
}

/// A directory or file of the host that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// What is bound, absolute.
    pub source: PathBuf,
    /// On what, in the shared tree: an empty directory, or an empty file.
    pub place: PathBuf,
    /// Whether it is a directory.
    pub directory: bool,
    /// Whether what is mounted below it comes along.
    pub recursive: bool,
    /// Who may write; enforced here, because a guest's kernel does as it likes.
    pub access: Access,
    /// Whether what the host mounts below the source later is seen too. Otherwise the bind is made
    /// private. Nothing of a guest's mounts ever comes back.
    pub follows: bool,
}

/// Who may write to a bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The guest may.
    ReadWrite,
    /// The guest may not, but for what is mounted below.
    ReadOnly,
    /// The guest may not, also in what is mounted below.
    ReadOnlyRecursive,
}

/// Drives of a machine, each of which takes one disk at a time.
pub const DRIVES: usize = 12;

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its serial number, by which the guest finds it. At most 20 bytes.
    pub serial: String,
    /// What is on it.
    pub source: BlockSource,
    /// Whether it may only be read.
    pub readonly: bool,
}

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockSource {
    /// A file or a block device by its path.
    Path(PathBuf),
    /// A block device by its numbers.
    Device {
        /// Its driver.
        major: i64,
        /// Which of the driver's.
        minor: i64,
    },
}

/// A unix socket of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// Where it is.
    pub source: PathBuf,
    /// The vsock port by which the guest comes to it.
    pub port: u32,
}

/// Which network a machine is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// A namespace that is there.
    Namespace(PathBuf),
    /// An empty namespace that the shim makes. Docker and nerdctl fill it between `Create` and `Start`.
    New,
    /// The machine's, which runs already.
    Pod,
    /// None but loopback: the host's network was asked for, and the configuration says to go on.
    Isolated,
}

/// Hooks that run on the host, in its mount namespace, each with [`Plan::state`] on standard input.
/// The other two kinds stay in the guest's spec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// During `Create`, before those of `create_runtime`.
    pub prestart: Vec<Hook>,
    /// During `Create`, when the network namespace is there.
    pub create_runtime: Vec<Hook>,
    /// After `Start`.
    pub poststart: Vec<Hook>,
    /// After the container is gone.
    pub poststop: Vec<Hook>,
}

/// The cgroup on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCgroup {
    /// Where.
    pub path: CgroupPath,
    /// What only the host can enforce: its processors, its disks, and a share of its time.
    pub resources: LinuxResources,
}

/// What may be laid on the monitor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Monitor {
    /// How gladly the host's kernel kills it when memory runs out.
    pub oom_score_adj: Option<i32>,
    /// The AppArmor profile that was asked for the container.
    pub apparmor_profile: Option<String>,
    /// The SELinux label that was asked for the container.
    pub selinux_label: Option<String>,
    /// The SELinux label that was asked for the container's mounts.
    pub mount_label: Option<String>,
}

/// Something read differently from how it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Where it stands.
    pub path: String,
    /// What became of it and why.
    pub text: String,
}

impl Note {
    pub(crate) fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        Note { path: path.into(), text: text.into() }
    }
}
