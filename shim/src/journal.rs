//! What was made, written down before it is made; and the one way of undoing it.
//!
//! A `Create` that fails, `Delete`, and the `delete` command after a shim was killed all undo the same list, last
//! things first. Each entry can be undone at any moment around its making: what is not there is fine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{debug, warn};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::deadlines;
use crate::hooks::Run;
use crate::machine::net::{self, Redirected};
use crate::process::Process;
use crate::template::store;
use crate::warm::upper;

/// Something that was made, or was about to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Made {
    /// A directory with all that we have put in it; no other file system below it is touched.
    Tree(PathBuf),
    /// A file or socket.
    File(PathBuf),
    /// A mount, and all that are below it.
    Mount(PathBuf),
    /// A process.
    Process(Process),
    /// A cgroup, and those of its parents that are then empty, up to another directory.
    Cgroup {
        /// It.
        path: PathBuf,
        /// What stays.
        keep: PathBuf,
    },
    /// A template that is not made yet, unless somebody else makes it now.
    Making(PathBuf),
    /// An empty directory that was filled.
    Filled {
        /// It.
        path: PathBuf,
        /// Its mode before.
        mode: u32,
        /// Its owner before.
        owner: (u32, u32),
    },
    /// One that was filled stays so: what is in it is its container's by now.
    Kept(PathBuf),
    /// Something in a network namespace that outlives the machine.
    Redirected(Redirected),
    /// A container for which hooks run when it is gone.
    Poststop(Run),
}

/// A list of what was made.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    made: Mutex<Vec<Made>>,
}

/// The name of the file.
pub const NAME: &str = "journal";

impl Journal {
    /// A new one in `directory`, which is made, and is its first entry. What an older one there says is undone.
    pub fn create(directory: &Path) -> io::Result<Self> {
        Self::load(directory)?.undo()?;
        fs::create_dir_all(directory)?;
        let journal = Self { path: directory.join(NAME), made: Mutex::default() };
        File::create(&journal.path)?;
        journal.note(Made::Tree(directory.to_owned()))?;
        Ok(journal)
    }

    /// The one in `directory`; if there is none, one that has only the directory.
    pub fn load(directory: &Path) -> io::Result<Self> {
        let path = directory.join(NAME);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            other => other?,
        };
        // A line that is cut off is of something that was not made.
        let mut made: Vec<Made> = text.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
        if made.is_empty() && directory.exists() {
            made.push(Made::Tree(directory.to_owned()));
        }
        Ok(Self { path, made: Mutex::new(made) })
    }

    /// To be called before `made` is.
    pub fn note(&self, made: Made) -> io::Result<()> {
        let mut line = serde_json::to_vec(&made)?;
        line.push(b'\n');
        let mut list = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        OpenOptions::new().append(true).open(&self.path)?.write_all(&line)?;
        list.push(made);
        Ok(())
    }

    /// Its processes.
    pub fn processes(&self) -> Vec<Process> {
        let list = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let process = |made: &Made| if let Made::Process(process) = made { Some(*process) } else { None };
        list.iter().filter_map(process).collect()
    }

    /// Undoes all of it, last things first, whatever fails on the way. What failed is kept for another attempt.
    pub fn undo(&self) -> io::Result<()> {
        let list = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        let mut failed = Vec::new();
        let mut first = None;
        let kept: Vec<_> = list
            .iter()
            .filter_map(|made| if let Made::Kept(path) = made { Some(path.clone()) } else { None })
            .collect();
        for made in list.into_iter().rev() {
            if matches!(&made, Made::Filled { path, .. } if kept.contains(path)) {
                continue;
            }
            // The journal itself is in the first directory: it goes last, and only if nothing else is left.
            let keep =
                first.is_some() && matches!(&made, Made::Tree(path) if self.path.parent() == Some(path));
            if keep {
                failed.push(made);
                continue;
            }
            debug!("undoing {made:?}");
            if let Err(error) = undo(&made) {
                warn!("undoing {made:?}: {error}");
                first.get_or_insert_with(|| {
                    io::Error::new(error.kind(), format!("undoing {made:?}: {error}"))
                });
                failed.push(made);
            }
        }
        failed.reverse();
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = failed;
        first.map_or(Ok(()), Err)
    }
}

/// Undoes what was made for containers, and for their machine if it ends with them, whatever fails on the way. Its processes
/// are ended first: they use what was made for the others, cgroups among it.
pub fn undo_all<'a>(
    containers: impl IntoIterator<Item = &'a Journal>,
    machine: Option<&'a Journal>,
) -> io::Result<()> {
    let ended = machine.iter().flat_map(|journal| journal.processes());
    let mut first = None;
    for process in ended {
        first = first.or(process.kill(deadlines::KILLED).err());
    }
    for journal in containers.into_iter().chain(machine) {
        first = first.or(journal.undo().err());
    }
    first.map_or(Ok(()), Err)
}

fn undo(made: &Made) -> io::Result<()> {
    match made {
        Made::Tree(path) => remove_tree(path),
        Made::File(path) => fine_if_missing(fs::remove_file(path)),
        Made::Mount(path) => unmount(path),
        Made::Process(process) => process.kill(deadlines::KILLED),
        Made::Cgroup { path, keep } => remove_cgroup(path, keep),
        Made::Making(path) => store::abandoned(path),
        Made::Filled { path, mode, owner } => fine_if_missing(empty(path, *mode, *owner)),
        Made::Kept(_) => Ok(()),
        Made::Redirected(redirected) => net::undo(redirected),
        Made::Poststop(run) => {
            run.all_despite_errors();
            Ok(())
        }
    }
}

