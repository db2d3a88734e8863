//! `/dev/shm`: engines mount a tmpfs on the host and bind it. A machine's memory is its own, so the guest has
//! a tmpfs of the same size instead. Containers of a pod that bind the same one share it there.

use std::path::Path;

use oci_spec::runtime::Mount;

use super::Entry;
use crate::layout;
use crate::plan::{Plan, Shm};
use crate::planner::Context;

const SHM: &str = "/dev/shm";

pub(super) fn is(entry: &Entry<'_>) -> bool {
    entry.mount.destination() == Path::new(SHM)
}

pub(super) fn one(context: &Context<'_>, plan: &mut Plan, entry: &Entry<'_>, source: &Path) -> Mount {
    let Some(size) = context.request.host.files.tmpfs_size(source) else {
        // Somebody keeps files there, and wants them to be seen.
        return super::binds::shared(context, plan, entry, source.to_path_buf(), true);
    };
    let id = context.request.guest_id;
    let target = layout::guest_shm(context.kind.group(id).unwrap_or(id));
    plan.guest.shm = Some(Shm { path: target.clone(), size });
    entry.from("bind", target, entry.options().to_vec())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    fn shm(source: &str) -> serde_json::Value {
        json!({ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "ro"] })
    }

    #[test]
    fn a_tmpfs_of_the_guest_stands_for_the_hosts() {
        let plan = Case::mount(&shm("/state/shm")).plan();
        assert_eq!(plan.share.binds, []);
        let mounts = plan.guest.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_ref().unwrap().to_str(), Some("/run/supermachine/shm/c1"));
        let path = "/run/supermachine/shm/c1".into();
        assert_eq!(plan.guest.shm, Some(Shm { path, size: 64 << 20 }));
    }

    #[test]
    fn a_pod_has_one() {
        let mut case = Case::mount(&shm("/state/shm"));
        case.spec["annotations"] = json!({ "io.kubernetes.cri.sandbox-id": "p1" });
        assert_eq!(case.plan().guest.shm.unwrap().path.to_str(), Some("/run/supermachine/shm/p1"));
    }

    #[test]
    fn a_directory_of_files_is_shared() {
        let plan = Case::mount(&shm("/dir")).plan();
        assert_eq!((plan.share.binds.len(), plan.guest.shm), (1, None));
    }

    #[test]
    fn the_spec_may_mount_it_itself() {
        let mount = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "size=1g"] });
        let plan = Case::mount(&mount).plan();
        assert_eq!(serde_json::to_value(plan.guest.spec.mounts()).unwrap(), json!([mount]));
    }
}
