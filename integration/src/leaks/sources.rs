//! Where the host is looked at: /proc, /sys, the directories of containerd and of ours, containerd itself.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Kind, Scope, Snapshot};
use crate::containerd::Api;
use crate::process;

/// For everything containerd is asked while looking.
const ASKING: Duration = Duration::from_secs(30);
/// Deeper than any state directory, less deep than an image.
const FILES_DEEP: usize = 5;
const CGROUPS_DEEP: usize = 8;

pub(super) fn look(scope: &Scope, into: &mut Snapshot) -> Result<()> {
    // containerd first: asking it opens descriptors, and those are gone again by the time they are counted.
    let api = Api::connect(&scope.containerd, "default", ASKING)?;
    for object in api.objects()? {
        into.add(Kind::ContainerdObject, object, "");
    }
    let namespaces = api.namespaces()?;
    drop(api);
    processes(into);
    mounts(into)?;
    network(into);
    sockets(into)?;
    tree(Path::new("/sys/fs/cgroup"), CGROUPS_DEEP, &mut |path, is_directory| {
        if is_directory && !is_shelf(path, &namespaces) {
            into.add(Kind::Cgroup, path.display().to_string(), "");
        }
    });
    for directory in &scope.directories {
        tree(directory, FILES_DEEP, &mut |path, _| {
            if !belongs_to_containerd(directory, path) && !is_shelf(path, &namespaces) {
                into.add(Kind::File, path.display().to_string(), "");
            }
        });
    }
    loop_devices(into);
    for name in names(Path::new("/sys/kernel/debug/kvm")) {
        // Directories here are PID-FD, one a machine; the files beside them are counters.
        if name.split_once('-').is_some_and(|(pid, fd)| is_number(pid) && is_number(fd)) {
            into.add(Kind::VirtualMachine, name, "");
        }
    }
    if let Some(only) = &scope.only {
        into.keep_only(only);
    }
    containerd_descriptors(&scope.containerd, into)
}

fn processes(into: &mut Snapshot) {
    for process in process::all().iter().filter(|process| !process.is_kernel_thread()) {
        // The state belongs to the name: a process that has become a zombie is another finding.
        let zombie = if process.is_zombie() { " (zombie)" } else { "" };
        let name = format!("{} {}{zombie}", process.pid, process.name);
        into.add(Kind::Process, name, process.arguments.clone());
    }
}

fn mounts(into: &mut Snapshot) -> Result<()> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    for line in text.lines() {
        if let Some((at, what)) = mount(line) {
            into.add(Kind::Mount, at, what);
        }
    }
    Ok(())
}

/// `36 35 98:0 /root /mnt rw - ext3 /dev/root rw` gives the place and what is mounted there.
fn mount(line: &str) -> Option<(String, String)> {
    let (place, what) = line.split_once(" - ")?;
    let at = place.split(' ').nth(4)?;
    let (kind, rest) = what.split_once(' ')?;
    Some((at.to_owned(), format!("{kind} {}", rest.split(' ').next()?)))
}

fn network(into: &mut Snapshot) {
    for interface in names(Path::new("/sys/class/net")) {
        into.add(Kind::NetworkInterface, interface, "");
    }
    let mut namespaces: BTreeMap<String, String> = BTreeMap::new();
    for process in process::all() {
        if let Ok(namespace) = fs::read_link(format!("/proc/{}/ns/net", process.pid)) {
            namespaces.entry(namespace.display().to_string()).or_insert_with(|| process.describe());
        }
    }
    for (namespace, holder) in namespaces {
        into.add(Kind::NetworkNamespace, namespace, format!("of {holder}"));
    }
    for directory in ["/run/netns", "/run/docker/netns"] {
        for name in names(Path::new(directory)) {
            into.add(Kind::NetworkNamespace, format!("{directory}/{name}"), "");
        }
    }
}

/// A listening socket, as /proc/net/unix shows it: its inode and its path.
struct Listener {
    inode: u64,
    path: String,
}

