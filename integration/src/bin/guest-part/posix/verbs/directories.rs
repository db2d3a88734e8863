//! What is in directories, also while it changes.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::ptr::NonNull;

use nix::errno::Errno;

use super::super::words::{Fault, Told, number, shown, wrong};
use super::super::world::World;

pub fn call(_: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("ls", [path]) => names(path),
        ("kinds", [path]) => kinds(path),
        ("many", [path, count]) => number(count).and_then(|count| many(path, count)),
        ("count", [path]) => fs::read_dir(path).map(|all| all.count().to_string()).map_err(Into::into),
        ("seek-each", [path]) => seek_each(path),
        ("rewind", [path]) => rewind(path),
        ("remove-while-reading", [path]) => remove_while_reading(path),
        ("rename-while-reading", [path]) => rename_while_reading(path),
        ("dots", [path]) => dots(path),
        _ => return None,
    })
}

fn names(path: &str) -> Told {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(shown(entry?.file_name().as_bytes()));
    }
    names.sort();
    Ok(if names.is_empty() { "empty".to_owned() } else { names.join(",") })
}

/// The kinds of entries as the directory itself tells them.
fn kinds(path: &str) -> Told {
    let mut told = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let kind = match () {
            () if kind.is_dir() => "dir",
            () if kind.is_symlink() => "symlink",
            () if kind.is_fifo() => "fifo",
            () if kind.is_socket() => "sock",
            () if kind.is_char_device() => "char",
            () => "file",
        };
        told.push(format!("{}={kind}", shown(entry.file_name().as_bytes())));
    }
    told.sort();
    Ok(told.join(","))
}

/// Many files, and links to the first where it is only a matter of names.
fn many(path: &str, count: u32) -> Told {
    let first = Path::new(path).join("entry-0");
    File::create(&first)?;
    for number in 1..count {
        fs::hard_link(&first, Path::new(path).join(format!("entry-{number}")))?;
    }
    Ok(String::new())
}

/// A directory by the calls of the C library, which know places in it.
struct Dir(NonNull<libc::DIR>);

impl Dir {
    fn open(path: &str) -> Result<Self, Fault> {
        let path = CString::new(path).or_else(|_| wrong("a name with a zero byte"))?;
        // SAFETY: a string of C.
        let dir = unsafe { libc::opendir(path.as_ptr()) };
        NonNull::new(dir).map(Self).ok_or_else(|| Errno::last().into())
    }

    /// The next name; none at the end.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Errno::clear();
        // SAFETY: the stream is open until this is dropped.
        let entry = unsafe { libc::readdir(self.0.as_ptr()) };
        if entry.is_null() {
            return match Errno::last() {
                Errno::UnknownErrno => Ok(None),
                errno => Err(errno.into()),
            };
        }
        // SAFETY: the entry is valid until the next call on the stream, and its name ends with a zero.
        Ok(Some(unsafe { CStr::from_ptr((*entry).d_name.as_ptr()) }.to_bytes().to_vec()))
    }

    fn tell(&mut self) -> libc::c_long {
        // SAFETY: the stream is open.
        unsafe { libc::telldir(self.0.as_ptr()) }
    }

    fn seek(&mut self, place: libc::c_long) {
        // SAFETY: the stream is open, and the place came from `tell` on it.
        unsafe { libc::seekdir(self.0.as_ptr(), place) }
    }

    fn rewind(&mut self) {
        // SAFETY: the stream is open.
        unsafe { libc::rewinddir(self.0.as_ptr()) }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: the stream is open and not used any more.
        unsafe { libc::closedir(self.0.as_ptr()) };
    }
}

/// Goes through a directory, then back to every eighth place: the same name must come there.
fn seek_each(path: &str) -> Told {
    let mut dir = Dir::open(path)?;
    let mut places = Vec::new();
    loop {
        let place = dir.tell();
        match dir.next()? {
            Some(name) => places.push((place, name)),
            None => break,
        }
    }
    let mut right = 0;
    let tried: Vec<_> = places.iter().rev().step_by(8).collect();
    for (place, name) in &tried {
        dir.seek(*place);
        right += usize::from(dir.next()?.as_ref() == Some(name));
    }
    Ok(format!("{right}-of-{}", tried.len()))
}

/// A name made after the directory was read shows when it is read from the beginning.
fn rewind(path: &str) -> Told {
    let mut dir = Dir::open(path)?;
    let count = |dir: &mut Dir| {
        let mut count = 0;
        while dir.next()?.is_some() {
            count += 1;
        }
        Ok::<u32, Fault>(count)
    };
    let before = count(&mut dir)?;
    File::create(Path::new(path).join("later"))?;
    dir.rewind();
    Ok(format!("{}-more", count(&mut dir)? - before))
}

fn is_dots(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

/// Removes each file when its name comes: all are gone in the end, and none came twice.
fn remove_while_reading(path: &str) -> Told {
    let mut dir = Dir::open(path)?;
    let mut seen = 0;
    while let Some(name) = dir.next()? {
        if !is_dots(&name) {
            fs::remove_file(Path::new(path).join(OsStr::from_bytes(&name)))?;
            seen += 1;
        }
    }
    Ok(format!("{seen}-seen,{}-left", fs::read_dir(path)?.count()))
}

/// Moves each file that comes out of the way: what was there at first comes exactly once.
fn rename_while_reading(path: &str) -> Told {
    let mut dir = Dir::open(path)?;
    let (mut seen, mut twice) = (BTreeSet::new(), 0);
    while let Some(name) = dir.next()? {
        if is_dots(&name) || name.starts_with(b"moved") {
            continue;
        }
        let from = Path::new(path).join(OsStr::from_bytes(&name));
        let to = Path::new(path).join(format!("moved-{}", String::from_utf8_lossy(&name)));
        fs::rename(from, to)?;
        twice += usize::from(!seen.insert(name));
    }
    Ok(format!("{}-seen,{twice}-twice", seen.len()))
}

/// Whether the directory itself and the one above it are listed.
fn dots(path: &str) -> Told {
    let mut dir = Dir::open(path)?;
    let mut dots = 0;
    while let Some(name) = dir.next()? {
        dots += usize::from(is_dots(&name));
    }
    Ok(dots.to_string())
}
