//! How a snapshot comes to its name: written aside, brought to disk, renamed. So there is all of it or nothing, and
//! none is ever written over one that a machine may be running on.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::{BASE_FILE, Error, Header, MEMORY_FILE, STATE_FILE, read_header};

/// What a directory that has not got its name yet ends with.
const ASIDE: &str = ".part";

/// Makes the snapshot `directory`, which must not be there yet: `write` fills the files of its state and of its RAM.
/// What fails leaves nothing. A process that dies in it leaves a directory for which [`is_aside`] is true.
pub fn make<T, E: From<Error>>(
    directory: &Path,
    write: impl FnOnce(&File, &File) -> Result<T, E>,
) -> Result<T, E> {
    let aside = Aside::beside(directory)?;
    let (state, memory) = (aside.file(STATE_FILE)?, aside.file(MEMORY_FILE)?);
    let written = write(&state, &memory)?;
    aside.keep(directory, &[state, memory])?;
    Ok(written)
}

/// The same, for RAM that lies over that of the snapshot in `below`, of which a link is taken. Its machine must have come
/// from there, and `write` must write [`Form::Over`](super::Form::Over).
pub fn make_over<T, E: From<Error>>(
    directory: &Path,
    below: &Path,
    write: impl FnOnce(&File, &File) -> Result<T, E>,
) -> Result<T, E> {
    let aside = Aside::beside(directory)?;
    let base = link(below, &aside.0)?;
    let (state, memory) = (aside.file(STATE_FILE)?, aside.file(MEMORY_FILE)?);
    let written = write(&state, &memory)?;
    if read_header(&aside.0)?.base != Some(base.lowest()) {
        let why = format!("the machine has not come from {}", below.display());
        return Err(Error::Unfit(why).into());
    }
    aside.keep(directory, &[state, memory])?;
    Ok(written)
}

/// Links what all RAM of the snapshot in `below` comes from into `directory`, where another one is to lie over it. Says what
/// that snapshot is.
pub fn link(below: &Path, directory: &Path) -> Result<Header, Error> {
    let header = read_header(below)?;
    let lowest = below.join(if header.base.is_some() { BASE_FILE } else { MEMORY_FILE });
    let linked = fs::hard_link(&lowest, directory.join(BASE_FILE));
    linked.map_err(|source| Error::File {
        what: "link, which takes a directory on the same disk,",
        path: lowest,
        source,
    })?;
    Ok(header)
}

/// Whether a directory of this name was left by a process that died while it wrote a snapshot.
pub fn is_aside(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(ASIDE)
}

/// A directory without its name. It goes when it is dropped.
struct Aside(PathBuf);

impl Aside {
    fn beside(directory: &Path) -> Result<Self, Error> {
        let failed = |what, source| Error::File { what, path: directory.to_owned(), source };
        let name = directory
            .file_name()
            .ok_or_else(|| failed("make the snapshot", io::Error::from(io::ErrorKind::InvalidInput)))?;
        if directory.symlink_metadata().is_ok() {
            return Err(failed("make the snapshot", io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        let name = format!(".{}.{}{ASIDE}", name.to_string_lossy(), std::process::id());
        let path = directory.with_file_name(name);
        fs::create_dir(&path).map_err(|source| Error::File { what: "make", path: path.clone(), source })?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> Result<File, Error> {
        let path = self.0.join(name);
        let made = File::options().read(true).write(true).create_new(true).open(&path);
        made.map_err(|source| Error::File { what: "make", path, source })
    }

    fn keep(&self, directory: &Path, files: &[File]) -> Result<(), Error> {
        let failed = |source| Error::File { what: "bring to disk", path: directory.to_owned(), source };
        for file in files {
            file.sync_all().map_err(failed)?;
        }
        File::open(&self.0).and_then(|aside| aside.sync_all()).map_err(failed)?;
        // An empty directory that somebody has made meanwhile would be replaced, which loses nothing.
        fs::rename(&self.0, directory).map_err(failed)?;
        let parent = match directory.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Not there any more once it has its name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A directory, gone when it is dropped.
    struct Room(PathBuf);

    impl Room {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmm-make-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(&self.0)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Room {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn there_is_all_of_it_or_nothing() {
        let room = Room::new("all");
        let place = room.0.join("a");
        let failed = make(&place, |mut state, _| {
            state.write_all(b"half").unwrap();
            Err::<(), _>(Error::Unfit("no".into()))
        });
        assert!(failed.is_err());
        assert!(room.names().is_empty());
        make(&place, |mut state, mut memory| {
            let name = &room.names()[0];
            assert!(is_aside(name) && !place.exists(), "{name}");
            state.write_all(b"s").and_then(|()| memory.write_all(b"m")).unwrap();
            Ok::<_, Error>(())
        })
        .unwrap();
        assert_eq!(room.names(), ["a"]);
        assert_eq!(fs::read(place.join(MEMORY_FILE)).unwrap(), b"m");
        let again = make(&place, |_, _| Ok::<_, Error>(()));
        assert!(
            matches!(again, Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists)
        );
        assert_eq!(fs::read(place.join(STATE_FILE)).unwrap(), b"s");
    }

    #[test]
    fn a_place_must_be_one() {
        for place in ["/", "", "/nonexistent/a"] {
            assert!(make(Path::new(place), |_, _| Ok::<_, Error>(())).is_err(), "{place}");
        }
    }
}
