//! Binds: what of the host's a container sees.
//!
//! The shim binds the directory, or exactly the file, to a place of the container's in the shared tree, and
//! the guest binds from there. Read-only is enforced on the host, and again in the guest for good errors.
//! Whatever changes in the source is seen at once, since it is the same directory.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;

use super::{Entry, options, shm, sockets};
use crate::config::Reach;
use crate::devices;
use crate::error::{Result, invalid, missing, unsupported};
use crate::host::Found;
use crate::layout;
use crate::plan::{Bind, Note, Plan};
use crate::planner::Context;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const CGROUP: &str = "/sys/fs/cgroup";
/// What the host's kernel makes up, and the guest's as well.
const KERNEL: &[&str] = &["/proc", "/sys", "/dev"];

pub(super) fn one(context: &Context<'_>, plan: &mut Plan, entry: &Entry<'_>) -> Result<Mount> {
    let place = format!("{}.source", entry.place);
    let Some(source) = entry.mount.source().as_ref().filter(|source| !source.as_os_str().is_empty()) else {
        return Err(invalid(place, "missing", "a bind has a source"));
    };
    // Components leave out `//`, `/./` and a last `/`.
    let source: PathBuf = context.absolute(source).components().collect();
    if source == Path::new(CGROUP) {
        let flags = entry.options().iter().filter(|option| !option.ends_with("bind")).cloned();
        return Ok(entry.from("cgroup", "cgroup", flags.collect()));
    }
    let found = context.request.host.files.look(&source);
    match found {
        Found::Missing => Err(missing(place, &source)),
        Found::Character { major, minor } => {
            let why = "this is a device of the host, and the guest has none of these numbers";
            let own = devices::own_path(major, minor);
            let own = own.ok_or_else(|| unsupported(place, source.display(), why, "leave it out"))?;
            Ok(entry.from("bind", own, entry.options().to_vec()))
        }
        Found::Block { .. } => {
            let why = "this is a disk of the host";
            Err(unsupported(
                place,
                source.display(),
                why,
                "name it in linux.devices, which makes it one of the machine",
            ))
        }
        Found::Fifo => {
            let why = "the two ends of a named pipe are in two kernels";
            Err(unsupported(place, source.display(), why, "use a unix socket"))
        }
        Found::Namespace { .. } => {
            Err(unsupported(place, source.display(), "namespaces of the host stay there", "leave it out"))
        }
        Found::Directory if shm::is(entry) => Ok(shm::one(context, plan, entry, &source)),
        Found::Directory | Found::File if of_kernel(&source) => kernel(context, plan, entry, place, &source),
        Found::Socket(owner) => sockets::one(context, plan, entry, source, owner),
        Found::Directory | Found::File => {
            let is_file = found == Found::File;
            if is_file && entry.mount.destination() == Path::new(RESOLV_CONF) {
                plan.resolv_conf = Some(source.clone());
            }
            Ok(shared(context, plan, entry, source, !is_file))
        }
    }
}

/// A directory or a file in the shared tree.
pub(super) fn shared(
    context: &Context<'_>,
    plan: &mut Plan,
    entry: &Entry<'_>,
    source: PathBuf,
    directory: bool,
) -> Mount {
    let given = entry.options();
    let place = layout::bind(&plan.guest_id, entry.index);
    let guest = entry.from("bind", layout::guest_bind(&place), given.to_vec());
    plan.share.binds.push(Bind {
        source,
        place: context.shared(&place),
        directory,
        recursive: given.iter().any(|option| option == "rbind"),
        access: options::access(given),
        follows: given.iter().any(|option| option == "slave" || option == "rslave"),
    });
    guest
}

fn of_kernel(source: &Path) -> bool {
    let source = lexical(source);
    // A disk may be mounted anywhere, but /dev/shm is the one place below where people keep files.
    KERNEL.iter().any(|kernel| source.starts_with(kernel)) && !source.starts_with("/dev/shm")
}

