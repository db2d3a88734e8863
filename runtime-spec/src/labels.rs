//! AppArmor and SELinux: what confines a container on a shared kernel.
//!
//! A guest runs a stock kernel without the host's policies, and engines on hosts that have such policies
//! ask for their default profile with every container. What confines a container here is its machine. So
//! the labels leave the guest's spec, and the plan keeps them for the monitor, on which the host may lay
//! them. Seccomp profiles are another matter: they are in the spec, and hold in the guest.

use crate::plan::{Note, Plan};

const WHY: &str = "is not laid on the container, which its machine confines; it may be laid on the monitor";

/// Takes them out of the guest's spec.
pub(crate) fn take(plan: &mut Plan) {
    let given = |label: Option<String>| label.filter(|label| !label.is_empty());
    let spec = &mut plan.guest.spec;
    if let Some(process) = spec.process_mut() {
        plan.monitor.apparmor_profile = given(process.apparmor_profile().clone());
        plan.monitor.selinux_label = given(process.selinux_label().clone());
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
    if let Some(linux) = spec.linux_mut() {
        plan.monitor.mount_label = given(linux.mount_label_mut().take());
    }
    let unconfined = Some("unconfined".to_owned());
    for (path, label) in [
        ("process.apparmorProfile", &plan.monitor.apparmor_profile),
        ("process.selinuxLabel", &plan.monitor.selinux_label),
        ("linux.mountLabel", &plan.monitor.mount_label),
    ] {
        if let Some(label) = label.as_ref().filter(|_| *label != unconfined) {
            plan.notes.push(Note::new(path, format!("{label} {WHY}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::Case;

    #[test]
    fn labels_are_the_monitors() {
        let plan = Case::with(&json!({
            "process": { "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "u:r:t:s0" },
            "linux": { "mountLabel": "u:object_r:t:s0" },
        }))
        .plan();
        assert_eq!(plan.monitor.apparmor_profile.as_deref(), Some("cri-containerd.apparmor.d"));
        assert_eq!(plan.monitor.selinux_label.as_deref(), Some("u:r:t:s0"));
        assert_eq!(plan.monitor.mount_label.as_deref(), Some("u:object_r:t:s0"));
        let guest = serde_json::to_string(&plan.guest).unwrap();
        for key in ["apparmorProfile", "selinuxLabel", "mountLabel"] {
            assert!(!guest.contains(key), "{key}");
        }
        assert_eq!(plan.notes.len(), 3);
        let plan =
            Case::with(&json!({ "process": { "apparmorProfile": "unconfined", "selinuxLabel": "" } })).plan();
        assert_eq!((plan.notes.len(), plan.monitor.selinux_label), (0, None));
    }
}
