//! Namespaces: new ones are made in the guest, a pod's are shared in the guest, the host's cannot be had.
//!
//! | asked for | becomes |
//! |---|---|
//! | a new one | a new one in the guest |
//! | `/proc/PID/ns/KIND` of a container of the pod | `ns/CONTAINER/KIND` ([`crate::layout`]) |
//! | anybody else's | an error: it is in another machine |
//! | the host's PID or IPC namespace | as `policy.host_namespaces` says |
//! | the host's UTS namespace | the guest is named like the host |
//! | a new UTS namespace without a name | it has the host's name, as a copy of the host's would |
//! | the host's cgroup namespace | the guest's, which is all that could be seen anyway |
//! | the host's user and time namespace | the guest's, which are like it |
//!
//! A user namespace with mappings is passed on: the share keeps numeric owners, so the mapped ids mean in
//! the guest what they mean on the host. The network has its own file ([`crate::network`]).

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};

use crate::config::Reach;
use crate::error::{Result, at, invalid, unsupported};
use crate::host::{Found, Pod};
use crate::layout;
use crate::plan::{Note, Plan};
use crate::planner::Context;

/// Every kind of namespace there is, with the name of its file in `/proc/PID/ns` .
pub(crate) const KINDS: &[(Type, &str)] = &[
    (Type::Cgroup, "cgroup"),
    (Type::Ipc, "ipc"),
    (Type::Mount, "mnt"),
    (Type::Network, "net"),
    (Type::Pid, "pid"),
    (Type::Time, "time"),
    (Type::User, "user"),
    (Type::Uts, "uts"),
];

const LIST: &str = "linux.namespaces";

pub(crate) fn file_name(kind: Type) -> &'static str {
    KINDS.iter().find(|(known, _)| *known == kind).map_or("", |(_, name)| name)
}

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let asked: Vec<_> =
        plan.guest.spec.linux().iter().filter_map(|linux| linux.namespaces().clone()).flatten().collect();
    let mut kept = Vec::new();
    for (index, namespace) in asked.iter().enumerate() {
        let kind = namespace.typ();
        if asked[..index].iter().any(|earlier| earlier.typ() == kind) {
            return Err(invalid(at(LIST, index), file_name(kind), "there is one of each kind"));
        }
        if kind == Type::Network {
            continue;
        }
        match whose(context, namespace) {
            // An empty path is none, but not to the guest's runtime.
            Whose::New => kept.push(of(kind, None)),
            Whose::Host => {}
            Whose::Pods(path) if kind != Type::Mount => kept.push(of(kind, Some(path))),
            Whose::Pods(path) | Whose::Others(path) => {
                let why = "it is not of a container of this pod, so it is in another machine";
                let why = if kind == Type::Mount { "mount namespaces are not shared" } else { why };
                let instead = "leave out the path, or put the containers into one pod";
                return Err(unsupported(at(LIST, index), path.display(), why, instead));
            }
        }
    }
    let has = |kind: Type| kept.iter().any(|namespace| namespace.typ() == kind);
    hosts(context, plan, has)?;
    if kept.iter().any(|namespace| namespace.typ() == Type::Uts && namespace.path().is_none()) {
        name(context, plan);
    }
    mappings(plan, has)?;
    if let Some(linux) = plan.guest.spec.linux_mut() {
        linux.set_namespaces(Some(kept));
    }
    Ok(())
}

fn of(kind: Type, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path);
    namespace
}

/// Whose namespace is asked for.
pub(crate) enum Whose {
    New,
    Host,
    /// The pod's, at this path in the guest.
    Pods(PathBuf),
    /// Somebody else's, at this path on the host.
    Others(PathBuf),
}

pub(crate) fn whose(context: &Context<'_>, namespace: &LinuxNamespace) -> Whose {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else {
        return Whose::New;
    };
    let kind = file_name(namespace.typ());
    if let Some(container) = context.request.pod.and_then(|pod| member(pod, path, kind)) {
        return Whose::Pods(layout::guest_namespace(container, kind));
    }
    match context.request.host.files.look(path) {
        Found::Namespace { initial: true, .. } => Whose::Host,
        _ => Whose::Others(path.clone()),
    }
}

/// The container of the pod whose namespace a path is.
fn member<'a>(pod: &'a Pod, path: &Path, kind: &str) -> Option<&'a str> {
    let pid = path.strip_prefix("/proc").ok()?.to_str()?.strip_suffix(kind)?.strip_suffix("/ns/")?;
    let pid: u32 = pid.parse().ok()?;
    pod.tasks.iter().find(|task| task.pid == pid).map(|task| task.container.as_str())
}

