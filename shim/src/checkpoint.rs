//! A container's checkpoint, as containerd packs it into an image and unpacks it again: a directory.
//!
//! ```text
//! state, memory     its machine's snapshot, packed for carrying
//! container.json    what a shim has to know of the container in it
//! ```
//!
//! The memory is unpacked where templates are, under a name that is its content's, so that all containers that come
//! from one checkpoint share the pages that none of them changes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use agent_api::is_id;
use oci_spec::runtime::Spec;
use runtime_spec::Kind;
use runtime_spec::plan::{Block, Plan};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::snapshot::{MEMORY_FILE, STATE_FILE};

use crate::error::{Attempt, Error, Result};
use crate::machine::drives::path_of;
use crate::paths::hex;
use crate::stdio::StreamSet;
use crate::template::Making;

const ABOUT_FILE: &str = "container.json";
/// The version of this description. Others are not read.
pub const VERSION: u32 = 1;
/// Longer ones are not ours.
const LARGEST: u64 = 1 << 20;
/// At once.
const PIECE: usize = 1 << 20;
/// As much of a disk is compared.
const HEAD: u64 = 64 << 10;

/// What a shim has to know of a container that was saved with its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    version: u32,
    /// The id by which its machine knows it.
    pub container: String,
    /// The streams of its own process.
    pub streams: StreamSet,
    /// Its other processes.
    pub execs: Vec<Exec>,
    /// The last event of the agent's that its shim has heard.
    pub last_event: u64,
    /// What of the host it has mounted.
    pub mounts: Vec<Mount>,
    /// What is in the drives of its machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
}

/// All of it that every version has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// A process beside a container's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Its id.
    pub id: String,
    /// Its streams.
    pub streams: StreamSet,
    /// It has ended, and nobody has deleted it.
    pub exited: bool,
}

/// A mount whose other side is the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Where the container sees it.
    pub destination: PathBuf,
    /// Where its machine finds it.
    pub source: PathBuf,
}

/// A disk, which is read-only and has to be the same when its machine goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its serial number.
    pub serial: String,
    /// The digest of its beginning, where file systems say which they are.
    pub head: String,
}

/// What is at the beginning of these disks.
pub fn disks(blocks: &[Block]) -> Result<Vec<Disk>> {
    let of = |block: &Block| {
        let path = path_of(block)?;
        let what = format!("reading the disk {}", path.display());
        let mut head = Vec::new();
        File::open(&path).attempt(&what)?.take(HEAD).read_to_end(&mut head).attempt(what)?;
        Ok(Disk { serial: block.serial.clone(), head: hex(&Sha256::digest(&head)) })
    };
    blocks.iter().map(of).collect()
}

/// The mounts of a guest's spec that lead out of its machine.
fn mounts(spec: &Spec) -> Vec<Mount> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let binds = mounts.iter().filter(|mount| mount.typ().as_deref() == Some("bind"));
    let of = |mount: &oci_spec::runtime::Mount| {
        let source = mount.source().clone().unwrap_or_default();
        Mount { destination: mount.destination().clone(), source }
    };
    binds.map(of).collect()
}

/// Why a container of this plan cannot be written down, nor be what was, if so.
pub fn obstacle(plan: &Plan) -> Option<&'static str> {
    match plan.kind {
        Kind::Single if plan.blocks.iter().all(|block| block.readonly) => None,
        Kind::Single => Some(
            "it has a disk that it can write to, which would not be what its memory says later; mount that on the host and \
             bind it instead",
        ),
        Kind::Sandbox | Kind::Member { .. } => Some("it is in a machine with others, as those of a pod are"),
    }
}

impl About {
    /// Of the container that its machine knows by this id, with the guest's spec of it and its streams; of other
    /// processes there are none yet.
    pub fn new(container: &str, spec: &Spec, streams: StreamSet, last_event: u64) -> Self {
        Self {
            version: VERSION,
            container: container.to_owned(),
            streams,
            execs: Vec::new(),
            last_event,
            mounts: mounts(spec),
            disks: Vec::new(),
        }
    }

    /// Whether a container of this plan, with a terminal or without, can be what was saved.
    pub fn check(&self, plan: &Plan, terminal: bool) -> Result<()> {
        if let Some(why) = obstacle(plan) {
            return Err(Error::precondition(format!("cannot restore this container: {why}")));
        }
        if self.streams.terminal != terminal {
            return Err(Error::precondition(format!(
                "the container that was written down had {} terminal, and this one is to have {}",
                if terminal { "no" } else { "a" },
                if terminal { "one" } else { "none" }
            )));
        }
        let here = disks(&plan.blocks)?;
        if here.len() != self.disks.len() {
            return Err(Error::precondition(format!(
                "the container that was written down had {} disks, and this one is to have {}",
                self.disks.len(),
                here.len()
            )));
        }
        if let Some((block, _)) =
            plan.blocks.iter().zip(here.iter().zip(&self.disks)).find(|(_, (here, saved))| here != saved)
        {
            return Err(Error::precondition(format!(
                "the disk {} is not the one that the container had; restore it with the image that it had",
                path_of(block)?.display()
            )));
        }
        let now = mounts(&plan.guest.spec);
        let missing = self.mounts.iter().find(|mount| !now.contains(mount));
        let other = missing.or_else(|| now.iter().find(|mount| !self.mounts.contains(mount)));
        match other {
            None => Ok(()),
            Some(mount) => Err(Error::precondition(format!(
                "the checkpoint and config.json differ in the mount at {}: restore it with the mounts that it had, in \
                 their order",
                mount.destination.display()
            ))),
        }
    }
}

