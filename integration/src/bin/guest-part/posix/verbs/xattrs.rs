//! Extended attributes, and access control lists by them.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use nix::errno::Errno;

use super::super::words::{Fault, Told, check, number, shown, wrong};
use super::super::world::World;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("setx", [path, name, value]) => set(path, name, &bytes(value), 0),
        ("setx", [path, name, value, how]) => way(how).and_then(|how| set(path, name, &bytes(value), how)),
        ("lsetx", [path, name, value]) => set_on_link(path, name, &bytes(value)),
        ("fsetx", [slot, name, value]) => set_open(world, slot, name, &bytes(value)),
        ("getx", [path, name]) => get(path, name).map(|value| shown(&value)),
        ("getx", [path, name, room]) => number(room).and_then(|room| length(path, name, room)),
        ("fgetx", [slot, name]) => get_open(world, slot, name),
        ("listx", [path]) => {
            list(path).map(|names| if names.is_empty() { "none".into() } else { names.join(",") })
        }
        ("listx", [path, room]) => number(room).and_then(|room| list_length(path, room)),
        ("rmx", [path, name]) => remove(path, name),
        ("acl", [path, which, entries]) => {
            acl(entries).and_then(|value| set(path, &format!("system.posix_acl_{which}"), &value, 0))
        }
        ("get-acl", [path, which]) => {
            get(path, &format!("system.posix_acl_{which}")).map(|value| acl_text(&value))
        }
        ("rm-acl", [path, which]) => remove(path, &format!("system.posix_acl_{which}")),
        _ => return None,
    })
}

fn text(word: &str) -> Result<CString, Fault> {
    CString::new(word).or_else(|_| wrong("a name with a zero byte"))
}

/// A value: text, or bytes in hexadecimal behind `hex:`; `empty` is none at all.
fn bytes(word: &str) -> Vec<u8> {
    match word.strip_prefix("hex:") {
        Some(digits) => digits
            .as_bytes()
            .chunks(2)
            .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect(),
        None if word == "empty" => Vec::new(),
        None => word.as_bytes().to_vec(),
    }
}

fn way(word: &str) -> Result<libc::c_int, Fault> {
    match word {
        "create" => Ok(libc::XATTR_CREATE),
        "replace" => Ok(libc::XATTR_REPLACE),
        _ => wrong(format!("{word} is no way to set an attribute")),
    }
}

fn set(path: &str, name: &str, value: &[u8], flags: libc::c_int) -> Told {
    let (path, name) = (text(path)?, text(name)?);
    // SAFETY: two strings of C and a buffer with its length, which the call only reads.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
}

fn set_on_link(path: &str, name: &str, value: &[u8]) -> Told {
    let (path, name) = (text(path)?, text(name)?);
    // SAFETY: as in `set`.
    check(unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

fn set_open(world: &World, slot: &str, name: &str, value: &[u8]) -> Told {
    let (fd, name) = (world.fd(slot)?, text(name)?);
    // SAFETY: as in `set`, with a descriptor that is open.
    check(unsafe { libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

/// More than an attribute may have.
const ROOM: usize = 70_000;

/// What a call wrote to a buffer of `room` bytes.
fn filled(room: usize, call: impl FnOnce(*mut u8) -> isize) -> Result<Vec<u8>, Fault> {
    let mut buffer = vec![0; room];
    let length = Errno::result(call(buffer.as_mut_ptr()))?;
    buffer.truncate(length.unsigned_abs());
    Ok(buffer)
}

fn get(path: &str, name: &str) -> Result<Vec<u8>, Fault> {
    let (path, name) = (text(path)?, text(name)?);
    filled(ROOM, |at| {
        // SAFETY: two strings of C, and a buffer that has as much room as the call is told.
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), at.cast(), ROOM) }
    })
}

fn get_open(world: &World, slot: &str, name: &str) -> Told {
    let (fd, name) = (world.fd(slot)?.as_raw_fd(), text(name)?);
    // SAFETY: as in `get`, with a descriptor that is open.
    let value = filled(ROOM, |at| unsafe { libc::fgetxattr(fd, name.as_ptr(), at.cast(), ROOM) })?;
    Ok(shown(&value))
}

/// How long it is, asked with a buffer of `room` bytes.
fn length(path: &str, name: &str, room: usize) -> Told {
    let (path, name) = (text(path)?, text(name)?);
    let mut buffer = vec![0u8; room];
    let at = if room == 0 { null_mut() } else { buffer.as_mut_ptr() };
    // SAFETY: as in `get`; with no room the call does not look at the pointer.
    let length = Errno::result(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), at.cast(), room) })?;
    Ok(length.to_string())
}

