//! Where a shim keeps what must be found again: a directory for each task, shim and machine.
//!
//! ```text
//! /run/supermachine/
//!   tasks/NAMESPACE/ID/        journal    what was made for the container
//!                              group      the group whose shim serves it: the id of the container that began it
//!                              network    the network namespace of its machine, which others can join
//!                              timeline   the phases of its creation
//!                              warm       what becomes of one that is to be warm
//!   shims/NAMESPACE/GROUP/     daemon     the shim's process
//!                              address    the shim's socket
//!                              log        what it logged, the last of it
//!   machines/HASH/             journal    what was made for the machine
//!                              tree/      what the machine shares
//!                              vsock/     sockets: sun_path is short, hence the hash
//!                              jail/      the monitor's root is built over it
//!                              console    what the guest's console showed
//! ```

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// All of it.
pub const ROOT: &str = "/run/supermachine";

/// Where things of one group of containers are: those that share a machine, and so a shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
    namespace: String,
    group: String,
}

impl Paths {
    /// Below `root`.
    pub fn new(root: &Path, namespace: &str, group: &str) -> Self {
        Self { root: root.into(), namespace: namespace.into(), group: group.into() }
    }

    /// A container's directory.
    pub fn task(&self, id: &str) -> PathBuf {
        self.root.join("tasks").join(&self.namespace).join(id)
    }

    /// The shim's directory.
    pub fn shim(&self) -> PathBuf {
        self.root.join("shims").join(&self.namespace).join(&self.group)
    }

    /// The machine's directory.
    pub fn machine(&self) -> PathBuf {
        self.root.join("machines").join(&hash(&[&self.namespace, &self.group])[..16])
    }

    /// What the machine shares.
    pub fn tree(&self) -> PathBuf {
        self.machine().join("tree")
    }

    /// Where its sockets are.
    pub fn vsock(&self) -> PathBuf {
        self.machine().join("vsock")
    }

    /// The name of the group.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// The namespace of containerd.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// All containers of the namespace that have a directory, and the groups they are of.
    pub fn tasks(&self) -> Vec<(String, String)> {
        let Ok(entries) = std::fs::read_dir(self.root.join("tasks").join(&self.namespace)) else {
            return Vec::new();
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|id| Some((id.clone(), group_of(&self.root, &self.namespace, &id)?))).collect()
    }
}

/// The group of a container that has a directory.
pub fn group_of(root: &Path, namespace: &str, id: &str) -> Option<String> {
    let path = root.join("tasks").join(namespace).join(id).join("group");
    std::fs::read_to_string(path).ok().filter(|group| !group.is_empty())
}

/// The digest of words, in hexadecimal.
pub fn hash(words: &[&str]) -> String {
    hex(&Sha256::digest(words.join("/")))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_a_machine_have_short_paths() {
        let id = "0123456789abcdef".repeat(8);
        let paths = Paths::new(Path::new(ROOT), &id, &id);
        let longest = paths.vsock().join(format!("vsock_{}", u32::MAX));
        assert!(longest.as_os_str().len() < 108, "{}", longest.display());
    }

    #[test]
    fn digests_are_those_of_sha256() {
        assert_eq!(hash(&["abc"]), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
