//! Seccomp: the profile holds in the guest, but for what would need a listener on the host.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use crate::error::{Result, unsupported};
use crate::plan::Plan;
use crate::planner::Context;

pub(crate) const ACTIONS: &[LinuxSeccompAction] = &[
    LinuxSeccompAction::ScmpActAllow,
    LinuxSeccompAction::ScmpActErrno,
    LinuxSeccompAction::ScmpActKill,
    LinuxSeccompAction::ScmpActKillProcess,
    LinuxSeccompAction::ScmpActKillThread,
    LinuxSeccompAction::ScmpActLog,
    LinuxSeccompAction::ScmpActTrace,
    LinuxSeccompAction::ScmpActTrap,
];

pub(crate) const OPERATORS: &[LinuxSeccompOperator] = &[
    LinuxSeccompOperator::ScmpCmpEq,
    LinuxSeccompOperator::ScmpCmpGe,
    LinuxSeccompOperator::ScmpCmpGt,
    LinuxSeccompOperator::ScmpCmpLe,
    LinuxSeccompOperator::ScmpCmpLt,
    LinuxSeccompOperator::ScmpCmpMaskedEq,
    LinuxSeccompOperator::ScmpCmpNe,
];

/// Of the guests there are. Profiles name every architecture; the others never match.
pub(crate) const ARCHITECTURES: &[Arch] =
    &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32, Arch::ScmpArchAarch64, Arch::ScmpArchArm];

pub(crate) const FLAGS: &[LinuxSeccompFilterFlag] = &[
    LinuxSeccompFilterFlag::SeccompFilterFlagTsync,
    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow,
    LinuxSeccompFilterFlag::SeccompFilterFlagLog,
];

const INSTEAD: &str = "use a profile without SCMP_ACT_NOTIFY";

pub(crate) fn transform(_: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let profile = plan.guest.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    profile.map_or(Ok(()), check)
}

fn check(profile: &LinuxSeccomp) -> Result<()> {
    let why = "the listener is a process of the host, the system call one of the guest's";
    if let Some(path) = profile.listener_path() {
        return Err(unsupported("linux.seccomp.listenerPath", path.display(), why, INSTEAD));
    }
    let action = |path: String, action: LinuxSeccompAction| {
        if ACTIONS.contains(&action) { Ok(()) } else { Err(unsupported(path, action, why, INSTEAD)) }
    };
    action("linux.seccomp.defaultAction".to_owned(), profile.default_action())?;
    for (index, syscall) in profile.syscalls().iter().flatten().enumerate() {
        action(format!("linux.seccomp.syscalls[{index}].action"), syscall.action())?;
    }
    for flag in profile.flags().iter().flatten() {
        if !FLAGS.contains(flag) {
            return Err(unsupported("linux.seccomp.flags", flag, "it is for listeners", "leave it out"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Case;

    fn case(profile: &Value) -> Case {
        Case::with(&json!({ "linux": { "seccomp": profile } }))
    }

    #[test]
    fn profiles_reach_the_guest_as_they_are() {
        let actions: Vec<_> = ACTIONS
            .iter()
            .map(|action| json!({ "names": ["mkdir"], "action": action.to_string() }))
            .collect();
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_MIPS"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": actions,
        });
        let plan = case(&profile).plan();
        let guest = serde_json::to_value(plan.guest.spec.linux().as_ref().unwrap().seccomp()).unwrap();
        assert_eq!(guest, profile);
    }

    #[test]
    fn listeners_are_out_of_reach() {
        let syscall = |action: &str| json!([{ "names": ["mount"], "action": action }]);
        for (profile, path) in [
            (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "linux.seccomp.defaultAction"),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscall("SCMP_ACT_NOTIFY") }),
                "linux.seccomp.syscalls[0].action",
            ),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/l" }),
                "linux.seccomp.listenerPath",
            ),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW",
                        "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"] }),
                "linux.seccomp.flags",
            ),
        ] {
            assert_eq!(case(&profile).error().path(), path);
        }
    }
}
