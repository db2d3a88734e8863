//! A tree of files that follows from a number, so that one side makes it and the other, which has only the
//! number, finds out whether all of it is there and nothing else.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use crate::pattern;

/// Entries in one directory.
const SHELF: u32 = 50;
/// 2001-09-09, and later for later entries.
const EPOCH: u64 = 1_000_000_000;

/// One entry, by its number.
enum Entry {
    File { size: usize, mode: u32 },
    Link { target: String },
    HardLink { to: PathBuf },
}

/// The shelves are directories, two deep.
fn shelf(root: &Path, number: u32) -> PathBuf {
    let shelf = number / SHELF;
    root.join(format!("d{}", shelf % 7)).join(format!("s{shelf}"))
}

fn path(root: &Path, number: u32) -> PathBuf {
    // Names of all lengths, and not only letters.
    let tail = "ä b".repeat(number as usize % 20);
    shelf(root, number).join(format!("{number}{tail}"))
}

fn entry(root: &Path, number: u32) -> Entry {
    match number % 25 {
        24 => Entry::Link { target: format!("../nowhere/{number}") },
        // The entry before it is a file and stands on the same shelf.
        23 => Entry::HardLink { to: path(root, number - 1) },
        _ => {
            let size = [0, 1, 100, 4095, 4096, 4097, 20_000][number as usize % 7];
            Entry::File { size, mode: [0o644, 0o600, 0o755, 0o4755, 0o444][number as usize % 5] }
        }
    }
}

fn time(number: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(EPOCH + u64::from(number), 123_456_789)
}

/// Makes `count` entries below `root`, which is there and empty.
pub fn make(root: &Path, count: u32, seed: u64) -> Result<()> {
    for number in 0..count {
        if number % SHELF == 0 {
            let shelf = shelf(root, number);
            fs::create_dir_all(&shelf).with_context(|| format!("creating {}", shelf.display()))?;
        }
        let path = path(root, number);
        put(root, &path, number, seed).with_context(|| format!("making {}", path.display()))?;
    }
    Ok(())
}

fn put(root: &Path, path: &Path, number: u32, seed: u64) -> Result<()> {
    match entry(root, number) {
        Entry::Link { target } => symlink(target, path)?,
        Entry::HardLink { to } => fs::hard_link(to, path)?,
        Entry::File { size, mode } => {
            fs::write(path, pattern::bytes(seed + u64::from(number), size))?;
            let file = File::open(path)?;
            file.set_times(FileTimes::new().set_modified(time(number)))?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Fails unless exactly the `count` entries of `seed` are below `root`.
pub fn check(root: &Path, count: u32, seed: u64) -> Result<()> {
    for number in 0..count {
        let path = path(root, number);
        look(root, &path, number, seed).with_context(|| format!("looking at {}", path.display()))?;
    }
    let found = number_of_entries(root)?;
    ensure!(found == count, "{} has {found} entries, made were {count}", root.display());
    Ok(())
}

fn look(root: &Path, path: &Path, number: u32, seed: u64) -> Result<()> {
    match entry(root, number) {
        Entry::Link { target } => {
            let found = fs::read_link(path)?;
            ensure!(found == Path::new(&target), "it leads to {}", found.display());
        }
        Entry::HardLink { to } => {
            let (one, other) = (fs::symlink_metadata(path)?, fs::symlink_metadata(to)?);
            ensure!(one.ino() == other.ino(), "it is another file than the one it was linked to");
            ensure!(one.nlink() == 2, "it has {} links", one.nlink());
        }
        Entry::File { size, mode } => {
            let data = fs::symlink_metadata(path)?;
            let found = data.permissions().mode() & 0o7777;
            ensure!(found == mode, "its mode is {found:o} and not {mode:o}");
            ensure!(data.modified()? == time(number), "its time is {:?}", data.modified()?);
            let bytes = fs::read(path)?;
            ensure!(bytes.len() == size, "it has {} bytes and not {size}", bytes.len());
            if let Some(at) = pattern::wrong(seed + u64::from(number), 0, &bytes) {
                bail!("its byte {at} is wrong");
            }
        }
    }
    Ok(())
}

/// What is not a directory.
fn number_of_entries(directory: &Path) -> Result<u32> {
    let mut count = 0;
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { number_of_entries(&entry.path())? } else { 1 };
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is done to a tree, and a word of the complaint.
    type Damage = (fn(&Path), &'static str);

    #[test]
    fn a_tree_is_recognised_and_damage_is_named() {
        let root = std::env::temp_dir().join(format!("tree-{}", std::process::id()));
        let damages: [Damage; 6] = [
            (|root| fs::write(root.join("d0/more"), "").unwrap(), "entries"),
            (|root| fs::remove_file(path(root, 3)).unwrap(), "looking at"),
            (|root| fs::write(path(root, 2), [1; 100]).unwrap(), "time"),
            (|root| fs::set_permissions(path(root, 1), fs::Permissions::from_mode(0o640)).unwrap(), "mode"),
            (
                |root| {
                    fs::remove_file(path(root, 23)).unwrap();
                    fs::copy(path(root, 22), path(root, 23)).unwrap();
                },
                "another file",
            ),
            (
                |root| {
                    fs::remove_file(path(root, 24)).unwrap();
                    symlink("x", path(root, 24)).unwrap();
                },
                "leads to",
            ),
        ];
        for (damage, word) in damages {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir(&root).unwrap();
            make(&root, 120, 9).unwrap();
            check(&root, 120, 9).unwrap();
            damage(&root);
            let error = format!("{:#}", check(&root, 120, 9).unwrap_err());
            assert!(error.contains(word), "{word}: {error}");
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
