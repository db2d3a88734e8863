//! What a template is of: whatever can make a restored machine another one.

use std::path::{Path, PathBuf};

use runtime_spec::layout::{BINDS_TAG, SHARE_TAG};
use runtime_spec::plan::{self, DRIVES, Shape};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digests;
use crate::error::{Error, Result};
use crate::machine::{self, monitor_path, net};
use crate::{deadlines, paths};

/// The length of a key's text: short enough for a path, long enough to be the only one.
const LENGTH: usize = 32;

/// The name of a template.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// Of a name that may be one.
    pub fn parse(name: &str) -> Option<Self> {
        let good = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        (name.len() == LENGTH && name.chars().all(good)).then(|| Self(name.to_owned()))
    }

    fn of(words: &[&str]) -> Self {
        let mut digest = paths::hash(words);
        digest.truncate(LENGTH);
        Self(digest)
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// What a template is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// Its digest.
    pub kernel_digest: String,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// Its digest.
    pub initrd_digest: String,
    /// The digest of the monitor's program.
    pub monitor_digest: String,
    /// What the monitor says of itself and of this host, as JSON.
    pub fingerprint: String,
    /// The processors that the machine has.
    pub cpus: u32,
    /// Of these, those that run.
    pub online: u32,
    /// Bytes of memory that it has booted with.
    pub memory: u64,
    /// Bytes of memory that it can be given.
    pub memory_max: u64,
    /// Its devices, but for those that every machine has.
    pub devices: Vec<String>,
    /// What the kernel was told.
    pub append: String,
}

/// A container's checkpoint, whose memory was unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The digest of its files.
    pub digest: String,
    /// The container's id when it was made.
    pub container: String,
}

/// A warm container, for whoever looks for one to start from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// The template that its machine would be restored from.
    pub template: String,
    /// Its image, by the directories of its layers, each with what tells that it is still the same.
    pub layers: Vec<String>,
    /// The digest of its configuration.
    pub config: String,
    /// When it is warm.
    pub when: String,
    /// What its command is, for people.
    pub command: String,
    /// The container that it was, for people.
    pub container: String,
}

impl Warm {
    /// Its name. What is for people is not in it.
    pub fn key(&self) -> Result<Key> {
        let layers = serde_json::to_string(&self.layers).map_err(Error::unknown)?;
        Ok(Key::of(&["warm", &self.template, &layers, &self.config, &self.when]))
    }
}

/// What machines are restored from, without being booted first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// A template.
    Template(Parts),
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// A warm container.
    Warm(Warm),
}

impl Of {
    /// Its name.
    pub fn key(&self) -> Result<Key> {
        match self {
            Self::Template(parts) => parts.key(),
            Self::Checkpoint(checkpoint) => Ok(checkpoint.key()),
            Self::Warm(warm) => warm.key(),
        }
    }
}

impl Checkpoint {
    /// The name of what was unpacked: by its content alone.
    pub fn key(&self) -> Key {
        Key::of(&["checkpoint", &self.digest])
    }
}

/// The devices of every template, in their order: tags of shares, with how long the guest believes them.
pub const SHARES: [(&str, &str); 2] = [(SHARE_TAG, "auto"), (BINDS_TAG, "fresh")];

impl Parts {
    /// Of the template that a machine of this plan is restored from. Takes a while where kernel or initrd are new.
    pub fn find(machine: &plan::Machine, digests: &mut Digests) -> Result<Self> {
        let [kernel, initrd] = machine::guest_files(machine.kernel.as_ref(), machine.initrd.as_ref());
        let (kernel, initrd) = (kernel.1?, initrd.1?);
        let monitor = monitor_path();
        let Shape { cpus, online, memory, memory_max } = machine.shape;
        Ok(Self {
            kernel_digest: digests.content(&kernel)?,
            initrd_digest: digests.content(&initrd)?,
            monitor_digest: digests.content(&monitor)?,
            fingerprint: digests.monitor(&monitor, || fingerprint(&monitor))?,
            kernel,
            initrd,
            cpus,
            online,
            memory,
            memory_max,
            devices: std::iter::once("vsock".to_owned())
                .chain((0..DRIVES).map(|index| format!("drive {index}")))
                .chain(
                    (0..net::SLOTS)
                        .map(|slot| format!("net {} {}", net::slot_pairs(slot), net::slot_mac(slot))),
                )
                .chain(SHARES.iter().map(|(tag, cache)| format!("fs {tag} {cache}")))
                .collect(),
            append: append(online),
        })
    }

    /// The name of the template. Where files are does not matter.
    pub fn key(&self) -> Result<Key> {
        let without = Self { kernel: PathBuf::new(), initrd: PathBuf::new(), ..self.clone() };
        Ok(Key::of(&[&serde_json::to_string(&without).map_err(Error::unknown)?]))
    }
}

/// Processors beyond these are parked until somebody wants them.
fn append(online: u32) -> String {
    format!("quiet maxcpus={online}")
}

/// The one line of the monitor's.
fn fingerprint(monitor: &Path) -> std::io::Result<String> {
    let mut command = std::process::Command::new(monitor);
    command.arg("fingerprint").env_clear().current_dir("/");
    let output = crate::process::output(command, deadlines::ASK)?;
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let told = serde_json::from_str::<Value>(&line).is_ok_and(|value| value.is_object());
    if output.status.success() && told {
        return Ok(line);
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(std::io::Error::other(format!("its fingerprint is {line:?} ({}): {why}", output.status)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn parts() -> Parts {
        Parts {
            kernel: "/k".into(),
            kernel_digest: "aa".into(),
            initrd: "/i".into(),
            initrd_digest: "bb".into(),
            monitor_digest: "cc".into(),
            fingerprint: r#"{"build":"1","processor":{}}"#.into(),
            cpus: 4,
            online: 2,
            memory: 1 << 30,
            memory_max: 8 << 30,
            devices: vec!["vsock".into()],
            append: append(2),
        }
    }

    #[test]
    fn whatever_matters_makes_another_key_and_a_path_does_not() {
        type Edit = fn(&mut Parts);
        let of = |edit: Edit| {
            let mut parts = parts();
            edit(&mut parts);
            parts.key().unwrap()
        };
        let same = of(|_| {});
        assert_eq!(of(|parts| (parts.kernel, parts.initrd) = ("/x".into(), "/y".into())), same);
        let edits: [Edit; 10] = [
            |parts| parts.kernel_digest = "dd".into(),
            |parts| parts.initrd_digest = "dd".into(),
            |parts| parts.monitor_digest = "dd".into(),
            |parts| parts.fingerprint = "{}".into(),
            |parts| parts.cpus = 5,
            |parts| parts.online = 1,
            |parts| parts.memory += 1,
            |parts| parts.memory_max += 1,
            |parts| parts.devices.push("fs x auto".into()),
            |parts| parts.append.push(' '),
        ];
        let mut keys: Vec<_> = edits.iter().map(|edit| of(*edit)).chain([same]).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 11);
    }

    #[test]
    fn names_of_templates() {
        let key = parts().key().unwrap();
        assert_eq!(Key::parse(key.as_str()), Some(key.clone()));
        for name in
            ["", "digests.json", &key.as_str()[1..], &key.as_str().to_uppercase(), &format!("{key}.new")]
        {
            assert_eq!(Key::parse(name), None, "{name}");
        }
    }
}
