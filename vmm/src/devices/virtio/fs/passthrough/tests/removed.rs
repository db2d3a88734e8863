//! Files that a guest has open and that were removed.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

/// Names that a share is left with, beside what a [`Directory`] has from the beginning.
fn left_over(path: &Path) -> Vec<String> {
    names(path).into_iter().filter(|name| name != "file").collect()
}

impl Guest {
    /// Opens a file of the root in each of these ways and removes it.
    fn orphan<const N: usize>(&self, name: &str, flags: [i32; N]) -> (u64, [u64; N]) {
        let node = self.lookup(ROOT, name).unwrap();
        let handles = flags.map(|flags| self.open(node, flags).unwrap());
        self.ask(UNLINK, ROOT, &[name.as_bytes(), &[0]].concat()).unwrap();
        (node, handles)
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        self.ask(GETATTR, node, &longs(&[0, 0])).unwrap()
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

#[test]
fn it_goes_on_with_what_was_in_it() {
    let (one, other) = (Directory::new(), Directory::new_named("other"));
    let path = one.0.join("gone");
    let content: Vec<u8> = (0..10_000u32).map(|at| (at % 251) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    // Nobody could open it like this, once it is closed.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4400)).unwrap();
    let guest = Guest::mounted(&one.0, false);
    let (node, [reading, writing, both]) =
        guest.orphan("gone", [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR]);
    let file = guest.lookup(ROOT, "file").unwrap();
    let named = guest.open(file, libc::O_RDONLY).unwrap();
    let before = guest.attributes(node);
    let second = guest.moved(&one.0).unwrap();
    let third = {
        // Nor does it take the right to open what its mode denies.
        let _without = drop_effective_cap("DAC_OVERRIDE").unwrap();
        second.moved(&other.0).unwrap()
    };
    for (guest, byte) in [(&guest, b'1'), (&second, b'2'), (&third, b'3')] {
        assert!(guest.read(READ, node, reading, 0, 10_000).unwrap() == content);
        assert_eq!(guest.read(READ, node, writing, 0, 1), Err(libc::EBADF));
        assert_eq!(guest.write(node, reading, 0, b"x"), Err(libc::EBADF));
        guest.write(node, writing, 1, &[byte]).unwrap();
        assert_eq!(guest.read(READ, node, both, 0, 3).unwrap(), [content[0], byte, content[2]]);
        guest.write(node, both, 1, &content[1..2]).unwrap();
        assert_eq!(guest.read(READ, file, named, 0, 9).unwrap(), b"content");
        assert_eq!(guest.lookup(ROOT, "gone"), Err(libc::ENOENT));
        guest.release(node, reading);
        assert_eq!(guest.read(READ, node, both, 9_999, 9).unwrap(), content[9_999..]);
    }
    for directory in [&one, &other] {
        assert_eq!(left_over(&directory.0), Vec::<String>::new());
    }
    // Size, type and permissions, links, owner.
    let fields = |bytes: &[u8]| (long(&bytes[24..]), [76, 80, 84, 88].map(|at| word(&bytes[at..])));
    assert_eq!(fields(&guest.moved(&other.0).unwrap().attributes(node)), fields(&before));
    assert_eq!(word(&before[76..]), libc::S_IFREG | 0o4400);
}

#[test]
fn it_is_whose_it_was_and_as_old() {
    let directory = Directory::new();
    let path = directory.0.join("gone");
    std::fs::write(&path, "gone").unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6751)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let old = std::time::UNIX_EPOCH - Duration::new(1_000_000, 5);
    file.set_times(std::fs::FileTimes::new().set_accessed(old).set_modified(old + Duration::from_secs(9)))
        .unwrap();
    // Those who are no root have files of their own only.
    let owner = (file.metadata().unwrap().uid() == 0).then_some(1234);
    std::os::unix::fs::fchown(&file, owner, owner).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6751)).unwrap();
    let owner = file.metadata().unwrap().uid();
    let guest = Guest::mounted(&directory.0, false);
    let (node, _) = guest.orphan("gone", [libc::O_RDWR]);
    let before = guest.attributes(node);
    assert_eq!((word(&before[76..]), word(&before[84..])), (libc::S_IFREG | 0o6751, owner));
    // Before it is saved a second time, and read for that.
    let after = guest.moved(&directory.0).unwrap().attributes(node);
    for field in [40..48, 48..56, 64..72, 76..80, 84..92] {
        assert_eq!(before[field.clone()], after[field.clone()], "{field:?}");
    }
}

