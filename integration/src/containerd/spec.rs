//! The OCI configuration of a test's container: what `ctr run` makes, less what no test needs.

use serde_json::{Value, json};

/// A configuration that runs `arguments` as root, in namespaces of its own, with nothing but busybox around.
pub fn spec(id: &str, namespace: &str, arguments: &[&str], terminal: bool) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(arguments, terminal),
        "root": {"path": "rootfs"},
        "hostname": "integration",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])
        ],
        "linux": {
            "cgroupsPath": format!("/{namespace}/{id}"),
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
            ]
        }
    })
}

/// The same for a process beside the container's own.
pub(super) fn process(arguments: &[&str], terminal: bool) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_SETGID",
        "CAP_SETUID",
    ];
    json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true
    })
}

fn mount(destination: &str, kind: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": kind, "options": options})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_carried_through() {
        let made = spec("a", "default", &["sh", "-c", "exit 1"], false);
        assert_eq!(made["process"]["args"][2], "exit 1");
        assert_eq!(made["linux"]["cgroupsPath"], "/default/a");
    }
}
