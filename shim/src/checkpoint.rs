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

use agent_api::agent::Stdio;
use agent_api::is_id;
use agent_api::stdio::Stream;
use runtime_spec::plan::Plan;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmm::snapshot::{MEMORY_FILE, STATE_FILE};

use crate::error::{Attempt, Error, Result};
use crate::paths::hex;
use crate::template::Making;

/// What names of directories begin with that containerd makes for checkpoints.
const CONTAINERDS: &str = "ctrd-checkpoint";
const ABOUT_FILE: &str = "container.json";
/// The version of this description. Others are not read.
const VERSION: u32 = 1;
/// Longer ones are not ours.
const LARGEST: u64 = 1 << 20;
/// At once.
const PIECE: usize = 1 << 20;

/// What a shim has to know of a container that was saved with its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    version: u32,
    /// The id by which its machine knows it.
    pub container: String,
    /// How many containers the machine has had.
    pub ordinal: u32,
    /// The streams of its own process.
    pub streams: StreamSet,
    /// Its other processes.
    pub execs: Vec<Exec>,
    /// The last event of the agent's that its shim has heard.
    pub last_event: u64,
    /// What of the host it has mounted.
    pub mounts: Vec<Mount>,
}

/// All of it that every version has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Which streams a process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSet {
    /// A terminal.
    pub terminal: bool,
    /// Standard input, and so on.
    pub stdin: bool,
    /// Also that of a terminal.
    pub stdout: bool,
    /// Not that of a terminal.
    pub stderr: bool,
}

impl StreamSet {
    /// Whether it is one of them.
    pub fn has(self, stream: Stream) -> bool {
        match stream {
            Stream::Stdin => self.stdin,
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

impl From<&Stdio> for StreamSet {
    fn from(stdio: &Stdio) -> Self {
        let Stdio { terminal, stdin, stdout, stderr, .. } = *stdio;
        Self { terminal, stdin, stdout, stderr: stderr && !terminal }
    }
}

/// A process beside a container's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Its id.
    pub id: String,
    /// Its streams.
    pub streams: StreamSet,
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

/// The mounts of a plan that lead out of its machine.
pub fn mounts(plan: &Plan) -> Vec<Mount> {
    let mounts = plan.guest.spec.mounts().as_deref().unwrap_or_default();
    let binds = mounts.iter().filter(|mount| mount.typ().as_deref() == Some("bind"));
    let of = |mount: &oci_spec::runtime::Mount| {
        let source = mount.source().clone().unwrap_or_default();
        Mount { destination: mount.destination().clone(), source }
    };
    binds.map(of).collect()
}

impl About {
    /// Of a container.
    pub fn new(container: &str, ordinal: u32, streams: StreamSet, mounts: Vec<Mount>) -> Self {
        Self {
            version: VERSION,
            container: container.to_owned(),
            ordinal,
            streams,
            execs: Vec::new(),
            last_event: 0,
            mounts,
        }
    }

    /// Whether a container of this plan can be what was saved.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        if plan.machine.is_none() {
            return Err(Error::precondition("a container of a pod cannot be restored from a checkpoint"));
        }
        if !plan.blocks.is_empty() {
            return Err(Error::precondition(
                "a container that is restored cannot have disks: mount them on the host and bind them",
            ));
        }
        let now = mounts(plan);
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

    /// Removes a directory that containerd has made for this one create and does not remove. Others belong to whoever
    /// has named them.
    pub fn dispose(&self) {
        let name = self.directory.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(CONTAINERDS)
            && let Err(error) = fs::remove_dir_all(&self.directory)
        {
            log::warn!("removing {}: {error}", self.directory.display());
        }
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
    /// In `directory`, which is made if need be, and has none yet.
    pub fn begin(directory: &Path) -> Result<Self> {
        let what = format!("writing a checkpoint to {}", directory.display());
        fs::create_dir_all(directory).attempt(&what)?;
        let file = |name: &str| {
            let path = directory.join(name);
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
        };
        let state = file(STATE_FILE).attempt(&what)?;
        let memory = file(MEMORY_FILE).inspect_err(|_| drop(fs::remove_file(directory.join(STATE_FILE))));
        Ok(Self { directory: directory.to_owned(), state, memory: memory.attempt(what)?, kept: false })
    }

    /// It is whole.
    pub fn finish(mut self, about: &About) -> Result<()> {
        let path = self.directory.join(ABOUT_FILE);
        let text = serde_json::to_vec_pretty(about).map_err(Error::unknown)?;
        fs::write(&path, text).attempt(format_args!("writing {}", path.display()))?;
        self.kept = true;
        Ok(())
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
