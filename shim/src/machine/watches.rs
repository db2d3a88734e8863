//! What others do in directories that a machine's processes watch, on its way to these.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use agent_api::MOST_NEWS;
use agent_api::agent::{News, news::What};
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::fanotify::{Event, Group, Handle, OF_DIRECTORY, OF_FILE, handle_of};

/// What happens within this time is told together.
const TOGETHER: Duration = Duration::from_millis(20);

/// What is watched on the host for a machine.
pub struct Watches {
    tree: OwnedFd,
    /// Who does what the machine itself does.
    monitor: u32,
    marks: Marks,
}

/// What is watched, and what it is called.
#[derive(Default)]
struct Marks {
    group: Option<AsyncFd<Group>>,
    places: HashSet<PathBuf>,
    handles: HashMap<Handle, Vec<PathBuf>>,
}

impl Watches {
    /// Of the machine that shares `tree` by its monitor.
    pub fn new(tree: &Path, monitor: u32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let tree = nix::fcntl::open(tree, flags, Mode::empty())?;
        Ok(Self { tree, monitor, marks: Marks::default() })
    }

    /// Watches these places, and no others. What cannot be watched, as it is gone or none of the machine's, is not; if nothing
    /// can, that is an error.
    pub fn set(&mut self, wanted: Vec<PathBuf>) -> io::Result<()> {
        let wanted: HashSet<_> = wanted.into_iter().collect();
        if !self.marks.places.is_subset(&wanted) {
            self.marks = Marks::default();
        }
        let mut failed = None;
        for place in wanted {
            if !self.marks.places.contains(&place) {
                failed = self.add(place).err().or(failed);
            }
        }
        match failed {
            Some(error) if self.marks.handles.is_empty() => Err(error),
            _ => Ok(()),
        }
    }

    fn add(&mut self, place: PathBuf) -> io::Result<()> {
        let file = self.find(&place)?;
        let what = if is(fstat(&file)?.st_mode, SFlag::S_IFDIR) { OF_DIRECTORY } else { OF_FILE };
        let group = match &mut self.marks.group {
            Some(group) => group,
            none => {
                // SAFETY: a group has one descriptor, which is its own until it is dropped.
                none.insert(unsafe { AsyncFd::register_with_interest(Group::new()?, Interest::READABLE) }?)
            }
        };
        group.get_ref().add(&file, what)?;
        self.marks.handles.entry(handle_of(&file)?).or_default().push(place.clone());
        self.marks.places.insert(place);
        Ok(())
    }

    /// Opens a place of a bind, as its guest calls it, and not to read or write. Links that the guest has laid are not followed.
    fn find(&self, place: &Path) -> io::Result<OwnedFd> {
        let is_plain = place.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_plain || place.components().nth(1) != Some(Component::Normal("binds".as_ref())) {
            return Err(io::Error::other(format!("{} is no place of a bind", place.display())));
        }
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(openat2(&self.tree, place, how)?)
    }

