//! Who may do what.

use super::Line;

pub const CASES: &[Line] = &[
    (
        "owner",
        "file a hi; chown a 1000:0; chmod a 400 | @u cat a; @u open 0 a w; @v cat a; chmod a 077; @u cat a; @v cat a",
    ),
    ("group", "file a hi; chown a 0:1000; chmod a 040 | @u cat a; @v cat a; chmod a 704; @u cat a; @v cat a"),
    ("others", "file a hi; chmod a 004 | @u cat a; @u open 0 a w; chmod a 002; @u cat a; @u open 0 a w"),
    (
        "root",
        "file a hi; chown a 1000:1000; chmod a 0 | cat a; open 0 a rw; access a rw; access a x; chmod a 001; access a x",
    ),
    (
        "ask",
        "file a; chmod a 640 | @u access a f; @u access a r; @u access a w; access a rw; access x f; @u access . w; @u access . rx",
    ),
    (
        "ask-owner",
        "file a; chown a 1000:1000; chmod a 500 | @u access a r; @u access a w; @u access a x; @v access a r; chmod a 050; @u access a r; @v access a rx",
    ),
    ("ask-effective", "file a; chmod a 600 | eaccess a rw; @u eaccess a r; @u eaccess a f"),
    (
        "search",
        "mkdir d; file d/a hi; chmod d 644 | @u cat d/a; @u stat d/a s; @u ls d; chmod d 711; @u cat d/a; @u ls d; @u stat d/x t",
    ),
    (
        "search-kept-open",
        "mkdir d; file d/a hi; @u chdir d | chmod d 0; @u cat a; @u ls .; chmod d 755; @u cat a",
    ),
    ("open-kept", "file a hi; @u open 0 a r | chmod a 0; @u read 0 9; @u open 1 a r"),
    (
        "directory-write",
        "mkdir d; chown d 1000:1000; chmod d 755; file d/a | @u unlink d/a; @u file d/b; @v file d/c; @v unlink d/b; chmod d 555; @u unlink d/b; ls d",
    ),
    (
        "sticky",
        "mkdir d; chmod d 1777; file d/root; @u file d/u; @v file d/v | @u unlink d/root; @u unlink d/v; @u rename d/v d/x; @u unlink d/u; unlink d/v; ls d",
    ),
    (
        "sticky-owner-of-directory",
        "mkdir d; chown d 1000:1000; chmod d 1777; file d/root; @v file d/v | @u unlink d/v; @u unlink d/root; ls d",
    ),
    (
        "sticky-directories",
        "mkdir d; chmod d 1777; mkdir d/root | @u mkdir d/u; @v rmdir d/u; @u rmdir d/root; @u rmdir d/u; ls d",
    ),
    (
        "sticky-links-are-protected",
        "mkdir d; chmod d 1777; file a hi; @u symlink ../a d/l | cat d/l; @v cat d/l; @u cat d/l",
    ),
    ("truncate", "file a hi; chmod a 644 | @u truncate a 0; chmod a 666; @u truncate a 1; stat a s"),
    (
        "changing-another's",
        "file a | @u chmod a 777; @u chown a 1000:1000; @u utimes a 1 1; @u unlink a; stat a mo",
    ),
    (
        "group-by-supplement",
        "file a hi; chown a 0:1000; chmod a 660 | @v open 0 a rw; @v write 0 HO; cat a; @v truncate a 0; @v chmod a 666",
    ),
    (
        "create-needs-both",
        "mkdir d; chmod d 772 | @u file d/a; chmod d 771; @u file d/a; chmod d 773; @u file d/a; ls d",
    ),
    ("list-needs-read", "mkdir d; file d/a; chmod d 733 | @u ls d; @u stat d/a t; @u unlink d/a"),
    (
        "changed-under-a-user",
        "file a hi; chmod a 600 | @u cat a; chmod a 644; @u cat a; chown a 1000:1000; chmod a 400; @u cat a; @v cat a",
    ),
    (
        "dangling-for-a-user",
        "symlink x l; mkdir d 700; symlink d/a m; file d/a | @u cat l; @u cat m; @u readlink m",
    ),
    (
        "mknod-by-a-user",
        "chmod . 777 | @u mknod p fifo 600; @u mknod s sock 600; @u mknod f file 600; @u mknod c char:1:3 666; @u mknod b block:7:0 666; ls .",
    ),
];