/// A checkpoint on disk.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    directory: PathBuf,
    /// What it says of its container.
    pub about: About,
}

impl Checkpoint {
    /// Looks at the one in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(ABOUT_FILE);
        let what = format!("reading the checkpoint {}", directory.display());
        let mut text = Vec::new();
        match File::open(&path) {
            Ok(file) => file.take(LARGEST).read_to_end(&mut text).map(drop).attempt(&what)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = format!("{what}: it has no {ABOUT_FILE}, so it is none of this runtime's");
                return Err(Error::invalid(text));
            }
            Err(error) => return Err(error).attempt(&what),
        }
        let wrong = |why: String| Error::invalid(format!("{what}: {ABOUT_FILE}: {why}"));
        let version: Version = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if version.version != VERSION {
            return Err(wrong(format!("it is of version {}, this shim reads {VERSION}", version.version)));
        }
        let about: About = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let ids = std::iter::once(&about.container).chain(about.execs.iter().map(|exec| &exec.id));
        if let Some(id) = ids.into_iter().find(|id| !is_id(id)) {
            return Err(wrong(format!("{id:?} is not an id")));
        }
        Ok(Self { directory: directory.to_owned(), about })
    }

    /// The digest of its machine's files. Reads all of them.
    pub fn digest(&self) -> Result<String> {
        let mut digest = Sha256::new();
        let mut piece = vec![0; PIECE];
        for name in [STATE_FILE, MEMORY_FILE] {
            let path = self.directory.join(name);
            let what = format!("reading {}", path.display());
            let mut file = File::open(&path).attempt(&what)?;
            digest.update(file.metadata().attempt(&what)?.len().to_le_bytes());
            loop {
                match file.read(&mut piece).attempt(&what)? {
                    0 => break,
                    length => digest.update(&piece[..length]),
                }
            }
        }
        Ok(hex(&digest.finalize()))
    }

    /// Writes its machine's snapshot as machines are restored from it.
    pub fn unpack(&self, making: &Making) -> Result<()> {
        let open = |name: &str| {
            let path = self.directory.join(name);
            File::open(&path).attempt(format_args!("reading {}", path.display()))
        };
        let what = format!("unpacking the checkpoint {}", self.directory.display());
        io::copy(&mut open(STATE_FILE)?, &mut &making.state).attempt(&what)?;
        vmm::snapshot::unpack(&open(MEMORY_FILE)?, &making.memory, |_, _| ()).attempt(what)
    }
}

/// Removes a directory that containerd has made for one create and does not remove. Others belong to whoever has named
/// them.
pub fn dispose(directory: &Path) {
    if is_containerds(directory)
        && let Err(error) = fs::remove_dir_all(directory)
    {
        log::warn!("removing {}: {error}", directory.display());
    }
}

/// As Go's `os.MkdirTemp` makes one where the environment of a service says nothing else.
fn is_containerds(directory: &Path) -> bool {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let digits = name.strip_prefix("ctrd-checkpoint").unwrap_or_default();
    directory.parent() == Some(Path::new("/tmp"))
        && !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub struct Writing {
    directory: PathBuf,
    /// For the machine's state.
    pub state: File,
    /// For its memory.
    pub memory: File,
    kept: bool,
}

impl Writing {
    /// In `directory`, which has none yet.
    pub fn begin(directory: &Path) -> Result<Self> {
        let what = format!("writing a checkpoint to {}", directory.display());
        let file = |name: &str| {
            let path = directory.join(name);
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
        };
        let state = file(STATE_FILE).attempt(&what)?;
        let memory = file(MEMORY_FILE).inspect_err(|_| drop(fs::remove_file(directory.join(STATE_FILE))));
        Ok(Self { directory: directory.to_owned(), state, memory: memory.attempt(what)?, kept: false })
    }

    /// Says what it is of. Before its machine is saved, which may not go on afterwards: nothing can fail then.
    pub fn describe(&self, about: &About) -> Result<()> {
        let path = self.directory.join(ABOUT_FILE);
        let text = serde_json::to_vec_pretty(about).map_err(Error::unknown)?;
        fs::write(&path, text).attempt(format_args!("writing {}", path.display()))
    }

    /// It is whole.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Writing {
    /// Removes what there is of one that was not finished.
    fn drop(&mut self) {
        if !self.kept {
            for name in [STATE_FILE, MEMORY_FILE, ABOUT_FILE] {
                let _ = fs::remove_file(self.directory.join(name));
            }
        }
    }
}

#[cfg(test)]
mod tests;
