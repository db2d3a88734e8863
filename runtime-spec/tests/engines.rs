//! Specs as container engines write them, and what becomes of each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use runtime_spec::cgroup::CgroupPath;
use runtime_spec::config::Config;
use runtime_spec::host::{Files, Found, Host, Owner, Pod, Task};
use runtime_spec::plan::{Access, BlockSource, Network, Plan, Size, Source};
use runtime_spec::{Kind, Request, RootfsMount, plan, read};
use serde_json::{Value, json};

/// A host on which everything is what its name says.
struct ByName;

impl Files for ByName {
    fn look(&self, path: &Path) -> Found {
        let name = path.file_name().unwrap_or_default().to_str().unwrap_or_default();
        let files = ["resolv.conf", "hosts", "hostname", "etc-hosts", "1a2b"];
        match name {
            _ if files.contains(&name) || path.extension().is_some_and(|extension| extension == "erofs") => {
                Found::File
            }
            "docker.sock" => Found::Socket(Owner { uid: 0, gid: 998, mode: 0o660 }),
            "sdb" => Found::Block { major: 8, minor: 16 },
            _ if path.parent().is_some_and(|parent| parent.ends_with("netns")) => {
                Found::Namespace { initial: false, id: 7 }
            }
            _ => Found::Directory,
        }
    }

    fn tmpfs_size(&self, path: &Path) -> Option<u64> {
        path.ends_with("shm").then_some(64 << 20)
    }
}

fn overlay() -> RootfsMount {
    RootfsMount {
        typ: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: [
            "index=off",
            "workdir=/snapshots/9/work",
            "upperdir=/snapshots/9/fs",
            "lowerdir=/snapshots/8/fs",
        ]
        .map(str::to_owned)
        .to_vec(),
    }
}

