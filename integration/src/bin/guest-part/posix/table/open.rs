//! Opening and creating.

use super::Line;

pub const CASES: &[Line] = &[
    ("missing", "open 0 a r; open 0 a rw; open 0 a/b r"),
    ("through-a-file", "file a | open 0 a/b r; open 0 a/b rw,creat; open 0 a/ r"),
    ("trailing-slash", "mkdir d | open 0 d/ r; open 0 d/ r,directory; open 0 new/ rw,creat"),
    ("directory-for-writing", "mkdir d | open 0 d w; open 0 d rw; open 0 d r,trunc; open 0 d r,creat"),
    ("truncates", "file a content | open 0 a w,trunc; stat a s; write 0 x; cat a"),
    ("truncates-when-read-only", "file a content | open 0 a r,trunc; stat a s"),
    ("excl-without-creat", "file a content | open 0 a r,excl; read 0 7"),
    ("excl-on-a-link", "symlink nowhere l | open 0 l rw,creat,excl; type nowhere"),
    (
        "creat-through-a-link",
        "symlink target l | open 0 l rw,creat; type target; type l; write 0 hi; cat target",
    ),
    ("nofollow", "file a; symlink a l | open 0 l r,nofollow; open 0 l r; open 0 l w,nofollow,creat"),
    ("nofollow-in-the-middle", "mkdir d; file d/a hi; symlink d l | open 0 l/a r,nofollow; read 0 2"),
    ("path-only", "file a hi | open 0 a r,path; read 0 2; fstat 0 ts; fchmod 0 600"),
    ("path-of-a-link", "symlink x l | open 0 l r,path,nofollow; fstat 0 t"),
    ("append", "file a one | open 0 a w,append; write 0 two; pwrite 0 0 three; cat a; seek 0 0 cur"),
    (
        "append-by-two",
        "file a | open 0 a w,append; open 1 a w,append; write 0 one; write 1 two; write 0 three; cat a",
    ),
    (
        "append-switched-on",
        "file a one | open 0 a rw; set-flags 0 append; write 0 two; cat a; set-flags 0 r; pwrite 0 0 X; cat a",
    ),
    ("append-and-read", "file a one | open 0 a rw,append; read 0 2; write 0 two; read 0 5; pread 0 0 9"),
    ("sync", "open 0 a rw,creat,sync; write 0 x; open 1 a rw,dsync; write 1 y; cat a"),
    ("noatime", "file a hi | open 0 a r,noatime; read 0 2"),
    ("noatime-of-anothers", "file a hi | @u open 0 a r,noatime; @u open 0 a r; @u read 0 2"),
    ("read-of-write-only", "file a hi | open 0 a w; read 0 2; pread 0 0 2"),
    ("write-of-read-only", "file a hi | open 0 a r; write 0 x; ftruncate 0 0; fallocate 0 0 0 4096; cat a"),
    ("directory-read", "mkdir d | open 0 d r; read 0 10; write 0 x; ftruncate 0 0; fsync 0; fdatasync 0"),
    ("loop", "symlink b a; symlink a b | open 0 a r; open 0 a rw,creat; stat a t; truncate a 0; type a"),
    ("long-chain", "file f; symlink f (l){1}; symlink l ll; symlink ll lll | open 0 lll r; readlink lll"),
    ("deep-chain", "mkdir d; symlink d l; file d/f hi | open 0 (l/../){30}l/f r; open 0 (l/../){41}l/f r"),
    ("name-too-long", "open 0 n{255} rw,creat; open 0 n{256} rw,creat; stat n{256} t; stat n{255} t; ls ."),
    (
        "path-too-long",
        "file f | open 0 (./){2046}f r; open 0 (./){2048}f r; mkdir (./){2048}d; unlink (./){2048}f",
    ),
    ("empty-name", "symlink a l | unlink (){0}; stat (){0} t; stat ./ t; stat . t"),
    ("odd-names", "file a*b; file ü; file -; file ...; file .hidden | ls ."),
    ("direct", "open 0 a rw,creat,direct; direct-write 0 0 0 4096; direct-read 0 0 0 4096; stat a s"),
    (
        "direct-misaligned",
        "file a | open 0 a rw,direct; direct-write 0 0 0 100; direct-write 0 3 0 4096; stat a s",
    ),
    (
        "direct-then-buffered",
        "open 0 a rw,creat,direct; direct-write 0 0 0 4096; open 1 a rw; pread 1 0 4; pwrite 1 0 XX; direct-read 0 0 0 4096; pread 1 0 4",
    ),
    ("tmpfile", "open 0 . rw,tmpfile 600; write 0 hidden; pread 0 0 6; fstat 0 tmsn; ls ."),
    ("tmpfile-linked", "open 0 . rw,tmpfile 640; write 0 now; link-open 0 a; cat a; stat a mn; fstat 0 n"),
    ("tmpfile-excl", "open 0 . rw,tmpfile,excl 600; link-open 0 a; ls ."),
    ("tmpfile-read-only", "open 0 . r,tmpfile 600"),
    ("tmpfile-in-a-file", "file a | open 0 a rw,tmpfile 600"),
    ("two-openings", "file a hello | open 0 a r; open 1 a r; read 0 2; read 1 3; read 0 9; read 1 9"),
    ("duplicate-shares-place", "file a hello | open 0 a r; dup 0 1; read 0 2; read 1 3"),
    ("kept-through-rename", "file a hello; open 0 a rw | rename a b; write 0 HE; cat b; fstat 0 sn"),
    (
        "kept-through-replacement",
        "file a old; file b new; open 0 a r | rename b a; pread 0 0 9; fstat 0 n; cat a",
    ),
];

