//! Every key of the configuration, with its meaning: what the default file, the documentation and the
//! reader of foreign options go by.

use std::fmt::Write;

use super::Config;

/// A key of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its table.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it means.
    pub text: &'static str,
    /// A value to show where the default is to have none.
    pub example: Option<&'static str>,
}

const fn key(section: &'static str, name: &'static str, text: &'static str) -> Key {
    Key { section, name, text, example: None }
}

/// Every key, table by table.
pub const KEYS: &[Key] = &[
    Key {
        example: Some("\"/usr/share/supermachine/vmlinux\""),
        ..key("vm", "kernel", "The guest's kernel. Default: the installed one.")
    },
    Key {
        example: Some("\"/usr/share/supermachine/initrd.img\""),
        ..key("vm", "initrd", "The guest's initrd. Default: the installed one.")
    },
    key(
        "vm",
        "boot",
        "How a machine comes to life: \"restore\" from the snapshot of one that has booted, or \"cold\".",
    ),
    key("vm", "cpus", "Processors of a machine whose containers have no limit, up to those of the host."),
    key("vm", "memory", "Memory of a machine whose containers have no limit, up to half of the host's."),
    key("vm", "overhead", "What a guest itself needs, on top of the memory limits of its containers."),
    key("vm", "max_cpus", "The most processors of a machine; 0: as many as the host has."),
    key("vm", "max_memory", "The most memory of a machine; 0: as much as the host has."),
    key(
        "template",
        "directory",
        "Where the snapshots are that machines are restored from, one for each kernel, initrd, monitor, processor and \
         shape. On a tmpfs they are restored fastest.",
    ),
    key(
        "template",
        "max_bytes",
        "What they may take of the disk. Those that were used longest ago go first; those in use stay.",
    ),
    key(
        "policy",
        "host_namespaces",
        "Containers that ask for the host's network, PIDs or IPC: \"reject\" them, or give them the \"guest\"'s \
         (whose network is then loopback only).",
    ),
    key(
        "policy",
        "host_kernel",
        "Binds of the host's /proc, /sys and /dev: \"reject\" them, or bind the \"guest\"'s.",
    ),
    key(
        "policy",
        "privileged_devices",
        "Devices of privileged containers that the guest does not have: \"omit\" them, or \"reject\" the container.",
    ),
    key(
        "policy",
        "spoofing",
        "Frames with another hardware address than the interface's, claims to another address, and routers that nobody asked for: \
         \"drop\" them, or \"allow\" them, for containers that add addresses themselves.",
    ),
    key(
        "network",
        "vhost",
        "Who moves the packets between a guest and an interface of its network namespace: \"auto\": the host's kernel, where it \
         has vhost-net; \"off\": the monitor, a process without rights.",
    ),
    Key {
        example: Some("\"stream:/run/passt/{id}.sock\""),
        ..key(
            "network",
            "socket",
            "The unix socket of who has the network of containers without a network namespace of somebody else's: \
             \"stream:PATH\" (passt) or \"datagram:PATH\" (gvproxy). {id} in it stands for the id of the container, or of \
             its pod. Default: none.",
        )
    },
    key(
        "network",
        "address",
        "The addresses behind that socket: \"dhcp\", or some like \"10.0.2.15/24,fd00::5/64\".",
    ),
    Key {
        example: Some("\"10.0.2.2,fd00::2\""),
        ..key("network", "gateway", "By whom all else is reached from these addresses. Default: nobody.")
    },
    key(
        "annotations",
        "allow",
        "Which annotations dev.supermachine.* of containers are heeded. Any other is an error. \
         There are also kernel, initrd and network.",
    ),
];

/// The commented file: every key with its meaning and default, which is what it says if nothing is changed.
pub fn default_file() -> String {
    let defaults = toml::Table::try_from(Config::default()).unwrap_or_default();
    let mut file = String::from(
        "# Configuration of supermachine. Every key is shown with its default.\n\
         # Files in /etc/supermachine/config.d/*.toml are read after this one.\n",
    );
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            let _ = write!(file, "\n[{section}]\n");
        }
        for line in wrap(key.text) {
            let _ = writeln!(file, "# {line}");
        }
        let value = defaults.get(key.section).and_then(|table| table.get(key.name));
        let _ = match value {
            Some(value) => writeln!(file, "{} = {value}", key.name),
            None => writeln!(file, "# {} = {}", key.name, key.example.unwrap_or("\"\"")),
        };
    }
    file
}

fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && lines[last].len() + word.len() > 90 {
            lines.push(word.to_owned());
        } else {
            if !lines[last].is_empty() {
                lines[last].push(' ');
            }
            lines[last].push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn the_default_file_is_the_default() {
        let file = default_file();
        assert_eq!(toml::from_str::<Config>(&file).unwrap(), Config::default(), "{file}");
    }

    #[test]
    fn every_key_is_documented_and_every_documented_key_exists() {
        let mut config = Config::default();
        config.vm.kernel = Some(PathBuf::from("/k"));
        config.vm.initrd = Some(PathBuf::from("/i"));
        config.network.socket = Some("stream:/s".parse().unwrap());
        config.network.gateway = "10.0.2.2".parse().unwrap();
        let table = toml::Table::try_from(config).unwrap();
        let mut there: Vec<(String, String)> = Vec::new();
        for (section, keys) in &table {
            there.extend(keys.as_table().unwrap().keys().map(|key| (section.clone(), key.clone())));
        }
        let mut known: Vec<(String, String)> =
            KEYS.iter().map(|key| (key.section.to_owned(), key.name.to_owned())).collect();
        there.sort();
        known.sort();
        assert_eq!(there, known);
        let page = include_str!("../../../docs/configuration.md");
        for key in KEYS {
            assert!(
                page.contains(&format!("`{}.{}`", key.section, key.name)),
                "{} is not in the page",
                key.name
            );
        }
    }
}
