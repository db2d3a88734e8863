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

fn written(tree: Tree) -> Vec<u8> {
    encode(&Versions::V2(tree, BTreeMap::new())).unwrap()
}

#[test]
fn directories_come_before_what_is_in_them_as_the_server_takes_them() {
    let bytes = tree().to_server(true).unwrap();
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
    assert_eq!(with(7, vec![open(5, 7, 0), open(6, 7, 0), open(7, 3, 0)]), Err(2));
    for bytes in [encode(&Versions::V1(tree())).unwrap(), vec![7], vec![]] {
        assert_eq!(Tree::from_server(&bytes), Err(0));
    }
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
        assert_eq!(tree.to_server(true).is_ok(), kept & libc::O_ACCMODE == libc::O_RDONLY, "{flags:#o}");
        tree.to_server(false).unwrap();
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
        let error = tree.to_server(false).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    for flags in [libc::O_CREAT, libc::O_TRUNC, libc::O_PATH, libc::O_TMPFILE, i32::MIN] {
        let tree = Tree { handles: vec![open(1, 3, flags)], ..tree() };
        tree.to_server(false).unwrap_err();
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
        assert_eq!(Tree { handles: vec![], ..crowded(names) }.to_server(false).is_ok(), ok);
    }
}

proptest! {
    #[test]
    fn no_bytes_upset_it(bytes in proptest::collection::vec(any::<u8>(), 0..200), read_only in any::<bool>()) {
        let _ = Tree::from_server(&bytes);
        if let Ok(tree) = decode::<Tree>(&bytes) {
            let _ = tree.to_server(read_only);
        }
    }

    /// Whatever hangs on whatever, what is handed on is a tree, of which nothing is missing.
    #[test]
    fn only_trees_are_handed_on(parents in proptest::collection::vec((2u64..12, 1u64..12), 0..12)) {
        let inodes: Vec<_> = [inode(1, Location::Root)]
            .into_iter()
            .chain(parents.into_iter().map(|(id, parent)| Inode { count: 20, ..named(id, parent, "x") }))
            .map(|inode| Inode { count: 20, ..inode })
            .collect();
        let count = inodes.len();
        let tree = Tree { inodes, next_inode: 12, handles: vec![], ..tree() };
        if let Ok(bytes) = tree.to_server(false) {
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
}
