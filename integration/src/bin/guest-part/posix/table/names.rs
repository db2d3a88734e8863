//! Directories, links, removing and renaming.

use super::Line;

pub const CASES: &[Line] = &[
    ("mkdir", "mkdir d; mkdir d; mkdir d/e/f; mkdir d/e; stat d n; stat . n; rmdir d/e; stat d n"),
    ("mkdir-slashes", "mkdir d//; mkdir ./e/.; mkdir f/; ls ."),
    ("mkdir-dots", "mkdir .; mkdir ..; rmdir .; mkdir d; rmdir d/.; rmdir d/.."),
    ("mkdir-through-a-link", "symlink d l | mkdir l; mkdir l/; ls ."),
    ("rmdir-not-empty", "mkdir d; file d/a | rmdir d; unlink d/a; rmdir d; ls ."),
    ("rmdir-open", "mkdir d; open 0 d r | rmdir d; fstat 0 tn; ls ."),
    ("rmdir-hidden-entry", "mkdir d; file d/.a | rmdir d"),
    ("links", "file a hi | link a b; link b c; stat a n; same a c; unlink a; stat c n; cat c; link a d"),
    (
        "link-keeps-attributes",
        "file a; chmod a 4711; chown a 5:6 | link a b; stat b mo; chmod b 640; stat a m",
    ),
    ("link-to-a-directory", "mkdir d | link d e; stat d n"),
    (
        "link-to-a-symlink",
        "file a; symlink a l | link l m; type m; lstat l n; link-target l n; type n; stat a n",
    ),
    ("link-missing", "file a | link x b; link a x/b; link a/x b; link a a"),
    ("link-to-a-removed-file", "file a hi; open 0 a r; unlink a | link-open 0 b; ls ."),
    ("link-to-an-open-file", "file a hi; open 0 a r | link-open 0 b; same a b; fstat 0 n"),
    (
        "link-protected",
        "file a; chmod . 777 | @u link a b; chmod a 666; @u link a c; chmod a 4777; @u link a d; stat a n",
    ),
    (
        "symlink-text",
        "symlink some/where l; readlink l; lstat l ts; symlink t{4095} m; readlink m; symlink t{4096} n",
    ),
    ("symlink-short", "symlink x l; lstat l ms; symlink (){0} m"),
    ("symlink-long-name", "symlink x n{255}; symlink x n{256}; ls ."),
    (
        "symlink-to-a-directory",
        "mkdir d; file d/a hi; symlink d l | cat l/a; unlink l/a; ls d; rmdir l; unlink l; type d",
    ),
    ("symlink-absolute", "symlink /proc/self/status l | type l; open 0 l r"),
    (
        "unlink-open",
        "file a hello; open 0 a rw | unlink a; read 0 2; write 0 XX; pread 0 0 9; fstat 0 sn; ls .",
    ),
    (
        "unlink-open-truncate",
        "file a hello; open 0 a rw; unlink a | ftruncate 0 2; fstat 0 s; ftruncate 0 10; pread 0 0 10; fsync 0",
    ),
    (
        "unlink-open-attributes",
        "file a; open 0 a rw; unlink a | fchmod 0 640; fchown 0 7:8; futimes 0 1000000001 1000000002; fstat 0 mon",
    ),
    ("unlink-open-xattr", "file a; open 0 a rw; unlink a | fsetx 0 user.x v; fgetx 0 user.x"),
    (
        "unlink-open-and-make-again",
        "file a old; open 0 a rw; unlink a; file a new | pread 0 0 9; cat a; fstat 0 n; unlink a",
    ),
    (
        "unlink-open-twice",
        "file a x; link a b; open 0 a rw | unlink a; fstat 0 n; unlink b; fstat 0 n; pread 0 0 1",
    ),
    (
        "unlink-open-allocate",
        "file a; open 0 a rw; unlink a | fallocate 0 0 0 8192; fstat 0 s; write 0 x; seek 0 0 data",
    ),
    (
        "unlink-open-map",
        "open 0 a rw,creat; ftruncate 0 4096; map 0 0 4096 rw; unlink a | poke 0 5 hi; msync 0; pread 0 5 2; peek 0 5 2",
    ),
    (
        "unlink-open-lock",
        "file a; open 0 a rw; unlink a | flock 0 ex; lock 0 wr 0 10; @b lock 0 wr 0 10; @b get-lock 0 wr 0 1",
    ),
    ("unlink-open-by-another", "file a hello; @b open 0 a r | unlink a; @b read 0 9; @b fstat 0 n"),
    ("unlink-missing", "unlink a; file b; unlink b/a; unlink b; unlink b"),
    ("unlink-readonly-file", "file a; chmod a 0 | unlink a; ls ."),
    (
        "deep",
        "mkdir d; mkdir d/d; mkdir d/d/d; file d/d/d/f hi; chdir d/d/d | cat f; cat ../../../d/d/d/f; rename f ../f; cat ../f",
    ),
    (
        "directory-counts",
        "mkdir d; mkdir d/1; mkdir d/2; mkdir e | stat d n; rename d/1 e/1; stat d n; stat e n; rmdir d/2; stat d n",
    ),
    (
        "same-name-again",
        "file a 1; unlink a; mkdir a; rmdir a; symlink x a; unlink a; mkfifo a 600; unlink a; file a 2 | cat a",
    ),
    ("negative-name", "stat a t; file a; stat a t; unlink a; stat a t; mkdir a; stat a t"),
    (
        "negative-name-by-another",
        "stat a t; @b file a hi; cat a; @b unlink a; stat a t; @b mkdir a; stat a t",
    ),
    ("case-matters", "file a; file A | ls .; same a A"),
    ("inode-is-kept", "file a; link a b | rename a c; same b c; chmod c 600; same b c"),
];