/// What to do where the host's namespace is asked for, which is where there is none.
fn hosts(context: &Context<'_>, plan: &mut Plan, has: impl Fn(Type) -> bool) -> Result<()> {
    if !has(Type::Mount) {
        return Err(invalid(LIST, "without mount", "a container has a mount namespace"));
    }
    for (kind, name) in [(Type::Pid, "pid"), (Type::Ipc, "ipc")].into_iter().filter(|(kind, _)| !has(*kind)) {
        refuse_host(context, plan, name, "the guest's")?;
        if kind == Type::Ipc {
            plan.notes.push(Note::new(LIST, "/dev/shm is the container's own"));
        }
    }
    if !has(Type::Cgroup) {
        plan.notes.push(Note::new(LIST, "the host's cgroup namespace was asked for; the guest's is given"));
    }
    if !has(Type::Uts) {
        let spec = &mut plan.guest.spec;
        if let Some(name) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
            return Err(invalid("domainname", name, "it takes a UTS namespace of the container's own"));
        }
        spec.set_domainname(None);
        let name = spec.hostname_mut().take().filter(|name| !name.is_empty());
        plan.guest.hostname = Some(name.unwrap_or_else(|| context.request.host.hostname.to_owned()));
    }
    Ok(())
}

/// A new UTS namespace is a copy of its maker's: that of a machine, which has no name, would be without one.
fn name(context: &Context<'_>, plan: &mut Plan) {
    let spec = &mut plan.guest.spec;
    if spec.hostname().as_ref().is_none_or(String::is_empty) {
        spec.set_hostname(Some(context.request.host.hostname.to_owned()));
    }
}

/// An error, or a note, when a namespace of the host is asked for.
pub(crate) fn refuse_host(context: &Context<'_>, plan: &mut Plan, kind: &str, given: &str) -> Result<()> {
    let asked = format!("the host's {kind} namespace");
    match context.settings.config.policy.host_namespaces {
        Reach::Reject => {
            let instead = "leave it out, or set policy.host_namespaces = \"guest\" in the configuration";
            Err(unsupported(LIST, asked, "the container is in a machine of its own", instead))
        }
        Reach::Guest => {
            plan.notes.push(Note::new(LIST, format!("{asked} was asked for; {given} is given")));
            Ok(())
        }
    }
}

