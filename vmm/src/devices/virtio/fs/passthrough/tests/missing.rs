//! A guest that goes on over other files than it had.

use super::*;

#[test]
fn what_was_only_known_need_not_be_there() {
    let (one, other) = (Directory::new(), Directory::new_named("other"));
    std::fs::create_dir_all(one.0.join("a/b")).unwrap();
    std::fs::write(one.0.join("a/b/c"), "c").unwrap();
    std::fs::write(one.0.join("a/d"), "d").unwrap();
    let guest = Guest::mounted(&one.0, false);
    let a = guest.lookup(ROOT, "a").unwrap();
    let b = guest.lookup(a, "b").unwrap();
    let c = guest.lookup(b, "c").unwrap();
    let d = guest.lookup(a, "d").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    std::fs::create_dir(other.0.join("a")).unwrap();
    std::fs::write(other.0.join("a/d"), "other").unwrap();
    let moved = guest.moved(&other.0).unwrap();
    for gone in [b, c] {
        assert_eq!(moved.open(gone, libc::O_RDONLY), Err(libc::EBADF));
    }
    assert_eq!(moved.lookup(a, "b"), Err(libc::ENOENT));
    assert_eq!(moved.lookup(a, "d"), Ok(d));
    assert_eq!(moved.read(READ, file, handle, 0, 9).unwrap(), b"content");
    // What is there now is another, and the numbers of the first stay away.
    std::fs::create_dir(other.0.join("a/b")).unwrap();
    let new = moved.lookup(a, "b").unwrap();
    assert!(![ROOT, a, b, c, d, file].contains(&new));
    // What the guest was told of is known for as long as it does not forget it.
    let forget = |node, times: u64| moved.ask(FORGET, node, &longs(&[times])).unwrap();
    forget(b, 1);
    forget(c, 1);
    forget(new, 1);
    forget(d, 2);
    assert_eq!(moved.lookup(a, "d").map(|again| [a, b, c, d].contains(&again)), Ok(false));
    // It goes on once more.
    let again = moved.moved(&other.0).unwrap();
    assert_eq!(again.read(READ, file, handle, 0, 9).unwrap(), b"content");
    assert_eq!(again.lookup(ROOT, "a"), Ok(a));
}

#[test]
fn what_is_open_is_named_when_it_is_missing_or_another() {
    let (one, other) = (Directory::new(), Directory::new_named("kind"));
    std::fs::create_dir_all(one.0.join("a/directory")).unwrap();
    std::fs::write(one.0.join("a/regular"), "").unwrap();
    let guest = Guest::mounted(&one.0, false);
    let a = guest.lookup(ROOT, "a").unwrap();
    let (directory, regular) = (guest.lookup(a, "directory").unwrap(), guest.lookup(a, "regular").unwrap());
    guest.ask(OPENDIR, directory, &words(&[0, 0])).unwrap();
    guest.open(regular, libc::O_RDWR).unwrap();
    let error = || guest.moved(&other.0).err().expect("it is not there").to_string();
    let there = error();
    assert!(there.contains("a/directory is not there, a/regular is not there"), "{there}");
    std::fs::create_dir_all(other.0.join("a/regular")).unwrap();
    std::fs::write(other.0.join("a/directory"), "").unwrap();
    let another = error();
    assert!(another.contains("a/directory is no directory any more"), "{another}");
    assert!(another.contains("a/regular is a directory, and was none"), "{another}");
    std::fs::remove_dir_all(other.0.join("a")).unwrap();
    // The same by way of a link, which is not taken.
    std::os::unix::fs::symlink(one.0.join("a"), other.0.join("a")).unwrap();
    assert_eq!(error(), there);
}
