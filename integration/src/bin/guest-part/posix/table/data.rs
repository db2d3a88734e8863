//! Contents: reading, writing, sizes, room, copies, and maps of them.

use super::Line;

pub const CASES: &[Line] = &[
    (
        "write-and-read",
        "open 0 a rw,creat; write 0 hello; seek 0 1 set; read 0 3; read 0 9; read 0 9; stat a s",
    ),
    ("write-beyond-the-end", "file a x; open 0 a rw | pwrite 0 10 y; stat a s; cat a"),
    ("write-far-away", "open 0 a rw,creat | pwrite 0 1T x; stat a s; pread 0 1T 5; pread 0 500G 5; holes a"),
    ("write-too-far", "open 0 a rw,creat | pwrite 0 8191T x; ftruncate 0 8191T; truncate a 8191T; stat a s"),
    (
        "write-at-the-limit",
        "open 0 a rw,creat | pwrite 0 17592186040319 xy; stat a s; pwrite 0 17592186044415 xy; stat a s",
    ),
    (
        "negative-places",
        "file a hello; open 0 a rw | pwrite 0 -1 x; pread 0 -1 1; seek 0 -1 set; ftruncate 0 -1; truncate a -1; seek 0 -2 end",
    ),
    ("large-write", "open 0 a rw,creat | write 0 x{300000}; stat a s; pread 0 0 300001; pread 0 131070 4"),
    ("across-pages", "open 0 a rw,creat | pwrite 0 4094 abcd; pread 0 4092 8; pwrite 0 4095 X; cat a"),
    (
        "two-writers",
        "file a ----------; open 0 a rw | @b open 0 a rw; @b pwrite 0 5 B; pwrite 0 4 A; @b pread 0 0 10; pread 0 0 10",
    ),
    (
        "seen-by-another-reader",
        "file a one; open 0 a r; @b open 0 a w | pread 0 0 9; @b pwrite 0 0 TWO; pread 0 0 9; @b pwrite 0 3 more; pread 0 0 9; fstat 0 s",
    ),
    (
        "shrunk-by-another",
        "file a hello; open 0 a r | pread 0 0 9; @b truncate a 2; pread 0 0 9; fstat 0 s; @b truncate a 4; pread 0 0 9",
    ),
    (
        "seek-ends",
        "file a hello; open 0 a r | seek 0 0 end; seek 0 -2 cur; read 0 9; seek 0 100 set; read 0 9; seek 0 5 end",
    ),
    (
        "truncate",
        "file a hello | truncate a 2; cat a; truncate a 5; cat a; truncate a 0; cat a; truncate x 0; truncate . 0",
    ),
    (
        "truncate-open",
        "file a hello; open 0 a rw | seek 0 5 set; ftruncate 0 2; write 0 x; cat a; ftruncate 0 0; fstat 0 s",
    ),
    (
        "truncate-zeroes-the-tail",
        "open 0 a rw,creat; write 0 x{6000} | ftruncate 0 5000; ftruncate 0 6000; pread 0 4998 4; pread 0 5000 1000",
    ),
    (
        "truncate-grows-with-holes",
        "file a | truncate a 1G; stat a s; holes a; open 0 a r; seek 0 0 data; seek 0 0 hole",
    ),
    ("truncate-read-only-file", "file a hello; chmod a 444 | truncate a 1; @u truncate a 0; stat a s"),
    (
        "data-and-holes",
        "open 0 a rw,creat; pwrite 0 1M x; ftruncate 0 4M | seek 0 0 data; seek 0 0 hole; seek 0 1M data; seek 0 1M hole; seek 0 2M data; seek 0 2M hole; seek 0 5M data; seek 0 4M hole",
    ),
    (
        "data-and-holes-dense",
        "open 0 a rw,creat; write 0 x{9000} | seek 0 0 data; seek 0 100 data; seek 0 0 hole; seek 0 9000 data; seek 0 9000 hole",
    ),
    ("seek-data-moves", "open 0 a rw,creat; pwrite 0 1M x | seek 0 0 data; read 0 1; seek 0 0 cur"),
    (
        "allocate",
        "open 0 a rw,creat | fallocate 0 0 0 100000; stat a s; holes a; pread 0 99999 5; fallocate 0 0 0 10; stat a s",
    ),
    ("allocate-keep", "file a hi; open 0 a rw | fallocate 0 keep 0 1M; stat a s; holes a; cat a"),
    (
        "allocate-keep-beyond",
        "open 0 a rw,creat; write 0 hi | fallocate 0 keep 4096 8192; stat a s; pwrite 0 8000 x; stat a s",
    ),
    (
        "punch",
        "open 0 a rw,creat; write 0 x{20000} | fallocate 0 punch,keep 4096 8192; stat a s; pread 0 4094 4; pread 0 12286 4; holes a; seek 0 0 hole; seek 0 4096 data",
    ),
    (
        "punch-odd",
        "open 0 a rw,creat; write 0 x{100} | fallocate 0 punch,keep 10 5; pread 0 8 9; fallocate 0 punch,keep 90 100; stat a s; pread 0 88 20",
    ),
    ("punch-without-keep", "open 0 a rw,creat; write 0 x{100} | fallocate 0 punch 0 10; cat a"),
    (
        "zero",
        "open 0 a rw,creat; write 0 x{20000} | fallocate 0 zero 4000 10; pread 0 3998 14; fallocate 0 zero 19990 100; stat a s; pread 0 19988 200",
    ),
    (
        "zero-keep",
        "open 0 a rw,creat; write 0 x{100} | fallocate 0 zero,keep 90 100; stat a s; pread 0 88 20",
    ),
    (
        "collapse",
        "open 0 a rw,creat; write 0 a{4096}; write 0 b{4096}; write 0 c{4096} | fallocate 0 collapse 4096 4096; stat a s; pread 0 4090 10; fallocate 0 collapse 10 10",
    ),
    (
        "insert",
        "open 0 a rw,creat; write 0 a{4096}; write 0 b{4096} | fallocate 0 insert 4096 4096; stat a s; pread 0 4094 4; pread 0 8190 4",
    ),
    (
        "allocate-nonsense",
        "open 0 a rw,creat | fallocate 0 0 0 0; fallocate 0 0 -1 10; fallocate 0 0 0 -1; fallocate 0 punch,zero 0 1; stat a s",
    ),
    (
        "allocate-pipe-and-directory",
        "mkfifo p 600; mkdir d; open 0 p rw; open 1 d r | fallocate 0 0 0 10; fallocate 1 0 0 10",
    ),
    ("allocate-too-much", "open 0 a rw,creat | fallocate 0 0 0 100T; stat a s"),
    (
        "copy",
        "file a hello-world; open 0 a r; open 1 b rw,creat | copy 0 0 1 0 5; cat b; copy 0 6 1 5 100; cat b; copy 0 11 1 0 5; copy 0 100 1 0 5",
    ),
    ("copy-within", "file a hello-world; open 0 a rw | copy 0 0 0 11 5; cat a; copy 0 0 0 2 5; stat a s"),
    (
        "copy-large",
        "open 0 a rw,creat; write 0 x{200000}; open 1 b rw,creat | copy 0 0 1 0 200000; stat b s; pread 1 199990 100",
    ),
    (
        "copy-of-unwritten-cache",
        "open 0 a rw,creat; open 1 b rw,creat | pwrite 0 0 fresh; copy 0 0 1 0 5; pread 1 0 9",
    ),
    (
        "copy-over-cached",
        "file b older; file a newer; open 0 a r; open 1 b rw | pread 1 0 9; copy 0 0 1 0 5; pread 1 0 9; cat b",
    ),
    (
        "copy-wrong-ways",
        "file a hello; open 0 a r; open 1 b w,creat; open 2 . r | copy 1 0 1 9 5; copy 0 0 0 9 5; copy 0 0 2 0 5",
    ),
    ("copy-to-append", "file a hello; file b there; open 0 a r; open 1 b w,append | copy 0 0 1 0 5; cat b"),
    (
        "copy-extends",
        "file a hello; open 0 a r; open 1 b rw,creat | copy 0 0 1 10000 5; stat b s; pread 1 9998 9",
    ),
    ("sync", "open 0 a rw,creat; write 0 x | fsync 0; fdatasync 0; syncfs 0; open 1 . r; fsync 1; syncfs 1"),
    (
        "append-race",
        "file a | @b& append-race a 60; @c& append-race a 60; append-race a 60; wait b; wait c; lines a",
    ),
    ("sparse-count", "open 0 a rw,creat; pwrite 0 100M x; fsync 0 | stat a s; holes a; pread 0 50M 3"),
    ("advise", "file a hello; open 0 a r | advise 0; read 0 5"),
    ("last-byte-of-page", "open 0 a rw,creat; write 0 x{4096} | pread 0 4095 10; pread 0 4096 10; stat a s"),
];

