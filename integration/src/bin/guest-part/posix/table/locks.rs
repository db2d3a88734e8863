//! Locks between processes.

use super::Line;

pub const CASES: &[Line] = &[
    (
        "flock-exclusive",
        "file a; open 0 a rw; @b open 1 a rw | flock 0 ex; @b flock 1 ex; @b flock 1 sh; flock 0 un; @b flock 1 ex; flock 0 ex",
    ),
    (
        "flock-shared",
        "file a; open 0 a r; @b open 1 a r | flock 0 sh; @b flock 1 sh; flock 0 ex; @b flock 1 un; flock 0 ex",
    ),
    ("flock-own-openings", "file a; open 0 a r; open 1 a r | flock 0 ex; flock 1 ex; close 0; flock 1 ex"),
    (
        "flock-inherited",
        "file a; open 0 a r | flock 0 ex; @b flock 0 ex; @b flock 0 un; open 1 a r; flock 1 ex",
    ),
    (
        "flock-duplicate",
        "file a; open 0 a r | flock 0 ex; dup 0 1; close 0; open 2 a r; flock 2 ex; close 1; flock 2 ex",
    ),
    ("flock-directory", "mkdir d; open 0 d r; open 1 d r | flock 0 ex; flock 1 ex; flock 0 un; flock 1 ex"),
    (
        "flock-waits",
        "file a; open 0 a r; @b open 1 a r | flock 0 ex; @b& flock-wait 1 ex; flock 0 un; wait b; flock 0 ex",
    ),
    ("flock-through-links", "file a; link a b; open 0 a r; open 1 b r | flock 0 ex; flock 1 ex"),
    (
        "flock-and-fcntl-apart",
        "file a; open 0 a rw; @b open 1 a rw | flock 0 ex; @b lock 1 wr 0 0; @b get-lock 1 wr 0 0",
    ),
    ("flock-after-rename", "file a; open 0 a r | flock 0 ex; rename a b; open 1 b r; flock 1 ex"),
    (
        "range-exclusive",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 wr 0 10; @b lock 1 wr 5 10; @b lock 1 wr 10 10; @b get-lock 1 wr 0 100; lock 0 un 0 10; @b lock 1 wr 0 10",
    ),
    (
        "range-shared",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 rd 0 10; @b lock 1 rd 0 10; @b lock 1 wr 0 1; @b get-lock 1 wr 3 1; @b get-lock 1 rd 3 1",
    ),
    (
        "range-whole-file",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 wr 0 0; @b lock 1 rd 1T 1; @b get-lock 1 rd 1T 1",
    ),
    (
        "range-split",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 wr 0 30; lock 0 un 10 10; @b lock 1 wr 10 10; @b get-lock 1 wr 0 100; @b get-lock 1 wr 20 100",
    ),
    (
        "range-of-one-process",
        "file a; open 0 a rw; open 1 a rw | lock 0 wr 0 10; lock 1 wr 0 10; get-lock 1 wr 0 10",
    ),
    (
        "range-lost-by-any-close",
        "file a; open 0 a rw; open 1 a rw; @b open 2 a rw | lock 0 wr 0 10; @b lock 2 wr 0 10; close 1; @b lock 2 wr 0 10",
    ),
    (
        "range-not-inherited",
        "file a; open 0 a rw | lock 0 wr 0 10; @b get-lock 0 wr 0 10; @b lock 0 wr 0 10; @b lock 0 un 0 10; @c lock 0 wr 0 10",
    ),
    (
        "range-waits",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 wr 0 1; @b& lock-wait 1 wr 0 1; lock 0 un 0 1; wait b; lock 0 wr 0 1",
    ),
    (
        "range-needs-access",
        "file a; open 0 a r; open 1 a w | lock 0 wr 0 1; lock 0 rd 0 1; lock 1 rd 0 1; lock 1 wr 0 1",
    ),
    (
        "range-upgrade",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 rd 0 10; lock 0 wr 0 10; @b get-lock 1 rd 0 10; lock 0 rd 0 10; @b get-lock 1 rd 0 10",
    ),
    (
        "range-nonsense",
        "file a; open 0 a rw | lock 0 wr -1 1; lock 0 wr 0 -1; lock 0 wr 5 -5; get-lock 0 wr 0 5",
    ),
    (
        "range-deadlock",
        "file a; open 0 a rw; @b open 1 a rw | lock 0 wr 0 1; @b lock 1 wr 1 1; @b& lock-wait 1 wr 0 1; lock 0 wr 1 1; lock 0 un 0 1; wait b",
    ),
    ("range-after-unlink", "file a; open 0 a rw; @b open 1 a rw; unlink a | lock 0 wr 0 1; @b lock 1 wr 0 1"),
    (
        "range-after-exec-of-b",
        "file a; open 0 a rw; @b open 1 a rw; @b lock 1 wr 0 1 | lock 0 wr 0 1; @b close 1; lock 0 wr 0 1",
    ),
    (
        "opening-exclusive",
        "file a; open 0 a rw; open 1 a rw | ofd-lock 0 wr 0 10; ofd-lock 1 wr 0 10; get-ofd-lock 1 wr 0 10; close 0; ofd-lock 1 wr 0 10",
    ),
    (
        "opening-inherited",
        "file a; open 0 a rw; open 1 a rw | ofd-lock 0 wr 0 10; @b ofd-lock 0 un 0 10; ofd-lock 1 wr 0 10",
    ),
    (
        "opening-against-range",
        "file a; open 0 a rw; @b open 1 a rw | ofd-lock 0 wr 0 10; @b lock 1 wr 0 10; @b get-lock 1 wr 0 10; lock 0 wr 0 10",
    ),
    ("lease", "file a; open 0 a r | lease 0 rd; lease 0 un"),
];
