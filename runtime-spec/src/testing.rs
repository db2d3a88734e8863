//! What tests of transformers have in common: a small spec that is planned for, to be changed, and a host
//! that is a table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::config::Config;
use crate::error::Error;
use crate::host::{Files, Found, Host, Owner, Pod};
use crate::plan::Plan;
use crate::planner::{Request, plan};
use crate::rootfs::RootfsMount;

/// The host's files.
pub(crate) struct Table(pub BTreeMap<PathBuf, Found>);

impl Files for Table {
    fn look(&self, path: &Path) -> Found {
        self.0.get(path).copied().unwrap_or(Found::Missing)
    }

    fn tmpfs_size(&self, path: &Path) -> Option<u64> {
        path.ends_with("shm").then_some(64 << 20)
    }
}

/// A request to be changed.
pub(crate) struct Case {
    pub id: String,
    /// If it is not the id.
    pub guest_id: Option<String>,
    pub spec: Value,
    pub rootfs: Vec<RootfsMount>,
    pub config: Config,
    pub files: Table,
    pub pod: Option<Pod>,
    pub terminal: bool,
    pub ordinal: u32,
}

pub(crate) const SOCKET: Owner = Owner { uid: 0, gid: 998, mode: 0o660 };

impl Case {
    pub(crate) fn new() -> Case {
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": { "user": {}, "cwd": "/", "args": ["sh"] },
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network" }, { "type": "cgroup" }
            ] },
        });
        let files = [
            ("/bundle/rootfs", Found::Directory),
            ("/dir", Found::Directory),
            ("/bundle/relative", Found::Directory),
            ("/file", Found::File),
            ("/image.erofs", Found::File),
            ("/image2.erofs", Found::File),
            ("/rw.img", Found::File),
            ("/dev/mapper/snap", Found::Block { major: 253, minor: 4 }),
            ("/run/docker.sock", Found::Socket(SOCKET)),
            ("/fifo", Found::Fifo),
            ("/dev/null", Found::Character { major: 1, minor: 3 }),
            ("/dev/nvidia0", Found::Character { major: 195, minor: 0 }),
            ("/dev/sdb", Found::Block { major: 8, minor: 16 }),
            ("/run/netns/a", Found::Namespace { initial: false, id: 7 }),
            ("/var/run/netns/a", Found::Namespace { initial: false, id: 7 }),
            ("/run/netns/c", Found::Namespace { initial: false, id: 8 }),
            ("/run/netns/host", Found::Namespace { initial: true, id: 1 }),
            ("/state/shm", Found::Directory),
        ];
        Case {
            id: "c1".to_owned(),
            guest_id: None,
            spec,
            rootfs: Vec::new(),
            config: Config::default(),
            files: Table(files.map(|(path, found)| (PathBuf::from(path), found)).into()),
            pod: None,
            terminal: false,
            ordinal: 0,
        }
    }

    /// The small spec with `changes` laid over it: objects are merged, everything else is replaced.
    pub(crate) fn with(changes: &Value) -> Case {
        let mut case = Case::new();
        merge(&mut case.spec, changes);
        case
    }

    /// With a mount of the spec and nothing else.
    pub(crate) fn mount(mount: &Value) -> Case {
        Case::with(&json!({ "mounts": [mount] }))
    }

    pub(crate) fn try_plan(&self) -> Result<Plan, Error> {
        let spec: Spec = serde_json::from_value(self.spec.clone()).expect("a spec");
        plan(&Request {
            id: &self.id,
            guest_id: self.guest_id.as_deref().unwrap_or(&self.id),
            namespace: "default",
            bundle: Path::new("/bundle"),
            share: Path::new("/share"),
            spec: &spec,
            rootfs: &self.rootfs,
            terminal: self.terminal,
            ordinal: self.ordinal,
            config: &self.config,
            host: Host { cpus: 4, memory: 8 << 30, hostname: "host1", files: &self.files },
            pod: self.pod.as_ref(),
        })
    }

    pub(crate) fn plan(&self) -> Plan {
        self.try_plan().unwrap_or_else(|error| panic!("{error}\n{:#}", self.spec))
    }

    pub(crate) fn error(&self) -> Error {
        match self.try_plan() {
            Ok(_) => panic!("there is a plan for {:#}", self.spec),
            Err(error) => error,
        }
    }
}

fn merge(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                merge(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over.clone(),
    }
}