pub const MAPS: &[Line] = &[
    (
        "shared-write-is-read",
        "open 0 a rw,creat; ftruncate 0 8192; map 0 0 8192 rw | poke 0 4095 hi; pread 0 4095 2; msync 0; cat a",
    ),
    (
        "write-is-seen-in-map",
        "file a hello; open 0 a rw; map 0 0 5 r | peek 0 0 5; pwrite 0 0 HE; peek 0 0 5",
    ),
    (
        "two-maps",
        "open 0 a rw,creat; ftruncate 0 4096; open 1 a rw; map 0 0 4096 rw; map 1 1 4096 rw | poke 0 0 one; peek 1 0 3; poke 1 3 two; peek 0 0 6",
    ),
    (
        "two-processes",
        "open 0 a rw,creat; ftruncate 0 4096; @b open 0 a rw; @b map 0 0 4096 rw; map 0 0 4096 rw | poke 0 0 one; @b peek 0 0 3; @b poke 0 3 two; peek 0 0 6; @b msync 0; pread 0 0 7",
    ),
    ("private", "file a hello; open 0 a r; map 0 0 5 rw,private | poke 0 0 HE; peek 0 0 5; cat a"),
    ("after-close", "file a hello; open 0 a rw; map 0 0 5 rw; close 0 | poke 0 0 HE; unmap 0; cat a"),
    (
        "read-only-file",
        "file a hello; open 0 a r | map 0 0 5 rw,shared; map 0 0 5 rw,private; map 0 0 5 r,shared",
    ),
    ("write-only-file", "file a hello; open 0 a w | map 0 0 5 r,shared; map 0 0 5 rw,shared"),
    ("append-file", "file a hello; open 0 a rw,append | map 0 0 5 rw,shared; poke 0 0 J; msync 0; cat a"),
    ("directory", "open 0 . r | map 0 0 4096 r,private"),
    ("tail-is-zero", "file a hello; open 0 a r; map 0 0 4096 r | peek 0 0 8"),
    (
        "grown",
        "file a hello; open 0 a rw; map 0 0 4096 rw | truncate a 10; peek 0 0 12; poke 0 8 x; msync 0; cat a",
    ),
    (
        "written-time",
        "open 0 a rw,creat; ftruncate 0 4096; map 0 0 4096 rw; mark a | poke 0 0 x; msync 0; changed a",
    ),
    (
        "direct",
        "open 0 a rw,creat,direct; direct-write 0 0 0 4096 | map 0 0 4096 rw,shared; poke 0 0 X; msync 0; cat a",
    ),
];