pub const RENAMING: &[Line] = &[
    (
        "keeps-all",
        "file a hi; chmod a 640; chown a 3:4; setx a user.k v; utimes a 1000000001 1000000002 | rename a b; times b; cat b; stat b mons; getx b user.k",
    ),
    ("same-file", "file a hi; link a b | rename a b; ls .; stat a n; rename a a; ls ."),
    ("same-file-noreplace", "file a | rename a a noreplace; rename a a exchange"),
    ("into-itself", "mkdir d; mkdir d/e | rename d d/e/f; rename d d/f; rename d d; rename d/e d"),
    ("into-itself-exchange", "mkdir d; mkdir d/e | rename d d/e exchange; rename d/e d exchange"),
    ("dots", "mkdir d | rename . x; rename d/. x; rename d ..; rename d/.. x"),
    ("missing", "file a | rename x y; rename a x/y; rename a/x y; rename x a; ls ."),
    ("slashes", "file a; mkdir d | rename a b/; rename d e/; rename a/ c; ls ."),
    ("long-names", "file a | rename a n{255}; rename n{255} n{256}; ls ."),
    ("flags-that-exclude", "file a; file b | rename a b both; ls ."),
    ("whiteout", "file a hi | rename a b whiteout; cat b; lstat a tr"),
    (
        "directory-counts",
        "mkdir d; mkdir e; mkdir d/s; file e/f | rename d/s e/f exchange; stat d n; stat e n; type d/f; type d/s; type e/f",
    ),
    ("open-directory", "mkdir d; file d/a hi; open 0 d r; chdir d | rename ../d ../e; cat a; stat ../e/a s"),
    ("across-directories", "mkdir d; mkdir e; file d/a hi | rename d/a e/b; cat e/b; ls d; ls e"),
    ("directory-with-children", "mkdir d; file d/a hi; mkdir e | rename d e/d; cat e/d/a; stat e n"),
    (
        "over-open-file",
        "file a new; file b old; open 0 b rw | rename a b; pread 0 0 9; write 0 XX; cat b; fstat 0 n",
    ),
    (
        "sticky",
        "mkdir d; chmod d 1777; file d/a; mkdir d/d | @u rename d/a d/b; @u file d/own; @u rename d/own d/a; @u rename d/own d/mine; ls d",
    ),
    (
        "directory-without-write",
        "mkdir d; mkdir d/s; chmod d 777; mkdir e; chmod e 777; chown d/s 0:0 | @u rename d/s e/s; @u rename d/s d/t; ls d; ls e",
    ),
    (
        "own-directory-without-write",
        "chmod . 777; mkdir d; mkdir e; chmod d 777; chmod e 777 | @u mkdir d/s 555; @u rename d/s e/s; @u rename d/s d/t; ls d; ls e",
    ),
    ("by-another", "file a one | stat a s; @b rename a b; stat a s; cat b; @b rename b a; cat a"),
];
