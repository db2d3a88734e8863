//! A guest that tells itself what the host has done.

use std::os::unix::fs::{MetadataExt, symlink};

use super::super::super::News;
use super::*;

const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

const FIRST: u32 = 70_000;
const APPEARS: u32 = FIRST;
const FILE_VANISHES: u32 = FIRST + 1;
const DIRECTORY_VANISHES: u32 = FIRST + 2;
const CHANGES: u32 = FIRST + 3;

/// The groups that bring news in these tests.
pub(super) fn first() -> News {
    News::from(FIRST).unwrap()
}

const TOP: u64 = 1 << 63;

fn of_group(mut header: [u8; 40], gid: u32) -> [u8; 40] {
    header[28..32].copy_from_slice(&gid.to_le_bytes());
    header
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

/// The body of a request to make a file.
fn mknod(name: &[u8], mode: u32) -> Vec<u8> {
    [&words(&[mode, 0, 0o22, 0])[..], name].concat()
}

impl Guest {
    fn hearing(path: &Path, read_only: bool) -> Self {
        let mut guest = Self::mounted(path, read_only);
        guest.share = guest.share.with_news(first());
        guest
    }

    /// Asks on behalf of a group.
    fn ask_as(&self, gid: u32, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.ask_of(of_group(header(40 + body.len() as u32, opcode, node), gid), body, ROOM).unwrap()
    }

    fn ask_of(&self, header: [u8; 40], body: &[u8], room: u32) -> Result<Result<Vec<u8>, i32>, Broken> {
        let len = self.share.handle(request(&self.ram, &header, body, room))? as usize;
        let mut answer = vec![0; len];
        self.ram.read_slice(&mut answer, GuestAddress(testing::DATA + 0x4000)).unwrap();
        if answer.is_empty() {
            return Ok(Ok(answer));
        }
        assert_eq!((word(&answer) as usize, long(&answer[8..])), (len, 7));
        Ok(match word(&answer[4..]).cast_signed() {
            0 => Ok(answer.split_off(16)),
            error => Err(-error),
        })
    }

    fn entry(&self, name: &str) -> Vec<u8> {
        self.ask(LOOKUP, ROOT, &[name.as_bytes(), &[0]].concat()).unwrap()
    }

    /// Whether the server has an idea of a file.
    fn knows(&self, node: u64) -> bool {
        self.ask(GETATTR, node, &longs(&[0, 0])).is_ok()
    }

    fn forget(&self, node: u64, times: u64) {
        assert_eq!(self.ask(FORGET, node, &longs(&[times])), Ok(vec![]));
    }
}

/// A directory in which there is one of each kind.
fn populated() -> Directory {
    let directory = Directory::new();
    std::fs::create_dir(directory.0.join("sub")).unwrap();
    symlink("nowhere", directory.0.join("link")).unwrap();
    directory
}

/// All that a request could have changed.
fn state(directory: &Directory) -> Vec<(String, u32, i64, i64, u64, u32)> {
    let mut paths: Vec<_> = names(&directory.0).into_iter().map(|name| directory.0.join(name)).collect();
    paths.push(directory.0.clone());
    let one = |path: PathBuf| {
        let of = path.symlink_metadata().unwrap();
        (path.display().to_string(), of.mode(), of.ctime(), of.ctime_nsec(), of.size(), of.uid())
    };
    paths.into_iter().map(one).collect()
}

#[test]
fn a_guest_says_of_every_request_whose_it_is() {
    let directory = Directory::new();
    // Linux asks for it, in the second word of flags.
    let (ext, idmap, others) = (1 << 30, 1 << 8, 1 << 2);
    let init = [words(&[7, 41, 0x2_0000, ext, idmap | others]), words(&[0; 11])].concat();
    let agreed = |guest: &Guest| {
        let reply = guest.ask(INIT, 0, &init).unwrap();
        assert_eq!((reply.len(), word(&reply), word(&reply[12..]) & ext), (64, 7, ext));
        word(&reply[32..])
    };
    let plain = Guest::new(&directory.0, false);
    let mut hearing = Guest::new(&directory.0, false);
    hearing.share = hearing.share.with_news(first());
    let (plainly, heard) = (agreed(&plain), agreed(&hearing));
    assert_eq!((plainly & idmap, heard), (idmap, plainly & !idmap));
    // That holds where the guest goes on.
    let file = hearing.lookup(ROOT, "file").unwrap();
    let moved = hearing.moved(&directory.0).unwrap();
    assert_eq!(moved.lookup(ROOT, "file"), Ok(file));
    let saved = |guest: &Guest| {
        let state: State = decode(&guest.share.save().unwrap()).unwrap();
        word(&state.mounted.unwrap().request[56..])
    };
    plain.lookup(ROOT, "file").unwrap();
    assert_eq!([&plain, &hearing, &moved].map(saved), [idmap | others, others, others]);
    // Who does not say it cannot hear news afterwards.
    let state = plain.share.save().unwrap();
    let mut deaf = Guest::new(&directory.0, false);
    deaf.share = deaf.share.with_news(first());
    let refused = deaf.share.restore(&state).unwrap_err().to_string();
    assert!(refused.contains("its news was without"), "{refused}");
    // There is no more of it than what it says.
    assert!(hearing.ask(INIT, 0, &words(&[6, 0, 0, 0])).is_err());
    assert!(hearing.ask_of(header(44, INIT, 0), &[7], ROOM).is_err());
}

#[test]
fn what_has_appeared_is_as_if_the_guest_had_made_it() {
    for read_only in [false, true] {
        let directory = populated();
        let before = state(&directory);
        let guest = Guest::hearing(&directory.0, read_only);
        let file = libc::S_IFREG | 0o600;
        for (name, opcode, body, kind) in [
            ("file", MKNOD, mknod(b"file\0", file), libc::S_IFREG),
            // What is behind a name is no part of it.
            ("file", MKNOD, mknod(b"file\0\x08\0\0\0\0\0\0\0", file), libc::S_IFREG),
            ("sub", MKDIR, [&words(&[0o700, 0])[..], b"sub\0"].concat(), libc::S_IFDIR),
            ("link", SYMLINK, b"link\0somewhere\0".to_vec(), libc::S_IFLNK),
        ] {
            let lookup = [name.as_bytes(), &[0]].concat();
            assert_eq!(guest.ask_as(APPEARS, LOOKUP, ROOT, &lookup), Err(libc::ENOENT), "{name}");
            let made = guest.ask_as(APPEARS, opcode, ROOT, &body).unwrap();
            assert_eq!(made.len(), 128);
            assert_eq!(word(&made[100..]) & libc::S_IFMT, kind, "{name}");
            assert_eq!(guest.entry(name), made, "{name}");
            // Both count.
            let node = long(&made);
            guest.forget(node, 1);
            assert!(guest.knows(node), "{name}");
            guest.forget(node, 1);
            assert!(!guest.knows(node), "{name}");
        }
        assert_eq!(state(&directory), before);
    }
}

#[test]
fn what_has_not_appeared_or_is_another_is_refused_and_not_remembered() {
    let directory = populated();
    let before = state(&directory);
    let guest = Guest::hearing(&directory.0, false);
    let file = libc::S_IFREG | 0o600;
    let long_name = [&[b'x'; 300][..], &[0]].concat();
    for (opcode, body, error) in [
        (MKNOD, mknod(b"none\0", file), libc::ENOENT),
        (MKDIR, [&words(&[0o700, 0])[..], b"none\0"].concat(), libc::ENOENT),
        (SYMLINK, b"none\0file\0".to_vec(), libc::ENOENT),
        (MKNOD, mknod(b"sub\0", file), libc::EIO),
        (MKNOD, mknod(b"file\0", libc::S_IFIFO), libc::EIO),
        (MKDIR, [&words(&[0o700, 0])[..], b"file\0"].concat(), libc::EIO),
        (SYMLINK, b"file\0x\0".to_vec(), libc::EIO),
        (MKNOD, mknod(&long_name, file), libc::ENAMETOOLONG),
        (MKNOD, mknod(&[b'x'; 2000], file), libc::EINVAL),
        (MKNOD, mknod(b"file", file), libc::EINVAL),
        (MKNOD, mknod(b"\0file\0", file), libc::EINVAL),
        (MKNOD, mknod(b"", file), libc::EINVAL),
        (MKNOD, words(&[file]), libc::EINVAL),
        (MKDIR, vec![], libc::EINVAL),
        (SYMLINK, vec![], libc::EINVAL),
    ] {
        assert_eq!(guest.ask_as(APPEARS, opcode, ROOT, &body), Err(error), "{opcode} {body:?}");
    }
    // A name ends where its request does.
    let body = mknod(b"file\0", file);
    let short = of_group(header(40 + body.len() as u32 - 1, MKNOD, ROOT), APPEARS);
    assert_eq!(guest.ask_of(short, &body, ROOM).unwrap(), Err(libc::EINVAL));
    assert_eq!(guest.ask_as(APPEARS, MKNOD, 99, &body), Err(libc::EBADF), "no such directory");
    assert_eq!(state(&directory), before);
    // None of it counts: who looks for them now is the first.
    for name in ["file", "sub"] {
        let node = guest.lookup(ROOT, name).unwrap();
        guest.forget(node, 1);
        assert!(!guest.knows(node), "{name}");
    }
}

#[test]
fn what_vanishes_is_made_up_and_stays_here() {
    for read_only in [false, true] {
        let directory = populated();
        let before = state(&directory);
        let guest = Guest::hearing(&directory.0, read_only);
        let mut nodes = Vec::new();
        for (gid, opcode, name, kind) in [
            (FILE_VANISHES, UNLINK, &b"file\0"[..], libc::S_IFREG),
            (FILE_VANISHES, UNLINK, b"none\0", libc::S_IFREG),
            (DIRECTORY_VANISHES, RMDIR, b"sub\0", libc::S_IFDIR),
            (DIRECTORY_VANISHES, RMDIR, b"none\0", libc::S_IFDIR),
        ] {
            let entry = guest.ask_as(gid, LOOKUP, ROOT, name).unwrap();
            assert_eq!(entry.len(), 128);
            let node = long(&entry);
            assert!(node & TOP != 0 && !nodes.contains(&node), "{node:#x}");
            nodes.push(node);
            assert_eq!((long(&entry[40..]), word(&entry[100..]), word(&entry[104..])), (node, kind, 1));
            // Generation and timeouts; size, times, owner.
            for zeroes in [8..40, 48..100, 108..128] {
                assert!(entry[zeroes.clone()].iter().all(|byte| *byte == 0), "{zeroes:?}");
            }
            assert_eq!(guest.ask_as(gid, opcode, ROOT, name), Ok(vec![]));
        }
        assert_eq!(state(&directory), before);
        // To whoever asks, also where the guest goes on.
        let moved = guest.moved(&directory.0).unwrap();
        for guest in [&guest, &moved] {
            for gid in [0, APPEARS, FILE_VANISHES, DIRECTORY_VANISHES, CHANGES] {
                for opcode in (1..53).filter(|opcode| ![FORGET, INTERRUPT, BATCH_FORGET].contains(opcode)) {
                    let answer = guest.ask_as(gid, opcode, nodes[0], &[0; 64]);
                    assert_eq!(answer, Err(libc::ENOENT), "{opcode} of {gid}");
                }
                for opcode in [FORGET, INTERRUPT] {
                    assert_eq!(guest.ask_as(gid, opcode, nodes[0], &longs(&[1])), Ok(vec![]));
                }
            }
        }
    }
}

#[test]
fn real_files_are_forgotten_among_others() {
    let directory = Directory::new();
    let guest = Guest::hearing(&directory.0, false);
    let nodes: Vec<_> = (0..600)
        .map(|index| {
            std::fs::write(directory.0.join(index.to_string()), "").unwrap();
            guest.lookup(ROOT, &index.to_string()).unwrap()
        })
        .collect();
    let batch = |forgets: &[u64]| {
        let ones: Vec<_> = forgets.iter().flat_map(|node| longs(&[*node, 1])).collect();
        [words(&[forgets.len() as u32, 0]), ones].concat()
    };
    let (few, many) = nodes.split_at(3);
    guest.ask_as(CHANGES, BATCH_FORGET, 0, &batch(&[few[0], TOP, few[1], TOP | 7])).unwrap();
    assert_eq!([0, 1, 2].map(|at| guest.knows(few[at])), [false, false, true]);
    guest.ask(BATCH_FORGET, 0, &batch(&few[2..])).unwrap();
    guest.ask(BATCH_FORGET, 0, &batch(&[TOP; 300])).unwrap();
    guest.ask(BATCH_FORGET, 0, &batch(&[])).unwrap();
    assert!(many.iter().all(|node| guest.knows(*node)));
    // More than fit one question of ours; the memory of a guest by hand has room for less at once.
    for some in many.chunks(300).map(|some| [some, &[TOP]].concat()) {
        // In as many bytes as there are between a body and its answer.
        assert!(batch(&some).len() < 0x3000);
        guest.ask(BATCH_FORGET, 0, &batch(&some)).unwrap();
    }
    assert!(!many.iter().any(|node| guest.knows(*node)));
    // As many as are not there, or as nobody has.
    let room = |body: &[u8]| guest.ask_of(header(40, BATCH_FORGET, 0), body, ROOM);
    assert!(room(&[&words(&[2, 0])[..], &longs(&[TOP, 1])].concat()).is_err());
    assert_eq!(room(&words(&[u32::MAX, 0])).unwrap(), Err(libc::ENOMEM));
    assert!(room(&[]).is_err());
}

#[test]
fn what_changes_is_not_touched() {
    for read_only in [false, true] {
        let directory = Directory::new();
        let before = state(&directory);
        let guest = Guest::hearing(&directory.0, read_only);
        let file = long(&guest.ask_as(CHANGES, LOOKUP, ROOT, b"file\0").unwrap());
        let attributes = guest.ask_as(CHANGES, GETATTR, file, &longs(&[0, 0])).unwrap();
        assert_eq!(long(&attributes[24..]), 7);
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY | libc::O_TRUNC] {
            let opened = guest.ask_as(CHANGES, OPEN, file, &words(&[flags.cast_unsigned(), 0])).unwrap();
            assert_eq!(opened, longs(&[TOP, 0]));
        }
        // Whoever closes it.
        for gid in [CHANGES, 0, 1234] {
            let fallocate = [longs(&[TOP, 0, 0]), words(&[1, 0])].concat();
            assert_eq!(guest.ask_as(gid, FALLOCATE, file, &fallocate), Ok(vec![]));
            assert_eq!(guest.ask_as(gid, FLUSH, file, &longs(&[TOP, 0, 1])), Ok(vec![]));
            assert_eq!(guest.ask_as(gid, FSYNC, file, &longs(&[TOP, 0])), Ok(vec![]));
            assert_eq!(guest.ask_as(gid, RELEASE, file, &longs(&[TOP, 0, 0])), Ok(vec![]));
        }
        assert_eq!(guest.read(READ, file, TOP, 0, 9), Err(libc::EBADF));
        let written = guest.write(file, TOP, 0, b"x");
        assert_eq!(written, Err(if read_only { libc::EROFS } else { libc::EBADF }));
        // Mode, size and handle, which are all the same.
        let setattr = [words(&[1 | 8 | 64, 0]), longs(&[TOP, 0]), vec![0; 64]].concat();
        assert_eq!(guest.ask_as(CHANGES, SETATTR, file, &setattr), Ok(attributes));
        assert_eq!(guest.ask_as(CHANGES, SETATTR, 99, &setattr), Err(libc::EBADF));
        let saved: State = decode(&guest.share.save().unwrap()).unwrap();
        assert_eq!(saved.mounted.unwrap().tree.open(), 0);
        assert_eq!(state(&directory), before);
    }
}

