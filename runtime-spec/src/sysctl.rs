//! Sysctls: of a namespace of the container, or of the machine.
//!
//! A machine's kernel is its own, so the sysctls that a shared kernel has to refuse are fine here: they go
//! to the agent, which writes them before the container is made. Those of the network are among them,
//! because the network is the machine's. In a pod they hold for all of it.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::error::{Result, invalid, unsupported};
use crate::plan::Plan;
use crate::planner::Context;

const IPC: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

pub(crate) fn transform(_: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(linux) = plan.guest.spec.linux_mut() else { return Ok(()) };
    let namespaces: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
    let has = |kind: LinuxNamespaceType| namespaces.contains(&kind);
    let mut sysctls: Vec<_> = linux.sysctl_mut().take().unwrap_or_default().into_iter().collect();
    sysctls.sort_unstable();
    let mut container = std::collections::HashMap::new();
    for (key, value) in sysctls {
        let path = format!("linux.sysctl.{key}");
        let name = key.replace('/', ".");
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.starts_with('.') || name.is_empty() || name.contains("..") || !name.chars().all(good) {
            return Err(invalid(path, format!("{value:?}"), "this is not the name of a sysctl"));
        }
        match name.as_str() {
            "kernel.hostname" => {
                return Err(unsupported(path, value, "it is set by another key", "use `hostname`"));
            }
            "kernel.domainname" if has(LinuxNamespaceType::Uts) => container.insert(key, value),
            ipc if (IPC.contains(&ipc) || ipc.starts_with("fs.mqueue.")) && has(LinuxNamespaceType::Ipc) => {
                container.insert(key, value)
            }
            user if user.starts_with("user.") && has(LinuxNamespaceType::User) => {
                container.insert(key, value)
            }
            _ => plan.guest.sysctls.insert(name, value),
        };
    }
    linux.set_sysctl((!container.is_empty()).then_some(container));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::Case;

    #[test]
    fn each_sysctl_has_its_owner() {
        for (name, of_machine) in [
            ("net.ipv4.ip_unprivileged_port_start", true),
            ("net/ipv4/ip_forward", true),
            ("vm.max_map_count", true),
            ("kernel.pid_max", true),
            ("user.max_user_namespaces", true),
            ("kernel.shm_rmid_forced", false),
            ("fs.mqueue.msg_max", false),
            ("kernel.domainname", false),
        ] {
            let plan = Case::with(&json!({ "linux": { "sysctl": { name: "1" } } })).plan();
            assert_eq!(plan.guest.sysctls.contains_key(&name.replace('/', ".")), of_machine, "{name}");
            let in_spec = plan.guest.spec.linux().as_ref().unwrap().sysctl();
            assert_eq!(in_spec.as_ref().is_some_and(|all| all.contains_key(name)), !of_machine, "{name}");
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["kernel.hostname", "../../etc/passwd", "", ".a", "a b", "net.ipv4.conf.all.\n"] {
            let error = Case::with(&json!({ "linux": { "sysctl": { name: "1" } } })).error();
            assert_eq!(error.path(), format!("linux.sysctl.{name}"));
        }
    }
}
