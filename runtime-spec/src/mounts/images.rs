//! Disks with a file system, mounted by the spec: an image in a file, or a disk of the host.
//!
//! The guest mounts the disk at a place of its own and binds that into the container. Options of the file system as a
//! whole belong to the mount, all others to the bind.

use oci_spec::runtime::Mount;

use super::{Entry, filesystems, options};
use crate::devices::next_serial;
use crate::error::{Result, invalid, missing};
use crate::host::Found;
use crate::layout;
use crate::plan::{self, Access, Block, BlockSource, Plan, Source};
use crate::planner::Context;

/// File systems of disks that the guest can mount.
pub(crate) const TYPES: &[&str] = &["erofs", "ext4"];

/// Those of the options of any mount which are about all of the file system.
const OF_ALL: &[&str] = &["async", "dirsync", "sync"];
/// Those that are decided here, or mean nothing for a new mount.
const DECIDED: &[&str] = &["bind", "defaults", "loop", "mand", "nomand", "rbind", "remount", "ro", "rw"];

pub(super) fn one(context: &Context<'_>, plan: &mut Plan, entry: &Entry<'_>, typ: &str) -> Result<Mount> {
    let place = format!("{}.source", entry.place);
    let Some(source) = entry.mount.source().as_ref().filter(|source| !source.as_os_str().is_empty()) else {
        return Err(invalid(place, "missing", format!("a mount of type {typ} has a source")));
    };
    let source = context.absolute(source);
    match context.request.host.files.look(&source) {
        Found::File | Found::Block { .. } => {}
        Found::Missing => return Err(missing(place, &source)),
        _ => return Err(invalid(place, source.display(), "this is neither an image nor a disk")),
    }
    let serial = next_serial(context, plan);
    let readonly = typ == "erofs" || options::access(entry.options()) != Access::ReadWrite;
    plan.blocks.push(Block { serial: serial.clone(), source: BlockSource::Path(source), readonly });
    let target = layout::guest_image(&plan.guest_id, entry.index);
    let asked = entry.options().iter().filter(|option| !DECIDED.contains(&option.as_str())).cloned();
    let (mut given, mut options): (Vec<_>, Vec<_>) =
        asked.partition(|option| OF_ALL.contains(&option.as_str()) || filesystems::takes(typ, option));
    options.push("bind".to_owned());
    if readonly {
        given.push("ro".to_owned());
        options.push("ro".to_owned());
    }
    plan.guest.mounts.push(plan::Mount {
        typ: typ.to_owned(),
        source: Source::Disk(serial),
        target: target.clone(),
        options: given,
        devices: Vec::new(),
        mkdir: Vec::new(),
    });
    Ok(entry.from("bind", target, options))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    #[test]
    fn images_and_disks_become_disks_of_the_machine() {
        for (typ, source, options, readonly, disk, seen) in [
            (
                "ext4",
                "/dev/sdb",
                vec!["noatime", "rprivate"],
                false,
                vec![],
                vec!["noatime", "rprivate", "bind"],
            ),
            ("ext4", "/rw.img", vec!["loop", "ro"], true, vec!["ro"], vec!["bind", "ro"]),
            (
                "ext4",
                "/rw.img",
                vec!["rro", "sync", "remount"],
                true,
                vec!["sync", "ro"],
                vec!["rro", "bind", "ro"],
            ),
            (
                "ext4",
                "/rw.img",
                vec!["errors=remount-ro", "nodev"],
                false,
                vec!["errors=remount-ro"],
                vec!["nodev", "bind"],
            ),
            ("erofs", "/image.erofs", vec![], true, vec!["ro"], vec!["bind", "ro"]),
            ("erofs", "/image.erofs", vec!["ro", "rw"], true, vec!["ro"], vec!["bind", "ro"]),
        ] {
            let mount = json!({ "destination": "/d", "type": typ, "source": source, "options": options });
            let plan = Case::mount(&mount).plan();
            let source = BlockSource::Path(source.into());
            assert_eq!(plan.blocks, [Block { serial: "c0b0".to_owned(), source, readonly }]);
            let made = &plan.guest.mounts[0];
            assert_eq!(made.source, Source::Disk("c0b0".to_owned()));
            assert_eq!(made.options, disk, "{options:?}");
            let found = &plan.guest.spec.mounts().as_ref().unwrap()[0];
            assert_eq!(found.source().as_ref(), Some(&made.target));
            assert_eq!(found.options().as_deref().unwrap(), seen, "{options:?}");
        }
    }

    #[test]
    fn what_is_no_disk() {
        for source in ["/gone", "/dir", ""] {
            let mount = json!({ "destination": "/d", "type": "ext4", "source": source });
            assert_eq!(Case::mount(&mount).error().path(), "mounts[0].source", "{source}");
        }
    }
}