#[test]
fn others_do_what_they_say() {
    let directory = populated();
    let file = libc::S_IFREG | 0o600;
    let guests = [
        (Guest::hearing(&directory.0, false), FIRST - 1),
        (Guest::hearing(&directory.0, false), FIRST + 4),
        (Guest::hearing(&directory.0, false), 0),
        (Guest::mounted(&directory.0, false), APPEARS),
        (Guest::mounted(&directory.0, false), FILE_VANISHES),
        (Guest::mounted(&directory.0, false), CHANGES),
    ];
    // Those who are no root cannot make a file somebody else's.
    let as_given = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    for (guest, gid) in guests.into_iter().filter(|(_, gid)| as_given || *gid == 0) {
        let lookup = |name| {
            let entry = guest.ask_as(gid, LOOKUP, ROOT, name)?;
            Some(long(&entry)).filter(|node| *node != 0).ok_or(libc::ENOENT)
        };
        assert!(lookup(b"file\0").is_ok(), "{gid}");
        assert_eq!(lookup(b"new\0"), Err(libc::ENOENT));
        guest.ask_as(gid, MKNOD, ROOT, &mknod(b"new\0", file)).unwrap();
        assert!(directory.0.join("new").is_file());
        let new = lookup(b"new\0").unwrap();
        assert!(new & TOP == 0);
        let opened = guest.ask_as(gid, OPEN, new, &words(&[libc::O_RDWR.cast_unsigned(), 0])).unwrap();
        let handle = long(&opened);
        assert!(handle & TOP == 0);
        guest.write(new, handle, 0, b"new").unwrap();
        guest.release(new, handle);
        let setattr = [words(&[8, 0]), longs(&[0, 1]), vec![0; 64]].concat();
        guest.ask_as(gid, SETATTR, new, &setattr).unwrap();
        assert_eq!(std::fs::read(directory.0.join("new")).unwrap(), b"n");
        guest.ask_as(gid, UNLINK, ROOT, b"new\0").unwrap();
        assert!(!directory.0.join("new").exists());
    }
}