/// Abstract names begin with `@`; sockets without a name cannot be told apart, nor be found by anyone.
fn listeners(table: &str) -> Vec<Listener> {
    const ACCEPTS: u32 = 0x1_0000;
    let parse = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?.parse().ok()?;
        let path = fields.next()?.to_owned();
        (flags & ACCEPTS != 0).then_some(Listener { inode, path })
    };
    table.lines().skip(1).filter_map(parse).collect()
}

fn read_listeners() -> Result<Vec<Listener>> {
    Ok(listeners(&fs::read_to_string("/proc/net/unix").context("reading /proc/net/unix")?))
}

fn sockets(into: &mut Snapshot) -> Result<()> {
    for listener in read_listeners()? {
        into.add(Kind::Socket, listener.path, "");
    }
    Ok(())
}

fn loop_devices(into: &mut Snapshot) {
    for device in names(Path::new("/sys/block")) {
        if let Ok(file) = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")) {
            into.add(Kind::LoopDevice, device, file.trim().to_owned());
        }
    }
}

/// The process that listens at `socket`, by what its descriptors stand for.
fn containerd_descriptors(socket: &Path, into: &mut Snapshot) -> Result<()> {
    let wanted: HashSet<String> = read_listeners()?
        .into_iter()
        .filter(|listener| Path::new(&listener.path) == socket)
        .map(|listener| format!("socket:[{}]", listener.inode))
        .collect();
    for process in process::all() {
        let targets = descriptors(process.pid);
        if targets.iter().any(|target| wanted.contains(target)) {
            for target in targets {
                into.add(Kind::ContainerdFd, without_inode(&target), "");
            }
        }
    }
    Ok(())
}

fn descriptors(pid: i32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let target = |entry: fs::DirEntry| Some(fs::read_link(entry.path()).ok()?.display().to_string());
    entries.flatten().filter_map(target).collect()
}

/// `socket:[1234]` is one of many sockets: only their number can be compared.
fn without_inode(target: &str) -> &str {
    match target.split_once(":[") {
        Some((kind, rest)) if rest.trim_end_matches(']').chars().all(|c| c.is_ascii_digit()) => kind,
        _ => target,
    }
}

/// What containerd keeps in its own time: content and unpacked layers go with its garbage collection, which
/// no container waits for. What matters of them is in the list of its objects.
fn belongs_to_containerd(root: &Path, path: &Path) -> bool {
    const ITS_OWN: [&str; 3] =
        ["io.containerd.content.v1.", "io.containerd.snapshotter.v1.", "io.containerd.metadata.v1."];
    let inside = path.strip_prefix(root).unwrap_or(path);
    inside
        .components()
        .any(|part| ITS_OWN.iter().any(|own| part.as_os_str().to_string_lossy().starts_with(own)))
}

/// A place that containerd, runc or a shim of ours makes for the first container and keeps for all later ones. What
/// stands on a shelf counts, the shelf does not.
fn is_shelf(path: &Path, namespaces: &[String]) -> bool {
    const OF_ALL: [&str; 3] = ["fifo", "s", "runc"];
    const OF_OURS: [&str; 4] = ["tasks", "shims", "machines", "containerd-version"];
    const WITH_NAMESPACES: [&str; 5] = ["runc", "io.containerd.runtime.v2.task", "cgroup", "tasks", "shims"];
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (own, parent) = (name(path), path.parent().map(name).unwrap_or_default());
    let is_namespace = namespaces.contains(&own);
    // Control groups of version 1 have a hierarchy for each controller in between.
    let in_controller = path.parent().and_then(Path::parent) == Some(Path::new("/sys/fs/cgroup"));
    path.strip_prefix(TEMPLATES).is_ok_and(is_of_templates)
        || (parent == "containerd" && OF_ALL.contains(&own.as_str()))
        || (path.parent() == Some(Path::new("/run/supermachine")) && OF_OURS.contains(&own.as_str()))
        || (is_namespace && (WITH_NAMESPACES.contains(&parent.as_str()) || in_controller))
}

/// Templates, which the first container makes and all later ones use.
const TEMPLATES: &str = "/var/lib/supermachine/templates";

/// What is there for long; what is being made, or removed, is not.
fn is_of_templates(inside: &Path) -> bool {
    let first = inside.components().next().map(|first| Path::new(first.as_os_str()));
    let extension = first.and_then(Path::extension);
    extension.is_none_or(|extension| extension != "new" && extension != "old")
}

