//! The order in which a plan is made: one transformer for each concern.
//!
//! A transformer takes its concern out of the spec, or rewrites it for the guest, and puts what the host
//! has to do into the plan. None relies on another but where the list says so.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxResources, Spec};

use crate::cgroup::CgroupPath;
use crate::config::{Config, Settings};
use crate::error::{Result, invalid};
use crate::host::{Host, Pod};
use crate::kind::Kind;
use crate::plan::{DRIVES, Demand, Guest, HostCgroup, HostHooks, Monitor, Network, Plan, Share};
use crate::{
    annotations, cgroup, devices, hooks, labels, logger, mounts, namespaces, network, platform, process,
    resources, rootfs, seccomp, size, sysctl,
};

/// What a container is asked for with.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Its id.
    pub id: &'a str,
    /// What its machine calls it, and so its directory in the tree: its id, unless it is restored from a checkpoint,
    /// whose machine knows it by the id that it had.
    pub guest_id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Where its config.json lies, absolute.
    pub bundle: &'a Path,
    /// Where its machine's shared tree is on the host, absolute.
    pub share: &'a Path,
    /// Its config.json.
    pub spec: &'a Spec,
    /// The mounts of its root file system, as containerd hands them over.
    pub rootfs: &'a [rootfs::RootfsMount],
    /// Whether its process has a terminal: `Create` decides, not config.json.
    pub terminal: bool,
    /// How many containers its machine has had before. Ports and serial numbers depend on it, so that a
    /// container keeps them and no two of a machine have the same.
    pub ordinal: u32,
    /// The configuration.
    pub config: &'a Config,
    /// What the host is like.
    pub host: Host<'a>,
    /// The pod that it joins, if its machine runs already.
    pub pod: Option<&'a Pod>,
}

/// What every transformer knows.
pub(crate) struct Context<'a> {
    pub request: &'a Request<'a>,
    pub settings: Settings,
    pub kind: Kind,
    /// It is no pod's, and joins the machine of another that is not.
    pub shares: bool,
}

impl Context<'_> {
    /// A place in the shared tree, on the host.
    pub(crate) fn shared(&self, place: &Path) -> PathBuf {
        self.request.share.join(place)
    }

    /// Drives of its machine that take a disk for it.
    pub(crate) fn free_drives(&self) -> usize {
        self.request.pod.map_or(DRIVES, |pod| pod.free_drives)
    }

    /// A path of the spec; relative ones are relative to the bundle.
    pub(crate) fn absolute(&self, path: &Path) -> PathBuf {
        self.request.bundle.join(path)
    }
}

type Transformer = fn(&Context<'_>, &mut Plan) -> Result<()>;

/// Sysctls come after namespaces, which decide whose they are; devices after resources, whose rules they
/// are rewritten with; sizes after resources, which say what is demanded.
const TRANSFORMERS: &[Transformer] = &[
    platform::transform,
    rootfs::transform,
    mounts::transform,
    namespaces::transform,
    sysctl::transform,
    network::transform,
    process::transform,
    seccomp::transform,
    resources::transform,
    cgroup::transform,
    devices::transform,
    hooks::transform,
    size::transform,
];

/// Makes the plan of a container, or says what about it cannot be.
pub fn plan(request: &Request<'_>) -> Result<Plan> {
    check_id("id", request.id)?;
    check_id("guest id", request.guest_id)?;
    check_id("namespace", request.namespace)?;
    let settings = annotations::settings(request.config, request.spec.annotations().as_ref())?;
    let kind = Kind::of(request.id, request.spec.annotations().as_ref());
    if let Kind::Member { pod } = &kind {
        check_id("annotations", pod)?;
    }
    if let Some(pod) = request.pod {
        check_id("pod", &pod.id)?;
    }
    let (kind, shares) = match (kind, request.pod) {
        (Kind::Single, Some(pod)) => (Kind::Member { pod: pod.id.clone() }, true),
        (kind, _) => (kind, false),
    };
    let context = Context { request, settings, kind, shares };
    let mut plan = Plan {
        id: request.id.to_owned(),
        guest_id: request.guest_id.to_owned(),
        bundle: request.bundle.to_path_buf(),
        kind: context.kind.clone(),
        machine: None,
        demand: Demand::default(),
        room: None,
        guest: Guest { spec: request.spec.clone(), ..Guest::default() },
        share: Share::default(),
        blocks: Vec::new(),
        sockets: Vec::new(),
        network: Network::New,
        uplink: None,
        resolv_conf: None,
        hooks: HostHooks::default(),
        cgroup: HostCgroup { path: CgroupPath::default(), resources: LinuxResources::default() },
        monitor: Monitor::default(),
        logger: logger::environment(request),
        notes: Vec::new(),
    };
    for transform in TRANSFORMERS {
        transform(&context, &mut plan)?;
    }
    labels::take(&mut plan);
    Ok(plan)
}

/// Ids become names of directories on both sides.
fn check_id(path: &str, id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty()
        || id.len() > 128
        || !id.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !id.chars().all(good)
    {
        let why =
            "an id begins with a letter or digit, and has up to 128 of letters, digits, `.`, `_` and `-`";
        return Err(invalid(path, format!("{id:?}"), why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::testing::Case;

    #[test]
    fn ids_are_names_of_directories() {
        for id in ["", ".", "..", "../x", "a/b", "-a", "a b", "ä", &"a".repeat(129)] {
            let mut case = Case::new();
            case.id = id.to_owned();
            assert_eq!(case.error().path(), "id", "{id:?}");
        }
        for id in ["a", "0a", "a.b_c-d"] {
            let mut case = Case::new();
            case.id = id.to_owned();
            assert_eq!(case.plan().id, id);
        }
        let group = serde_json::json!({ "annotations": { "io.containerd.runc.v2.group": "../x" } });
        assert_eq!(Case::with(&group).error().path(), "annotations");
    }

    #[test]
    fn places_are_named_as_the_machine_knows_them() {
        let bind = |source: &str, destination: &str| serde_json::json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] });
        let mounts = [bind("/dir", "/data"), bind("/run/docker.sock", "/s"), bind("/state/shm", "/dev/shm")];
        let mut case = Case::with(&serde_json::json!({ "mounts": mounts }));
        let before = case.plan();
        case.guest_id = Some("old".to_owned());
        let plan = case.plan();
        assert_eq!((plan.id.as_str(), plan.guest_id.as_str()), ("c1", "old"));
        assert_eq!(plan.cgroup, before.cgroup);
        let renamed = |value: String| value.replace("c1", "old");
        assert_eq!(format!("{:?}", plan.share), renamed(format!("{:?}", before.share)));
        assert_eq!(format!("{:?}", plan.guest), renamed(format!("{:?}", before.guest)));
        case.guest_id = Some("../x".to_owned());
        assert_eq!(case.error().path(), "guest id");
    }
}