#[test]
fn news_of_one_thing_changes_others_as_anybody_can() {
    let directory = Directory::new();
    let guest = Guest::hearing(&directory.0, false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    // What brings no news of this kind is for the server, as is what is about files that are open.
    for gid in [APPEARS, FILE_VANISHES, DIRECTORY_VANISHES, CHANGES] {
        let body = [longs(&[handle, 0]), words(&[9, 0]), longs(&[0, 0])].concat();
        assert_eq!(guest.ask_as(gid, READ, file, &body), Ok(b"content".to_vec()));
        assert_eq!(guest.ask_as(gid, FLUSH, file, &longs(&[handle, 0, 1])), Ok(vec![]));
    }
    assert!(guest.ask_as(APPEARS, OPEN, file, &words(&[0, 0])).is_ok_and(|answer| long(&answer) & TOP == 0));
    assert!(guest.ask_as(FILE_VANISHES, GETATTR, file, &longs(&[0, 0])).is_ok());
    assert_eq!(guest.ask_as(CHANGES, UNLINK, ROOT, b"file\0"), Ok(vec![]));
    assert!(!directory.0.join("file").exists());
}

#[test]
fn an_answer_without_room_is_the_drivers_fault() {
    let directory = Directory::new();
    let guest = Guest::hearing(&directory.0, false);
    let create = mknod(b"file\0", libc::S_IFREG);
    for (gid, opcode, body, needs) in [
        (APPEARS, LOOKUP, &b"file\0"[..], 16),
        (APPEARS, MKNOD, &create, 144),
        (FILE_VANISHES, LOOKUP, b"file\0", 144),
        (FILE_VANISHES, UNLINK, b"file\0", 16),
        (CHANGES, OPEN, &words(&[1, 0]), 32),
        (CHANGES, SETATTR, &[0; 88], 120),
    ] {
        for room in [1, 15, 16, needs - 1, needs, needs + 1] {
            let header = of_group(header(40 + body.len() as u32, opcode, ROOT), gid);
            let answer = guest.ask_of(header, body, room);
            assert_eq!(answer.is_ok(), room >= needs, "{opcode} with {room} bytes of {needs}: {answer:?}");
        }
    }
}

#[test]
fn threads_bring_news_at_the_same_time() {
    const THREADS: u32 = 8;
    let directory = Directory::new();
    let share = Guest::hearing(&directory.0, false).share;
    for index in 0..THREADS {
        std::fs::write(directory.0.join(index.to_string()), vec![0; index as usize]).unwrap();
    }
    let nodes = Mutex::new(std::collections::BTreeSet::new());
    std::thread::scope(|scope| {
        for index in 0..THREADS {
            let (share, nodes) = (&share, &nodes);
            scope.spawn(move || {
                share.enter_thread().unwrap();
                let ram = ram();
                let ask = |gid, opcode, body: &[u8]| {
                    let header = of_group(header(40 + body.len() as u32, opcode, ROOT), gid);
                    share.handle(request(&ram, &header, body, ROOM)).unwrap();
                    let mut answer = [0; 144];
                    ram.read_slice(&mut answer, GuestAddress(testing::DATA + 0x4000)).unwrap();
                    assert_eq!((word(&answer), word(&answer[4..])), (144, 0));
                    answer
                };
                for _ in 0..200 {
                    let made = ask(APPEARS, MKNOD, &mknod(format!("{index}\0").as_bytes(), libc::S_IFREG));
                    assert_eq!(long(&made[64..]), u64::from(index), "its size");
                    let vanished = ask(FILE_VANISHES, LOOKUP, b"x\0");
                    assert!(nodes.lock().unwrap().insert(long(&vanished[16..])));
                }
            });
        }
    });
    assert_eq!(nodes.into_inner().unwrap().len(), 200 * THREADS as usize);
}

fn gids() -> impl Strategy<Value = u32> {
    prop_oneof![6 => FIRST - 1..FIRST + 5, 1 => Just(0u32), 1 => any::<u32>()]
}

fn nodes() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..5, 2 => (0u64..5).prop_map(|node| TOP | node), 1 => any::<u64>()]
}

