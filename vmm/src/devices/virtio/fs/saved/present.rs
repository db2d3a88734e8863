//! What of a tree is there where the guest goes on. Others may have changed the files since, or they are those of
//! another container.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};

use super::{Inode, Location, ROOT, StateError, Tree};

/// Files that are named in one message.
const NAMED_MAX: usize = 5;
/// Bytes of a path in a message.
const PATH_MAX: usize = 4096;

/// What was found: the files that are not there, and what those that somebody has open are now.
#[derive(Default)]
struct Found {
    gone: BTreeSet<u64>,
    modes: BTreeMap<u64, u32>,
}

impl Tree {
    /// Leaves out what is not there below `root`, with all that was in it: the guest learns of it when it looks there
    /// next. What it has open must be there, though, and be a directory or a file, as it was. Those that are to
    /// be `made` for this need not be there yet. The tree is one that can be given to a server.
    pub fn present(mut self, root: &Rc<OwnedFd>, made: &BTreeSet<u64>) -> Result<Self, StateError> {
        let found = self.look(root, made)?;
        self.check_open(&found, made)?;
        let open: BTreeSet<u64> = self.handles.iter().map(|handle| handle.inode).collect();
        let (mut left_out, mut fewer) = (BTreeSet::new(), BTreeMap::<u64, u64>::new());
        for inode in self.order()?.into_iter().rev() {
            let count = inode.count.saturating_sub(fewer.get(&inode.id).copied().unwrap_or(0));
            // What counted only for what was in it is nobody's any more.
            let unused = count == 0 && inode.id != ROOT && !open.contains(&inode.id);
            if found.gone.contains(&inode.id) || unused {
                left_out.insert(inode.id);
                if let Location::Path { parent, .. } = inode.location {
                    *fewer.entry(parent).or_default() += 1;
                }
            }
        }
        self.inodes.retain(|inode| !left_out.contains(&inode.id));
        for inode in &mut self.inodes {
            let fewer = fewer.get(&inode.id).copied().unwrap_or(0);
            inode.count = inode.count.saturating_sub(fewer).max(1);
        }
        Ok(self)
    }

    /// Looks for each file, name by name from the root, and never through a link. A directory is open while something
    /// in it has yet to be looked for.
    fn look(&self, root: &Rc<OwnedFd>, made: &BTreeSet<u64>) -> Result<Found, StateError> {
        let mut inside: BTreeMap<u64, Vec<&Inode>> = BTreeMap::new();
        for inode in &self.inodes {
            if let Location::Path { parent, .. } = inode.location {
                inside.entry(parent).or_default().push(inode);
            }
        }
        let open: BTreeSet<u64> = self.handles.iter().map(|handle| handle.inode).collect();
        let mut found = Found::default();
        let below_root = inside.remove(&ROOT).unwrap_or_default();
        let mut left: Vec<_> = below_root.into_iter().map(|inode| (inode, Some(Rc::clone(root)))).collect();
        while let Some((inode, directory)) = left.pop() {
            let Location::Path { name, .. } = &inode.location else { continue };
            let failed =
                |error: Errno| StateError(format!("{} cannot be found: {error}", self.path(inode.id)));
            let mode = match &directory {
                Some(directory) => mode(directory, name).map_err(failed)?,
                None => None,
            };
            match mode {
                Some(mode) if open.contains(&inode.id) => drop(found.modes.insert(inode.id, mode)),
                None if !made.contains(&inode.id) => drop(found.gone.insert(inode.id)),
                _ => (),
            }
            let Some(below) = inside.remove(&inode.id) else { continue };
            let is_directory = mode.is_some_and(|mode| mode & libc::S_IFMT == libc::S_IFDIR);
            let directory = match directory.filter(|_| is_directory) {
                Some(directory) => {
                    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    Some(Rc::new(openat(&*directory, name.as_str(), flags, Mode::empty()).map_err(failed)?))
                }
                None => None,
            };
            left.extend(below.into_iter().map(|inode| (inode, directory.clone())));
        }
        Ok(found)
    }

    /// Whether all that somebody has open is there and is what it was.
    fn check_open(&self, found: &Found, made: &BTreeSet<u64>) -> Result<(), StateError> {
        let mut wrong = BTreeMap::new();
        for handle in
            self.handles.iter().filter(|handle| handle.inode != ROOT && !made.contains(&handle.inode))
        {
            let is_directory = handle.flags() & libc::O_DIRECTORY != 0;
            let what = match found.modes.get(&handle.inode).map(|mode| mode & libc::S_IFMT) {
                None => "is not there",
                Some(libc::S_IFDIR) if !is_directory => "is a directory, and was none",
                Some(libc::S_IFREG) if is_directory => "is no directory any more",
                Some(libc::S_IFDIR | libc::S_IFREG) => continue,
                Some(_) => "is neither a file nor a directory",
            };
            wrong.insert(handle.inode, what);
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let named: Vec<String> =
            wrong.iter().take(NAMED_MAX).map(|(id, what)| format!("{} {what}", self.path(*id))).collect();
        let more = match wrong.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        Err(StateError(format!(
            "of what its guest has open, {}{more}; go on with the files that it had, such as the writable layer of its \
             container",
            named.join(", ")
        )))
    }

    /// Where a file is in the share, for messages: what is too long begins with dots.
    fn path(&self, id: u64) -> String {
        let inodes: BTreeMap<u64, &Inode> = self.inodes.iter().map(|inode| (inode.id, inode)).collect();
        let (mut path, mut next) = (String::new(), id);
        while let Some(Location::Path { parent, name }) = inodes.get(&next).map(|inode| &inode.location) {
            if path.len() + name.len() > PATH_MAX {
                return format!(".../{path}");
            }
            path = if path.is_empty() { name.clone() } else { format!("{name}/{path}") };
            next = *parent;
        }
        path
    }
}

/// Type and permissions of what has the name, if anything has.
fn mode(directory: &OwnedFd, name: &str) -> nix::Result<Option<u32>> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat.st_mode)),
        Err(Errno::ENOENT | Errno::ENAMETOOLONG) => Ok(None),
        Err(error) => Err(error),
    }
}
