use std::rc::Rc;

use proptest::prelude::*;

use super::*;

fn inode(id: u64, location: Location) -> Inode {
    Inode { id, count: 5, location, reference: None }
}

fn named(id: u64, parent: u64, name: &str) -> Inode {
    inode(id, Location::Path { parent, name: name.into() })
}

fn open(id: u64, inode: u64, flags: i32) -> Handle {
    Handle { id, inode, source: Source::Inode { flags } }
}

fn tree() -> Tree {
    Tree {
        // A directory that was renamed below a younger one.
        inodes: vec![inode(1, Location::Root), named(2, 4, "a"), named(3, 2, "b"), named(4, 1, "c")],
        next_inode: 9,
        handles: vec![open(1, 3, libc::O_RDONLY), open(2, 2, libc::O_DIRECTORY)],
        next_handle: 3,
        negotiated: Negotiated {
            writeback: false,
            announce_submounts: true,
            posix_acl: true,
            sup_group_extension: true,
        },
    }
}

/// With what it has open open in another way.
pub fn opened(tree: &Tree, flags: i32) -> Tree {
    let handles = tree.handles.iter().map(|handle| open(handle.id, handle.inode, flags)).collect();
    Tree { handles, ..tree.clone() }
}

fn written(tree: Tree) -> Vec<u8> {
    encode(&Versions::V2(tree, BTreeMap::new())).unwrap()
}

fn handed_on(tree: &Tree, read_only: bool) -> Result<Vec<u8>, StateError> {
    tree.check(read_only)?;
    tree.to_server()
}

#[test]
fn directories_come_before_what_is_in_them_as_the_server_takes_them() {
    let bytes = handed_on(&tree(), true).unwrap();
    let Versions::V2(other, _) = decode(&bytes).unwrap() else { panic!("another version") };
    // It takes the first, and puts the last in its place.
    let (mut left, mut taken) = (other.inodes, vec![]);
    while !left.is_empty() {
        taken.push(left.swap_remove(0).id);
    }
    assert_eq!(taken, [1, 4, 2, 3]);
    assert_eq!(other.handles, tree().handles);
}

#[test]
fn what_is_gone_is_left_out_unless_somebody_has_it_open() {
    let with = |id, handles: Vec<Handle>| {
        let mut tree = tree();
        tree.inodes.push(inode(id, Location::Lost));
        tree.handles.extend(handles);
        Tree::from_server(&written(tree))
    };
    assert_eq!(with(7, vec![]), Ok(tree()));
    let kept = with(7, vec![open(5, 7, 0), open(6, 7, 0), open(7, 3, 0)]).unwrap();
    assert_eq!((kept.lost(), kept.inodes.len()), (vec![7], 5));
    for bytes in [encode(&Versions::V1(tree())).unwrap(), vec![7], vec![]] {
        Tree::from_server(&bytes).unwrap_err();
    }
}

