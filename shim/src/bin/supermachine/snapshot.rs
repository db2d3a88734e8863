//! `supermachine snapshot`: snapshots wherever they are.

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use shim::config::{self, Options};
use shim::template::Store;
use vmm::snapshot::{AHEAD_FILE, BASE_FILE, EPOCH, Header, MEMORY_FILE, STATE_FILE, read_header, verify};

use crate::progress::Progress;
use crate::{Failure, print, printable};

/// Does what the words say.
pub fn run(words: &[String], json: bool) -> Result<ExitCode, Failure> {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ls", places @ ..] => list(&known(places)?, json),
        ["inspect", place] => {
            let place = resolve(place)?;
            show(&place, &read_header(&place)?, json);
        }
        ["verify", place] => {
            let place = resolve(place)?;
            let progress = Progress::of("reading");
            let verified = verify(&place, |done, whole| progress.step("reading", Some((done, whole))));
            drop(progress);
            verified?;
            print(&format!("{} is as it was written\n", place.display()));
        }
        ["rm", place] => remove(Path::new(place))?,
        ["inspect" | "verify" | "rm"] => {
            return Err(format!("{} which snapshot? Give its directory", words[0]).into());
        }
        _ => {
            return Err(
                "snapshot does ls, inspect DIR, verify DIR and rm DIR; supermachine --help says more".into(),
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn store() -> Result<Store, Failure> {
    Ok(Store::new(&config::of(&Options::default())?.template))
}

/// A directory, or that of a template.
fn resolve(place: &str) -> Result<PathBuf, Failure> {
    if Path::new(place).is_dir() || place.contains('/') {
        return Ok(place.into());
    }
    let store = store()?;
    let key = crate::template::find(&store, place)?;
    Ok(store.directory().join(key.as_str()))
}

fn is_snapshot(path: &Path) -> bool {
    path.join(STATE_FILE).is_file() && path.join(MEMORY_FILE).is_file()
}

/// Those in the given directories, or else the templates'.
fn known(places: &[&str]) -> Result<Vec<PathBuf>, Failure> {
    let places = if places.is_empty() {
        vec![store()?.directory().to_owned()]
    } else {
        places.iter().map(PathBuf::from).collect()
    };
    let mut found = Vec::new();
    for place in places {
        if is_snapshot(&place) {
            found.push(place);
            continue;
        }
        match fs::read_dir(&place) {
            Ok(entries) => {
                found.extend(entries.flatten().map(|entry| entry.path()).filter(|path| is_snapshot(path)));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(format!("reading {}: {error}", place.display()).into()),
        }
    }
    found.sort();
    Ok(found)
}

fn list(found: &[PathBuf], json: bool) {
    let rows: Vec<_> =
        found.iter().map(|path| (path, read_header(path).map_err(|error| error.to_string()))).collect();
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(path, header)| match header {
                Ok(header) => described(path, header),
                Err(error) => json!({ "path": path, "error": error }),
            })
            .collect();
        print(&format!("{:#}\n", json!(rows)));
        return;
    }
    let rows: Vec<_> = rows.iter().map(|(path, header)| row(path, header)).collect();
    print(&crate::ps::columns(&["DIRECTORY", "CPUS", "MEMORY", "SIZE", "ON DISK"], &rows));
}

fn row(path: &Path, header: &Result<Header, String>) -> [String; 5] {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let place = printable(&path.display().to_string());
    match header {
        Ok(header) => {
            [place, header.vcpus.to_string(), mib(header.memory), mib(header.memory_len), mib(on_disk(path))]
        }
        Err(error) => [place, "-".into(), "-".into(), "-".into(), printable(error)],
    }
}

fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let blocks = |name| fs::metadata(path.join(name)).map_or(0, |found| found.blocks() * 512);
    blocks(STATE_FILE) + blocks(MEMORY_FILE)
}

fn described(path: &Path, header: &Header) -> Value {
    json!({
        "path": path, "epoch": EPOCH, "architecture": header.architecture, "hypervisor": header.hypervisor,
        "build": header.build, "created": header.created, "page_size": header.page_size, "cpus": header.vcpus,
        "memory": header.memory, "memory_max": header.memory_max,
        "devices": header.devices.iter().map(|slot| json!({ "id": slot.id, "kind": slot.kind })).collect::<Vec<_>>(),
        "bytes": header.memory_len, "data": header.memory_data, "on_disk": on_disk(path),
        "base": header.base.map(|base| base.data),
    })
}

fn show(path: &Path, header: &Header, json: bool) {
    let described = described(path, header);
    if json {
        return print(&format!("{described:#}\n"));
    }
    let mut text = String::new();
    for (name, value) in described.as_object().into_iter().flatten() {
        let value = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Array(devices) => {
                let names = devices.iter().filter_map(|device| device["id"].as_str());
                names.collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        let _ = writeln!(text, "{name:<13} {}", printable(&value));
    }
    print(&text);
}

/// Nothing but a snapshot's files, so that a mistyped path costs nothing.
fn remove(path: &Path) -> Result<(), Failure> {
    if !is_snapshot(path) {
        return Err(format!("{} is no snapshot; nothing is removed", path.display()).into());
    }
    if fs::canonicalize(path)?.parent() == fs::canonicalize(store()?.directory()).ok().as_deref() {
        return Err("that is a template: supermachine template rm removes it".into());
    }
    // Those last without which it is none, so that it can be tried again.
    for name in [BASE_FILE, AHEAD_FILE, STATE_FILE, MEMORY_FILE] {
        match fs::remove_file(path.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            done => done.map_err(|error| format!("removing {}/{name}: {error}", path.display()))?,
        }
    }
    fs::remove_dir(path).map_err(|error| format!("removing {}: {error}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("snapshot-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn only_snapshots_are_found_and_removed() {
        let directory = scratch("rm");
        let (snapshot, other) = (directory.join("a"), directory.join("b"));
        for path in [&snapshot, &other] {
            fs::create_dir(path).unwrap();
            fs::write(path.join(MEMORY_FILE), "x").unwrap();
        }
        for name in [STATE_FILE, BASE_FILE, AHEAD_FILE] {
            fs::write(snapshot.join(name), "x").unwrap();
        }
        let place = directory.display().to_string();
        assert_eq!(known(&[&place]).unwrap(), std::slice::from_ref(&snapshot));
        assert!(known(&[&format!("{place}/none")]).unwrap().is_empty());
        assert!(
            row(&snapshot, &read_header(&snapshot).map_err(|error| error.to_string()))[4]
                .contains("snapshot")
        );
        assert!(remove(&other).unwrap_err().to_string().contains("no snapshot"));
        remove(&snapshot).unwrap();
        assert!(!snapshot.exists() && other.exists());
        fs::remove_dir_all(&directory).unwrap();
    }
}
