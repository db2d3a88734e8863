//! Whose shim serves a container: its own, that of its pod, or that of whoever has its network namespace.
//!
//! A network namespace is that of one machine. Containers that are to share one without being a pod
//! (`docker run --network container:NAME`) share the machine as well: who comes second joins the first.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use runtime_spec::Kind;
use serde::Deserialize;
use serde_json::Value;

use crate::paths::{Paths, group_of};

/// In a container's directory: the number of the network namespace of its machine, once others can join it.
const NETWORK: &str = "network";
/// Between the id of a container and the number of a group that cannot have its name. Ids have no such letter.
const AGAIN: char = '+';
/// More groups that outlive their first container are not believed in.
const MOST: u32 = 100;

/// By which name a container's shim is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// This one, whoever began it.
    Named(String),
    /// One that nobody else has.
    Own,
}

/// The group of container `id`, whose config.json is at `config`.
pub fn of(root: &Path, namespace: &str, config: &Path, id: &str) -> io::Result<Group> {
    // A bundle of a sandbox may have none.
    let text = match fs::read(config) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Group::Named(id.to_owned())),
        other => other?,
    };
    // What is wrong with it, Create says.
    let config: Value = serde_json::from_slice(&text).unwrap_or_default();
    let annotations: Option<HashMap<String, String>> =
        Deserialize::deserialize(&config["annotations"]).unwrap_or_default();
    if let Some(group) = Kind::of(id, annotations.as_ref()).group(id) {
        return Ok(Group::Named(group.to_owned()));
    }
    let namespaces = config["linux"]["namespaces"].as_array();
    let network = namespaces.into_iter().flatten().find(|one| one["type"] == "network");
    let path = network.and_then(|network| network["path"].as_str()).filter(|path| !path.is_empty());
    let joined =
        path.and_then(|path| inode(Path::new(path))).and_then(|number| has(root, namespace, number, id));
    Ok(joined.map_or(Group::Own, Group::Named))
}

/// The names that a group of the container's own can have, the usual one first: another container may still be in a
/// machine that this one has begun before.
pub fn names(id: &str) -> impl Iterator<Item = String> {
    let more = (1..MOST).map(move |number| format!("{id}{AGAIN}{number}"));
    std::iter::once(id.to_owned()).chain(more)
}

/// The container that began a group.
pub fn founder(group: &str) -> &str {
    group.split_once(AGAIN).map_or(group, |(id, _)| id)
}

/// Others can join the machine of a container in this network namespace from now on.
pub fn note(directory: &Path, network: &Path) -> io::Result<()> {
    fs::write(directory.join(NETWORK), fs::metadata(network)?.ino().to_string())
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// The group, other than a dead one, whose machine has a network namespace.
fn has(root: &Path, namespace: &str, number: u64, id: &str) -> Option<String> {
    let tasks = Paths::new(root, namespace, id).tasks();
    tasks.into_iter().filter(|(other, _)| other != id).find_map(|(other, group)| {
        let paths = Paths::new(root, namespace, &group);
        let noted = fs::read_to_string(paths.task(&other).join(NETWORK)).ok()?;
        let address = (noted.parse() == Ok(number)).then(|| paths.shim().join("address"))?;
        UnixStream::connect(fs::read_to_string(address).ok()?).ok()?;
        Some(group)
    })
}

/// Notes the group of a container of which there is nothing yet, so that `delete` finds its shim.
pub fn leave(root: &Path, namespace: &str, group: &str, id: &str) -> io::Result<()> {
    if group == id || group_of(root, namespace, id).is_some_and(|noted| noted == group) {
        return Ok(());
    }
    let directory = Paths::new(root, namespace, group).task(id);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("group"), group)
}

/// Takes that back, for one that is not begun after all.
pub fn take_back(root: &Path, namespace: &str, group: &str, id: &str) {
    if group != id {
        let directory = Paths::new(root, namespace, group).task(id);
        let _ = fs::remove_file(directory.join("group"));
        // If that was all there was.
        let _ = fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("group-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn groups_by_annotation() {
        let root = scratch("annotation");
        let path = root.join("config.json");
        let find = || of(&root, "ns", &path, "c1").unwrap();
        assert_eq!(find(), Group::Named("c1".into()), "a sandbox without config.json");
        let named = |name: &str| Group::Named(name.to_owned());
        for (text, expected) in [
            ("{}", Group::Own),
            ("no JSON", Group::Own),
            (r#"{"annotations":null,"linux":null}"#, Group::Own),
            (r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#, named("g")),
            (
                r#"{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"p"}}"#,
                named("p"),
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"c1"}}"#,
                named("c1"),
            ),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(find(), expected, "{text}");
        }
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn groups_by_network_namespace() {
        let root = scratch("network");
        let (config, network, other) = (root.join("config.json"), root.join("net"), root.join("other"));
        fs::write(&network, "").unwrap();
        fs::write(&other, "").unwrap();
        let asks = |path: &Path| {
            let namespaces = serde_json::json!([{ "type": "pid" }, { "type": "network", "path": path }]);
            fs::write(&config, serde_json::json!({ "linux": { "namespaces": namespaces } }).to_string())
                .unwrap();
            of(&root, "ns", &config, "c2").unwrap()
        };
        let paths = Paths::new(&root, "ns", "c1");
        for directory in [paths.task("c1"), paths.shim()] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(paths.task("c1").join("group"), "c1").unwrap();
        assert_eq!(asks(&network), Group::Own, "it is not to be joined yet");
        note(&paths.task("c1"), &network).unwrap();
        assert_eq!(asks(&network), Group::Own, "nobody answers");
        let socket = root.join("socket");
        fs::write(paths.shim().join("address"), socket.as_os_str().as_encoded_bytes()).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(asks(&network), Group::Named("c1".into()));
        for path in [&other, Path::new(""), Path::new("/none")] {
            assert_eq!(asks(path), Group::Own, "{}", path.display());
        }
        assert_eq!(of(&root, "elsewhere", &config, "c2").unwrap(), Group::Own);
        asks(&network);
        assert_eq!(of(&root, "ns", &config, "c1").unwrap(), Group::Own, "it does not join itself");
        drop(listener);
        assert_eq!(asks(&network), Group::Own, "its shim is dead");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_group_is_found_by_who_deletes() {
        let root = scratch("leave");
        leave(&root, "ns", "c1", "c1").unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "by its name");
        leave(&root, "ns", "c1+1", "c1").unwrap();
        assert_eq!(group_of(&root, "ns", "c1").as_deref(), Some("c1+1"));
        take_back(&root, "ns", "c1+1", "c1");
        assert_eq!(group_of(&root, "ns", "c1"), None);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn names_and_founders() {
        let names: Vec<_> = names("c-1").take(3).collect();
        assert_eq!(names, ["c-1", "c-1+1", "c-1+2"]);
        assert!(names.iter().all(|name| founder(name) == "c-1"));
    }
}