#[test]
fn holes_are_not_kept() {
    let directory = Directory::new();
    let file = File::create(directory.0.join("sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    let guest = Guest::mounted(&directory.0, false);
    let (node, [handle]) = guest.orphan("sparse", [libc::O_RDWR]);
    let places = [(0, 3), (5000, 4000), (512 << 20, 1), ((1 << 30) - 2, 2)];
    for (at, len) in places {
        guest.write(node, handle, at, &vec![7; len]).unwrap();
    }
    // Zeroes that somebody wrote are none either.
    guest.write(node, handle, 64 << 20, &[0; 4096]).unwrap();
    let bytes = guest.share.save().unwrap();
    assert!(bytes.len() < 24 << 10, "{}", bytes.len());
    let other = Guest::new(&directory.0, false);
    other.share.restore(&bytes).unwrap();
    let attributes = other.attributes(node);
    assert_eq!(long(&attributes[24..]), 1 << 30);
    assert!(long(&attributes[32..]) < 1024, "blocks of it take room");
    for (at, len) in places {
        let from = u64::saturating_sub(at, 10);
        let expected = [vec![0; (at - from) as usize], vec![7; len]].concat();
        let read = other.read(READ, node, handle, from, expected.len() as u32).unwrap();
        assert_eq!(read, expected, "{at}");
    }
    assert_eq!(left_over(&directory.0), Vec::<String>::new());
}

#[test]
fn a_removed_directory_stays_removed() {
    let directory = Directory::new();
    std::fs::create_dir(directory.0.join("gone")).unwrap();
    let guest = Guest::mounted(&directory.0, false);
    let gone = guest.lookup(ROOT, "gone").unwrap();
    let handle = long(&guest.ask(OPENDIR, gone, &words(&[0, 0])).unwrap());
    guest.ask(RMDIR, ROOT, b"gone\0").unwrap();
    let moved = guest.moved(&directory.0).unwrap();
    for guest in [&guest, &moved] {
        assert_eq!(guest.read(READDIR, gone, handle, 0, 300), Err(libc::ENOENT));
        assert_eq!(guest.lookup(gone, "x"), Err(libc::ENOENT));
        assert_eq!(word(&guest.attributes(gone)[76..]) & libc::S_IFMT, libc::S_IFDIR);
    }
    assert_eq!(left_over(&directory.0), Vec::<String>::new());
}

#[test]
fn nobody_needs_what_nobody_has_open() {
    let directory = Directory::new();
    let guest = Guest::mounted(&directory.0, false);
    let (file, [handle]) = guest.orphan("file", [libc::O_RDWR]);
    guest.release(file, handle);
    let moved = guest.moved(&directory.0).unwrap();
    assert_eq!(moved.open(file, libc::O_RDONLY), Err(libc::EBADF));
    assert_eq!(moved.lookup(ROOT, "file"), Err(libc::ENOENT));
    // Another name is a name.
    std::fs::write(directory.0.join("one"), "x").unwrap();
    std::fs::hard_link(directory.0.join("one"), directory.0.join("two")).unwrap();
    let (one, [handle]) = guest.orphan("one", [libc::O_RDONLY]);
    let moved = guest.moved(&directory.0).unwrap();
    assert_eq!(moved.read(READ, one, handle, 0, 100).unwrap(), b"x");
    assert_eq!(moved.lookup(ROOT, "two"), Ok(one));
}

#[test]
fn what_cannot_be_kept_is_said() {
    let (directory, outside) = (Directory::new(), Directory::new_named("outside"));
    let saved = |guest: &Guest| guest.share.save().map_err(|error| error.to_string());
    // Of the root, by the host: a guest could not.
    let guest = Guest::mounted(&directory.0, true);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    std::fs::remove_file(directory.0.join("file")).unwrap();
    let error = saved(&guest).unwrap_err();
    assert!(error.contains("1 files open") && error.contains("removed: file"), "{error}");
    assert!(error.contains("read-only") && error.contains("close them"), "{error}");
    // It goes on.
    assert_eq!(guest.read(READ, file, handle, 0, 9).unwrap(), b"content");
    let guest = Guest::mounted(&directory.0, false);
    for (name, to) in [
        ("moved", outside.0.join("moved")),
        ("strange", directory.0.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff"))),
    ] {
        std::fs::write(directory.0.join(name), "x").unwrap();
        let node = guest.lookup(ROOT, name).unwrap();
        let handle = guest.open(node, libc::O_RDWR).unwrap();
        std::fs::rename(directory.0.join(name), to).unwrap();
        let error = saved(&guest).unwrap_err();
        assert!(error.contains("1 files open") && error.contains("has a name outside"), "{error}");
        guest.release(node, handle);
        saved(&guest).unwrap();
    }
}

#[test]
fn it_is_not_too_much() {
    let directory = Directory::new();
    let guest = Guest::mounted(&directory.0, false);
    let error = |word: &str| {
        let error = guest.share.save().unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("removed: ") && error.contains("close them"),
            "{error}"
        );
    };
    // A byte in each block is a block.
    let file = File::create(directory.0.join("large")).unwrap();
    for at in (0..=orphan::CONTENT_MAX as u64).step_by(4096) {
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", at).unwrap();
    }
    let (large, [handle]) = guest.orphan("large", [libc::O_RDWR]);
    error("more than 64 MiB");
    guest.release(large, handle);
    let mut open = Vec::new();
    for index in 0..=FILES_MAX {
        std::fs::write(directory.0.join(index.to_string()), "").unwrap();
        open.push(guest.orphan(&index.to_string(), [libc::O_RDONLY]));
    }
    error("1024 are the most");
    let (node, [handle]) = open.swap_remove(7);
    guest.release(node, handle);
    let moved = guest.moved(&directory.0).unwrap();
    for (node, [handle]) in open {
        assert_eq!(moved.read(READ, node, handle, 0, 1), Ok(vec![]));
    }
    assert_eq!(left_over(&directory.0), Vec::<String>::new());
}

#[test]
fn the_guest_waits_for_so_much_to_be_read() {
    let directory = Directory::new();
    let file = File::create(directory.0.join("zeroes")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 3 << 20], 0).unwrap();
    // Holes are not read.
    file.set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 1 << 20], 1 << 39).unwrap();
    let guest = Guest::mounted(&directory.0, false);
    let (zeroes, _) = guest.orphan("zeroes", [libc::O_RDWR]);
    let query = Query::new(&guest.share).unwrap();
    orphan::tests::kept(&query, &[zeroes], 0, 5 << 20).unwrap();
    let error = orphan::tests::kept(&query, &[zeroes, zeroes], 0, 5 << 20).unwrap_err();
    assert!(error.contains("more than 1024 MiB would have to be read"), "{error}");
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 2], 4095).unwrap();
    orphan::tests::kept(&query, &[zeroes], 8192, 5 << 20).unwrap();
    let error = orphan::tests::kept(&query, &[zeroes], 8191, 5 << 20).unwrap_err();
    assert!(error.contains("more than 64 MiB are in them"), "{error}");
    // What was opened for that is open no more.
    let open = guest.open(zeroes, libc::O_RDONLY).unwrap();
    let state: State = decode(&guest.share.save().unwrap()).unwrap();
    assert_eq!(state.mounted.unwrap().tree.open(), 2, "{open}");
}