/// Empties a directory, which is then as it was.
fn empty(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> io::Result<()> {
    upper::clear(path)?;
    std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn fine_if_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes off everything that is mounted at `path`.
fn unmount(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount, or not there.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes a directory, but nothing that is on another file system than it: not what a mount shows that was
/// forgotten.
fn remove_tree(path: &Path) -> io::Result<()> {
    let device = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?.dev(),
    };
    remove_on(path, device)
}

fn remove_on(path: &Path, device: u64) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.dev() != device {
        let text = format!("{} is a mount, whose files are not removed", path.display());
        return Err(io::Error::new(ErrorKind::ResourceBusy, text));
    }
    if !metadata.is_dir() {
        return fine_if_missing(fs::remove_file(path));
    }
    for entry in fs::read_dir(path)? {
        remove_on(&entry?.path(), device)?;
    }
    fine_if_missing(fs::remove_dir(path))
}

/// The processes of a cgroup may take a moment to leave it after they have ended. Ours have: whoever is in it then is
/// of a container that was given the same one, and removes it.
fn remove_cgroup(path: &Path, keep: &Path) -> io::Result<()> {
    let until = Instant::now() + deadlines::CGROUP;
    loop {
        match fine_if_missing(fs::remove_dir(path)) {
            Ok(()) => break,
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error),
            Err(_) if Instant::now() < until => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(_) if populated(path) => {
                log::info!("the cgroup {} stays, since others are in it", path.display());
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    // Parents that others still use stay.
    for parent in path.ancestors().skip(1).take_while(|parent| parent.starts_with(keep) && *parent != keep) {
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

fn populated(cgroup: &Path) -> bool {
    let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("journal-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn another_process_undoes_the_same() {
        let directory = scratch("undo");
        let journal = Journal::create(&directory.join("a")).unwrap();
        let (tree, file) = (directory.join("tree"), directory.join("file"));
        for made in [Made::Tree(tree.clone()), Made::File(file.clone()), Made::File(directory.join("never"))]
        {
            journal.note(made).unwrap();
        }
        fs::create_dir_all(tree.join("x/y")).unwrap();
        std::os::unix::fs::symlink("/", tree.join("link")).unwrap();
        fs::write(&file, "").unwrap();
        journal.note(Made::Process(crate::process::sleeper())).unwrap();
        drop(journal);
        OpenOptions::new()
            .append(true)
            .open(directory.join("a/journal"))
            .unwrap()
            .write_all(b"{\"tree\":\"/et")
            .unwrap();

        let journal = Journal::load(&directory.join("a")).unwrap();
        assert_eq!(journal.processes().len(), 1);
        journal.undo().unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        assert!(journal.processes().is_empty());
        // Again, and without anything there.
        journal.undo().unwrap();
        Journal::load(&directory.join("a")).unwrap().undo().unwrap();
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_was_filled_is_emptied_unless_it_is_the_containers() {
        let directory = scratch("filled");
        for kept in [false, true] {
            let (own, filled) = (directory.join(format!("c{kept}")), directory.join(format!("f{kept}")));
            fs::create_dir_all(&filled).unwrap();
            let about = fs::metadata(&filled).unwrap();
            let (mode, owner) = (about.mode() & 0o7777, (about.uid(), about.gid()));
            let journal = Journal::create(&own).unwrap();
            journal.note(Made::Filled { path: filled.clone(), mode, owner }).unwrap();
            fs::create_dir(filled.join("etc")).unwrap();
            fs::set_permissions(&filled, fs::Permissions::from_mode(0o700)).unwrap();
            if kept {
                journal.note(Made::Kept(filled.clone())).unwrap();
            }
            // By another process, after this one was killed.
            Journal::load(&own).unwrap().undo().unwrap();
            let now = fs::metadata(&filled).unwrap().mode() & 0o7777;
            assert_eq!((filled.join("etc").exists(), now == mode), (kept, !kept), "{now:o}");
            assert!(!own.exists());
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_machine_has_ended_before_anything_is_undone_that_it_may_use() {
        let directory = scratch("all");
        let machine = Journal::create(&directory.join("machine")).unwrap();
        let process = crate::process::sleeper();
        machine.note(Made::Process(process)).unwrap();
        let container = Journal::create(&directory.join("container")).unwrap();
        let alive = directory.join("alive");
        let mut hook = oci_spec::runtime::Hook::default();
        let script = format!("kill -0 {} && touch {}", process.pid, alive.display());
        hook.set_path("/bin/sh".into());
        hook.set_args(Some(["sh", "-c", &script].map(str::to_owned).to_vec()));
        let run = Run { hooks: vec![hook], state: oci_spec::runtime::State::default(), bundle: "/".into() };
        // It runs when it is its turn to be undone.
        container.note(Made::Poststop(run)).unwrap();
        undo_all([&container], Some(&machine)).unwrap();
        assert!(!process.is_alive() && !alive.exists());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_cannot_be_undone_is_kept() {
        let directory = scratch("keep");
        let journal = Journal::create(&directory).unwrap();
        // A directory is no file.
        journal.note(Made::File(PathBuf::from("/proc"))).unwrap();
        journal.undo().unwrap_err();
        assert!(directory.join(NAME).exists());
        assert_eq!(Journal::load(&directory).unwrap().made.into_inner().unwrap().len(), 2);
        fs::remove_dir_all(&directory).unwrap();
    }
}
