//! Where things are: in the tree that a machine shares, and in its guest.
//!
//! ```text
//! the shared tree (host)          the guest
//!   ID/rootfs                       /run/supermachine/share/ID/rootfs
//!   ID/layers/N                     /run/supermachine/share/ID/layers/N
//!   ID/binds/N                      /run/supermachine/binds/ID/binds/N
//!                                   /run/supermachine/containers/ID/{rootfs,layers/N}   from images
//!                                   /run/supermachine/sockets/ID/N                      unix sockets
//!                                   /run/supermachine/shm/ID                            /dev/shm
//!                                   /run/supermachine/ns/ID/{pid,ipc,uts,...}           namespaces
//! ```
//!
//! The tree is shared by virtio-fs since the machine was made, so that nothing is plugged in for a container: as
//! `share`, of which the guest keeps what it has looked up for a moment, and again as `binds`, where it looks each
//! time, as others change what is bound. What the agent has to provide is what is below neither; the namespaces of
//! a running container are wherever its agent finds `ns/ID/KIND` to lead.

use std::path::{Path, PathBuf};

/// The tag of the share.
pub const SHARE_TAG: &str = "containers";
/// Where the agent mounts the share.
pub const GUEST_SHARE: &str = "/run/supermachine/share";
/// The tag of the same tree, for what others than the container change.
pub const BINDS_TAG: &str = "binds";
/// Where the agent mounts that.
pub const GUEST_BINDS: &str = "/run/supermachine/binds";
/// Where the agent keeps what containers are made of that is not shared.
pub const GUEST_CONTAINERS: &str = "/run/supermachine/containers";
/// Where the agent listens on behalf of the host's unix sockets.
pub const GUEST_SOCKETS: &str = "/run/supermachine/sockets";
/// Where the agent mounts what becomes `/dev/shm`.
pub const GUEST_SHM: &str = "/run/supermachine/shm";
/// Where namespaces of running containers are found.
pub const GUEST_NAMESPACES: &str = "/run/supermachine/ns";
/// What a machine calls a container that others may start from: they find what it had under that name.
pub const WARM: &str = "warm";
/// The vsock port of a machine's first forwarded socket.
pub const SOCKET_PORTS: u32 = 0x4000_0000;
/// How many sockets a container can have forwarded.
pub const SOCKETS_PER_CONTAINER: u32 = 256;

/// The directory of a container, relative to the shared tree.
pub fn subtree(id: &str) -> PathBuf {
    PathBuf::from(id)
}

/// The root file system of a container that the host mounts, relative to the shared tree.
pub fn rootfs(id: &str) -> PathBuf {
    subtree(id).join("rootfs")
}

pub(crate) fn bind(id: &str, index: usize) -> PathBuf {
    subtree(id).join("binds").join(index.to_string())
}

pub(crate) fn layer(id: &str, index: usize) -> PathBuf {
    subtree(id).join("layers").join(index.to_string())
}

/// Where the guest sees a place of the shared tree.
pub fn in_guest(place: &Path) -> PathBuf {
    Path::new(GUEST_SHARE).join(place)
}

/// Where the guest sees a place of the shared tree that others change, too.
pub(crate) fn guest_bind(place: &Path) -> PathBuf {
    Path::new(GUEST_BINDS).join(place)
}

pub(crate) fn guest_rootfs(id: &str) -> PathBuf {
    Path::new(GUEST_CONTAINERS).join(id).join("rootfs")
}

pub(crate) fn guest_layer(id: &str, index: usize) -> PathBuf {
    Path::new(GUEST_CONTAINERS).join(id).join("layers").join(index.to_string())
}

pub(crate) fn guest_image(id: &str, index: usize) -> PathBuf {
    Path::new(GUEST_CONTAINERS).join(id).join("images").join(index.to_string())
}

pub(crate) fn guest_socket(id: &str, index: usize) -> PathBuf {
    Path::new(GUEST_SOCKETS).join(id).join(index.to_string())
}

pub(crate) fn guest_shm(id: &str) -> PathBuf {
    Path::new(GUEST_SHM).join(id)
}

pub(crate) fn guest_namespace(id: &str, kind: &str) -> PathBuf {
    Path::new(GUEST_NAMESPACES).join(id).join(kind)
}
