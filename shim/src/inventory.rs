//! What there is on this host, as the directories tell: for an operator, who has no connection to any shim.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::machine::TEMPLATE;
use crate::paths::{Paths, group_of};
use crate::process::Process;

/// A container that has a directory.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its namespace of containerd's.
    pub namespace: String,
    /// Its id.
    pub id: String,
    /// Where its things are.
    pub paths: Paths,
}

impl Entry {
    /// The process that stands for it, if that lives.
    pub fn holder(&self) -> Option<Process> {
        alive(&self.paths.task(&self.id))
    }

    /// The monitor of its machine, if that lives.
    pub fn monitor(&self) -> Option<Process> {
        alive(&self.paths.machine())
    }

    /// Where its shim listens.
    pub fn address(&self) -> Option<PathBuf> {
        fs::read_to_string(self.paths.shim().join("address")).ok().map(PathBuf::from)
    }

    /// What the console of its machine showed.
    pub fn console(&self) -> PathBuf {
        self.paths.machine().join("console")
    }

    /// What its shim logged.
    pub fn log(&self) -> PathBuf {
        self.paths.shim().join("log")
    }
}

/// The first living process in a journal.
fn alive(directory: &Path) -> Option<Process> {
    if !directory.is_dir() {
        return None;
    }
    Journal::load(directory).ok()?.processes().into_iter().find(Process::is_alive)
}

/// How many machines run on each template, by its name.
pub fn running_on(root: &Path) -> BTreeMap<String, usize> {
    let machines = root.join("machines");
    let mut counts = BTreeMap::new();
    for directory in names(&machines).into_iter().map(|name| machines.join(name)) {
        if let Ok(template) = fs::read_to_string(directory.join(TEMPLATE))
            && alive(&directory).is_some()
        {
            *counts.entry(template).or_default() += 1;
        }
    }
    counts
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// All containers below `root`, or those of one namespace.
pub fn list(root: &Path, namespace: Option<&str>) -> Vec<Entry> {
    let tasks = root.join("tasks");
    let namespaces = names(&tasks).into_iter().filter(|name| namespace.is_none_or(|only| only == name));
    let mut found = Vec::new();
    for namespace in namespaces {
        for id in names(&tasks.join(&namespace)) {
            let group = group_of(root, &namespace, &id).unwrap_or_else(|| id.clone());
            let paths = Paths::new(root, &namespace, &group);
            found.push(Entry { namespace: namespace.clone(), id, paths });
        }
    }
    found
}

/// The container of that id, or the only one whose id begins so.
pub fn find(root: &Path, namespace: Option<&str>, id: &str) -> Result<Entry> {
    let all = list(root, namespace);
    let exact: Vec<_> = all.iter().filter(|entry| entry.id == id).collect();
    let begin = || all.iter().filter(|entry| !id.is_empty() && entry.id.starts_with(id)).collect();
    let found: Vec<_> = if exact.is_empty() { begin() } else { exact };
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(Error::not_found(format!(
            "there is no container {id}; `supermachine ps` lists those there are"
        ))),
        several => {
            let names: Vec<_> =
                several.iter().map(|entry| format!("{}/{}", entry.namespace, entry.id)).collect();
            let names = names.join(", ");
            Err(Error::invalid(format!(
                "{id} may be {names}; write more of it, or name its namespace with -n"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Made;

    #[test]
    fn only_machines_that_live_run_on_templates() {
        let root = std::env::temp_dir().join(format!("inventory-on-{}", std::process::id()));
        let sleeper = crate::process::sleeper();
        let dead = Process { started: sleeper.started + 1, ..sleeper };
        for (name, process, template) in [
            ("a", sleeper, Some("t")),
            ("b", sleeper, Some("t")),
            ("c", dead, Some("t")),
            ("d", sleeper, None),
        ] {
            let directory = root.join("machines").join(name);
            Journal::create(&directory).unwrap().note(Made::Process(process)).unwrap();
            if let Some(template) = template {
                fs::write(directory.join(TEMPLATE), template).unwrap();
            }
        }
        assert_eq!(running_on(&root), BTreeMap::from([("t".to_owned(), 2)]));
        assert!(running_on(&root.join("none")).is_empty());
        sleeper.kill(std::time::Duration::from_secs(5)).unwrap();
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn containers_are_found_by_what_tells_them_apart() {
        let root = std::env::temp_dir().join(format!("inventory-{}", std::process::id()));
        for (namespace, id, group) in
            [("default", "web", "web"), ("default", "worker", "web"), ("k8s.io", "web", "p")]
        {
            let directory = root.join("tasks").join(namespace).join(id);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("group"), group).unwrap();
        }
        let all: Vec<_> =
            list(&root, None).iter().map(|one| format!("{}/{}", one.namespace, one.id)).collect();
        assert_eq!(all, ["default/web", "default/worker", "k8s.io/web"]);
        assert_eq!(list(&root, Some("k8s.io")).len(), 1);
        assert!(list(&root, Some("none")).is_empty());

        let found = find(&root, None, "wo").unwrap();
        assert_eq!((found.id.as_str(), found.paths.group()), ("worker", "web"));
        assert_eq!(find(&root, Some("default"), "web").unwrap().id, "web");
        assert!(find(&root, None, "web").unwrap_err().text.contains("default/web, k8s.io/web"));
        assert!(find(&root, Some("default"), "w").unwrap_err().text.contains("default/worker"));
        assert!(find(&root, None, "x").is_err() && find(&root, None, "").is_err());
        let entry = &list(&root, Some("k8s.io"))[0];
        assert_eq!((entry.holder(), entry.monitor(), entry.address()), (None, None, None));
        fs::remove_dir_all(&root).unwrap();
    }
}
