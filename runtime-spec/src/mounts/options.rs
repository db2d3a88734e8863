//! Options of mounts: one table says which are known, and features advertise just those.

use oci_spec::runtime::Mount;

use super::{Entry, filesystems};
use crate::error::{Error, Result, at, unsupported};
use crate::plan::Access;

/// What every mount can be given. Each is one that the guest's runtime knows as well; it would hand any other
/// to the file system, which would refuse it without a name.
pub(crate) const KNOWN: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

const SHARED: &[&str] = &["shared", "rshared"];
const IDMAP: &[&str] = &["idmap", "ridmap"];

pub(super) fn idmap(path: String, asked: &str) -> Error {
    unsupported(
        path,
        asked,
        "ids of mounts are not mapped",
        "give the files the owners that the container expects",
    )
}

/// Whether an entry is a bind. Clients write it as a type, as an option, or as both.
pub(super) fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options.iter().any(|option| option == "bind" || option == "rbind")
}

/// Refuses options that would not be honoured.
pub(super) fn check(entry: &Entry<'_>) -> Result<()> {
    let typ = entry.mount.typ().as_deref().unwrap_or_default();
    let typ = if is_bind(entry.mount) { "bind" } else { typ };
    for (index, option) in entry.options().iter().enumerate() {
        let path = || at(&format!("{}.options", entry.place), index);
        if KNOWN.contains(&option.as_str()) || filesystems::takes(typ, option) {
            continue;
        }
        if SHARED.contains(&option.as_str()) {
            let why = "mounts of a container do not leave its machine";
            return Err(unsupported(path(), option, why, "use rslave, by which mounts of the host arrive"));
        }
        if IDMAP.contains(&option.as_str()) {
            return Err(idmap(path(), option));
        }
        let why = format!("it is no option of a mount of type {typ:?} that this runtime knows");
        return Err(unsupported(path(), option, why, "leave it out"));
    }
    Ok(())
}

/// Who may write, by the options of a bind: of several that say so, the last.
pub(super) fn access(options: &[String]) -> Access {
    options.iter().fold(Access::ReadWrite, |access, option| match option.as_str() {
        "ro" if access == Access::ReadWrite => Access::ReadOnly,
        "rro" => Access::ReadOnlyRecursive,
        "rw" | "rrw" => Access::ReadWrite,
        _ => access,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    fn bind(options: &[&str]) -> Case {
        Case::mount(&json!({ "destination": "/d", "type": "bind", "source": "/dir", "options": options }))
    }

    #[test]
    fn every_known_option_is_planned_for() {
        for option in KNOWN {
            let plan = bind(&["rbind", option]).plan();
            let guest = &plan.guest.spec.mounts().as_ref().unwrap()[0];
            assert_eq!(guest.options().as_ref().unwrap()[1], *option);
        }
    }

    #[test]
    fn every_other_is_refused_by_name() {
        // What other runtimes know besides, and what nobody does.
        for option in [
            "shared",
            "rshared",
            "idmap",
            "ridmap",
            "iversion",
            "noiversion",
            "lazytime",
            "nolazytime",
            "loud",
            "silent",
            "nosymfollow",
            "symfollow",
            "tmpcopyup",
            "size=1m",
            "uid=0",
            "z",
            "",
        ] {
            let error = bind(&["rbind", option]).error();
            assert_eq!(error.path(), "mounts[0].options[1]", "{option}");
        }
    }

    #[test]
    fn who_may_write() {
        for (options, expected) in [
            ("", Access::ReadWrite),
            ("rw", Access::ReadWrite),
            ("ro", Access::ReadOnly),
            ("rro", Access::ReadOnlyRecursive),
            ("ro,rro", Access::ReadOnlyRecursive),
            ("rro,ro", Access::ReadOnlyRecursive),
            ("ro,rw", Access::ReadWrite),
            ("rw,ro", Access::ReadOnly),
        ] {
            let options: Vec<_> = options.split(',').map(str::to_owned).collect();
            assert_eq!(access(&options), expected, "{options:?}");
        }
    }
}
