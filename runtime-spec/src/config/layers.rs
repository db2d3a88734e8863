//! Layers of configuration: later ones over earlier ones, key by key.

use toml::{Table, Value};

use super::{Config, KEYS};
use crate::error::{Error, Result};
use crate::plan::Note;

/// A text of configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer<'a> {
    /// Where it is from, for messages: a path, or the name of an option.
    pub origin: &'a str,
    /// TOML.
    pub text: &'a str,
    /// Whether others may have put keys of theirs into it, as containerd does with the body of runtime
    /// options, which is everything that stands in the runtime's table. What is unknown there is noted and
    /// ignored. In a file of ours it is an error.
    pub foreign: bool,
}

/// Puts layers over the defaults, in their order.
pub fn load(layers: &[Layer<'_>]) -> Result<(Config, Vec<Note>)> {
    let mut merged = Table::new();
    let mut notes = Vec::new();
    for layer in layers {
        let wrong = |problem: String| Error::Config {
            origin: layer.origin.to_owned(),
            problem: problem.trim_end().to_owned(),
        };
        let mut table: Table = toml::from_str(layer.text).map_err(|error| wrong(error.to_string()))?;
        if layer.foreign {
            for key in take_unknown(&mut table) {
                notes.push(Note::new(layer.origin, format!("{key} is not a key of ours, and ignored")));
            }
            Config::try_from_table(&table).map_err(wrong)?;
        } else {
            // From the text and not from the table, because the error then shows the line.
            toml::from_str::<Config>(layer.text).map_err(|error| wrong(error.to_string()))?;
        }
        merge(&mut merged, table);
    }
    let whole = |problem: String| Error::Config { origin: "as a whole".to_owned(), problem };
    let config = Config::try_from_table(&merged).map_err(whole)?;
    check(&config).map_err(whole)?;
    Ok((config, notes))
}

impl Config {
    fn try_from_table(table: &Table) -> std::result::Result<Config, String> {
        Value::Table(table.clone()).try_into().map_err(|error: toml::de::Error| error.to_string())
    }
}

fn check(config: &Config) -> std::result::Result<(), String> {
    if config.vm.cpus == 0 {
        return Err("vm.cpus is 0; a machine has at least one processor".to_owned());
    }
    config.network.check()?;
    let paths = [
        ("vm.kernel", config.vm.kernel.as_ref()),
        ("vm.initrd", config.vm.initrd.as_ref()),
        ("template.directory", Some(&config.template.directory)),
    ];
    for (name, path) in paths {
        if let Some(path) = path.filter(|path| !path.is_absolute()) {
            return Err(format!("{name} is {:?}, which must be absolute", path.display().to_string()));
        }
    }
    Ok(())
}

fn take_unknown(table: &mut Table) -> Vec<String> {
    let mut unknown: Vec<String> = Vec::new();
    table.retain(|section, value| {
        let Value::Table(keys) = value else {
            unknown.push(section.to_owned());
            return false;
        };
        if !KEYS.iter().any(|key| key.section == section) {
            unknown.push(section.to_owned());
            return false;
        }
        keys.retain(|name, _| {
            let known = KEYS.iter().any(|key| key.section == section && key.name == name);
            if !known {
                unknown.push(format!("{section}.{name}"));
            }
            known
        });
        true
    });
    unknown
}

fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(under)), Value::Table(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Boot, Bytes, Reach, default_file};
    use super::*;

    fn ours<'a>(origin: &'a str, text: &'a str) -> Layer<'a> {
        Layer { origin, text, foreign: false }
    }

    #[test]
    fn nothing_is_the_default() {
        assert_eq!(load(&[]).unwrap(), (Config::default(), vec![]));
        assert_eq!(load(&[ours("file", &default_file())]).unwrap().0, Config::default());
    }

    #[test]
    fn later_layers_win_key_by_key() {
        let (config, notes) = load(&[
            ours("file", "[vm]\ncpus = 4\nmemory = \"2GiB\"\n[policy]\nhost_namespaces = \"guest\""),
            ours("drop-in", "[vm]\nmemory = 536870912\nboot = \"cold\""),
            Layer { origin: "options", text: "[vm]\ncpus = 8", foreign: true },
        ])
        .unwrap();
        assert_eq!((config.vm.cpus, config.vm.memory), (8, Bytes(512 << 20)));
        assert_eq!((config.vm.boot, config.policy.host_namespaces), (Boot::Cold, Reach::Guest));
        assert_eq!(notes, []);
    }

    #[test]
    fn unknown_keys_are_errors_in_our_files_and_ignored_in_foreign_options() {
        let text = "SystemdCgroup = true\nTypeUrl = \"x\"\n[other]\na = 1\n[vm]\nmemroy = \"1GiB\"\ncpus = 3";
        let error = load(&[ours("/etc/x.toml", text)]).unwrap_err();
        assert_eq!(error.path(), "/etc/x.toml");
        assert!(error.to_string().contains("unknown field"), "{error}");
        let (config, notes) = load(&[Layer { origin: "options", text, foreign: true }]).unwrap();
        assert_eq!(config.vm.cpus, 3);
        let noted = notes.iter().map(|note| note.text.split(' ').next().unwrap()).collect::<Vec<_>>();
        assert_eq!(noted.len(), 4);
        for key in ["SystemdCgroup", "TypeUrl", "other", "vm.memroy"] {
            assert!(noted.contains(&key), "{key}");
        }
    }

    #[test]
    fn errors_name_their_file_and_key() {
        for (text, word) in [
            ("[vm]\ncpus = \"two\"", "cpus"),
            ("[vm]\ncpus = -1", "cpus"),
            ("[vm]\nmemory = \"2GB\"", "memory"),
            ("[vm]\nmemory = true", "amount of memory"),
            ("[vm", "vm"),
            ("[policy]\nhost_kernel = \"share\"", "share"),
        ] {
            for foreign in [false, true] {
                let error = load(&[Layer { origin: "o", text, foreign }]).unwrap_err();
                assert_eq!(error.path(), "o", "{text}");
                assert!(foreign || error.to_string().contains(word), "{error}");
            }
        }
        for text in ["[vm]\ncpus = 0", "[vm]\nkernel = \"vmlinux\"", "[template]\ndirectory = \"t\""] {
            assert!(load(&[ours("o", text)]).is_err(), "{text}");
        }
    }
}