fn bodies() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"file\0other\0".to_vec()),
        Just(mknod(b"file\0", libc::S_IFREG)),
        Just(mknod(b"sub\0", libc::S_IFREG)),
        Just([&longs(&[TOP])[..], &[0; 80]].concat()),
        proptest::collection::vec((nodes(), 0u64..3), 0..8).prop_map(|forgets| {
            let ones = forgets.iter().flat_map(|(node, times)| longs(&[*node, *times])).collect();
            [words(&[forgets.len() as u32, 0]), ones].concat()
        }),
        proptest::collection::vec(any::<u8>(), 0..200),
        proptest::collection::vec(prop_oneof![Just(0u8), 0..8u8], 0..120),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Requests of any kind and of any group are answered within the room there is, or break the queue.
    #[test]
    fn no_request_upsets_it(
        requests in proptest::collection::vec(
            ((prop_oneof![8 => 1u32..53, 1 => any::<u32>()], nodes(), gids()),
             prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
             bodies(),
             prop_oneof![2 => Just(ROOM), 1 => 1..200u32]),
            1..12),
        read_only in any::<bool>(),
    ) {
        let directory = populated();
        let share = Passthrough::open(&directory.0, read_only, Cache::Auto).unwrap();
        let share = share.with_news(first());
        let ram = ram();
        let answered = std::thread::spawn(move || {
            share.enter_thread().unwrap();
            greet(&share, &ram);
            for ((opcode, node, gid), len, body, room) in requests {
                let len = len.unwrap_or(40 + body.len() as u32);
                let header = of_group(header(len, opcode, node), gid);
                if let Ok(written) = share.handle(request(&ram, &header, &body, room)) {
                    assert!(written <= room, "{written} bytes into {room}");
                }
            }
            share.forget();
        });
        prop_assert!(answered.join().is_ok());
    }

    /// What brings news changes nothing on the host, whatever is in it.
    #[test]
    fn no_news_does_what_it_says(
        requests in proptest::collection::vec(
            (prop_oneof![
                (Just(APPEARS), prop_oneof![Just(LOOKUP), Just(MKNOD), Just(MKDIR), Just(SYMLINK)]),
                (FILE_VANISHES..CHANGES, prop_oneof![Just(LOOKUP), Just(UNLINK), Just(RMDIR)]),
                (Just(CHANGES), prop_oneof![Just(LOOKUP), Just(OPEN), Just(SETATTR)]),
             ],
             nodes(), bodies()),
            1..12),
    ) {
        let directory = populated();
        let before = state(&directory);
        let guest = Guest::hearing(&directory.0, false);
        let file = guest.lookup(ROOT, "file").unwrap();
        for ((gid, opcode), node, body) in requests {
            let header = of_group(header(40 + body.len() as u32, opcode, node), gid);
            let _ = guest.ask_of(header, &body, ROOM);
        }
        prop_assert_eq!(state(&directory), before);
        prop_assert_eq!(guest.lookup(ROOT, "file"), Ok(file));
    }
}
