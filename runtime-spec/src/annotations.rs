//! What a container says for itself: annotations `dev.supermachine.*`, as far as the configuration allows.
//!
//! Annotations come from whoever may start containers, which in a cluster is not who runs the host.
//! Hence the list of the allowed ones, and sizes only within the configured most.

use std::collections::HashMap;
use std::str::FromStr;

use crate::config::{Bytes, Config, Settings};
use crate::error::{Error, Result};

/// What our annotations begin with.
pub const PREFIX: &str = "dev.supermachine.";

/// Every annotation of ours, without the prefix, and its meaning.
pub const ANNOTATIONS: &[(&str, &str)] = &[
    ("boot", "`restore` or `cold`, as `vm.boot`"),
    ("cpus", "exactly so many processors, at most `vm.max_cpus`"),
    (
        "memory",
        "exactly so much memory, like `2GiB`, at most `vm.max_memory`; a restored machine has at least `vm.memory`",
    ),
    (
        "warm",
        "when it is warm, for others to start from there: `created`, `listen[:PORT]`, `log:REGEX` or `after:MS`",
    ),
    ("kernel", "path of the guest's kernel on the host"),
    ("initrd", "path of the guest's initrd on the host"),
    ("network", "the socket of who has its network, as `network.socket`"),
];

/// The configuration as one container has it.
pub(crate) fn settings(config: &Config, annotations: Option<&HashMap<String, String>>) -> Result<Settings> {
    let mut settings = Settings { config: config.clone(), cpus: None, memory: None, warm: None };
    let mut ours: Vec<_> = annotations
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value.as_str())))
        .collect();
    ours.sort_unstable();
    for (name, value) in ours {
        let wrong = |problem: String| Error::Annotation {
            key: format!("{PREFIX}{name}"),
            value: value.to_owned(),
            problem,
        };
        if !ANNOTATIONS.iter().any(|(known, _)| *known == name) {
            let known: Vec<_> = ANNOTATIONS.iter().map(|(name, _)| *name).collect();
            return Err(wrong(format!(
                "there is no such annotation; there are {PREFIX}{{{}}}",
                known.join(",")
            )));
        }
        if !config.annotations.allow.iter().any(|allowed| allowed == name) {
            let key = "annotations.allow";
            return Err(wrong(format!(
                "the host does not allow it; add {name:?} to {key} of its configuration"
            )));
        }
        apply(&mut settings, name, value).map_err(wrong)?;
    }
    Ok(settings)
}

fn apply(settings: &mut Settings, name: &str, value: &str) -> std::result::Result<(), String> {
    match name {
        "boot" => settings.config.vm.boot = value.parse()?,
        "cpus" => {
            let cpus = u32::from_str(value).ok().filter(|cpus| *cpus > 0);
            settings.cpus = Some(cpus.ok_or("it is a number of processors, at least 1")?);
        }
        "memory" => settings.memory = Some(value.parse::<Bytes>()?),
        "warm" => settings.warm = Some(value.parse()?),
        "network" => settings.config.network.socket = Some(value.parse()?),
        _ if !value.starts_with('/') => return Err("it is an absolute path on the host".to_owned()),
        "kernel" => settings.config.vm.kernel = Some(value.into()),
        _ => settings.config.vm.initrd = Some(value.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Boot, Warm};
    use crate::testing::Case;

    fn case(name: &str, value: &str) -> Case {
        let mut case = Case::with(&json!({ "annotations": { format!("{PREFIX}{name}"): value } }));
        case.config.annotations.allow.extend(["kernel", "initrd", "network"].map(str::to_owned));
        case
    }

    #[test]
    fn each_annotation_is_heeded() {
        let machine = |name, value| case(name, value).plan().machine.unwrap();
        assert_eq!(machine("boot", "cold").boot, Boot::Cold);
        assert_eq!(machine("cpus", "3").size.cpus, 3);
        assert_eq!(machine("memory", "256MiB").size.memory, 256 << 20);
        assert_eq!(machine("warm", "listen:80").warm, Some(Warm::Listen(Some(80))));
        assert_eq!(machine("kernel", "/k").kernel, Some("/k".into()));
        assert_eq!(machine("initrd", "/i").initrd, Some("/i".into()));
        let uplink = case("network", "stream:/s").plan().uplink.unwrap();
        assert_eq!(uplink.socket.path, "/s");
    }

    #[test]
    fn what_is_unknown_forbidden_or_nonsense_is_an_error() {
        for (name, value) in [
            ("boot", "warm"),
            ("cpus", "0"),
            ("cpus", "two"),
            ("memory", "1.5GiB"),
            ("warm", "later"),
            ("kernel", "vmlinux"),
            ("initrd", ""),
            ("network", "/s"),
            ("network", "stream:s"),
            ("colour", "blue"),
            ("", ""),
        ] {
            assert_eq!(case(name, value).error().path(), format!("{PREFIX}{name}"));
        }
        let mut forbidden = case("kernel", "/k");
        forbidden.config = Config::default();
        assert!(forbidden.error().to_string().contains("annotations.allow"));
    }

    #[test]
    fn all_are_documented() {
        let page = include_str!("../../docs/configuration.md");
        for (name, _) in ANNOTATIONS {
            assert!(page.contains(&format!("`{PREFIX}{name}`")), "{name}");
        }
    }
}