/// Mounts for one thread; false where that is not allowed, as to those who are no root.
fn overlaid(room: &Path) -> bool {
    use nix::mount::{MsFlags, mount};
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(room.join(name)).unwrap();
    }
    let none: Option<&Path> = None;
    let (slave, at) = (MsFlags::MS_REC | MsFlags::MS_SLAVE, room.display());
    let layers = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
    let (overlay, plain) = (Some("overlay"), MsFlags::empty());
    unshare(CloneFlags::CLONE_NEWNS).is_ok()
        && mount(none, "/", none, slave, none).is_ok()
        && mount(overlay, &room.join("merged"), overlay, plain, Some(layers.as_str())).is_ok()
}

#[test]
fn what_is_of_a_lower_layer_is_kept_too() {
    let room = Directory::new_named("overlay");
    let path = &room.0;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if !overlaid(path) {
                eprintln!("not tested: nothing can be mounted here");
                return;
            }
            for (layer, name) in [("lower", "below"), ("upper", "above")] {
                std::fs::write(path.join(layer).join(name), name).unwrap();
            }
            let merged = path.join("merged");
            let guest = Guest::mounted(&merged, false);
            let orphans: Vec<_> = ["below", "above"]
                .map(|name| {
                    let (node, [handle]) = guest.orphan(name, [libc::O_RDONLY]);
                    (name, node, handle)
                })
                .into();
            let moved = guest.moved(&merged).unwrap().moved(&merged).unwrap();
            for (name, node, handle) in orphans {
                assert_eq!(moved.read(READ, node, handle, 0, 9).unwrap(), name.as_bytes());
            }
            assert_eq!(names(&merged), Vec::<String>::new());
            // Nor does one count as removed that has moved.
            std::fs::write(merged.join("strange"), "").unwrap();
            let strange = guest.lookup(ROOT, "strange").unwrap();
            guest.open(strange, libc::O_RDONLY).unwrap();
            let to = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
            std::fs::rename(merged.join("strange"), merged.join(to)).unwrap();
            let error = guest.share.save().unwrap_err().to_string();
            assert!(error.contains("has a name outside"), "{error}");
        });
        thread.join().unwrap();
    });
}

