//! The configuration of a call: files, then what containerd hands over as runtime options.

use std::fs;
use std::path::Path;

use log::info;
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;
use runtime_spec::config::{Config, DROP_INS, FILE, Layer, load};

use crate::error::{Attempt, Error, Result};

/// Runtime options that are for any runtime; others are for another one, and ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// `ConfigPath`
    pub path: String,
    /// The options themselves, if there is no path.
    pub body: String,
}

impl Options {
    /// Those in what containerd hands over.
    pub fn of(options: &Any) -> Result<Self> {
        // CRI of old had a `cri.` in front.
        if options.type_url.rsplit('/').next().is_none_or(|name| !name.ends_with("runtimeoptions.v1.Options"))
        {
            return Ok(Self::default());
        }
        Self::decode(&options.value).map_err(|error| Error::invalid(format!("the runtime options: {error}")))
    }

    fn decode(bytes: &[u8]) -> protobuf::Result<Self> {
        const PATH: u32 = 2 << 3 | 2;
        const BODY: u32 = 3 << 3 | 2;
        let (mut options, mut input) = (Self::default(), CodedInputStream::from_bytes(bytes));
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                PATH => options.path = input.read_string()?,
                BODY => options.body = String::from_utf8_lossy(&input.read_bytes()?).into_owned(),
                tag => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
            }
        }
        Ok(options)
    }
}

/// The configuration of a container, with `options` over the host's files.
pub fn of(options: &Options) -> Result<Config> {
    from(Path::new(FILE), Path::new(DROP_INS), options)
}

fn from(file: &Path, drop_ins: &Path, options: &Options) -> Result<Config> {
    let mut texts: Vec<(String, String, bool)> = Vec::new();
    let mut paths: Vec<_> = match fs::read_dir(drop_ins) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    if file.exists() {
        paths.insert(0, file.to_owned());
    }
    if !options.path.is_empty() {
        paths.push((&options.path).into());
    }
    for path in paths {
        let text = fs::read_to_string(&path).attempt(format_args!("reading {}", path.display()))?;
        texts.push((path.display().to_string(), text, false));
    }
    if options.path.is_empty() && !options.body.is_empty() {
        texts.push(("runtime options".to_owned(), options.body.clone(), true));
    }
    let layers: Vec<_> =
        texts.iter().map(|(origin, text, foreign)| Layer { origin, text, foreign: *foreign }).collect();
    let (config, notes) = load(&layers)?;
    for note in notes {
        info!("{}: {}", note.path, note.text);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str) -> Any {
        // config_path = "/c", config_body = "x"
        let value = vec![0x0a, 1, b't', 0x12, 2, b'/', b'c', 0x1a, 1, b'x'];
        Any { type_url: type_url.into(), value, ..Any::default() }
    }

    #[test]
    fn options_of_others_are_ignored() {
        let ours = Options { path: "/c".into(), body: "x".into() };
        for (name, expected) in [
            ("runtimeoptions.v1.Options", ours.clone()),
            ("type.googleapis.com/cri.runtimeoptions.v1.Options", ours),
            ("containerd.runc.v1.Options", Options::default()),
            ("", Options::default()),
        ] {
            assert_eq!(Options::of(&any(name)).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn later_layers_are_over_earlier_ones() {
        let directory = std::env::temp_dir().join(format!("config-{}", std::process::id()));
        let drop_ins = directory.join("config.d");
        fs::create_dir_all(&drop_ins).unwrap();
        let file = directory.join("config.toml");
        fs::write(&file, "[vm]\ncpus = 3\nmemory = \"1GiB\"\n").unwrap();
        fs::write(drop_ins.join("b.toml"), "[vm]\ncpus = 5\n").unwrap();
        fs::write(drop_ins.join("a.toml"), "[vm]\ncpus = 4\n").unwrap();
        fs::write(drop_ins.join("c.txt"), "no TOML").unwrap();
        let cpus = |options: &Options| from(&file, &drop_ins, options).map(|config| config.vm.cpus);
        assert_eq!(cpus(&Options::default()).unwrap(), 5);
        let body = "SystemdCgroup = true\n[vm]\ncpus = 6\n".to_owned();
        assert_eq!(cpus(&Options { body, ..Options::default() }).unwrap(), 6);
        let missing = Options { path: "/none".into(), body: "[vm]\ncpus = 6\n".into() };
        assert!(cpus(&missing).unwrap_err().text.contains("/none"));
        fs::remove_dir_all(&directory).unwrap();
    }
}