fn kernel(
    context: &Context<'_>,
    plan: &mut Plan,
    entry: &Entry<'_>,
    place: String,
    source: &Path,
) -> Result<Mount> {
    match context.settings.config.policy.host_kernel {
        Reach::Reject => {
            let why = "this is what the host's kernel says, and the container is on another one";
            let instead = "leave it out, or set policy.host_kernel = \"guest\" in the configuration";
            Err(unsupported(place, source.display(), why, instead))
        }
        Reach::Guest => {
            plan.notes.push(Note::new(place, format!("{} is the guest's", source.display())));
            Ok(entry.from("bind", source, entry.options().to_vec()))
        }
    }
}

/// Where a path leads if no part of it is a symbolic link.
fn lexical(path: &Path) -> PathBuf {
    let mut lexical = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                lexical.pop();
            }
            part => lexical.push(part),
        }
    }
    lexical
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::plan::Access;
    use crate::testing::Case;

    fn bind(source: &str, options: &[&str]) -> Value {
        json!({ "destination": "/d", "type": "bind", "source": source, "options": options })
    }

    fn in_guest(plan: &Plan) -> Value {
        serde_json::to_value(&plan.guest.spec.mounts().as_ref().unwrap()[0]).unwrap()
    }

    #[test]
    fn directories_and_files_come_through_the_shared_tree() {
        for (source, options, expected) in [
            ("/dir", vec!["bind"], (true, false, Access::ReadWrite, false)),
            ("/dir", vec!["rbind", "rprivate", "ro"], (true, true, Access::ReadOnly, false)),
            ("/dir", vec!["rbind", "rro", "rslave"], (true, true, Access::ReadOnlyRecursive, true)),
            ("/file", vec!["rbind", "ro"], (false, true, Access::ReadOnly, false)),
        ] {
            let plan = Case::mount(&bind(source, &options)).plan();
            let Bind { directory, recursive, access, follows, .. } = plan.share.binds[0];
            assert_eq!((directory, recursive, access, follows), expected, "{options:?}");
            assert_eq!(plan.share.binds[0].source, Path::new(source));
            let expected = bind("/run/supermachine/binds/c1/binds/0", &options);
            assert_eq!(in_guest(&plan), expected);
        }
    }

    #[test]
    fn sources_are_found_as_clients_write_them() {
        for (source, found) in [("relative", "/bundle/relative"), ("//dir/./", "/dir"), ("/dir/", "/dir")] {
            let plan = Case::mount(&bind(source, &["bind"])).plan();
            assert_eq!(plan.share.binds[0].source, Path::new(found), "{source}");
        }
        // An option makes a bind of any type.
        let plan = Case::mount(
            &json!({ "destination": "/d", "type": "none", "source": "/dir", "options": ["rbind"] }),
        );
        assert_eq!(plan.plan().share.binds.len(), 1);
    }

    #[test]
    fn what_cannot_be_bound() {
        for (source, word) in [
            ("/gone", "no such file or directory"),
            ("/fifo", "unix socket"),
            ("/dev/nvidia0", "device of the host"),
            ("/dev/sdb", "linux.devices"),
            ("/run/netns/a", "namespaces"),
            ("", "source"),
        ] {
            let error = Case::mount(&bind(source, &["bind"])).error();
            assert_eq!(error.path(), "mounts[0].source", "{source}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn what_the_guest_has_itself() {
        let plan = Case::mount(&bind("/dev/null", &["bind"])).plan();
        assert_eq!((in_guest(&plan)["source"].clone(), plan.share.binds.len()), (json!("/dev/null"), 0));
        let plan = Case::mount(&bind("/sys/fs/cgroup", &["rbind", "ro"])).plan();
        let expected =
            json!({ "destination": "/d", "type": "cgroup", "source": "cgroup", "options": ["ro"] });
        assert_eq!((in_guest(&plan), plan.share.binds.len()), (expected, 0));
    }

    #[test]
    fn what_kernels_say() {
        for source in ["/proc", "/dir/../sys", "/dev", "/sys/fs/cgroup/memory", "/proc/cpuinfo"] {
            let mut case = Case::mount(&bind(source, &["rbind", "ro"]));
            case.files.0.insert(source.into(), Found::Directory);
            assert_eq!(case.error().path(), "mounts[0].source", "{source}");
            case.config.policy.host_kernel = Reach::Guest;
            let plan = case.plan();
            assert_eq!((in_guest(&plan)["source"].clone(), plan.notes.len()), (json!(source), 1));
        }
    }
}
