//! Listing.

use super::Line;

pub const CASES: &[Line] = &[
    ("empty", "mkdir d | ls d; dots d; count d"),
    (
        "kinds",
        "mkdir d; file d/f; mkdir d/d; symlink x d/l; mkfifo d/p 600; mknod d/s sock 600; mknod d/c char:1:3 600 | kinds d",
    ),
    ("of-a-file", "file a | ls a; ls x; ls a/x"),
    (
        "long-names",
        "mkdir d; file d/a{255}; file d/b{255}; file d/c{255}; file d/d{255}; file d/e{255} | count d; ls d",
    ),
    ("many", "mkdir d; many d 250 | count d; stat d/entry-0 n; stat d/entry-249 t; stat d/entry-250 t"),
    ("seek", "mkdir d; many d 80 | seek-each d"),
    ("rewind", "mkdir d; file d/a | rewind d; count d"),
    ("remove-while-reading", "mkdir d; many d 150 | remove-while-reading d"),
    ("rename-while-reading", "mkdir d; many d 60 | rename-while-reading d; count d"),
    (
        "changed-by-another",
        "mkdir d; file d/a | ls d; @b file d/b; ls d; @b unlink d/a; ls d; @b rename d/b d/c; ls d",
    ),
    ("after-rename", "mkdir d; file d/a; ls d | rename d e; ls e; ls d"),
    ("removed-and-open", "mkdir d; chdir d | rmdir ../d; ls .; stat . n"),
    ("not-readable", "mkdir d; file d/a; chmod d 0 | ls d; @u ls d"),
];
