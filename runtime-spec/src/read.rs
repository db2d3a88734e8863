//! From JSON to the types of the specification, with the path of what is wrong.
//!
//! Unknown keys are ignored, as the specification demands of every runtime, and noted.

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::plan::Note;

/// Reads a config.json.
pub fn spec(json: &[u8]) -> Result<(Spec, Vec<Note>)> {
    read("config.json", json)
}

/// Reads the process of an `Exec`.
pub fn process(json: &[u8]) -> Result<(Process, Vec<Note>)> {
    read("process", json)
}

/// Reads the resources of an `Update`.
pub fn resources(json: &[u8]) -> Result<(LinuxResources, Vec<Note>)> {
    read("resources", json)
}

fn read<T: DeserializeOwned>(document: &str, json: &[u8]) -> Result<(T, Vec<Note>)> {
    let mut notes = Vec::new();
    let mut ignored = |path: serde_ignored::Path<'_>| {
        notes.push(Note::new(dotted(&path), "is not known to this runtime, and ignored"));
    };
    let mut parser = serde_json::Deserializer::from_slice(json);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut parser, &mut track);
    let value = serde_ignored::deserialize(tracked, &mut ignored);
    let malformed = |path: String, problem: String| Error::Malformed { path, problem };
    let value = match value {
        Ok(value) => value,
        Err(error) => {
            let path = track.path().to_string();
            let path = if [".", "?"].contains(&path.as_str()) { document.to_owned() } else { path };
            return Err(malformed(path, error.to_string()));
        }
    };
    parser.end().map_err(|error| malformed(document.to_owned(), error.to_string()))?;
    Ok((value, notes))
}

fn dotted(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", dotted(parent)),
        Path::Map { parent, key } => match dotted(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            dotted(parent)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_noted_by_their_path() {
        let json = br#"{"ociVersion":"1.1.0","mounts":[{"destination":"/a","colour":1}],"linux":{"x":{}}}"#;
        let (_, notes) = spec(json).unwrap();
        let paths: Vec<_> = notes.iter().map(|note| note.path.as_str()).collect();
        assert_eq!(paths, ["mounts[0].colour", "linux.x"]);
    }

    #[test]
    fn what_is_malformed_is_named_by_its_path() {
        for (json, path) in [
            (r#"{"mounts":[{"destination":7}]}"#, "mounts[0].destination"),
            (
                r#"{"process":{"user":{},"cwd":"/","rlimits":[{"type":"RLIMIT_X"}]}}"#,
                "process.rlimits[0].type",
            ),
            (r#"{"linux":{"devices":[{"path":"/a","type":"q"}]}}"#, "linux.devices[0].type"),
            (r"{", "config.json"),
            (r"{} {}", "config.json"),
            ("", "config.json"),
        ] {
            assert_eq!(spec(json.as_bytes()).unwrap_err().path(), path, "{json}");
        }
    }
}
