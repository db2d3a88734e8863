//! What a guest is told so that it asks less.

use super::*;

const NO_FLUSH: u32 = 1 << 5;
const CACHE_SYMLINKS: u32 = 1 << 23;
const CACHES: [Cache; 4] = [Cache::Never, Cache::Fresh, Cache::Auto, Cache::Always];

fn mounted(directory: &Directory, read_only: bool, cache: Cache, flags: u32) -> (Guest, u32) {
    let share = Passthrough::open(&directory.0, read_only, cache).unwrap();
    let guest = Guest { share, ram: ram() };
    let body = [words(&[7, 36, 0x2_0000, flags]), words(&[0; 12])].concat();
    let reply = guest.ask(INIT, 0, &body).unwrap();
    let granted = u32::from_le_bytes(reply[12..16].try_into().unwrap());
    (guest, granted)
}

#[test]
fn that_there_is_no_such_name_is_kept_as_long_as_names_are() {
    let directory = Directory::new();
    for cache in CACHES {
        let (guest, _) = mounted(&directory, false, cache, 0);
        let ask = |name: &str, room| guest.ask_for(LOOKUP, ROOT, &[name.as_bytes(), &[0]].concat(), room);
        let kept = match cache {
            Cache::Never | Cache::Fresh => None,
            Cache::Auto => Some(1),
            Cache::Always => Some(24 * 60 * 60),
        };
        match (kept, ask("none", ROOM)) {
            (None, answer) => assert_eq!(answer, Err(libc::ENOENT), "{cache:?}"),
            (Some(seconds), answer) => {
                let mut entry = vec![0; 128];
                entry[16..24].copy_from_slice(&u64::to_le_bytes(seconds));
                assert_eq!(answer, Ok(entry), "{cache:?}");
            }
        }
        assert_eq!(ask("none", 16 + 127), Err(libc::ENOENT), "{cache:?}: there is no room for more");
        assert_eq!(ask(&"n".repeat(256), ROOM), Err(libc::ENAMETOOLONG), "{cache:?}");
        assert!(ask("file", ROOM).is_ok_and(|entry| long(&entry) != 0), "{cache:?}");
        std::fs::write(directory.0.join("none"), "").unwrap();
        assert!(ask("none", ROOM).is_ok_and(|entry| long(&entry) != 0), "{cache:?}: asked again");
        std::fs::remove_file(directory.0.join("none")).unwrap();
    }
}

#[test]
fn closing_what_was_opened_to_be_read_is_no_request() {
    let directory = Directory::new();
    for (read_only, cache) in CACHES.map(|cache| [(false, cache), (true, cache)]).concat() {
        let (guest, _) = mounted(&directory, read_only, cache, 0);
        let file = guest.lookup(ROOT, "file").unwrap();
        let flags = |how: i32| {
            let reply: Result<Vec<u8>, i32> = guest.ask(OPEN, file, &words(&[how.cast_unsigned(), 0]));
            reply.map(|reply| u32::from_le_bytes(reply[8..12].try_into().unwrap()))
        };
        let read = flags(libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
        assert_eq!(read & NO_FLUSH, NO_FLUSH, "{cache:?}, {read_only}");
        for how in [libc::O_WRONLY, libc::O_RDWR] {
            match flags(how) {
                Ok(write) => assert_eq!(write, read & !NO_FLUSH, "{cache:?}: {how}"),
                Err(errno) => assert!(read_only && errno == libc::EROFS, "{cache:?}: {how}: {errno}"),
            }
        }
    }
}

#[test]
fn where_links_lead_is_kept_by_whom_can_and_where_names_are() {
    let directory = Directory::new();
    for cache in CACHES {
        let keeps = [Cache::Auto, Cache::Always].contains(&cache);
        for offered in [0, CACHE_SYMLINKS] {
            let (_, granted) = mounted(&directory, false, cache, offered);
            let expected = if keeps { offered } else { 0 };
            assert_eq!(granted & CACHE_SYMLINKS, expected, "{cache:?}, {offered}");
        }
    }
}

/// Whatever the pieces are into which a driver has cut the room.
#[test]
fn replies_in_pieces() {
    let directory = Directory::new();
    let (guest, _) = mounted(&directory, false, Cache::Auto, 0);
    let (ram, body, at) = (&guest.ram, b"none\0", testing::DATA);
    for sizes in [[1, 3, 5, 200], [16, 1, 31, 100], [18, 2, 2, 122], [144, 1, 1, 1]] {
        request(ram, &header(40 + body.len() as u32, LOOKUP, ROOT), body, ROOM);
        let mut parts = vec![(at, 40, 0), (at + 0x1000, body.len() as u32, 0)];
        let mut place = at + 0x4000;
        for size in sizes {
            parts.push((place, size, testing::WRITE));
            place += u64::from(size);
        }
        let len = guest.share.handle(testing::chain(ram, &parts)).unwrap();
        let mut reply = vec![0; 144];
        ram.read_slice(&mut reply, GuestAddress(at + 0x4000)).unwrap();
        let mut expected = [words(&[144, 0, 7, 0]), vec![0; 128]].concat();
        expected[32] = 1;
        assert_eq!((len, reply), (144, expected), "{sizes:?}");
    }
}
