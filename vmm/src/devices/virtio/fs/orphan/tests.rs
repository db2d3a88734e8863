use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proptest::prelude::*;

use super::content::{BLOCK, Builder};
use super::keep::Left;
use super::*;
use crate::devices::virtio::fs::query::Query;
use crate::devices::virtio::state::{decode, encode};

pub fn id(orphan: &Orphan) -> u64 {
    orphan.id
}

pub fn resized(orphan: &Orphan, size: u64) -> Orphan {
    Orphan { size, ..orphan.clone() }
}

pub fn retyped(orphan: &Orphan, mode: u32) -> Orphan {
    Orphan { mode, ..orphan.clone() }
}

/// What is kept of files, in bounds of its own.
pub fn kept(query: &Query<'_>, files: &[u64], content: usize, look: u64) -> Result<Vec<Orphan>, String> {
    keep::within(query, files, Left { content, look }).map_err(|error| error.to_string())
}

const NOW: Time = Time { seconds: 7, nanoseconds: 999_999_999 };

fn orphan(id: u64, size: u64, runs: &[(u64, &[u8])]) -> Orphan {
    let mut content = Builder::default();
    for (at, run) in runs {
        content.push(*at, run);
    }
    let content = content.build();
    Orphan { id, mode: libc::S_IFREG | 0o644, uid: 0, gid: 0, size, accessed: NOW, modified: NOW, content }
}

/// Bytes as they are saved, taken for a content.
fn content(bytes: &[u8]) -> Content {
    decode(&encode(&bytes.to_vec()).unwrap()).unwrap()
}

#[test]
fn runs_are_of_the_file_and_each_byte_is_once() {
    let run = |at: u64, len: u32, bytes: usize| {
        [&at.to_le_bytes()[..], &len.to_le_bytes(), &vec![1; bytes]].concat()
    };
    let cases = [
        (vec![], 0, Some(0)),
        (run(0, 5, 5), 5, Some(5)),
        (run(0, 5, 5), 4, None),
        ([run(0, 5, 5), run(5, 2, 2), run(100, 1, 1)].concat(), 101, Some(8)),
        // Twice, and backwards.
        ([run(0, 5, 5), run(4, 2, 2)].concat(), 100, None),
        ([run(50, 5, 5), run(4, 2, 2)].concat(), 100, None),
        // Nothing, for which a head would do.
        (run(7, 0, 0), 100, None),
        // Beyond all ends.
        (run(u64::MAX, 5, 5), u64::MAX, None),
        (run(u64::MAX - 5, 5, 5), i64::MAX as u64, None),
        // Cut short, in the head and behind it.
        (run(0, 5, 4), 100, None),
        (run(0, u32::MAX, 4), 100, None),
        (run(0, 5, 5)[..11].to_vec(), 100, None),
        ([run(0, 5, 5), vec![0]].concat(), 100, None),
    ];
    for (index, (bytes, size, expected)) in cases.into_iter().enumerate() {
        assert_eq!(content(&bytes).check(size), expected, "case {index}");
    }
}