fn mappings(plan: &Plan, has: impl Fn(Type) -> bool) -> Result<()> {
    let Some(linux) = plan.guest.spec.linux() else { return Ok(()) };
    let joins = linux.namespaces().iter().flatten().any(|ns| ns.typ() == Type::User && ns.path().is_some());
    for (path, list) in
        [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let given = list.as_ref().is_some_and(|list| !list.is_empty());
        if given && !has(Type::User) {
            return Err(invalid(path, "", "it takes a user namespace of the container's own"));
        }
        if !given && has(Type::User) && !joins {
            return Err(invalid(path, "missing", "a new user namespace has mappings"));
        }
    }
    let offsets = linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty());
    if offsets && !has(Type::Time) {
        return Err(invalid("linux.timeOffsets", "", "it takes a time namespace of the container's own"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::host::Task;
    use crate::testing::Case;

    /// The usual list, with `namespace` in place of the one of its kind; or without it, if it has no `type`.
    fn case(kind: &str, namespace: Option<Value>) -> Case {
        let mut case = Case::new();
        let list = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|entry| entry["type"] != kind);
        list.extend(namespace);
        case
    }

    fn in_pod(mut case: Case) -> Case {
        let task = |container: &str, pid| Task { container: container.to_owned(), pid };
        case.pod = Some(Pod {
            id: "p1".to_owned(),
            tasks: vec![task("p1", 100), task("c0", 101)],
            ..Pod::default()
        });
        let network = json!({ "type": "network", "path": "/proc/100/ns/net" });
        let list = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|entry| entry["type"] != "network");
        list.push(network);
        case
    }

    fn path_of(plan: &Plan, kind: Type) -> Option<PathBuf> {
        let list = plan.guest.spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        list.iter().find(|ns| ns.typ() == kind).and_then(|ns| ns.path().clone())
    }

    #[test]
    fn new_ones_are_made_in_the_guest() {
        let plan = Case::new().plan();
        let namespaces = plan.guest.spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().clone();
        let kinds: Vec<_> = namespaces.iter().map(LinuxNamespace::typ).collect();
        assert_eq!(kinds, [Type::Pid, Type::Ipc, Type::Uts, Type::Mount, Type::Cgroup]);
        let plan = case("pid", Some(json!({ "type": "pid", "path": "" }))).plan();
        assert_eq!(path_of(&plan, Type::Pid), None);
    }

    #[test]
    fn the_pods_are_shared_in_the_guest() {
        for (kind, name, path, shared) in [
            (Type::Pid, "pid", "/proc/100/ns/pid", "p1/pid"),
            (Type::Pid, "pid", "/proc/101/ns/pid", "c0/pid"),
            (Type::Ipc, "ipc", "/proc/100/ns/ipc", "p1/ipc"),
            (Type::Uts, "uts", "/proc/100/ns/uts", "p1/uts"),
        ] {
            let plan = in_pod(case(name, Some(json!({ "type": name, "path": path })))).plan();
            let expected = Path::new("/run/supermachine/ns").join(shared);
            assert_eq!(path_of(&plan, kind), Some(expected), "{path}");
        }
    }

    #[test]
    fn nobody_elses_can_be_had() {
        for path in ["/proc/999/ns/pid", "/proc/100/ns/ipc", "/run/ns/x", "/proc/100/ns/pid_for_children"] {
            let error = in_pod(case("pid", Some(json!({ "type": "pid", "path": path })))).error();
            assert!(error.path().starts_with("linux.namespaces["), "{error}");
        }
        let error = case("ipc", Some(json!({ "type": "ipc", "path": "/proc/100/ns/ipc" }))).error();
        assert_eq!(error.path(), "linux.namespaces[5]");
        case("mount", Some(json!({ "type": "mount", "path": "/proc/100/ns/mnt" }))).error();
        let mut twice = Case::new();
        twice.spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "pid" }));
        assert_eq!(twice.error().path(), "linux.namespaces[6]");
    }

    #[test]
    fn the_hosts() {
        for kind in ["pid", "ipc"] {
            let mut case = case(kind, None);
            assert_eq!(case.error().path(), LIST, "{kind}");
            case.config.policy.host_namespaces = Reach::Guest;
            let plan = case.plan();
            assert!(plan.notes.iter().any(|note| note.text.contains(kind)), "{kind}");
        }
        let mut by_path = case("pid", Some(json!({ "type": "pid", "path": "/run/netns/host" })));
        assert_eq!(by_path.error().path(), LIST);
        by_path.config.policy.host_namespaces = Reach::Guest;
        assert_eq!(path_of(&by_path.plan(), Type::Pid), None);
        assert_eq!(case("mount", None).error().path(), LIST);
        assert_eq!(case("cgroup", None).plan().notes.len(), 1);
        assert_eq!(Case::with(&json!({ "linux": null })).error().path(), LIST);
    }

    #[test]
    fn names() {
        assert_eq!(case("uts", None).plan().guest.hostname.as_deref(), Some("host1"));
        let mut named = case("uts", None);
        named.spec["hostname"] = json!("node7");
        let plan = named.plan();
        assert_eq!((plan.guest.hostname.as_deref(), plan.guest.spec.hostname()), (Some("node7"), &None));
        named.spec["domainname"] = json!("example.org");
        assert_eq!(named.error().path(), "domainname");
        let plan = Case::with(&json!({ "hostname": "web", "domainname": "example.org" })).plan();
        assert_eq!((plan.guest.hostname, plan.guest.spec.hostname().as_deref()), (None, Some("web")));
        let unnamed = case("uts", Some(json!({ "type": "uts" }))).plan();
        assert_eq!((unnamed.guest.hostname, unnamed.guest.spec.hostname().as_deref()), (None, Some("host1")));
    }

    #[test]
    fn users_and_clocks() {
        let ids = json!([{ "containerID": 0, "hostID": 100000, "size": 65536 }]);
        let mut users = case("user", Some(json!({ "type": "user" })));
        assert_eq!(users.error().path(), "linux.uidMappings");
        users.spec["linux"]["uidMappings"] = ids.clone();
        assert_eq!(users.error().path(), "linux.gidMappings");
        users.spec["linux"]["gidMappings"] = ids.clone();
        let plan = users.plan();
        assert_eq!(
            plan.guest.spec.linux().as_ref().unwrap().uid_mappings().as_ref().unwrap()[0].host_id(),
            100000
        );
        assert_eq!(
            Case::with(&json!({ "linux": { "uidMappings": ids } })).error().path(),
            "linux.uidMappings"
        );
        let offsets = json!({ "linux": { "timeOffsets": { "boottime": { "secs": 5 } } } });
        assert_eq!(Case::with(&offsets).error().path(), "linux.timeOffsets");
    }
}