#[test]
fn what_has_no_name_gets_one_in_the_root() {
    let lost = Tree {
        inodes: [tree().inodes, vec![inode(7, Location::Lost), inode(8, Location::Lost)]].concat(),
        handles: vec![open(1, 7, 0), open(2, 8, libc::O_DIRECTORY)],
        ..tree()
    };
    let names = |ids: &[u64]| ids.iter().map(|id| (*id, format!("n{id}"))).collect();
    for (ids, word) in
        [(&[7][..], "place of file 8"), (&[7, 8, 4], "nobody has open"), (&[7, 8, 9], "nobody")]
    {
        let error = lost.clone().place(&names(ids)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    handed_on(&lost, false).unwrap_err();
    let mut placed = lost.clone();
    placed.place(&names(&[7, 8])).unwrap();
    assert_eq!(placed.inodes[4..], [named(7, 1, "n7"), named(8, 1, "n8")]);
    // Each counts for the root.
    assert_eq!(placed.inodes[0].count, lost.inodes[0].count + 2);
    handed_on(&placed, false).unwrap();
    let mut counted = lost;
    counted.inodes[0].count = u64::MAX;
    counted.place(&names(&[7, 8])).unwrap();
    assert!(handed_on(&counted, false).unwrap_err().to_string().contains("file 1"));
}

/// A directory, gone when it is dropped.
struct Room(std::path::PathBuf);

impl Room {
    fn new(name: &str, files: &[&str]) -> Self {
        let thread = std::thread::current().id();
        let path = std::env::temp_dir().join(format!("vmm-tree-{}-{thread:?}-{name}", std::process::id()));
        for file in files {
            std::fs::create_dir_all(path.join(file)).unwrap();
        }
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn present(&self, tree: &Tree) -> Result<Tree, StateError> {
        tree.clone().present(&Rc::new(std::fs::File::open(&self.0).unwrap().into()), &BTreeSet::from([8]))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Files, and how often each counts.
type Counts<'a> = &'a [(u64, u64)];

#[test]
fn what_is_not_there_is_left_out_and_counts_no_more() {
    let counted = |id, parent, name, count| Inode { count, ..named(id, parent, name) };
    let known = Tree {
        inodes: vec![
            inode(1, Location::Root),
            counted(2, 1, "a", 1),
            counted(3, 2, "b", 2),
            counted(4, 3, "c", 3),
            counted(5, 3, "d", 1),
            counted(6, 1, "e", 2),
            counted(7, 6, "f", 1),
            // Made for this.
            counted(8, 1, "g", 1),
            counted(9, 8, "h", 1),
        ],
        next_inode: 10,
        handles: vec![open(1, 8, libc::O_DIRECTORY)],
        ..tree()
    };
    let cases: [(&[&str], Counts<'_>); 4] = [
        (&["a/b/c", "a/b/d", "e/f"], &[(1, 5), (2, 1), (3, 2), (4, 3), (5, 1), (6, 2), (7, 1), (8, 1)]),
        // What counted only for what was in it goes with it, up to what somebody knows.
        (&["a/b", "e"], &[(1, 4), (6, 1), (8, 1)]),
        (&["a/b/c", "a/d"], &[(1, 4), (2, 1), (3, 1), (4, 3), (8, 1)]),
        (&[], &[(1, 3), (8, 1)]),
    ];
    for (index, (files, left)) in cases.into_iter().enumerate() {
        let room = Room::new(&format!("left{index}"), files);
        let present = room.present(&known).unwrap();
        let counts: Vec<_> = present.inodes.iter().map(|inode| (inode.id, inode.count)).collect();
        assert_eq!(counts, left, "{files:?}");
        handed_on(&present, false).unwrap();
    }
}

#[test]
fn what_is_open_is_there_and_what_it_was() {
    let room = Room::new("open", &["a/b/directory", "outside/x"]);
    std::fs::write(room.0.join("a/b/file"), "").unwrap();
    std::os::unix::fs::symlink("file", room.0.join("a/b/link")).unwrap();
    std::os::unix::fs::symlink("outside", room.0.join("way")).unwrap();
    for (name, flags, word) in [
        ("file", libc::O_RDWR, None),
        ("directory", libc::O_DIRECTORY, None),
        ("file", libc::O_DIRECTORY, Some("a/b/file is no directory any more")),
        ("directory", libc::O_RDONLY, Some("a/b/directory is a directory, and was none")),
        ("link", libc::O_RDONLY, Some("a/b/link is neither")),
        ("none", libc::O_RDONLY, Some("a/b/none is not there")),
        (&"x".repeat(256), libc::O_RDONLY, Some("x is not there")),
    ] {
        let tree = Tree {
            inodes: vec![inode(1, Location::Root), named(2, 1, "a"), named(3, 2, "b"), named(4, 3, name)],
            handles: vec![open(1, 4, flags), open(2, 1, libc::O_DIRECTORY)],
            ..tree()
        };
        let error = room.present(&tree).err().map(|error| error.to_string());
        assert_eq!(error.is_some(), word.is_some(), "{error:?}");
        assert!(error.as_deref().unwrap_or_default().contains(word.unwrap_or_default()), "{error:?}");
    }
    // No link is a way to a file, and what is below one is not there.
    let tree = |name| Tree {
        inodes: vec![inode(1, Location::Root), named(2, 1, name), named(3, 2, "x")],
        handles: vec![open(1, 3, libc::O_DIRECTORY)],
        ..tree()
    };
    room.present(&tree("outside")).unwrap();
    let error = room.present(&tree("way")).unwrap_err().to_string();
    assert!(error.contains("way/x is not there"), "{error}");
    // Not all are named.
    let many = Tree {
        inodes: [inode(1, Location::Root)]
            .into_iter()
            .chain((2..9).map(|id| named(id, if id == 2 { 1 } else { id - 1 }, &"y".repeat(2000))))
            .collect(),
        handles: (2..8).map(|id| open(id, id, 0)).collect(),
        next_handle: 9,
        ..self::tree()
    };
    let error = room.present(&many).unwrap_err().to_string();
    assert!(error.contains("and 1 more") && error.contains(" .../yy"), "{error}");
    assert!(error.len() < 5 * 4200, "{}", error.len());
}

#[test]
fn files_are_open_as_the_server_had_them() {
    for (flags, kept) in [
        (libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT | libc::O_EXCL, libc::O_RDWR),
        (libc::O_WRONLY | libc::O_APPEND | libc::O_DIRECT | libc::O_NOATIME, libc::O_WRONLY),
        (libc::O_RDONLY | libc::O_SYNC | libc::O_CLOEXEC, libc::O_SYNC),
        (libc::O_PATH | libc::O_DIRECTORY, libc::O_DIRECTORY),
    ] {
        let tree = Tree { handles: vec![open(1, 2, flags)], ..tree() };
        let tree = Tree::from_server(&written(tree)).unwrap();
        assert_eq!(tree.handles[0].flags(), kept, "{flags:#o}");
        assert_eq!(handed_on(&tree, true).is_ok(), kept & libc::O_ACCMODE == libc::O_RDONLY, "{flags:#o}");
        handed_on(&tree, false).unwrap();
    }
}

/// Makes a tree another.
type Change<'a> = &'a dyn Fn(&mut Tree);

#[test]
fn what_leads_out_of_the_share_or_nowhere_is_refused() {
    let cases: [(Change<'_>, &str); 22] = [
        (&|tree| tree.inodes[2] = named(3, 2, ".."), "\"..\""),
        (&|tree| tree.inodes[2] = named(3, 2, "."), "\".\""),
        (&|tree| tree.inodes[2] = named(3, 2, ""), "\"\""),
        (&|tree| tree.inodes[2] = named(3, 2, "/etc"), "/etc"),
        (&|tree| tree.inodes[2] = named(3, 2, "x/../.."), "no name"),
        (&|tree| tree.inodes[2] = named(3, 2, "x\0"), "no name"),
        (&|tree| tree.inodes[2] = inode(3, Location::FullPath { name: "x".into() }), "place of file 3"),
        (&|tree| tree.inodes[2] = inode(3, Location::Lost), "place of file 3"),
        (&|tree| tree.inodes[2] = inode(3, Location::Root), "place of file 3"),
        (&|tree| tree.inodes[0] = named(1, 2, "x"), "place of file 1"),
        (
            &|tree| {
                let handle = FileHandle { mount: 0, kind: 1, bytes: vec![1] };
                tree.inodes[2].reference = Some(handle);
            },
            "place of file 3",
        ),
        (&|tree| tree.inodes[3] = named(4, 3, "c"), "not below the root"),
        (&|tree| tree.inodes[3] = named(4, 4, "c"), "not below the root"),
        (&|tree| tree.inodes[3] = named(4, 8, "c"), "not below the root"),
        (&|tree| drop(tree.inodes.remove(0)), "not below the root"),
        (&|tree| tree.inodes.push(named(3, 1, "again")), "file 3"),
        (&|tree| tree.inodes[1].count = 0, "file 2"),
        (&|tree| tree.inodes[1].count = u64::MAX, "file 2"),
        (&|tree| tree.next_inode = 4, "file 4"),
        (&|tree| tree.next_handle = 2, "open file 2"),
        (&|tree| tree.handles.push(open(2, 3, 0)), "open file 2"),
        (&|tree| tree.handles[0].inode = 8, "open file 1"),
    ];
    for (change, word) in cases {
        let mut tree = tree();
        change(&mut tree);
        let error = handed_on(&tree, false).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    for flags in [libc::O_CREAT, libc::O_TRUNC, libc::O_PATH, libc::O_TMPFILE, i32::MIN] {
        let tree = Tree { handles: vec![open(1, 3, flags)], ..tree() };
        handed_on(&tree, false).unwrap_err();
    }
    // As many in a directory as count for it, and no more.
    let crowded = |names: u64| Tree {
        inodes: [inode(1, Location::Root)]
            .into_iter()
            .chain((0..names).map(|index| named(20 + index, 1, "x")))
            .collect(),
        next_inode: 100,
        ..tree()
    };
    for (names, ok) in [(5, true), (6, false)] {
        assert_eq!(handed_on(&Tree { handles: vec![], ..crowded(names) }, false).is_ok(), ok);
    }
}

#[test]
fn there_are_no_more_than_a_server_can_have() {
    let crowded = |count| Tree { inodes: vec![], handles: vec![open(1, 1, 0); count], ..tree() };
    Tree::from_server(&written(crowded(KNOWN_MAX))).unwrap();
    Tree::from_server(&written(crowded(KNOWN_MAX + 1))).unwrap_err();
}

proptest! {
    #[test]
    fn no_bytes_upset_it(bytes in proptest::collection::vec(any::<u8>(), 0..200), read_only in any::<bool>()) {
        let _ = Tree::from_server(&bytes);
        if let Ok(tree) = decode::<Tree>(&bytes) {
            let _ = handed_on(&tree, read_only);
        }
    }

    /// Whatever hangs on whatever, what is handed on is a tree, of which nothing is missing.
    #[test]
    fn only_trees_are_handed_on(
        parents in proptest::collection::vec((2u64..12, 1u64..12), 0..12),
        lost in proptest::collection::btree_set(2u64..16, 0..3),
    ) {
        let inodes: Vec<_> = [inode(1, Location::Root)]
            .into_iter()
            .chain(parents.into_iter().map(|(id, parent)| Inode { count: 20, ..named(id, parent, "x") }))
            .chain(lost.iter().map(|id| inode(*id, Location::Lost)))
            .map(|inode| Inode { count: 20, ..inode })
            .collect();
        let count = inodes.len();
        let mut tree = Tree { inodes, next_inode: 16, handles: vec![], ..tree() };
        tree.place(&lost.iter().map(|id| (*id, "lost".into())).collect()).unwrap();
        if let Ok(bytes) = handed_on(&tree, false) {
            let Versions::V2(other, _) = decode(&bytes).unwrap() else { panic!("another version") };
            let (mut left, mut known) = (other.inodes, BTreeSet::new());
            prop_assert_eq!(left.len(), count);
            while !left.is_empty() {
                let inode = left.swap_remove(0);
                if let Location::Path { parent, .. } = inode.location {
                    prop_assert!(known.contains(&parent));
                }
                known.insert(inode.id);
            }
        }
    }

    /// Whatever is known and whatever is there, what is left is a tree of what is there.
    #[test]
    fn what_is_left_is_a_tree(
        parents in proptest::collection::vec((0usize..8, 1u64..3), 1..8),
        there in proptest::collection::vec(any::<bool>(), 8),
    ) {
        // A file is in an older one.
        let mut inodes = vec![Inode { count: 20, ..inode(1, Location::Root) }];
        let mut paths = vec![String::new()];
        for (index, (parent, count)) in parents.iter().enumerate() {
            let (id, parent) = (index as u64 + 20, parent % inodes.len());
            let directory = &mut inodes[parent];
            directory.count += 1;
            let directory = directory.id;
            inodes.push(Inode { count: *count, ..named(id, directory, &id.to_string()) });
            paths.push(format!("{}/{id}", paths[parent]));
        }
        let made: Vec<&str> =
            paths[1..].iter().zip(&there).filter(|(_, there)| **there).map(|(path, _)| &path[1..]).collect();
        let room = Room::new("any", &made);
        let known = Tree { inodes, next_inode: 40, handles: vec![], ..tree() };
        let present = room.present(&known).unwrap();
        handed_on(&present, true).unwrap();
        for (inode, path) in known.inodes.iter().zip(&paths) {
            let left = present.inodes.iter().any(|left| left.id == inode.id);
            prop_assert_eq!(left, room.0.join(path.trim_start_matches('/')).exists(), "{}", path);
        }
    }
}