pub const CREATING: &[Line] = &[
    (
        "modes",
        "open 0 a rw,creat 777; open 0 b rw,creat 600; open 0 c rw,creat 0; stat a m; stat b m; stat c m",
    ),
    ("no-access-but-open", "open 0 a rw,creat 0; write 0 hi; pread 0 0 2; stat a ms"),
    (
        "special-bits",
        "umask 0; open 0 a rw,creat 7777; mkdir d 7777; mkfifo p 7777; stat a m; stat d m; stat p m",
    ),
    (
        "special-bits-by-a-user",
        "chmod . 777 | @u umask 0; @u open 0 a rw,creat 7777; @u mkdir d 7777; stat a mo; stat d mo",
    ),
    (
        "umask",
        "umask 077; open 0 a rw,creat 777; mkdir d 777; mkfifo p 777; mknod n file 777; stat a m; stat d m; stat p m; stat n m",
    ),
    (
        "umask-none",
        "umask 0; open 0 a rw,creat 666; mkdir d 777; mkfifo p 666; symlink x l; stat a m; stat d m; stat p m; lstat l m",
    ),
    ("umask-all", "umask 777; open 0 a rw,creat 777; mkdir d 777; stat a m; stat d m"),
    (
        "owner-is-the-creator",
        "chmod . 777 | @u file a; @u mkdir d; @u symlink x l; @u mkfifo p 600; lstat a o; lstat d o; lstat l o; lstat p o",
    ),
    (
        "group-of-setgid-directory",
        "mkdir d; chown d 0:1000; chmod d 2777 | @v file d/a; @v mkdir d/d; file d/r; stat d/a mo; stat d/d mo; stat d/r mo",
    ),
    (
        "setgid-file-in-setgid-directory",
        "mkdir d; chown d 0:1000; chmod d 2777 | umask 0; @u open 0 d/own rw,creat 2755; @v open 0 d/member rw,creat 2755; stat d/own mo; stat d/member mo",
    ),
    (
        "setgid-file-of-a-strange-group",
        "mkdir d; chown d 0:77; chmod d 2777 | @u open 0 d/a rw,creat 2755; stat d/a mo",
    ),
    (
        "supplementary-group-may",
        "mkdir d; chown d 0:1000; chmod d 770 | @u file d/a; @v file d/b; @v mkdir d/d; @v symlink x d/l; @v rename d/b d/c; @v unlink d/c; ls d",
    ),
    (
        "no-write-no-file",
        "mkdir d 755 | @u file d/a; @u mkdir d/d; @u symlink x d/l; @u mkfifo d/p 600; ls d",
    ),
    ("existing-is-not-changed", "file a hello; chmod a 640 | open 0 a rw,creat 777; stat a ms"),
    ("in-a-removed-directory", "mkdir d; chdir d; rmdir ../d | file a; mkdir e; symlink x l; stat . n; ls ."),
    ("in-a-setuid-directory", "mkdir d; chown d 1000:0; chmod d 4777 | file d/a; stat d/a mo; stat d m"),
];
