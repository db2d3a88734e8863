//! What this runtime can do, for `-info` and for `RuntimeInfo.features`: made from the tables by which it
//! refuses the rest.

use std::collections::HashMap;

use oci_spec::runtime::{
    Apparmor, Cgroup, Features, IDMap, IntelRdt, LinuxFeature, MountExtensions, NetDevices, Seccomp, Selinux,
};

use crate::annotations::PREFIX;
use crate::{hooks, mounts, namespaces, platform, rootfs, seccomp};

/// By which containerd's mount manager learns what to hand over raw.
pub const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Capabilities of a container are those of the guest's kernel, which are all.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The features document of the specification.
pub fn features() -> Features {
    let mut features = Features::default();
    features
        .set_oci_version_min(platform::OLDEST.to_owned())
        .set_oci_version_max(platform::NEWEST.to_owned())
        .set_hooks(Some(names(hooks::KINDS)))
        .set_mount_options(Some(names(mounts::options::KNOWN)))
        .set_linux(Some(linux()))
        .set_annotations(Some(annotations()))
        .set_potentially_unsafe_config_annotations(Some(vec![PREFIX.to_owned()]));
    features
}

/// Types of mounts that containerd hands over raw, if told so: as images, not mounted.
pub fn mount_types() -> &'static [&'static str] {
    rootfs::IMAGES
}

/// What containerd need not do to mounts before it hands them over.
pub fn mount_transforms() -> &'static [&'static str] {
    rootfs::TRANSFORMS
}

/// Annotations of `RuntimeInfo`, and of the features document.
pub fn annotations() -> HashMap<String, String> {
    let transforms = mount_transforms().iter().map(|name| format!("{name}/*"));
    let types = mount_types().iter().map(|name| (*name).to_owned());
    let allowed: Vec<_> = transforms.chain(types).collect();
    HashMap::from([(ALLOW_MOUNTS.to_owned(), allowed.join(","))])
}

fn linux() -> LinuxFeature {
    let off = Some(false);
    let mut cgroup = Cgroup::default();
    cgroup.set_v1(off).set_v2(Some(true)).set_systemd(Some(true)).set_systemd_user(off).set_rdma(off);
    let mut apparmor = Apparmor::default();
    apparmor.set_enabled(off);
    let mut selinux = Selinux::default();
    selinux.set_enabled(off);
    let mut intel_rdt = IntelRdt::default();
    intel_rdt.set_enabled(off);
    let mut net_devices = NetDevices::default();
    net_devices.set_enabled(off);
    let mut idmap = IDMap::default();
    idmap.set_enabled(off);
    let mut extensions = MountExtensions::default();
    extensions.set_idmap(Some(idmap));
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(namespaces::KINDS.iter().map(|(kind, _)| *kind).collect()))
        .set_capabilities(Some(names(CAPABILITIES)))
        .set_cgroup(Some(cgroup))
        .set_seccomp(Some(seccomp()))
        .set_apparmor(Some(apparmor))
        .set_selinux(Some(selinux))
        .set_intel_rdt(Some(intel_rdt))
        .set_mount_extensions(Some(extensions))
        .set_net_devices(Some(net_devices));
    linux
}

