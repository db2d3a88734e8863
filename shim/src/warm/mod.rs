//! Warm starts: a container that says when it is warm is written down at that moment, in passing, and later ones of the
//! same image and configuration start from there.
//!
//! What is kept lies where templates are, under a name of its own kind:
//!
//! ```text
//! KEY/
//!   state, memory, about.json, used   as a template's
//!   container.json                    as a checkpoint's, and whether its process had been started
//!   upper/                            what it had written to its root file system
//!   stdout, stderr                    what it had said
//! ```
//!
//! The name is of all that its processes can have seen: image, configuration, kernel, size. What is bound from the host
//! is in it by its place only, as it is read again by whoever starts from there.

pub mod upper;
mod word;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use regex::bytes::{Regex, RegexBuilder};
use runtime_spec::annotations::PREFIX;
use runtime_spec::config::{Boot, Warm};
use runtime_spec::plan::{Access, Mount, Plan};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{self, About};
use crate::error::{Attempt, Error, Result};
use crate::paths;
use crate::stdio::{LONGEST_TOLD, StreamSet};
use crate::template::{self, Found, Key, Making, Store, Template};

pub use word::Word;

const CONTAINER: &str = "container.json";
const UPPER: &str = "upper";
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";
/// Longer descriptions are not ours.
const LARGEST: u64 = 1 << 20;
/// A regular expression that takes more is not compiled.
const LARGEST_REGEX: usize = 1 << 20;
/// The variable in which engines repeat a container's name.
const HOSTNAME: &str = "HOSTNAME=";

/// When a container is warm.
#[derive(Debug, Clone)]
pub enum Condition {
    /// When it is made.
    Created,
    /// When it listens on this TCP port, or on any.
    Listen(Option<u16>),
    /// When a line of its output is one of these.
    Log(Regex),
    /// So long after it was started.
    After(std::time::Duration),
}

impl Condition {
    /// As its annotation says.
    pub fn of(warm: &Warm) -> Result<Self> {
        Ok(match warm {
            Warm::Created => Self::Created,
            Warm::Listen(port) => Self::Listen(*port),
            Warm::After(time) => Self::After(std::time::Duration::from_millis(u64::from(*time))),
            Warm::Log(line) => {
                let mut builder = RegexBuilder::new(line);
                let compiled = builder.size_limit(LARGEST_REGEX).dfa_size_limit(LARGEST_REGEX).build();
                Self::Log(compiled.map_err(|error| Error::invalid(format!("{PREFIX}warm: {error}")))?)
            }
        })
    }
}

/// Of a container that is to be warm, or to start from one.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What it is.
    pub sort: template::Warm,
    /// When it is warm.
    pub condition: Condition,
    /// Where its files are.
    pub upper: PathBuf,
}

/// Why a container of this plan does not start from a warm one, nor becomes one, if so.
pub fn obstacle(plan: &Plan) -> Option<&'static str> {
    if let Some(why) = checkpoint::obstacle(plan) {
        return Some(why);
    }
    if !plan.blocks.is_empty() {
        return Some("it has disks of its own; mount them on the host and bind them instead");
    }
    if plan.machine.as_ref().is_some_and(|machine| machine.boot == Boot::Cold) {
        return Some("its machine is to boot");
    }
    // What one has in its memory of such files is wrong for another's.
    if plan.share.binds.iter().any(|bind| bind.directory && bind.access == Access::ReadWrite) {
        return Some("a directory of the host is bound that it can write to; bind it read-only");
    }
    match layers(plan) {
        None => Some("its root file system is no overlay that can be written to"),
        Some(_) => None,
    }
}

/// The layers of an overlay: where it is written to, the others, and all other options.
fn layers(plan: &Plan) -> Option<(PathBuf, Vec<PathBuf>, Vec<&str>)> {
    let [Mount { typ, options, .. }] = plan.share.rootfs.as_slice() else { return None };
    if typ != "overlay" {
        return None;
    }
    let (mut upper, mut lower, mut others) = (None, Vec::new(), Vec::new());
    for option in options {
        match option.split_once('=') {
            Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
            Some(("lowerdir", paths)) => lower.extend(paths.split(':').map(PathBuf::from)),
            Some(("workdir", _)) => {}
            _ => others.push(option.as_str()),
        }
    }
    Some((upper?, lower, others))
}

/// What a container of this plan is, in this namespace of containerd's, whose containers are one owner's, and with
/// these streams; `template` is what its machine would be restored from.
pub fn wanted(
    plan: &Plan,
    namespace: &str,
    condition: Condition,
    streams: StreamSet,
    template: &Key,
) -> Result<Wanted> {
    let missing = || Error::unknown("a container that cannot be warm was asked for its layers");
    let machine = plan.machine.as_ref().ok_or_else(missing)?;
    let when = machine.warm.as_ref().ok_or_else(missing)?;
    let (upper, lower, options) = layers(plan).ok_or_else(missing)?;
    let layers = lower.iter().map(|layer| identity(layer)).collect::<Result<_>>()?;
    let size = machine.size;
    let binds: Vec<_> = plan.share.binds.iter().map(bind).collect();
    let config = json!({
        "format": checkpoint::VERSION,
        "namespace": namespace,
        "guest": seen(plan)?,
        "binds": binds,
        "options": options,
        "size": [u64::from(size.cpus), size.memory],
        "streams": streams,
    });
    let process = plan.guest.spec.process().as_ref();
    let command = process.and_then(|process| process.args().clone()).unwrap_or_default().join(" ");
    let sort = template::Warm {
        template: template.as_str().to_owned(),
        layers,
        config: paths::hash(&[&config.to_string()]),
        when: when.to_string(),
        command: command.chars().take(80).collect(),
        container: plan.id.clone(),
    };
    Ok(Wanted { sort, condition, upper })
}

