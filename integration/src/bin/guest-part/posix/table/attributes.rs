//! Modes, owners, times, and what the file system says of itself.

use super::Line;

pub const CASES: &[Line] = &[
    ("chmod", "file a | chmod a 0; stat a m; chmod a 7777; stat a m; chmod a 640; stat a m; chmod x 0"),
    (
        "chmod-directory",
        "mkdir d | chmod d 1777; stat d m; chmod d 6755; stat d m; chmod d 0; stat d m; ls d",
    ),
    ("chmod-through-a-link", "file a; symlink a l | chmod l 600; stat a m; lstat l m; lchmod l 777"),
    ("chmod-open", "file a; open 0 a r | fchmod 0 4711; stat a m"),
    (
        "chmod-by-owner",
        "file a; chown a 1000:1000 | @u chmod a 4755; stat a m; @u chmod a 2755; stat a m; @v chmod a 777",
    ),
    (
        "chmod-strange-group",
        "file a; chown a 1000:77 | @u chmod a 2755; stat a m; mkdir d; chown d 1000:77; @u chmod d 2755; stat d m",
    ),
    ("chmod-by-a-stranger", "file a | @u chmod a 777; stat a m"),
    (
        "chown",
        "file a; chmod a 6755 | chown a 5:6; stat a mo; chown a -:7; stat a o; chown a 8:-; stat a o; chown a -:-; stat a o",
    ),
    (
        "chown-clears",
        "file a; chmod a 6755; file b; chmod b 6644; mkdir d; chmod d 6755 | chown a 5:6; stat a m; chown b 5:6; stat b m; chown d 5:6; stat d m",
    ),
    (
        "chown-to-the-same-clears",
        "file a; chmod a 6755 | chown a 0:0; stat a m; chmod a 6755; chown a -:-; stat a m",
    ),
    (
        "chown-by-owner",
        "file a; chown a 1000:1000; chmod a 6755 | @u chown a 1000:1000; stat a mo; @u chown a 0:-; @u chown a -:0; stat a o",
    ),
    (
        "chown-to-own-group",
        "file a; chown a 1001:1001; chmod a 6755 | @v chown a -:1000; stat a mo; @v chown a -:77",
    ),
    (
        "chown-link",
        "file a; symlink a l | lchown l 5:6; lstat l o; stat a o; chown l 7:8; lstat l o; stat a o",
    ),
    ("chown-large-ids", "file a | chown a 4294967294:65536; stat a o"),
    ("chown-open", "file a; open 0 a r | fchown 0 5:6; stat a o"),
    ("write-clears-setuid", "chmod . 777; file a hi; chmod a 6777 | @u open 0 a w; @u write 0 x; stat a m"),
    ("write-clears-setuid-only", "file a hi; chmod a 6766 | @u open 0 a w; @u write 0 x; stat a m"),
    ("write-of-root-keeps", "file a hi; chmod a 6777 | open 0 a w; write 0 x; stat a m"),
    (
        "write-of-owner-clears",
        "file a hi; chown a 1000:1000; chmod a 6755 | @u open 0 a w; @u write 0 x; stat a m",
    ),
    (
        "truncate-clears-setuid",
        "file a hi; chmod a 6777 | @u truncate a 1; stat a m; chmod a 6777; truncate a 0; stat a m",
    ),
    (
        "open-trunc-clears-setuid",
        "file a hi; chmod a 6777 | @u open 0 a w,trunc; stat a ms; chmod a 6777; open 1 a w,trunc; stat a m",
    ),
    ("ftruncate-clears-setuid", "file a hi; chmod a 6777 | @u open 0 a w; @u ftruncate 0 1; stat a m"),
    ("allocate-clears-setuid", "file a hi; chmod a 6777 | @u open 0 a w; @u fallocate 0 0 0 10; stat a m"),
    (
        "copy-clears-setuid",
        "file a hi; file b; chmod b 6777 | @u open 0 a r; @u open 1 b w; @u copy 0 0 1 0 2; stat b ms",
    ),
    (
        "map-clears-setuid",
        "file a hello; chmod a 6777 | @u open 0 a rw; @u map 0 0 5 rw; @u poke 0 0 x; @u msync 0; stat a m",
    ),
    ("utimes", "file a | utimes a 1000000001.123456789 1000000002.987654321; times a; utimes a 0 0; times a"),
    (
        "utimes-now-and-omit",
        "file a; utimes a 1000000001 1000000002 | utimes a omit 5.6; times a; utimes a 7.8 omit; times a; utimes a now omit; times a; utimes a omit now; times a; utimes a omit omit",
    ),
    (
        "utimes-before-and-beyond",
        "file a | utimes a -1 -1; times a; utimes a -5.5 -5.5; times a; utimes a 4294967296 8589934592; times a",
    ),
    (
        "utimes-out-of-range",
        "file a | utimes a 99999999999 99999999999; times a; utimes a -99999999999 -99999999999; times a",
    ),
    ("utimes-nonsense", "file a | utimes a 1.2000000000 1; utimes a 1 -1.-1; utimes x 1 1"),
    (
        "utimes-link",
        "file a; symlink a l; utimes a 5 6 | lutimes l 1 2; times l; times a; utimes l 3 4; times l; times a",
    ),
    ("utimes-open", "file a; open 0 a r | futimes 0 1.2 3.4; times a; futimes 0 now now; times a"),
    (
        "utimes-by-others",
        "file a; chmod a 666; file b; file c; chown c 1000:0 | @u utimes a now now; @u utimes a 1 1; @u utimes b now now; @u utimes c 1 2; @u utimes a omit omit; @u utimes a now omit; times c",
    ),
    ("changed-by-write", "file a; mark a . | open 0 a w; write 0 x; changed a; changed ."),
    ("changed-by-empty-write", "file a; mark a; open 0 a w | write 0 (){0}; changed a"),
    (
        "changed-by-truncate",
        "file a hi; file b hi; file c hi; mark a b c | truncate a 0; changed a; truncate b 2; changed b; open 0 c w; ftruncate 0 2; changed c",
    ),
    (
        "changed-by-open-trunc",
        "file a hi; file b; mark a b | open 0 a w,trunc; changed a; open 1 b w,trunc; changed b",
    ),
    ("changed-by-chmod", "file a; mark a . | chmod a 600; changed a; changed ."),
    ("changed-by-chown", "file a; mark a | chown a 1:1; changed a"),
    ("changed-by-link", "file a; mkdir d; mark a . d | link a d/b; changed a; changed d; changed ."),
    ("changed-by-unlink", "file a; link a b; mark a . | unlink b; changed a; changed ."),
    (
        "changed-by-rename",
        "file a; mkdir d; mkdir e; rename a d/a; mark d e d/a | rename d/a e/b; changed d; changed e",
    ),
    ("changed-by-renamed-itself", "file a; mark a | rename a b; rename b a; changed a"),
    ("changed-by-mkdir", "mkdir d; mark d | mkdir d/e; changed d"),
    ("changed-by-rmdir", "mkdir d; mkdir d/e; mark d | rmdir d/e; changed d"),
    ("changed-by-symlink", "mkdir d; mark d | symlink x d/l; changed d"),
    ("changed-by-mknod", "mkdir d; mark d | mkfifo d/p 600; changed d"),
    ("changed-by-create", "mkdir d; mark d | file d/a; changed d"),
    ("changed-by-xattr", "file a; mark a | setx a user.x v; changed a"),
    ("changed-by-rmxattr", "file a; setx a user.x v; mark a | rmx a user.x; changed a"),
    ("changed-by-utimes", "file a; mark a | utimes a 5 omit; changed a"),
    ("changed-by-allocate", "open 0 a rw,creat; mark a | fallocate 0 0 0 100; changed a"),
    ("changed-by-punch", "file a hello; open 0 a rw; mark a | fallocate 0 punch,keep 0 2; changed a"),
    ("changed-by-copy", "file a hi; open 0 a r; open 1 b rw,creat; mark b | copy 0 0 1 0 2; changed b"),
    (
        "changed-by-failed-calls",
        "mkdir d; file d/a; mark d d/a | mkdir d/a; unlink d/x; rmdir d/a; rename d/x d/a; changed d; changed d/a",
    ),
    ("changed-by-fsync", "file a; open 0 a rw; mark a | fsync 0; changed a"),
    ("changed-by-another-link", "file a; link a b; mark a | open 0 b w; write 0 x; changed a"),
    ("set-times-last", "file a; open 0 a w; write 0 x | utimes a 5 6; times a; close 0; times a"),
    ("set-times-while-open", "file a; open 0 a w | futimes 0 5 6; close 0; times a"),
    ("block-size", "file a | stat a b"),
    ("statfs-name", "statfs . name"),
    ("statfs-block", "statfs . block; statfs . fragment"),
    ("statfs-size", "statfs . blocks; statfs . files; statfs . room"),
    ("statfs-type", "statfs . type"),
    ("statfs-of-a-file", "file a | statfs a name; statfs x name"),
    ("born", "file a | born a"),
    ("lsattr", "file a; open 0 a r | get-flags 0"),
    ("lsattr-directory", "open 0 . r | get-flags 0"),
];