fn plan_of(id: &str, json: &str, rootfs: &[RootfsMount], pod: Option<&Pod>) -> Plan {
    let (spec, notes) = read::spec(json.as_bytes()).expect("a spec");
    assert_eq!(notes, [], "keys that are not known");
    plan(&Request {
        id,
        guest_id: id,
        namespace: "default",
        bundle: Path::new("/run/containerd/io.containerd.runtime.v2.task/default/x"),
        share: Path::new("/run/supermachine/x/share"),
        spec: &spec,
        rootfs,
        terminal: spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false),
        ordinal: 1,
        config: &Config::default(),
        host: Host { cpus: 8, memory: 16 << 30, hostname: "host1", files: &ByName },
        pod,
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

fn guest(plan: &Plan) -> Value {
    serde_json::to_value(&plan.guest).expect("JSON")
}

/// The mounts of the guest by their destinations.
fn mounts(plan: &Plan) -> BTreeMap<String, Value> {
    let mounts = guest(plan)["spec"]["mounts"].as_array().expect("a list").clone();
    mounts
        .into_iter()
        .map(|mount| (mount["destination"].as_str().expect("a path").to_owned(), mount))
        .collect()
}

fn namespaces(plan: &Plan) -> Vec<Value> {
    guest(plan)["spec"]["linux"]["namespaces"].as_array().expect("a list").clone()
}

fn size(cpus: u32, mebibytes: u64) -> Size {
    Size { cpus, memory: mebibytes << 20 }
}

fn noted(plan: &Plan) -> Vec<&str> {
    plan.notes.iter().map(|note| note.path.as_str()).collect()
}

#[test]
fn ctr() {
    let json = include_str!("fixtures/ctr.json");
    let plan = plan_of("web", json, &[overlay()], None);
    assert_eq!((&plan.kind, &plan.network), (&Kind::Single, &Network::New));
    assert_eq!(plan.machine.as_ref().unwrap().size, size(2, 1024));
    assert_eq!(plan.cgroup.path, CgroupPath::Fs("/default/web".into()));
    assert_eq!(plan.share.rootfs[0].target, Path::new("/run/supermachine/x/share/web/rootfs"));
    assert_eq!(plan.share.rootfs[0].source, Source::Path("overlay".into()));
    assert_eq!((plan.share.binds.len(), plan.sockets.len(), plan.blocks.len()), (0, 0, 0));
    assert_eq!(noted(&plan), Vec::<&str>::new());
    // But for the root, the cgroup, the network, the terminal and the name, the guest is told what the spec says.
    let mut expected: Value = serde_json::from_str(json).unwrap();
    expected["hostname"] = json!("host1");
    expected["root"]["path"] = json!("/run/supermachine/share/web/rootfs");
    expected["linux"]["cgroupsPath"] = json!("/web");
    expected["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|namespace| namespace["type"] != "network");
    expected["process"]["terminal"] = json!(false);
    let mut told = guest(&plan)["spec"].clone();
    for set in ["bounding", "effective", "permitted"] {
        let path = format!("/process/capabilities/{set}");
        for spec in [&mut told, &mut expected] {
            spec.pointer_mut(&path).unwrap().as_array_mut().unwrap().sort_by_key(Value::to_string);
        }
    }
    assert_eq!(told, expected);
}

#[test]
fn docker() {
    let plan = plan_of("9f86", include_str!("fixtures/docker.json"), &[], None);
    assert_eq!((&plan.kind, &plan.network), (&Kind::Single, &Network::New));
    assert_eq!(plan.machine.as_ref().unwrap().size, size(2, 384));
    assert_eq!(plan.hooks.prestart[0].path(), Path::new("/proc/4242/exe"));
    assert_eq!(guest(&plan)["spec"]["hooks"], json!(null));
    let merged = "/var/lib/docker/overlay2/0a1b/merged";
    assert_eq!(plan.share.rootfs[0].source, Source::Path(merged.into()));
    assert_eq!(plan.cgroup.path.directory(), Path::new("/system.slice/docker-9f86d081884c.scope"));
    assert_eq!(plan.guest.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
    assert_eq!(plan.monitor.apparmor_profile.as_deref(), Some("docker-default"));
    assert_eq!(plan.resolv_conf.as_deref(), Some(Path::new("/var/lib/docker/containers/9f86/resolv.conf")));
    assert_eq!(noted(&plan), ["process.apparmorProfile"]);

    let binds: Vec<_> =
        plan.share.binds.iter().map(|bind| (bind.source.to_str().unwrap(), bind.directory)).collect();
    assert_eq!(
        binds,
        [
            ("/var/lib/docker/containers/9f86/resolv.conf", false),
            ("/var/lib/docker/containers/9f86/hostname", false),
            ("/var/lib/docker/containers/9f86/hosts", false),
            ("/var/lib/docker/volumes/data/_data", true),
            ("/srv/app", true),
        ]
    );
    assert_eq!(plan.share.binds[4].access, Access::ReadOnly);
    let mounts = mounts(&plan);
    assert_eq!(mounts["/etc/hosts"]["source"], "/run/supermachine/binds/9f86/binds/8");
    assert_eq!(mounts["/dev/shm"]["source"], "/run/supermachine/shm/9f86");
    assert_eq!(mounts["/var/run/docker.sock"]["source"], "/run/supermachine/sockets/9f86/12");
    assert_eq!((plan.sockets[0].port, plan.guest.sockets[0].gid), (0x4000_0100, 998));

    let resources = guest(&plan)["spec"]["linux"]["resources"].clone();
    assert_eq!(resources["memory"]["limit"], 268_435_456);
    assert_eq!(resources["cpu"], json!({ "shares": 0, "quota": 150_000, "period": 100_000 }));
    assert_eq!(resources["devices"].as_array().unwrap().len(), 13);
    let host = serde_json::to_value(&plan.cgroup.resources).unwrap();
    assert_eq!(host, json!({ "cpu": { "quota": 200_000, "period": 100_000 } }));
    assert_eq!(guest(&plan)["spec"]["linux"]["seccomp"]["syscalls"].as_array().unwrap().len(), 4);
}

#[test]
fn nerdctl() {
    let plan = plan_of("abc", include_str!("fixtures/nerdctl.json"), &[overlay()], None);
    assert_eq!(plan.network, Network::Namespace(PathBuf::from("/run/netns/nerdctl-abc")));
    assert_eq!((plan.hooks.create_runtime.len(), plan.hooks.poststop.len()), (1, 1));
    assert_eq!(guest(&plan)["spec"]["process"]["terminal"], true);
    assert_eq!(mounts(&plan)["/scratch"]["options"], json!(["noexec", "nosuid", "nodev", "size=64m"]));
    assert_eq!(plan.machine.as_ref().unwrap().size, size(2, 1024));
    let state = plan.state(oci_spec::runtime::ContainerState::Creating, 77);
    assert_eq!(state.annotations().as_ref().unwrap()["nerdctl/network-namespace"], "/run/netns/nerdctl-abc");
}

#[test]
fn cri_sandbox() {
    let plan = plan_of("6d1e7a", include_str!("fixtures/cri-sandbox.json"), &[overlay()], None);
    assert_eq!(plan.kind, Kind::Sandbox);
    assert_eq!(plan.network, Network::Namespace(PathBuf::from("/var/run/netns/cni-1")));
    assert_eq!(plan.machine.as_ref().unwrap().size, size(3, 2176));
    assert_eq!(plan.cgroup.resources.cpu().as_ref().unwrap().shares(), Some(1024));
    assert_eq!(
        plan.cgroup.path.directory(),
        Path::new(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc0ffee.slice/cri-containerd-6d1e7a.scope"
        )
    );
    assert_eq!(plan.monitor.oom_score_adj, Some(-998));
    assert_eq!(noted(&plan), ["process.selinuxLabel", "linux.mountLabel"]);
    assert_eq!(mounts(&plan)["/dev/shm"]["source"], "/run/supermachine/shm/6d1e7a");
    assert_eq!(guest(&plan)["spec"]["hostname"], "web");
    assert_eq!(guest(&plan)["spec"]["root"]["readonly"], true);
}

fn pod() -> Pod {
    let task = |container: &str, pid| Task { container: container.to_owned(), pid };
    Pod {
        id: "6d1e7a".to_owned(),
        tasks: vec![task("6d1e7a", 4100), task("other", 4200)],
        netns: Some("/var/run/netns/cni-1".into()),
        free_drives: 12,
    }
}

#[test]
fn cri_member() {
    let plan = plan_of("app1", include_str!("fixtures/cri-member.json"), &[overlay()], Some(&pod()));
    assert_eq!(plan.kind, Kind::Member { pod: "6d1e7a".to_owned() });
    assert_eq!((&plan.network, &plan.machine), (&Network::Pod, &None));
    assert_eq!((plan.demand.cpus, plan.demand.memory), (Some(1), Some(1 << 30)));
    assert_eq!(
        namespaces(&plan),
        [
            json!({ "type": "pid" }),
            json!({ "type": "ipc", "path": "/run/supermachine/ns/6d1e7a/ipc" }),
            json!({ "type": "uts", "path": "/run/supermachine/ns/6d1e7a/uts" }),
            json!({ "type": "mount" }),
            json!({ "type": "cgroup" }),
        ]
    );
    // The sandbox's, which is another container's tmpfs.
    assert_eq!(mounts(&plan)["/dev/shm"]["source"], "/run/supermachine/shm/6d1e7a");
    let bind = |end: &str| plan.share.binds.iter().find(|bind| bind.source.ends_with(end)).unwrap();
    assert_eq!(bind("kubernetes.io~configmap/config").access, Access::ReadOnly);
    assert_eq!(bind("kubernetes.io~projected/token").access, Access::ReadOnlyRecursive);
    assert!(bind("kubernetes.io~csi/vol/mount").follows);
    assert!(!bind("containers/app/1a2b").directory);
    assert_eq!(guest(&plan)["spec"]["linux"]["rootfsPropagation"], "slave");
    let resources = guest(&plan)["spec"]["linux"]["resources"].clone();
    assert_eq!(resources["cpu"]["cpus"], json!(null));
    assert_eq!(resources["hugepageLimits"], json!(null));
    assert_eq!(resources["unified"]["memory.oom.group"], "1");
    assert_eq!(plan.cgroup.resources.cpu().as_ref().unwrap().cpus().as_deref(), Some("2-3"));
}

/// `kubectl debug --target` names the PID namespace of one container of the pod.
#[test]
fn cri_member_in_the_pids_of_another() {
    let mut spec: Value = serde_json::from_str(include_str!("fixtures/cri-member.json")).unwrap();
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4200/ns/pid");
    let plan = plan_of("debug", &spec.to_string(), &[overlay()], Some(&pod()));
    assert_eq!(namespaces(&plan)[0]["path"], "/run/supermachine/ns/other/pid");
}

/// A raw block volume of a pod.
#[test]
fn cri_member_with_a_disk() {
    let mut spec: Value = serde_json::from_str(include_str!("fixtures/cri-member.json")).unwrap();
    spec["linux"]["devices"] = json!([{ "path": "/dev/xvda", "type": "b", "major": 8, "minor": 16 }]);
    let rules = spec["linux"]["resources"]["devices"].as_array_mut().unwrap();
    rules.push(json!({ "allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm" }));
    let plan = plan_of("app1", &spec.to_string(), &[overlay()], Some(&pod()));
    assert_eq!(plan.blocks[0].source, BlockSource::Device { major: 8, minor: 16 });
    assert_eq!(plan.guest.devices[0].serial, plan.blocks[0].serial);
    assert_eq!(guest(&plan)["spec"]["linux"]["resources"]["devices"].as_array().unwrap().len(), 1);
}

#[test]
fn docker_privileged() {
    let plan = plan_of("9f86", include_str!("fixtures/docker-privileged.json"), &[], None);
    let devices = guest(&plan)["spec"]["linux"]["devices"].clone();
    let paths: Vec<_> =
        devices.as_array().unwrap().iter().map(|device| device["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["/dev/kmsg", "/dev/fuse", "/dev/net/tun"]);
    assert_eq!(plan.blocks, []);
    assert_eq!(noted(&plan), ["linux.namespaces", "linux.devices"]);
    let rules = guest(&plan)["spec"]["linux"]["resources"]["devices"].clone();
    assert_eq!(rules, json!([{ "allow": true, "access": "rwm" }]));
    assert_eq!(plan.share.binds[0].source, Path::new("/lib/modules"));
}