/// The names of all attributes, sorted.
fn list(path: &str) -> Result<Vec<String>, Fault> {
    let path = text(path)?;
    // SAFETY: a string of C, and a buffer that has as much room as the call is told.
    let names = filled(ROOM, |at| unsafe { libc::llistxattr(path.as_ptr(), at.cast(), ROOM) })?;
    let mut names: Vec<String> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// All attributes of a file with their values, each with a blank before it.
pub fn told(path: &str) -> anyhow::Result<String> {
    let failed = |fault: Fault| anyhow::anyhow!("reading the attributes: {fault:?}");
    list(path).map_err(failed)?.iter().try_fold(String::new(), |told, name| {
        Ok(format!("{told} {name}={}", shown(&get(path, name).map_err(failed)?)))
    })
}

fn list_length(path: &str, room: usize) -> Told {
    let path = text(path)?;
    let mut buffer = vec![0u8; room];
    let at = if room == 0 { null_mut() } else { buffer.as_mut_ptr() };
    // SAFETY: as in `length`.
    let length = Errno::result(unsafe { libc::listxattr(path.as_ptr(), at.cast(), room) })?;
    Ok(length.to_string())
}

fn remove(path: &str, name: &str) -> Told {
    let (path, name) = (text(path)?, text(name)?);
    // SAFETY: two strings of C.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

/// Version and entries of the attribute that is a list, each a tag, permissions and an id.
const ACL_VERSION: u32 = 2;
const NOBODY: u32 = u32::MAX;
const TAGS: [(&str, u16, bool); 6] = [
    ("u", 0x01, false),
    ("u", 0x02, true),
    ("g", 0x04, false),
    ("g", 0x08, true),
    ("m", 0x10, false),
    ("o", 0x20, false),
];

/// The attribute for `u::rwx,u:1000:r--,g::r-x,m::rwx,o::---`.
fn acl(entries: &str) -> Result<Vec<u8>, Fault> {
    let mut value = ACL_VERSION.to_le_bytes().to_vec();
    for entry in entries.split(',') {
        let words: Vec<&str> = entry.split(':').collect();
        let [tag, id, permissions] = words[..] else {
            return wrong(format!("{entry} is no entry of a list"));
        };
        let named = !id.is_empty();
        let Some((_, tag, _)) = TAGS.iter().find(|(name, _, has_id)| (*name, *has_id) == (tag, named)) else {
            return wrong(format!("{tag} is no tag"));
        };
        let bits: u16 =
            permissions.chars().zip([4, 2, 1]).filter(|(letter, _)| *letter != '-').map(|(_, bit)| bit).sum();
        value.extend(tag.to_le_bytes());
        value.extend(bits.to_le_bytes());
        value.extend(if named { number(id)? } else { NOBODY }.to_le_bytes());
    }
    Ok(value)
}

fn acl_text(value: &[u8]) -> String {
    let entry = |entry: &[u8]| {
        let (tag, bits) =
            (u16::from_le_bytes([entry[0], entry[1]]), u16::from_le_bytes([entry[2], entry[3]]));
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let (name, _, named) =
            TAGS.iter().find(|(_, number, _)| *number == tag).copied().unwrap_or(("?", 0, false));
        let id = if named { id.to_string() } else { String::new() };
        let letters: String = "rwx"
            .chars()
            .zip([4, 2, 1])
            .map(|(letter, bit)| if bits & bit == 0 { '-' } else { letter })
            .collect();
        format!("{name}:{id}:{letters}")
    };
    value.get(4..).unwrap_or_default().chunks_exact(8).map(entry).collect::<Vec<_>>().join(",")
}