/// Directories of layers are never changed, but containerd may have been set up anew.
fn identity(layer: &Path) -> Result<String> {
    let found = fs::metadata(layer).attempt(format_args!("looking at {}", layer.display()))?;
    let (dev, ino, ctime, nanoseconds) = (found.dev(), found.ino(), found.ctime(), found.ctime_nsec());
    Ok(format!("{} {dev} {ino} {ctime}.{nanoseconds:09}", layer.display()))
}

fn bind(bind: &runtime_spec::plan::Bind) -> Value {
    let access = match bind.access {
        Access::ReadWrite => "rw",
        Access::ReadOnly => "ro",
        Access::ReadOnlyRecursive => "rro",
    };
    // In whichever machine's tree.
    let place = bind.place.file_name().map(|name| name.to_string_lossy());
    json!([place, bind.directory, bind.recursive, bind.follows, access])
}

/// All that the guest is told, but for what engines give each container anew and this one is given, too.
fn seen(plan: &Plan) -> Result<Value> {
    let mut guest = plan.guest.clone();
    let name = hostname(plan);
    guest.hostname = guest.hostname.map(|_| String::new());
    let spec = &mut guest.spec;
    spec.set_annotations(None);
    if spec.hostname().is_some() {
        spec.set_hostname(Some(String::new()));
    }
    if let Some(process) = spec.process_mut()
        && let Some(env) = process.env_mut()
    {
        env.retain(|variable| variable.strip_prefix(HOSTNAME).is_none_or(|value| Some(value) != name));
    }
    let mut guest = serde_json::to_value(&guest).map_err(Error::unknown)?;
    // Sets, in no order.
    let capabilities = guest.pointer_mut("/spec/process/capabilities").and_then(Value::as_object_mut);
    for set in capabilities.into_iter().flat_map(|all| all.values_mut()).filter_map(Value::as_array_mut) {
        set.sort_by(|one, other| one.as_str().cmp(&other.as_str()));
    }
    Ok(guest)
}

/// What a container is called by its config.json.
pub fn hostname(plan: &Plan) -> Option<&str> {
    plan.guest.spec.hostname().as_deref().or(plan.guest.hostname.as_deref()).filter(|name| !name.is_empty())
}

/// What a shim has to know of a container that starts from a warm one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Container {
    about: About,
    /// Its process had been started.
    started: bool,
}

/// A warm container, to start from.
#[derive(Debug)]
pub struct Start {
    /// Its machine.
    pub template: Template,
    /// What there is to know of it.
    pub about: About,
    /// Whether its process had been started.
    pub started: bool,
    /// What it had said.
    pub said: [Vec<u8>; 2],
}

impl Start {
    /// Reads what is kept beside the machine. Blocks.
    fn read(template: Template) -> Result<Self> {
        let open = |name: &str, most: u64| {
            let path = template.directory.join(name);
            let mut bytes = Vec::new();
            let read = File::open(&path).and_then(|file| file.take(most).read_to_end(&mut bytes));
            read.attempt(format_args!("reading {}", path.display())).map(|_| bytes)
        };
        let told = LONGEST_TOLD as u64;
        let Container { about, started } = serde_json::from_slice(&open(CONTAINER, LARGEST)?)
            .map_err(|error| Error::unknown(format!("{CONTAINER}: {error}")))?;
        let said = [open(STDOUT, told)?, open(STDERR, told)?];
        Ok(Self { template, about, started, said })
    }
}

/// Gives a container the files of the one that is kept in `from`. Blocks.
pub fn fill(from: &Path, upper: &Path) -> Result<()> {
    upper::copy(&from.join(UPPER), upper, upper::LIMITS)
        .attempt(format_args!("copying the files of a warm container to {}", upper.display()))
}

/// Writes what goes beside a machine's state and memory. Blocks.
pub fn describe(making: &Making, about: About, started: bool, said: &[Vec<u8>; 2]) -> Result<()> {
    let container = serde_json::to_vec_pretty(&Container { about, started }).map_err(Error::unknown)?;
    for (name, bytes) in [(CONTAINER, &container), (STDOUT, &said[0]), (STDERR, &said[1])] {
        let path = making.directory().join(name);
        fs::write(&path, bytes).attempt(format_args!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Writes down a container's files, while nothing of it moves. Blocks.
pub fn keep_files(making: &Making, upper: &Path) -> Result<()> {
    let to = making.directory().join(UPPER);
    let kept = fs::create_dir(&to).and_then(|()| upper::copy(upper, &to, upper::LIMITS));
    kept.attempt(format_args!("keeping the files in {}", upper.display()))
}

/// The one to start from, if it is there. Blocks.
pub fn find(store: &Store, wanted: &Wanted) -> Result<Option<Start>> {
    let key = wanted.sort.key()?;
    let why = match store.open(&key).attempt(format_args!("opening warm container {key}"))? {
        Found::Nothing => return Ok(None),
        Found::Spoilt(why) => why,
        Found::Template(template) => match Start::read(template) {
            Ok(start) => return Ok(Some(start)),
            Err(error) => error.text,
        },
    };
    log::warn!("warm container {key} goes: {why}");
    if let Err(error) = store.remove(&key, false) {
        log::warn!("removing warm container {key}: {error}");
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
