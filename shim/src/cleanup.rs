//! `delete`: removes what a shim left that was killed, whenever that was.
//!
//! A shim that still runs is ended first, if it is this container's own: containerd calls this when it has given the
//! shim up. The shim of a pod serves other containers, and stays.

use std::error::Error as Failure;
use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::args::Args;
use crate::deadlines;
use crate::journal::Journal;
use crate::paths::{Paths, ROOT, group_of};
use crate::process::Process;
use crate::time;

/// Of a container whose shim is gone: as if it had been killed.
const KILLED: u32 = 128 + 9;

/// `delete`: the answer for containerd. What does not exist is removed already.
pub fn delete(args: &Args) -> Result<Vec<u8>, Box<dyn Failure>> {
    if args.id.is_empty() || args.namespace.is_empty() {
        return Err("delete takes -namespace and -id".into());
    }
    let pid = remove(Path::new(ROOT), &args.namespace, &args.id)?;
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: time::timestamp(time::now()),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Returns the number of the process that stood for the container, if it is known.
fn remove(root: &Path, namespace: &str, id: &str) -> std::io::Result<u32> {
    let group = group_of(root, namespace, id).unwrap_or_else(|| id.to_owned());
    let paths = Paths::new(root, namespace, &group);
    let own = Journal::load(&paths.task(id))?;
    let pid = own.processes().first().map_or(0, |process| process.pid);
    if group != id {
        own.undo()?;
        return Ok(pid);
    }
    if let Some(daemon) = daemon(&paths.shim()) {
        daemon.kill(deadlines::KILLED)?;
    }
    // A socket whose shim is gone.
    if let Ok(address) = fs::read_to_string(paths.shim().join("address")) {
        let _ = fs::remove_file(PathBuf::from(address));
    }
    let machine = Journal::load(&paths.machine())?;
    let members = paths.tasks().into_iter().filter(|(member, of)| *of == group && member != id);
    let members: Vec<_> =
        members.map(|(member, _)| Journal::load(&paths.task(&member))).collect::<Result<_, _>>()?;
    // The machine first, as what others made is in use by it.
    let mut first = None;
    for process in machine.processes() {
        first = first.or(process.kill(deadlines::KILLED).err());
    }
    for journal in members.iter().chain([&own, &machine]) {
        first = first.or(journal.undo().err());
    }
    if first.is_none() && paths.shim().exists() {
        fs::remove_dir_all(paths.shim())?;
    }
    first.map_or(Ok(pid), Err)
}

fn daemon(directory: &Path) -> Option<Process> {
    serde_json::from_slice(&fs::read(directory.join("daemon")).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use crate::journal::Made;
    use crate::process::sleeper;

    use super::*;

    #[test]
    fn what_a_killed_shim_left_is_found_and_removed() {
        let root = std::env::temp_dir().join(format!("cleanup-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        assert_eq!(remove(&root, "ns", "c1").unwrap(), 0);
        let paths = Paths::new(&root, "ns", "c1");
        let (daemon, monitor, holder, other) = (sleeper(), sleeper(), sleeper(), sleeper());
        let task = Journal::create(&paths.task("c1")).unwrap();
        fs::create_dir_all(paths.shim()).unwrap();
        let machine = Journal::create(&paths.machine()).unwrap();
        let member = Journal::create(&paths.task("c2")).unwrap();
        let stranger = Journal::create(&paths.task("c3")).unwrap();
        for (id, group) in [("c1", "c1"), ("c2", "c1"), ("c3", "c3")] {
            fs::write(paths.task(id).join("group"), group).unwrap();
        }
        task.note(Made::Process(holder)).unwrap();
        member.note(Made::File(root.join("f"))).unwrap();
        machine.note(Made::Process(monitor)).unwrap();
        stranger.note(Made::Process(other)).unwrap();
        fs::create_dir_all(paths.vsock()).unwrap();
        fs::write(paths.shim().join("daemon"), serde_json::to_vec(&daemon).unwrap()).unwrap();
        let socket = root.join("socket");
        fs::write(&socket, "").unwrap();
        fs::write(paths.shim().join("address"), socket.as_os_str().as_encoded_bytes()).unwrap();

        // A member's removal leaves its shim alone.
        remove(&root, "ns", "c2").unwrap();
        assert!(daemon.is_alive() && monitor.is_alive() && !paths.task("c2").exists());
        assert_eq!(remove(&root, "ns", "c1").unwrap(), holder.pid);
        for process in [daemon, monitor, holder] {
            assert!(!process.is_alive());
        }
        assert!(other.is_alive());
        assert!(!socket.exists() && !paths.machine().exists() && !paths.shim().exists());
        assert!(paths.task("c3").exists());
        remove(&root, "ns", "c3").unwrap();
        assert!(!other.is_alive());
        fs::remove_dir_all(&root).unwrap();
    }
}