/// Calls `found` for everything below `root`, other file systems and symbolic links left alone.
fn tree(root: &Path, depth: usize, found: &mut impl FnMut(&Path, bool)) {
    let Ok(device) = fs::symlink_metadata(root).map(|data| data.dev()) else { return };
    descend(root, depth, device, found);
}

fn descend(directory: &Path, depth: usize, device: u64, found: &mut impl FnMut(&Path, bool)) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        found(&path, data.is_dir());
        // What is mounted here is listed as a mount; control groups of version 1 are one mount each.
        let crossing = data.dev() != device && !path.starts_with("/sys/fs/cgroup");
        if data.is_dir() && depth > 0 && !crossing {
            descend(&path, depth - 1, device, found);
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_whatever_their_optional_fields() {
        let found =
            mount("36 35 98:0 / /mnt/a rw,noatime shared:1 master:2 - overlay overlay rw,lowerdir=/x");
        assert_eq!(found, Some(("/mnt/a".into(), "overlay overlay".into())));
        assert_eq!(mount("36 35 98:0 / /m rw - tmpfs none rw"), Some(("/m".into(), "tmpfs none".into())));
        assert_eq!(mount("garbage"), None);
    }

    #[test]
    fn only_named_listeners_count() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 11 /run/a.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 12 /run/a.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 13 @abstract\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 14\n";
        let found: Vec<_> = listeners(table).into_iter().map(|l| (l.inode, l.path)).collect();
        assert_eq!(found, [(11, "/run/a.sock".into()), (13, "@abstract".into())]);
    }

    #[test]
    fn descriptors_of_one_kind_are_one_name() {
        for (target, name) in [
            ("socket:[123]", "socket"),
            ("pipe:[9]", "pipe"),
            ("anon_inode:[eventpoll]", "anon_inode:[eventpoll]"),
            ("/var/lib/x", "/var/lib/x"),
        ] {
            assert_eq!(without_inode(target), name);
        }
    }

    #[test]
    fn shelves_do_not_count_but_what_stands_on_them() {
        let namespaces = ["default".to_owned()];
        for (path, shelf) in [
            ("/run/containerd/fifo", true),
            ("/run/containerd/fifo/123", false),
            ("/run/containerd/s", true),
            ("/run/containerd/runc/default", true),
            ("/run/containerd/runc/default/it-1", false),
            ("/run/containerd/io.containerd.runtime.v2.task/default", true),
            ("/run/containerd/io.containerd.runtime.v2.task/other", false),
            ("/run/supermachine/tasks", true),
            ("/run/supermachine/tasks/default", true),
            ("/run/supermachine/tasks/default/it-1", false),
            ("/run/supermachine/machines/0123", false),
            ("/var/lib/supermachine/templates", true),
            ("/var/lib/supermachine/templates/0123/state", true),
            ("/var/lib/supermachine/templates/0123.lock", true),
            ("/var/lib/supermachine/templates/0123.new/state", false),
            ("/sys/fs/cgroup/default", true),
            ("/sys/fs/cgroup/memory/default", true),
            ("/sys/fs/cgroup/default/it-1", false),
        ] {
            assert_eq!(is_shelf(Path::new(path), &namespaces), shelf, "{path}");
        }
    }

    #[test]
    fn files_are_found_and_containerds_own_left_out() {
        let root = std::env::temp_dir().join(format!("leaks-{}", std::process::id()));
        let snapshots = root.join("io.containerd.snapshotter.v1.overlayfs/snapshots/3");
        fs::create_dir_all(&snapshots).unwrap();
        fs::create_dir_all(root.join("io.containerd.runtime.v2.task/default/it-1")).unwrap();
        let mut found = Vec::new();
        tree(&root, FILES_DEEP, &mut |path, _| {
            if !belongs_to_containerd(&root, path) {
                found.push(path.strip_prefix(&root).unwrap().display().to_string());
            }
        });
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(
            found,
            [
                "io.containerd.runtime.v2.task",
                "io.containerd.runtime.v2.task/default",
                "io.containerd.runtime.v2.task/default/it-1"
            ]
        );
    }
}
