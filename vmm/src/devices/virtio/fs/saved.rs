//! What the file server remembers of a guest: the files that it knows, each by its name in a directory that it knows
//! too, and those that it has open.
//!
//! The server writes this down in a format of its own, of which the types here are the second version. It is read
//! here and not only handed on: the server takes what it wrote for its own word, but a state comes from a file, where
//! a name could lead out of the share; and it leaves out what it cannot find, without a word to whoever saves.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::super::StateError;
use super::super::state::{at_most, decode, encode};

mod present;

/// The directory that is shared.
const ROOT: u64 = 1;
/// How a file can be open elsewhere again. What changes a file when it is opened (O_TRUNC), and what the server did
/// not do when the guest asked for it (O_DIRECT, O_APPEND), is not among it.
const FLAGS: i32 = libc::O_ACCMODE | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_DSYNC | libc::O_SYNC;
/// Files of which a tree can consist, and files that can be open in it: the server has a descriptor for each, and a
/// process can have no more.
const KNOWN_MAX: usize = 1 << 20;
/// No count of a guest comes near.
const COUNT_MAX: u64 = 1 << 62;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Versions {
    V1(Tree),
    V2(Tree, BTreeMap<u64, String>),
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    #[serde(deserialize_with = "at_most::<KNOWN_MAX, _, _>")]
    inodes: Vec<Inode>,
    next_inode: u64,
    #[serde(deserialize_with = "at_most::<KNOWN_MAX, _, _>")]
    handles: Vec<Handle>,
    next_handle: u64,
    negotiated: Negotiated,
}

/// What server and guest have agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Negotiated {
    writeback: bool,
    announce_submounts: bool,
    posix_acl: bool,
    sup_group_extension: bool,
}

/// A file that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Inode {
    id: u64,
    /// How often the guest was told of it, and how many others name it as their directory.
    count: u64,
    location: Location,
    /// Not used: not all file systems have such handles, and a copy of a tree has others.
    reference: Option<FileHandle>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Location {
    Root,
    Path { parent: u64, name: String },
    Lost,
    FullPath { name: String },
    Handle { handle: FileHandle },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileHandle {
    mount: u64,
    kind: i32,
    bytes: Vec<u8>,
}

/// A file that the guest has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Handle {
    id: u64,
    inode: u64,
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    Inode { flags: i32 },
}

impl Handle {
    fn flags(&self) -> i32 {
        let Source::Inode { flags } = self.source;
        flags
    }
}

fn contradicts(what: impl std::fmt::Display) -> StateError {
    StateError(format!("what was saved of its files contradicts itself: {what}"))
}

impl Tree {
    /// What the server wrote down. Files that have no place in the share any more, and that nobody has open, are
    /// left out: they are as gone for the guest as they are for the host.
    pub fn from_server(bytes: &[u8]) -> Result<Self, StateError> {
        // The server is the same program, so it is not read only where its format has changed.
        let mut tree = match decode(bytes)? {
            Versions::V2(tree, mounts) if mounts.is_empty() => tree,
            _ => return Err(StateError("its server has written down something else".into())),
        };
        let open: BTreeSet<u64> = tree.handles.iter().map(|handle| handle.inode).collect();
        tree.inodes.retain(|inode| inode.location != Location::Lost || open.contains(&inode.id));
        for handle in &mut tree.handles {
            handle.source = Source::Inode { flags: handle.flags() & FLAGS };
        }
        Ok(tree)
    }

    /// The files that somebody has open and that have no place in the share any more.
    pub fn lost(&self) -> Vec<u64> {
        let lost = self.inodes.iter().filter(|inode| inode.location == Location::Lost);
        lost.map(|inode| inode.id).collect()
    }

    #[cfg(test)]
    pub fn open(&self) -> usize {
        self.handles.len()
    }

    /// Gives each of those a name in the root, where the server will find it.
    pub fn place(&mut self, names: &BTreeMap<u64, String>) -> Result<(), StateError> {
        let mut placed = 0;
        for inode in self.inodes.iter_mut().filter(|inode| inode.location == Location::Lost) {
            let name =
                names.get(&inode.id).ok_or_else(|| contradicts(format!("the place of file {}", inode.id)))?;
            inode.location = Location::Path { parent: ROOT, name: name.clone() };
            placed += 1;
        }
        if placed != names.len() {
            return Err(contradicts("it has removed files that nobody has open"));
        }
        if let Some(root) = self.inodes.iter_mut().find(|inode| inode.id == ROOT) {
            root.count = root.count.saturating_add(placed as u64);
        }
        Ok(())
    }

    /// Whether the guest knows no files, because it has not mounted the share.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.handles.is_empty()
    }

    /// An error if it is not of one tree below the root, or has files open as no guest of this share could.
    pub fn check(&self, read_only: bool) -> Result<(), StateError> {
        self.order()?;
        self.check_handles(read_only)
    }

    /// As the server reads it, each directory before what is in it, once it was checked.
    pub fn to_server(&self) -> Result<Vec<u8>, StateError> {
        let order = self.order()?;
        // The server takes the first, and from there on always the last.
        let mut inodes: Vec<Inode> = order.into_iter().cloned().collect();
        if let Some(below) = inodes.get_mut(1..) {
            below.reverse();
        }
        encode(&Versions::V2(Self { inodes, ..self.clone() }, BTreeMap::new()))
    }

    /// All files, each after its directory.
    fn order(&self) -> Result<Vec<&Inode>, StateError> {
        let mut ids = BTreeSet::new();
        let mut below: BTreeMap<u64, Vec<&Inode>> = BTreeMap::new();
        let mut order = Vec::new();
        for inode in &self.inodes {
            let id = inode.id;
            if !ids.insert(id) || id >= self.next_inode || !(1..COUNT_MAX).contains(&inode.count) {
                return Err(contradicts(format!("file {id}")));
            }
            match &inode.location {
                Location::Root if id == ROOT && inode.reference.is_none() => order.push(inode),
                Location::Path { parent, name } if id != ROOT && inode.reference.is_none() => {
                    if !is_name(name) {
                        return Err(contradicts(format!("{name:?} is no name")));
                    }
                    below.entry(*parent).or_default().push(inode);
                }
                _ => return Err(contradicts(format!("the place of file {id}"))),
            }
        }
        let mut next = 0;
        while let Some(inode) = order.get(next) {
            let inside = below.remove(&inode.id).unwrap_or_default();
            // Each of them counts, or the server would forget the directory on the way.
            if inode.count < inside.len() as u64 {
                return Err(contradicts(format!("the count of file {}", inode.id)));
            }
            order.extend(inside);
            next += 1;
        }
        match below.first_key_value() {
            None => Ok(order),
            Some((parent, _)) => Err(contradicts(format!("file {parent} is not below the root"))),
        }
    }

    fn check_handles(&self, read_only: bool) -> Result<(), StateError> {
        let inodes: BTreeSet<u64> = self.inodes.iter().map(|inode| inode.id).collect();
        let mut ids = BTreeSet::new();
        for handle in &self.handles {
            let flags = handle.flags();
            let new = ids.insert(handle.id) && handle.id < self.next_handle;
            let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
            if !new || !inodes.contains(&handle.inode) || flags & !FLAGS != 0 || writes && read_only {
                return Err(contradicts(format!("open file {} with flags {flags:#o}", handle.id)));
            }
        }
        Ok(())
    }
}

/// Whether it names a file in a directory, and nothing elsewhere.
fn is_name(name: &str) -> bool {
    !["", ".", ".."].contains(&name) && !name.contains(['/', '\0'])
}

#[cfg(test)]
pub mod tests;
