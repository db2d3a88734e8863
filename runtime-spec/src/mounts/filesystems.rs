//! File systems that the guest's kernel makes out of nothing, and the options that each takes.

use oci_spec::runtime::Mount;

use super::Entry;
use crate::error::{Result, unsupported};

/// The types, and what stands before the `=` of their options, or is their option as a whole.
const TYPES: &[(&str, &[&str])] = &[
    ("proc", &["hidepid", "gid", "subset"]),
    ("sysfs", &[]),
    ("mqueue", &[]),
    ("devpts", &["newinstance", "ptmxmode", "mode", "gid", "uid", "max"]),
    (
        "tmpfs",
        &[
            "size",
            "mode",
            "uid",
            "gid",
            "nr_blocks",
            "nr_inodes",
            "huge",
            "mpol",
            "inode32",
            "inode64",
            "noswap",
        ],
    ),
    ("ramfs", &["mode"]),
    ("cgroup", &["nsdelegate", "memory_recursiveprot", "memory_localevents", "favordynmods"]),
    ("cgroup2", &["nsdelegate", "memory_recursiveprot", "memory_localevents", "favordynmods"]),
    ("bpf", &["mode", "uid", "gid"]),
    ("debugfs", &["mode", "uid", "gid"]),
    ("tracefs", &["mode", "uid", "gid"]),
    ("erofs", &["loop", "dax", "user_xattr", "nouser_xattr", "acl", "noacl", "cache_strategy"]),
    ("ext4", &["loop", "data", "barrier", "nobarrier", "discard", "nodiscard", "errors", "noload", "dax"]),
];

/// Whether a type takes an option beside those that every mount takes.
pub(crate) fn takes(typ: &str, option: &str) -> bool {
    let name = option.split_once('=').map_or(option, |(name, _)| name);
    TYPES.iter().any(|(known, names)| *known == typ && names.contains(&name))
}

pub(super) fn one(entry: &Entry<'_>, typ: &str) -> Result<Mount> {
    let guest = entry.mount.clone();
    match typ {
        // The guest's runtime makes the container's own part of cgroup v2 of it, whatever v1 it may have been.
        "cgroup" | "cgroup2" => Ok(entry.from("cgroup", "cgroup", entry.options().to_vec())),
        _ if TYPES.iter().any(|(known, _)| *known == typ) => Ok(guest),
        "hugetlbfs" => {
            let why = "the guest has no huge pages to give";
            Err(unsupported(format!("{}.type", entry.place), typ, why, "use tmpfs"))
        }
        _ => {
            let why = "the guest cannot reach what it would be made of";
            let instead = "mount it on the host, and bind it";
            Err(unsupported(format!("{}.type", entry.place), format!("{typ:?}"), why, instead))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::Case;

    #[test]
    fn what_the_kernel_makes_is_the_guests() {
        for (typ, options) in [
            ("proc", vec!["nosuid", "noexec", "nodev", "hidepid=2"]),
            ("sysfs", vec!["ro"]),
            ("mqueue", vec!["nosuid"]),
            ("devpts", vec!["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            ("tmpfs", vec!["nosuid", "strictatime", "mode=755", "size=65536k", "rprivate"]),
            ("ramfs", vec![]),
            ("bpf", vec!["mode=0700"]),
        ] {
            let mount = json!({ "destination": "/x", "type": typ, "source": typ, "options": options });
            let plan = Case::mount(&mount).plan();
            assert_eq!(serde_json::to_value(plan.guest.spec.mounts()).unwrap(), json!([mount]));
            assert_eq!(plan.share.binds, []);
        }
    }

    #[test]
    fn cgroups_are_the_guests_of_the_second_version() {
        for typ in ["cgroup", "cgroup2"] {
            let plan =
                Case::mount(&json!({ "destination": "/sys/fs/cgroup", "type": typ, "options": ["ro"] }))
                    .plan();
            let expected = json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro"] }]);
            assert_eq!(serde_json::to_value(plan.guest.spec.mounts()).unwrap(), expected);
        }
    }

    #[test]
    fn what_it_cannot_make() {
        for typ in ["nfs", "fuse.sshfs", "overlay", "hugetlbfs", "btrfs", ""] {
            let error = Case::mount(&json!({ "destination": "/x", "type": typ, "source": "s" })).error();
            assert_eq!(error.path(), "mounts[0].type", "{typ}");
        }
        for (typ, option) in
            [("tmpfs", "tmpcopyup"), ("proc", "size=1"), ("sysfs", "mode=1"), ("tmpfs", "foo")]
        {
            let mount = json!({ "destination": "/x", "type": typ, "source": "s", "options": [option] });
            assert_eq!(Case::mount(&mount).error().path(), "mounts[0].options[0]", "{option}");
        }
    }
}
