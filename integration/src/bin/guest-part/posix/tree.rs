//! All there is below a directory, a line each, as `lstat` and its relatives tell it.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::stat::SFlag;

use super::verbs::{attributes_of, kind_name};
use super::words::shown;

/// What is told beside kind, mode, owner, links, size and attributes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum And {
    /// Which inode it is: for two looks at one tree.
    Inodes,
    /// What is in it, if it is short: for trees made in the same way.
    Contents,
}

/// Files up to this size are short.
const SHORT: u64 = 4096;

/// Tells all below `directory`, by path in order. Times are left out: they say when, not what.
pub fn tell(directory: &Path, and: And) -> Result<()> {
    std::env::set_current_dir(directory).with_context(|| format!("going to {}", directory.display()))?;
    let mut lines = Vec::new();
    let mut left = vec![PathBuf::from(".")];
    while let Some(path) = left.pop() {
        let looking = || format!("looking at {}", path.display());
        let data = path.symlink_metadata().with_context(looking)?;
        lines.push(line(&path, &data, and).with_context(looking)?);
        if data.is_dir() {
            for entry in fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))? {
                left.push(path.join(entry?.file_name()));
            }
        }
    }
    lines.sort();
    println!("{}", lines.join("\n"));
    Ok(())
}

fn line(path: &Path, data: &Metadata, and: And) -> Result<String> {
    let kind = data.file_type();
    let told = format!(
        "{}: {} {:04o} {}:{} {}link",
        shown(path.as_os_str().as_bytes()),
        kind_name(SFlag::from_bits_truncate(data.mode())),
        data.mode() & 0o7777,
        data.uid(),
        data.gid(),
        data.nlink(),
    );
    let of_its_kind = if kind.is_symlink() {
        format!(" to {}", shown(fs::read_link(path)?.as_os_str().as_bytes()))
    } else if kind.is_file() {
        format!(" {}bytes", data.size())
    } else if kind.is_block_device() || kind.is_char_device() {
        format!(" device-{:x}", data.rdev())
    } else {
        String::new()
    };
    let besides = match and {
        And::Inodes => format!(" inode-{}", data.ino()),
        And::Contents if kind.is_file() && (1..=SHORT).contains(&data.size()) => {
            format!(" with {}", shown(&fs::read(path)?))
        }
        And::Contents => String::new(),
    };
    Ok(told + &of_its_kind + &besides + &attributes_of(&path.to_string_lossy())?)
}