#[test]
fn what_was_not_kept_is_refused() {
    let one = orphan(2, 10, &[(0, b"abc")]);
    check(&[one.clone(), orphan(3, 0, &[])]).unwrap();
    let directory = Orphan { mode: libc::S_IFDIR | 0o1777, size: 4096, ..orphan(4, 0, &[]) };
    check(std::slice::from_ref(&directory)).unwrap();
    let late = Time { seconds: 7, nanoseconds: 1_000_000_000 };
    for (wrong, word) in [
        (resized(&one, 2), "removed file 2"),
        (resized(&one, 1 << 63), "removed file 2"),
        (retyped(&one, libc::S_IFIFO | 0o600), "removed file 2"),
        (retyped(&one, 0o600), "removed file 2"),
        (retyped(&one, libc::S_IFDIR), "removed file 2"),
        (Orphan { content: one.content.clone(), ..directory }, "removed file 4"),
        (Orphan { accessed: late, ..one.clone() }, "removed file 2"),
        (Orphan { modified: late, ..one.clone() }, "removed file 2"),
    ] {
        let error = check(&[wrong]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    // In all of them together.
    let half = vec![1; CONTENT_MAX / 2];
    let large = |more: u64, bytes: &[u8]| {
        orphan(2, CONTENT_MAX as u64, &[(0, &half), (half.len() as u64 + more, bytes)])
    };
    check(&[large(0, &half)]).unwrap();
    check(&[large(7, &half[7..]), orphan(3, 7, &[(0, &[1; 7])])]).unwrap();
    let error = check(&[large(0, &half), one.clone()]).unwrap_err().to_string();
    assert!(error.contains("67108864"), "{error}");
    let error = check(&vec![orphan(2, 0, &[]); FILES_MAX + 1]).unwrap_err().to_string();
    assert!(error.contains("1024"), "{error}");
    assert!(names(&[one.clone(), one]).unwrap_err().to_string().contains("removed file 2"));
}

#[test]
fn names_are_for_once() {
    let orphans: Vec<_> = (0..100).map(|id| orphan(id, 0, &[])).collect();
    let all: std::collections::BTreeSet<_> =
        (0..10).flat_map(|_| names(&orphans).unwrap().into_values()).collect();
    assert_eq!(all.len(), 1000);
    assert!(all.iter().all(|name| name.len() == ".supermachine-".len() + 32));
}

/// A directory, gone when it is dropped.
struct Room(PathBuf);

impl Room {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmm-orphan-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn nothing_that_is_there_is_touched() {
    let room = Room::new("there");
    let directory: OwnedFd = fs::File::open(&room.0).unwrap().into();
    let outside = room.0.join("outside");
    let kinds = [libc::S_IFREG | 0o600, libc::S_IFDIR | 0o700];
    let orphans: Vec<_> =
        (2..).zip(kinds).map(|(id, mode)| retyped(&orphan(id, 3, &[(0, b"abc")]), mode)).collect();
    for taken in [2, 3] {
        let names: BTreeMap<u64, String> = [(2, "two".to_owned()), (3, "three".to_owned())].into();
        let path = room.0.join(&names[&taken]);
        fs::write(&path, "mine").unwrap();
        let error = Made::make(&directory, &orphans, &names).err().expect("it is there");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        // A link is no way out.
        std::os::unix::fs::symlink(&outside, &path).unwrap();
        assert!(Made::make(&directory, &orphans, &names).is_err());
        fs::remove_file(&path).unwrap();
        assert_eq!(fs::read_dir(&room.0).unwrap().count(), 0);
        // Somebody who clears up does no harm, and others see nothing.
        let made = Made::make(&directory, &orphans, &names).unwrap();
        assert_eq!(fs::read(room.0.join("two")).unwrap(), b"abc");
        for name in names.values() {
            let metadata = room.0.join(name).metadata().unwrap();
            assert_eq!(std::os::unix::fs::MetadataExt::mode(&metadata) & 0o077, 0, "{name}");
        }
        fs::remove_file(room.0.join("two")).unwrap();
        made.settle().unwrap();
        assert_eq!(fs::read_dir(&room.0).unwrap().count(), 0);
    }
}

proptest! {
    /// What is put together comes apart, and as much is counted.
    #[test]
    fn blocks_become_runs(blocks in proptest::collection::btree_map(0u64..20, any::<u8>(), 0..12)) {
        let mut builder = Builder::default();
        for (index, byte) in &blocks {
            builder.push(index * BLOCK as u64, &[*byte; BLOCK]);
        }
        let content = builder.build();
        prop_assert_eq!(content.check(20 * BLOCK as u64), Some(blocks.len() * BLOCK));
        let mut seen = BTreeMap::new();
        for (at, run) in content.runs() {
            for (index, block) in run.chunks(BLOCK).enumerate() {
                prop_assert!(block.iter().all(|byte| *byte == block[0]));
                seen.insert(at / BLOCK as u64 + index as u64, block[0]);
            }
        }
        prop_assert_eq!(&seen, &blocks);
        let gaps = blocks.keys().filter(|index| !index.checked_sub(1).is_some_and(|b| blocks.contains_key(&b)));
        prop_assert_eq!(content.runs().count(), gaps.count());
    }

    #[test]
    fn no_bytes_upset_it(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>()) {
        let content = content(&bytes);
        prop_assert!(content.check(size).is_none_or(|len| len <= bytes.len()));
        prop_assert!(content.runs().map(|(_, run)| run.len()).sum::<usize>() <= bytes.len());
        if let Ok(orphans) = decode::<Vec<Orphan>>(&bytes) {
            let _ = check(&orphans);
        }
    }
}
