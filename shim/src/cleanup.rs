//! `delete`: removes what a shim left that was killed, whenever that was.
//!
//! A shim that still runs is ended first, if it is this container's own: containerd calls this when it has given the
//! shim up. One that serves other containers, too, as that of a pod does, stays for them; it goes with the last, or with
//! the one that began it.

use std::error::Error as Failure;
use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::args::Args;
use crate::deadlines;
use crate::journal::{Journal, undo_all};
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
    let members = paths.tasks().into_iter().filter(|(member, of)| *of == group && member != id);
    let members: Vec<_> = members.map(|(member, _)| member).collect();
    // Of one that is deleted already containerd may ask this, too, as it lets go of the shim.
    let is_the_shims = group == id && paths.task(id).exists();
    if !is_the_shims && !members.is_empty() {
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
    let members: Vec<_> =
        members.iter().map(|member| Journal::load(&paths.task(member))).collect::<Result<_, _>>()?;
    undo_all(members.iter().chain([&own]), Some(&machine))?;
    if paths.shim().exists() {
        fs::remove_dir_all(paths.shim())?;
    }
    Ok(pid)
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

        // That of one that is deleted already leaves its shim alone, as long as there are others.
        fs::rename(paths.task("c1"), root.join("aside")).unwrap();
        remove(&root, "ns", "c1").unwrap();
        assert!(daemon.is_alive() && monitor.is_alive() && paths.task("c2").exists());
        fs::rename(root.join("aside"), paths.task("c1")).unwrap();
        // So does that of a member.
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

        // The last of a group whose first container is gone takes the shim along.
        let paths = Paths::new(&root, "ns", "c4+1");
        let daemon = sleeper();
        fs::create_dir_all(paths.shim()).unwrap();
        fs::write(paths.shim().join("daemon"), serde_json::to_vec(&daemon).unwrap()).unwrap();
        for id in ["c4", "c5"] {
            Journal::create(&paths.task(id)).unwrap();
            fs::write(paths.task(id).join("group"), "c4+1").unwrap();
        }
        remove(&root, "ns", "c4").unwrap();
        assert!(daemon.is_alive());
        remove(&root, "ns", "c5").unwrap();
        assert!(!daemon.is_alive() && !paths.shim().exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