    /// What has happened, when something has.
    pub async fn next(&self) -> io::Result<Vec<News>> {
        let Some(group) = &self.marks.group else { return std::future::pending().await };
        let mut all = Vec::new();
        loop {
            let mut ready = group.readable().await?;
            sleep(TOGETHER).await;
            loop {
                let events = group.get_ref().read()?;
                if events.is_empty() {
                    ready.clear_ready();
                    break;
                }
                for event in events {
                    self.tell(&event, &mut all);
                }
                if all.len() >= MOST_NEWS {
                    break;
                }
            }
            if !all.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Adds what is to be told of it.
    fn tell(&self, event: &Event, all: &mut Vec<News>) {
        if event.pid == self.monitor {
            return;
        }
        let mut add = |place: &Path, name: &[u8], what: What, kind: SFlag| {
            let news = News {
                place: place.as_os_str().as_bytes().to_vec(),
                name: name.to_vec(),
                what: what.into(),
                type_: kind.bits(),
                ..News::default()
            };
            // A file that is written to is, often.
            if all.len() < MOST_NEWS && all.last() != Some(&news) {
                all.push(news);
            }
        };
        let has = |bits: u64| event.mask & bits != 0;
        let changed = has(libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE) && !has(libc::FAN_ONDIR);
        let is_itself = |handle: &Handle| self.marks.handles.get(handle).into_iter().flatten();
        if let Some((directory, name)) = event.name.as_ref().filter(|(_, name)| name != b".") {
            for place in is_itself(directory) {
                let found = self.kind_of(place, name);
                let appeared = has(libc::FAN_CREATE | libc::FAN_MOVED_TO);
                if has(libc::FAN_DELETE | libc::FAN_MOVED_FROM) && (found.is_none() || appeared) {
                    let gone = if has(libc::FAN_ONDIR) { SFlag::S_IFDIR } else { SFlag::S_IFREG };
                    add(place, name, What::VANISHED, gone);
                }
                let Some(kind) = found else { continue };
                if appeared {
                    add(place, name, What::APPEARED, kind);
                }
                if changed {
                    add(place, name, What::CHANGED, kind);
                }
                if has(libc::FAN_ATTRIB) {
                    add(place, name, What::ATTRIBUTES, kind);
                }
            }
        }
        let by_name =
            event.name.as_ref().is_some_and(|(at, name)| name != b"." && self.marks.handles.contains_key(at));
        let itself =
            event.itself.iter().chain(event.name.as_ref().filter(|(_, name)| name == b".").map(|(at, _)| at));
        for place in itself.flat_map(is_itself) {
            let gone =
                has(libc::FAN_DELETE_SELF | libc::FAN_MOVE_SELF | libc::FAN_DELETE | libc::FAN_MOVED_FROM);
            // Who watches a file hears of what is done to its name in a directory that is watched.
            if by_name && !gone {
                continue;
            }
            if changed {
                add(place, b"", What::CHANGED, SFlag::S_IFREG);
            }
            if has(libc::FAN_ATTRIB) || gone {
                add(place, b"", What::ATTRIBUTES, SFlag::S_IFREG);
            }
        }
    }

    fn kind_of(&self, place: &Path, name: &[u8]) -> Option<SFlag> {
        let directory = self.find(place).ok()?;
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let about = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        Some(SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT)
    }
}

fn is(mode: u32, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == kind
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use tokio::time::timeout;

    use super::*;

    /// A tree with a bind, until it is dropped.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let tree = std::env::temp_dir().join(format!("watches-{name}-{}", std::process::id()));
            fs::create_dir_all(tree.join("c1/binds/0/below")).unwrap();
            Self(tree)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn told(news: &[News]) -> Vec<(String, String, What)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        news.iter().map(|one| (text(&one.place), text(&one.name), one.what.enum_value_or_default())).collect()
    }

    /// What is watched, where this process may.
    fn watching(tree: &Tree, monitor: u32, places: &[&str]) -> Option<Watches> {
        let mut watches = Watches::new(&tree.0, monitor).unwrap();
        match watches.set(places.iter().map(PathBuf::from).collect()) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            set => set.map(|()| Some(watches)).unwrap(),
        }
    }

    #[tokio::test]
    async fn what_others_do_is_told() {
        let tree = Tree::new("others");
        let bind = "c1/binds/0";
        let Some(watches) = watching(&tree, 1, &[bind]) else { return };
        let at = tree.0.join(bind);
        let one = |name: &str, what| (bind.to_owned(), name.to_owned(), what);
        fs::write(at.join("a"), "1").unwrap();
        assert_eq!(told(&watches.next().await.unwrap()), [one("a", What::APPEARED), one("a", What::CHANGED)]);
        fs::set_permissions(at.join("a"), Permissions::from_mode(0o600)).unwrap();
        assert_eq!(told(&watches.next().await.unwrap()), [one("a", What::ATTRIBUTES)]);
        fs::rename(at.join("a"), at.join("b")).unwrap();
        assert_eq!(
            told(&watches.next().await.unwrap()),
            [one("a", What::VANISHED), one("b", What::APPEARED)]
        );
        fs::remove_dir(at.join("below")).unwrap();
        let news = watches.next().await.unwrap();
        assert_eq!(told(&news), [one("below", What::VANISHED)]);
        assert_eq!(news[0].type_, SFlag::S_IFDIR.bits());
    }

    #[tokio::test]
    async fn what_the_machine_itself_does_is_not() {
        let tree = Tree::new("own");
        let Some(watches) = watching(&tree, std::process::id(), &["c1/binds/0"]) else { return };
        fs::write(tree.0.join("c1/binds/0/a"), "1").unwrap();
        assert!(timeout(Duration::from_millis(200), watches.next()).await.is_err());
    }

    #[tokio::test]
    async fn only_places_of_binds_are_watched() {
        let tree = Tree::new("wrong");
        symlink("/etc", tree.0.join("c1/binds/0/link")).unwrap();
        fs::create_dir(tree.0.join("c1/rootfs")).unwrap();
        let mut watches = Watches::new(&tree.0, 1).unwrap();
        for wrong in [
            "c1/rootfs",
            "c1",
            "",
            "/etc",
            "../binds/0",
            "c1/binds/0/link/passwd",
            "c1/binds/0/../../..",
            "c1/binds/1",
        ] {
            assert!(watches.set(vec![wrong.into()]).is_err(), "{wrong}");
        }
        // What comes after that is watched all the same.
        match watches.set(vec!["c1/binds/0".into()]) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            set => set.unwrap(),
        }
    }
}