#[test]
fn what_fails_leaves_nothing() {
    let directory = Directory::new();
    let guest = Guest::mounted(&directory.0, false);
    std::fs::write(directory.0.join("gone"), "x").unwrap();
    std::fs::create_dir(directory.0.join("void")).unwrap();
    let void = guest.lookup(ROOT, "void").unwrap();
    guest.ask(OPENDIR, void, &words(&[0, 0])).unwrap();
    let (gone, [_]) = guest.orphan("gone", [libc::O_RDWR]);
    guest.ask(RMDIR, ROOT, b"void\0").unwrap();
    let state: State = decode(&guest.share.save().unwrap()).unwrap();
    let mounted = state.mounted.clone().unwrap();
    let restored = |read_only, orphans: &[Orphan]| {
        let changed = Mounted { orphans: orphans.to_vec(), ..mounted.clone() };
        let state = State { read_only, mounted: Some(changed), ..state.clone() };
        let restored = Guest::new(&directory.0, read_only).share.restore(&encode(&state).unwrap());
        assert_eq!(left_over(&directory.0), Vec::<String>::new());
        restored.map_err(|error| error.to_string())
    };
    let [first, second] = mounted.orphans.as_slice() else { panic!("{:?}", mounted.orphans) };
    let (void, gone) = if gone == orphan::tests::id(first) { (second, first) } else { (first, second) };
    restored(false, &[void.clone(), gone.clone()]).unwrap();
    let huge = orphan::tests::resized(gone, i64::MAX as u64);
    let directory_of_it = orphan::tests::retyped(gone, libc::S_IFDIR | 0o700);
    let file_of_it = orphan::tests::retyped(void, libc::S_IFREG | 0o600);
    for (orphans, word) in [
        // Only half of them are made; the server refuses the half; it is never come to.
        (vec![void.clone(), huge], "cannot be made anew"),
        (vec![file_of_it, gone.clone()], "Not a directory"),
        (vec![void.clone(), directory_of_it], "contradicts"),
        (vec![gone.clone()], "place of file"),
        (vec![], "place of file"),
        (vec![void.clone(), gone.clone(), gone.clone()], "contradicts"),
        (vec![gone.clone(); FILES_MAX + 1], "cannot be read"),
    ] {
        let error = restored(false, &orphans).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let error = restored(true, &mounted.orphans).unwrap_err();
    assert!(error.contains("read-only"), "{error}");
}

#[test]
fn shares_of_one_directory_do_not_meet() {
    let directory = Directory::new();
    let guests: Vec<_> = (0..4)
        .map(|index| {
            let guest = Guest::mounted(&directory.0, false);
            let name = format!("gone{index}");
            std::fs::write(directory.0.join(&name), &name).unwrap();
            let (node, [handle]) = guest.orphan(&name, [libc::O_RDWR]);
            (guest.share.save().unwrap(), node, handle, name)
        })
        .collect();
    std::thread::scope(|scope| {
        for (state, node, handle, name) in &guests {
            let path = &directory.0;
            scope.spawn(move || {
                for _ in 0..20 {
                    let guest = Guest::new(path, false);
                    guest.share.restore(state).unwrap();
                    assert_eq!(guest.read(READ, *node, *handle, 0, 9).unwrap(), name.as_bytes());
                }
            });
        }
    });
    assert_eq!(left_over(&directory.0), Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is written, and wherever, is there afterwards, and nothing else.
    #[test]
    fn what_was_written_is_kept(
        writes in proptest::collection::vec((0u64..60_000, 1usize..9000, prop_oneof![Just(0u8), any::<u8>()]), 0..6),
        len in proptest::option::of(0u64..60_000),
    ) {
        let directory = Directory::new();
        let path = directory.0.join("gone");
        let file = File::create(&path).unwrap();
        for (at, len, byte) in writes {
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![byte; len], at).unwrap();
        }
        if let Some(len) = len {
            file.set_len(len).unwrap();
        }
        let content = std::fs::read(&path).unwrap();
        let guest = Guest::mounted(&directory.0, false);
        let (node, [handle]) = guest.orphan("gone", [libc::O_RDONLY]);
        let moved = guest.moved(&directory.0).unwrap();
        prop_assert_eq!(long(&moved.attributes(node)[24..]), content.len() as u64);
        for (index, part) in content.chunks(8000).enumerate() {
            prop_assert_eq!(moved.read(READ, node, handle, index as u64 * 8000, 8000).unwrap(), part);
        }
        prop_assert_eq!(left_over(&directory.0), Vec::<String>::new());
    }
}
