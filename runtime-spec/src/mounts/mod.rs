//! Mounts: each entry of the spec becomes one entry of the guest's, in the same order, because later ones may
//! lie within earlier ones.
//!
//! | entry | becomes |
//! |---|---|
//! | a bind of a directory or file | a bind from the shared tree ([`binds`]) |
//! | a bind of a unix socket | a bind of a socket at which the agent listens ([`sockets`]) |
//! | a bind of `/dev/shm`'s tmpfs | a bind of a tmpfs of the same size, in the guest ([`shm`]) |
//! | a file system of the kernel | itself ([`filesystems`]) |
//! | an image or disk with ext4 or erofs | a disk of the machine ([`images`]) |
//! | anything else | an error |

pub(crate) mod binds;
pub(crate) mod filesystems;
mod images;
pub(crate) mod options;
mod shm;
mod sockets;

use oci_spec::runtime::{LinuxIdMapping, Mount};

use crate::error::{Result, at, invalid, unsupported};
use crate::plan::Plan;
use crate::planner::Context;

/// One entry, and where it stands.
pub(crate) struct Entry<'a> {
    /// `mounts[3]`
    pub place: String,
    pub index: usize,
    pub mount: &'a Mount,
}

impl Entry<'_> {
    fn options(&self) -> &[String] {
        self.mount.options().as_deref().unwrap_or_default()
    }

    /// The entry for the guest: the same place, but for where it comes from.
    fn from(&self, typ: &str, source: impl Into<std::path::PathBuf>, mut options: Vec<String>) -> Mount {
        // The guest's runtime goes by the option, and some clients write only the type.
        if typ == "bind" && !options.iter().any(|option| option == "bind" || option == "rbind") {
            options.push("bind".to_owned());
        }
        let mut mount = self.mount.clone();
        mount.set_uid_mappings(None).set_gid_mappings(None);
        mount.set_typ(Some(typ.to_owned())).set_source(Some(source.into()));
        mount.set_options((!options.is_empty()).then_some(options));
        mount
    }
}

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    root_propagation(plan)?;
    let Some(mounts) = plan.guest.spec.mounts_mut().take() else { return Ok(()) };
    let mut guest = Vec::with_capacity(mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        let entry = Entry { place: at("mounts", index), index, mount };
        guest.push(one(context, plan, &entry)?);
    }
    plan.guest.spec.set_mounts(Some(guest));
    Ok(())
}

fn one(context: &Context<'_>, plan: &mut Plan, entry: &Entry<'_>) -> Result<Mount> {
    let mount = entry.mount;
    if !mount.destination().is_absolute() {
        let asked = format!("\"{}\"", mount.destination().display());
        return Err(invalid(format!("{}.destination", entry.place), asked, "a destination is absolute"));
    }
    let maps = |list: &Option<Vec<LinuxIdMapping>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if maps(mount.uid_mappings()) || maps(mount.gid_mappings()) {
        return Err(options::idmap(format!("{}.uidMappings", entry.place), ""));
    }
    options::check(entry)?;
    if options::is_bind(mount) {
        return binds::one(context, plan, entry);
    }
    let typ = mount.typ().as_deref().unwrap_or_default();
    if images::TYPES.contains(&typ) {
        return images::one(context, plan, entry, typ);
    }
    filesystems::one(entry, typ)
}

/// Mounts of the host can reach a container, mounts of a container stay in its machine.
fn root_propagation(plan: &mut Plan) -> Result<()> {
    let Some(linux) = plan.guest.spec.linux_mut() else { return Ok(()) };
    let Some(asked) = linux.rootfs_propagation_mut().take().filter(|asked| !asked.is_empty()) else {
        return Ok(());
    };
    let path = "linux.rootfsPropagation";
    match asked.strip_prefix('r').unwrap_or(&asked) {
        "shared" => {
            let why = "mounts of a container do not leave its machine";
            return Err(unsupported(path, asked, why, "use rslave"));
        }
        // Without the `r`, which the guest's runtime does not know and always means.
        kind @ ("private" | "slave" | "unbindable") => linux.set_rootfs_propagation(Some(kind.to_owned())),
        _ => return Err(invalid(path, format!("{asked:?}"), "it is private, slave, shared or unbindable")),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::Case;

    #[test]
    fn entries_keep_their_order() {
        let plan = Case::with(&json!({ "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/data", "type": "bind", "source": "/dir", "options": ["rbind"] },
            { "destination": "/data/file", "type": "bind", "source": "/file", "options": ["bind", "ro"] },
            { "destination": "/data/tmp", "type": "tmpfs", "source": "tmpfs" },
        ] }))
        .plan();
        let mounts = plan.guest.spec.mounts().as_ref().unwrap();
        let order: Vec<_> = mounts.iter().map(|mount| mount.destination().to_str().unwrap()).collect();
        assert_eq!(order, ["/proc", "/data", "/data/file", "/data/tmp"]);
        let places: Vec<_> = plan.share.binds.iter().map(|bind| bind.place.to_str().unwrap()).collect();
        assert_eq!(places, ["/share/c1/binds/1", "/share/c1/binds/2"]);
    }

    #[test]
    fn entries_that_make_no_sense() {
        for (mount, path) in [
            (json!({ "destination": "data", "type": "tmpfs" }), "mounts[0].destination"),
            (json!({ "destination": "", "type": "tmpfs" }), "mounts[0].destination"),
            (
                json!({ "destination": "/a", "type": "bind", "source": "/dir",
                    "uidMappings": [{ "containerID": 0, "hostID": 1, "size": 1 }] }),
                "mounts[0].uidMappings",
            ),
        ] {
            assert_eq!(Case::mount(&mount).error().path(), path);
        }
    }

    #[test]
    fn propagation_of_the_root() {
        for (asked, guest) in [
            ("rslave", Some("slave")),
            ("slave", Some("slave")),
            ("rprivate", Some("private")),
            ("runbindable", Some("unbindable")),
            ("", None),
        ] {
            let plan = Case::with(&json!({ "linux": { "rootfsPropagation": asked } })).plan();
            assert_eq!(
                plan.guest.spec.linux().as_ref().unwrap().rootfs_propagation().as_deref(),
                guest,
                "{asked}"
            );
        }
        for asked in ["shared", "rshared", "loud"] {
            let error = Case::with(&json!({ "linux": { "rootfsPropagation": asked } })).error();
            assert_eq!(error.path(), "linux.rootfsPropagation", "{asked}");
        }
    }
}