fn seccomp() -> Seccomp {
    let flags: Vec<_> = seccomp::FLAGS.iter().map(ToString::to_string).collect();
    let mut seccomp = Seccomp::default();
    seccomp
        .set_enabled(Some(true))
        .set_actions(Some(seccomp::ACTIONS.to_vec()))
        .set_operators(Some(seccomp::OPERATORS.iter().map(ToString::to_string).collect()))
        .set_archs(Some(seccomp::ARCHITECTURES.to_vec()))
        .set_known_flags(Some(flags.clone()))
        .set_supported_flags(Some(flags));
    seccomp
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Case;

    fn strings(value: &Value) -> Vec<&str> {
        value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
    }

    /// Whatever is advertised is planned for.
    #[test]
    fn advertised_is_honoured() {
        let features = serde_json::to_value(features()).unwrap();
        for option in strings(&features["mountOptions"]) {
            let mount = json!({ "destination": "/d", "type": "bind", "source": "/dir", "options": [option] });
            Case::mount(&mount).plan();
        }
        for hook in strings(&features["hooks"]) {
            let plan = Case::with(&json!({ "hooks": { hook: [{ "path": "/hook" }] } })).plan();
            let guest = plan.guest.spec.hooks().is_some();
            let host = plan.hooks != crate::plan::HostHooks::default();
            assert!(guest != host, "{hook}");
        }
        for kind in strings(&features["linux"]["namespaces"]) {
            let mut case = Case::new();
            let ids = json!([{ "containerID": 0, "hostID": 0, "size": 1 }]);
            if kind == "user" {
                case.spec["linux"]["uidMappings"] = ids.clone();
                case.spec["linux"]["gidMappings"] = ids;
            }
            let list = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
            list.retain(|namespace| namespace["type"] != kind);
            list.push(json!({ "type": kind }));
            case.plan();
        }
        let all = strings(&features["linux"]["capabilities"]);
        Case::with(&json!({ "process": { "capabilities": { "bounding": all } } })).plan();
        for action in strings(&features["linux"]["seccomp"]["actions"]) {
            Case::with(&json!({ "linux": { "seccomp": { "defaultAction": action } } })).plan();
        }
        for flag in strings(&features["linux"]["seccomp"]["supportedFlags"]) {
            Case::with(
                &json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "flags": [flag] } } }),
            )
            .plan();
        }
    }

    /// Whatever is said not to be there is refused, or taken off.
    #[test]
    fn disabled_is_not_honoured() {
        let features = serde_json::to_value(features()).unwrap();
        for key in ["apparmor", "selinux", "intelRdt", "netDevices"] {
            assert_eq!(features["linux"][key]["enabled"], false, "{key}");
        }
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert_eq!(features["linux"]["cgroup"]["rdma"], false);
        assert_eq!(features["linux"]["cgroup"]["v1"], false);
        for option in ["idmap", "ridmap", "shared", "rshared"] {
            assert!(!strings(&features["mountOptions"]).contains(&option));
        }
        assert!(!strings(&features["linux"]["seccomp"]["actions"]).contains(&"SCMP_ACT_NOTIFY"));
    }

    #[test]
    fn what_containerd_hands_over_raw_is_planned_for() {
        let allowed = annotations()[ALLOW_MOUNTS].clone();
        assert_eq!(allowed, "mkdir/*,format/*,erofs,ext4");
        for allowed in allowed.split(',') {
            let mut case = Case::new();
            let (typ, source) = match allowed.strip_suffix('*') {
                Some(transform) => (format!("{transform}overlay"), "overlay"),
                None => (allowed.to_owned(), "/image.erofs"),
            };
            let options = Vec::new();
            case.rootfs =
                vec![crate::RootfsMount { typ, source: source.to_owned(), target: String::new(), options }];
            case.plan();
        }
    }

    /// Of all that containerd's mount manager can do to a mount, and of all that snapshotters yield.
    #[test]
    fn nothing_else_is_taken_raw() {
        let allowed = annotations()[ALLOW_MOUNTS].clone();
        let allowed: Vec<_> = allowed.split(',').collect();
        let plan = |typ: &str, source: &str| {
            let mut case = Case::new();
            let mount =
                crate::RootfsMount { typ: typ.to_owned(), source: source.to_owned(), ..Default::default() };
            case.rootfs = vec![mount];
            case.try_plan()
        };
        for transform in ["format", "mkdir", "mkfs", "loop", "idmap", "dmverity", "verity"] {
            let taken = plan(&format!("{transform}/overlay"), "overlay").is_ok();
            assert_eq!(taken, allowed.contains(&format!("{transform}/*").as_str()), "{transform}");
        }
        for typ in
            ["bind", "btrfs", "dmverity", "erofs", "ext4", "loop", "mkfs", "overlay", "squashfs", "xfs"]
        {
            let on_disk = plan(typ, "/image.erofs").is_ok_and(|plan| !plan.blocks.is_empty());
            assert_eq!(on_disk, allowed.contains(&typ), "{typ}");
        }
    }
}
