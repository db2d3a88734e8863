//! What a spec asks of the machine it is on: its version, and the parts that are of other systems or of
//! hardware that a guest does not have.

use oci_spec::runtime::{LinuxIntelRdt, Spec};

use crate::error::{Result, invalid, unsupported};
use crate::plan::Plan;
use crate::planner::Context;

/// The oldest version of the specification that is read.
pub(crate) const OLDEST: &str = "1.0.0";
/// The newest version of the specification whose every key is known.
pub(crate) const NEWEST: &str = "1.3.0";

pub(crate) fn transform(_: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let spec = &mut plan.guest.spec;
    if !spec.version().starts_with("1.") {
        let why = format!("versions {OLDEST} to {NEWEST} of the specification are read");
        return Err(invalid("ociVersion", format!("{:?}", spec.version()), why));
    }
    other_systems(spec)?;
    hardware(spec)
}

fn other_systems(spec: &Spec) -> Result<()> {
    let theirs = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    if let Some((path, _)) = theirs.iter().find(|(_, there)| *there) {
        return Err(unsupported(*path, "", "the guest is a Linux", "use a Linux container"));
    }
    if spec.vm().is_some() {
        let instead = "set vm.kernel and vm.initrd in the configuration, or the annotations for them";
        return Err(unsupported("vm", "", "the machine is this runtime's own", instead));
    }
    Ok(())
}

fn hardware(spec: &mut Spec) -> Result<()> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    if linux.intel_rdt().as_ref().is_some_and(|rdt| *rdt != LinuxIntelRdt::default()) {
        let why = "cache and bandwidth of the processor are not passed to guests";
        return Err(unsupported("linux.intelRdt", "", why, "leave it out"));
    }
    linux.set_intel_rdt(None);
    if let Some(policy) = linux.memory_policy() {
        let asked = policy.mode().to_string();
        return Err(unsupported("linux.memoryPolicy", asked, "a guest has one memory node", "leave it out"));
    }
    if let Some(name) = linux.net_devices().iter().flatten().map(|(name, _)| name).min() {
        let path = format!("linux.netDevices.{name}");
        let why = "devices of the host's network are not moved into guests";
        return Err(unsupported(path, "", why, "put it into the container's network namespace"));
    }
    linux.set_net_devices(None);
    let flags = linux.personality().as_ref().and_then(|personality| personality.flags().as_ref());
    if let Some(flag) = flags.and_then(|flags| flags.first()) {
        return Err(unsupported(
            "linux.personality.flags",
            flag,
            "there are no such flags",
            "leave them out",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::Case;

    #[test]
    fn what_a_guest_does_not_have() {
        for (spec, path) in [
            (json!({ "ociVersion": "" }), "ociVersion"),
            (json!({ "ociVersion": "2.0.0" }), "ociVersion"),
            (json!({ "solaris": {} }), "solaris"),
            (json!({ "windows": { "layerFolders": [] } }), "windows"),
            (json!({ "vm": { "kernel": { "path": "/k" } } }), "vm"),
            (json!({ "linux": { "intelRdt": { "closID": "x" } } }), "linux.intelRdt"),
            (json!({ "linux": { "memoryPolicy": { "mode": "MPOL_BIND" } } }), "linux.memoryPolicy"),
            (json!({ "linux": { "netDevices": { "eth1": {} } } }), "linux.netDevices.eth1"),
            (
                json!({ "linux": { "personality": { "domain": "LINUX", "flags": ["X"] } } }),
                "linux.personality.flags",
            ),
        ] {
            assert_eq!(Case::with(&spec).error().path(), path);
        }
    }

    #[test]
    fn what_it_has() {
        for spec in [
            json!({ "ociVersion": "1.0.2-dev" }),
            json!({ "linux": { "intelRdt": {}, "netDevices": {} } }),
            json!({ "linux": { "personality": { "domain": "LINUX32" } } }),
        ] {
            Case::with(&spec).plan();
        }
    }
}
