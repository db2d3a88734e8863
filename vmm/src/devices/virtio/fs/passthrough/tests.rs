use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::super::testing;
use super::*;
use crate::memory::{self, GuestRam};

mod fewer;
mod missing;
mod news;
mod removed;

#[test]
fn a_share_is_a_directory_that_is_there() {
    for (path, word) in [("/nonexistent", "No such file"), ("/proc/self/status", "directory")] {
        let error = Passthrough::open(Path::new(path), false, Cache::Auto).unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(word), "{error}");
    }
    for read_only in [false, true] {
        Passthrough::open(&std::env::temp_dir(), read_only, Cache::Auto).unwrap();
    }
}

/// A directory with a file in it, gone when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        Self::new_named("share")
    }

    fn new_named(name: &str) -> Self {
        let thread = std::thread::current().id();
        let path = std::env::temp_dir().join(format!("vmm-fs-{}-{thread:?}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("file"), "content").unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const ROOM: u32 = 0x2000;

/// A FUSE request in two parts, and where its answer goes.
fn request(ram: &Arc<GuestRam>, header: &[u8; 40], body: &[u8], room: u32) -> Chain {
    let at = testing::DATA;
    ram.write_slice(header, GuestAddress(at)).unwrap();
    ram.write_slice(body, GuestAddress(at + 0x1000)).unwrap();
    let parts = [(at, 40, 0), (at + 0x1000, body.len() as u32, 0), (at + 0x4000, room, testing::WRITE)];
    testing::chain(ram, &parts)
}

fn header(len: u32, opcode: u32, node: u64) -> [u8; 40] {
    let mut header = [0; 40];
    header[..4].copy_from_slice(&len.to_le_bytes());
    header[4..8].copy_from_slice(&opcode.to_le_bytes());
    header[8..16].copy_from_slice(&7u64.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    header
}

/// What a driver says first: FUSE 7.31, nothing special.
fn greet(share: &Passthrough, ram: &Arc<GuestRam>) {
    const INIT: u32 = 26;
    let body: Vec<u8> = [7u32, 31, 0x2_0000, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let chain = request(ram, &header(40 + body.len() as u32, INIT, 0), &body, ROOM);
    share.handle(chain).unwrap();
}

fn ram() -> Arc<GuestRam> {
    Arc::new(memory::anonymous(&[(0, 0x4_0000)]).unwrap())
}

#[test]
fn an_answer_fits_the_room_and_names_its_request() {
    const LOOKUP: u32 = 1;
    let directory = Directory::new();
    let share = Passthrough::open(&directory.0, false, Cache::Never).unwrap();
    let ram = ram();
    greet(&share, &ram);
    for (name, error) in [("file", 0), ("none", -libc::ENOENT)] {
        let body = [name.as_bytes(), &[0]].concat();
        let chain = request(&ram, &header(40 + body.len() as u32, LOOKUP, 1), &body, ROOM);
        let len = share.handle(chain).unwrap();
        let answer: [u32; 3] =
            [0, 4, 8].map(|at| ram.read_obj(GuestAddress(testing::DATA + 0x4000 + at)).unwrap());
        assert_eq!((answer[0], answer[1].cast_signed(), answer[2]), (len, error, 7), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Requests of any kind with anything in them are answered within the room there is, or break
    /// the queue. The requests are made on a thread of their own, as in a machine.
    #[test]
    fn no_request_upsets_it(
        requests in proptest::collection::vec(
            (prop_oneof![8 => 1u32..53, 1 => any::<u32>()],
             prop_oneof![4 => 0u64..5, 1 => any::<u64>()],
             prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
             prop_oneof![
                 Just(b"file\0other\0".to_vec()),
                 proptest::collection::vec(any::<u8>(), 0..200),
                 proptest::collection::vec(prop_oneof![Just(0u8), 0..8u8], 0..120),
             ],
             prop_oneof![2 => Just(ROOM), 1 => 1..200u32]),
            1..12),
        read_only in any::<bool>(),
    ) {
        let directory = Directory::new();
        let share = Passthrough::open(&directory.0, read_only, Cache::Auto).unwrap();
        let ram = ram();
        let answered = std::thread::spawn(move || {
            share.enter_thread().unwrap();
            greet(&share, &ram);
            for (opcode, node, len, body, room) in requests {
                let len = len.unwrap_or(40 + body.len() as u32);
                let chain = request(&ram, &header(len, opcode, node), &body, room);
                if let Ok(written) = share.handle(chain) {
                    assert!(written <= room, "{written} bytes into {room}");
                }
            }
            share.forget();
        });
        prop_assert!(answered.join().is_ok());
    }
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const DESTROY: u32 = 38;
const ROOT: u64 = 1;

/// What is in a directory, in order.
fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A guest that speaks by hand.
struct Guest {
    share: Passthrough,
    ram: Arc<GuestRam>,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

impl Guest {
    fn new(path: &Path, read_only: bool) -> Self {
        Self { share: Passthrough::open(path, read_only, Cache::Auto).unwrap(), ram: ram() }
    }

    fn mounted(path: &Path, read_only: bool) -> Self {
        let guest = Self::new(path, read_only);
        // POSIX_ACL, DONT_MASK, SETXATTR_EXT and INIT_EXT, as Linux has them.
        let flags = 1 << 20 | 1 << 6 | 1 << 29 | 1 << 30;
        guest.ask(INIT, 0, &[words(&[7, 36, 0x2_0000, flags]), words(&[0; 12])].concat()).unwrap();
        guest
    }

    /// The answer behind its header, or the error.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.ask_for(opcode, node, body, ROOM)
    }

    fn ask_for(&self, opcode: u32, node: u64, body: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        let chain = request(&self.ram, &header(40 + body.len() as u32, opcode, node), body, room);
        let len = self.share.handle(chain).unwrap() as usize;
        // Taking the share off is not answered.
        if len == 0 {
            return Ok(vec![]);
        }
        let mut answer = vec![0; len];
        self.ram.read_slice(&mut answer, GuestAddress(testing::DATA + 0x4000)).unwrap();
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer.split_off(16)),
            error => Err(-error),
        }
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.ask(LOOKUP, parent, &[name.as_bytes(), &[0]].concat())?;
        Some(long(&entry)).filter(|node| *node != 0).ok_or(libc::ENOENT)
    }

    fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        self.ask(OPEN, node, &words(&[flags.cast_unsigned(), 0])).map(|answer| long(&answer))
    }

    fn read(&self, opcode: u32, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = [longs(&[handle, offset]), words(&[size, 0]), longs(&[0, 0])].concat();
        // As much room as it asks for, like a kernel.
        self.ask_for(opcode, node, &body, 16 + size)
    }

    fn write(&self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<(), i32> {
        let head = [longs(&[handle, offset]), words(&[data.len() as u32, 0]), longs(&[0, 0])].concat();
        self.ask(WRITE, node, &[head.as_slice(), data].concat()).map(drop)
    }

    fn release(&self, node: u64, handle: u64) {
        self.ask(RELEASE, node, &[longs(&[handle]), words(&[0, 0]), longs(&[0])].concat()).unwrap();
    }

    /// Another that goes on, with the same share or a copy of it.
    fn moved(&self, path: &Path) -> Result<Self, StateError> {
        let mut guest = Self::new(path, self.share.is_read_only());
        if self.share.news.is_some() {
            guest.share = guest.share.with_news(news::first());
        }
        guest.share.restore(&self.share.save()?)?;
        Ok(guest)
    }
}

#[test]
fn open_files_go_on_elsewhere_and_here() {
    let directory = Directory::new();
    let path = &directory.0;
    std::fs::create_dir(path.join("sub")).unwrap();
    std::fs::write(path.join("sub/notes"), "0123456789").unwrap();
    let first = Guest::mounted(path, false);
    let sub = first.lookup(ROOT, "sub").unwrap();
    let notes = first.lookup(sub, "notes").unwrap();
    // Emptied when it was opened, and not again; appended to by whoever says where.
    let handle = first.open(notes, libc::O_RDWR | libc::O_TRUNC | libc::O_APPEND | libc::O_DIRECT).unwrap();
    first.write(notes, handle, 0, b"abcdef").unwrap();
    // Renamed since, also the directory.
    first.ask(RENAME, sub, &[&longs(&[ROOT])[..], b"notes\0moved\0"].concat()).unwrap();
    first.ask(RENAME, ROOT, &[&longs(&[ROOT])[..], b"sub\0there\0"].concat()).unwrap();
    let second = first.moved(path).unwrap();
    let third = second.moved(path).unwrap();
    for (guest, byte) in [(&first, b'1'), (&second, b'2'), (&third, b'3')] {
        guest.write(notes, handle, 2, &[byte]).unwrap();
        let content = guest.read(READ, notes, handle, 0, 100).unwrap();
        assert_eq!(content, [b'a', b'b', byte, b'd', b'e', b'f']);
        assert_eq!(guest.lookup(ROOT, "moved").unwrap(), notes);
        assert_eq!(guest.lookup(ROOT, "there").unwrap(), sub);
        // New ones are others.
        let file = guest.lookup(ROOT, "file").unwrap();
        assert!(![ROOT, sub, notes].contains(&file));
        assert_ne!(guest.open(file, libc::O_RDONLY).unwrap(), handle);
        guest.release(notes, handle);
        assert_eq!(guest.read(READ, notes, handle, 0, 1), Err(libc::EBADF));
    }
}

#[test]
fn a_copy_of_the_tree_will_do_and_what_is_missing_in_it_is_named() {
    let (one, other) = (Directory::new(), Directory::new_named("copy"));
    std::fs::create_dir_all(one.0.join("a/b")).unwrap();
    std::fs::write(one.0.join("a/b/c"), "one").unwrap();
    let guest = Guest::mounted(&one.0, true);
    let a = guest.lookup(ROOT, "a").unwrap();
    let b = guest.lookup(a, "b").unwrap();
    let c = guest.lookup(b, "c").unwrap();
    let handle = guest.open(c, libc::O_RDONLY).unwrap();
    std::fs::create_dir_all(other.0.join("a/b")).unwrap();
    let error = guest.moved(&other.0).err().expect("it is not there").to_string();
    assert!(error.contains("a/b/c is not there") && error.contains("writable layer"), "{error}");
    std::fs::write(other.0.join("a/b/c"), "other").unwrap();
    let moved = guest.moved(&other.0).unwrap();
    assert_eq!(moved.read(READ, c, handle, 0, 100).unwrap(), b"other");
    assert_eq!(moved.open(c, libc::O_RDWR), Err(libc::EROFS));
    for (read_only, cache, word) in [(false, Cache::Auto, "access"), (true, Cache::Always, "cache was Auto")]
    {
        let share = Passthrough::open(&one.0, read_only, cache).unwrap();
        let error = share.restore(&guest.share.save().unwrap()).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_directory_is_read_on() {
    let directory = Directory::new();
    for index in 0..50 {
        std::fs::write(directory.0.join(format!("file-{index:02}")), "").unwrap();
    }
    let guest = Guest::mounted(&directory.0, true);
    let handle = long(&guest.ask(OPENDIR, ROOT, &words(&[0, 0])).unwrap());
    let (mut guest, mut offset, mut names) = (guest, 0, Vec::new());
    loop {
        let entries = guest.read(READDIR, ROOT, handle, offset, 300).unwrap();
        if entries.is_empty() {
            break;
        }
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            offset = long(&rest[8..]);
            let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            names.push(String::from_utf8(rest[24..24 + len].to_vec()).unwrap());
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
        guest = guest.moved(&directory.0).unwrap();
    }
    names.retain(|name| name.starts_with("file-"));
    names.sort();
    assert_eq!(names, (0..50).map(|index| format!("file-{index:02}")).collect::<Vec<_>>());
}

#[test]
fn what_was_agreed_on_at_the_mount_holds() {
    let directory = Directory::new();
    let guest = Guest::mounted(&directory.0, false).moved(&directory.0).unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    // The longer form of the request, which is the one that was agreed on.
    guest.ask(SETXATTR, file, &[&words(&[5, 0, 0, 0])[..], b"user.key\0value"].concat()).unwrap();
    let value = guest.ask(GETXATTR, file, &[&words(&[100, 0])[..], b"user.key\0"].concat()).unwrap();
    assert_eq!(value, b"value");
}

#[test]
fn a_share_that_is_not_mounted_saves_as_such() {
    let directory = Directory::new();
    let mounted = Guest::mounted(&directory.0, false);
    let fresh = Guest::new(&directory.0, false);
    let bytes = fresh.share.save().unwrap();
    assert!(bytes.len() < 8, "{}", bytes.len());
    assert_ne!(mounted.share.save().unwrap(), bytes);
    mounted.ask(DESTROY, 0, &[]).unwrap();
    assert_eq!(mounted.share.save().unwrap(), bytes);
    let again = Guest::mounted(&directory.0, false);
    again.share.forget();
    assert_eq!(again.share.save().unwrap(), bytes);
    let other = Guest::new(&directory.0, false);
    other.share.restore(&bytes).unwrap();
    assert_eq!(other.lookup(ROOT, "file"), Err(libc::EBADF), "it has to be mounted first");
}

#[test]
fn a_state_is_believed_no_more_than_a_guest() {
    let directory = Directory::new();
    let guest = Guest::mounted(&directory.0, false);
    guest.lookup(ROOT, "file").unwrap();
    let state: State = decode(&guest.share.save().unwrap()).unwrap();
    let mounted = state.mounted.clone().unwrap();
    let request = mounted.request.clone();
    let error = |request| {
        let other = Guest::new(&directory.0, false);
        let changed = State { mounted: Some(Mounted { request, ..mounted.clone() }), ..state.clone() };
        other.share.restore(&encode(&changed).unwrap()).unwrap_err().to_string()
    };
    for (request, word) in [
        (header(40, LOOKUP, 1).to_vec(), "another"),
        (vec![], "another"),
        (request[..50].to_vec(), "not found again"),
        ([&request[..40], &words(&[6, 0, 0, 0])].concat(), "not found again"),
        ([&request[..], &[0; REQUEST_MAX]].concat(), "a request of our own"),
    ] {
        let error = error(request);
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_a_state_has_open_no_guest_could_have_otherwise() {
    let directory = Directory::new();
    for (read_only, flags, ok) in [
        (false, libc::O_RDWR, true),
        (false, libc::O_RDWR | libc::O_TRUNC, false),
        (true, libc::O_RDONLY, true),
        (true, libc::O_RDWR, false),
        (true, libc::O_RDONLY | libc::O_TRUNC, false),
    ] {
        let guest = Guest::mounted(&directory.0, read_only);
        let file = guest.lookup(ROOT, "file").unwrap();
        guest.open(file, libc::O_RDONLY).unwrap();
        let mut state: State = decode(&guest.share.save().unwrap()).unwrap();
        let mounted = state.mounted.as_mut().unwrap();
        mounted.tree = super::super::saved::tests::opened(&mounted.tree, flags);
        let restored = Guest::new(&directory.0, read_only).share.restore(&encode(&state).unwrap());
        assert_eq!(restored.is_ok(), ok, "{flags:#o}: {restored:?}");
        assert_eq!(std::fs::read(directory.0.join("file")).unwrap(), b"content");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// A state with a byte changed, or cut short: refused, or one of which requests are answered.
    #[test]
    fn no_state_upsets_it(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let directory = Directory::new();
        let guest = Guest::mounted(&directory.0, false);
        let file = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(file, libc::O_RDWR).unwrap();
        // Another that has no name, and a directory.
        std::fs::write(directory.0.join("gone"), "gone").unwrap();
        std::fs::create_dir(directory.0.join("void")).unwrap();
        let gone = guest.lookup(ROOT, "gone").unwrap();
        guest.open(gone, libc::O_RDWR).unwrap();
        let void = guest.lookup(ROOT, "void").unwrap();
        guest.ask(OPENDIR, void, &words(&[0, 0])).unwrap();
        guest.ask(UNLINK, ROOT, b"gone\0").unwrap();
        guest.ask(RMDIR, ROOT, b"void\0").unwrap();
        let mut bytes = guest.share.save().unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        let other = Guest::new(&directory.0, false);
        let _ = other.share.restore(&bytes);
        prop_assert_eq!(names(&directory.0), ["file"]);
        let _ = other.read(READ, file, handle, 0, 100);
        let _ = other.lookup(ROOT, "file");
        let _ = other.share.save();
    }
}
