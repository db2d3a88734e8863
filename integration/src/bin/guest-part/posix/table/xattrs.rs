//! Extended attributes and access control lists.

use super::Line;

pub const CASES: &[Line] = &[
    ("user", "file a | setx a user.x value; getx a user.x; listx a; rmx a user.x; getx a user.x; listx a"),
    ("user-on-directory", "mkdir d | setx d user.x value; getx d user.x; listx d"),
    ("user-on-symlink", "symlink x l | lsetx l user.x v; listx l"),
    ("user-on-fifo", "mkfifo p 600 | setx p user.x v; listx p"),
    (
        "trusted",
        "file a | setx a trusted.x v; getx a trusted.x; listx a; @u getx a trusted.x; @u setx a trusted.y v; @u listx a",
    ),
    ("trusted-on-symlink", "symlink x l | lsetx l trusted.x v; getx l trusted.x; listx l"),
    ("trusted-on-fifo", "mkfifo p 600 | setx p trusted.x v; getx p trusted.x"),
    ("security", "file a | setx a security.x v; getx a security.x; @u setx a security.y v"),
    ("system", "file a | setx a system.x v; getx a system.x"),
    ("no-family", "file a | setx a x v; setx a strange.x v; getx a x; setx a user. v; setx a (){0} v"),
    (
        "create-and-replace",
        "file a | setx a user.x 1 replace; setx a user.x 1 create; setx a user.x 2 create; setx a user.x 3 replace; getx a user.x",
    ),
    ("empty", "file a | setx a user.x empty; getx a user.x; listx a"),
    ("binary", "file a | setx a user.x hex:00ff0a00; getx a user.x"),
    (
        "sizes",
        "file a; setx a user.x value | getx a user.x 0; getx a user.x 5; getx a user.x 4; getx a user.x 100; listx a 0; listx a 3; listx a 7",
    ),
    ("missing", "file a | getx a user.x; rmx a user.x; getx x user.x; listx x"),
    (
        "name-too-long",
        "file a | setx a user.n{250} v; setx a user.n{251} v; getx a user.n{251}; rmx a user.n{251}",
    ),
    (
        "value-too-long",
        "file a | setx a user.x v{3500}; getx a user.x; setx a user.y v{65536}; setx a user.y v{65537}; setx a user.z v{40000}; listx a",
    ),
    (
        "many",
        "file a; setx a user.1 x; setx a user.2 x; setx a user.3 x{200}; setx a user.4 x{300} | listx a; rmx a user.2; listx a; getx a user.4",
    ),
    ("by-open-file", "file a; open 0 a r | fsetx 0 user.x v; fgetx 0 user.x; getx a user.x"),
    ("path-only-descriptor", "file a; open 0 a r,path | fsetx 0 user.x v; fgetx 0 user.x"),
    ("through-a-link", "file a; symlink a l | setx l user.x v; getx a user.x; listx l"),
    (
        "kept-by-link-and-rename",
        "file a; setx a user.x v | link a b; getx b user.x; rename a c; getx c user.x",
    ),
    (
        "without-permission",
        "file a; setx a user.x v; chmod a 600 | @u getx a user.x; @u setx a user.x w; chmod a 644; @u getx a user.x; @u setx a user.x w; @u rmx a user.x; @u listx a",
    ),
    ("of-own-file", "file a; chown a 1000:1000 | @u setx a user.x v; @u getx a user.x; @u rmx a user.x"),
    ("in-sticky-directory", "mkdir d; chmod d 1777 | @u setx d user.x v; chmod d 777; @u setx d user.x v"),
    ("of-unreadable-file", "file a; chmod a 0 | setx a user.x v; getx a user.x; listx a; rmx a user.x"),
    // Version 2, effective, permitted cap_net_raw.
    (
        "capability",
        "file a | setx a security.capability hex:0100000200200000000000000000000000000000; getx a security.capability; listx a",
    ),
    (
        "capability-nonsense",
        "file a | setx a security.capability v; setx a security.capability hex:00; listx a",
    ),
    (
        "capability-lost-by-write",
        "file a; setx a security.capability hex:0100000200200000000000000000000000000000; open 0 a w | write 0 x; getx a security.capability",
    ),
    (
        "capability-lost-by-truncate",
        "file a; setx a security.capability hex:0100000200200000000000000000000000000000 | truncate a 5; getx a security.capability",
    ),
    (
        "capability-lost-by-chown",
        "file a; setx a security.capability hex:0100000200200000000000000000000000000000 | chown a 1:1; getx a security.capability",
    ),
    (
        "capability-kept-by-chmod",
        "file a; setx a security.capability hex:0100000200200000000000000000000000000000 | chmod a 755; rename a b; getx b security.capability",
    ),
    (
        "capability-by-a-user",
        "file a; chown a 1000:1000 | @u setx a security.capability hex:0100000200200000000000000000000000000000",
    ),
    (
        "acl",
        "file a | acl a access u::rw-,u:1000:r--,g::r--,m::r--,o::---; get-acl a access; stat a m; listx a",
    ),
    (
        "acl-grants",
        "file a hi; chmod a 600; acl a access u::rw-,u:1000:r--,g::---,m::r--,o::--- | @u cat a; @v cat a; @u open 0 a w",
    ),
    (
        "acl-grants-writing",
        "file a hi; acl a access u::rw-,u:1000:rw-,g::---,m::rw-,o::--- | @u open 0 a rw; @u write 0 HI; cat a; @v open 0 a r",
    ),
    (
        "acl-denies",
        "file a hi; chmod a 644; acl a access u::rw-,u:1000:---,g::r--,m::r--,o::r-- | @u cat a; @v cat a; @u access a r; @v access a r",
    ),
    ("acl-group", "file a hi; acl a access u::rw-,g::---,g:1000:r--,m::r--,o::--- | @u cat a; @v cat a"),
    (
        "acl-mask",
        "file a hi; acl a access u::rw-,u:1000:rwx,g::rwx,m::--x,o::--- | stat a m; @u cat a; chmod a 640; get-acl a access; @u cat a",
    ),
    ("acl-same-as-mode", "file a | acl a access u::rw-,g::r--,o::r--; get-acl a access; listx a; stat a m"),
    ("acl-sets-mode", "file a | acl a access u::r--,g::-w-,o::--x; stat a m"),
    (
        "acl-removed",
        "file a; acl a access u::rw-,u:1000:r--,g::r--,m::r--,o::--- | rm-acl a access; stat a m; get-acl a access",
    ),
    (
        "acl-nonsense",
        "file a | acl a access u::rw-; acl a access u::rw-,u:1000:r--,g::r--,o::---; setx a system.posix_acl_access v; listx a",
    ),
    ("acl-default-of-a-file", "file a | acl a default u::rwx,g::r-x,o::---"),
    (
        "acl-default",
        "mkdir d; acl d default u::rwx,u:1000:rwx,g::r-x,m::rwx,o::--- | get-acl d default; stat d m; get-acl d access",
    ),
    (
        "acl-inherited-by-file",
        "mkdir d; acl d default u::rwx,u:1000:rwx,g::r-x,m::rwx,o::--- | open 0 d/a rw,creat 666; stat d/a m; get-acl d/a access; get-acl d/a default",
    ),
    (
        "acl-inherited-by-directory",
        "mkdir d; acl d default u::rwx,u:1000:rwx,g::r-x,m::rwx,o::--- | mkdir d/e 777; stat d/e m; get-acl d/e access; get-acl d/e default",
    ),
    (
        "acl-inherited-with-umask",
        "mkdir d; acl d default u::rwx,g::rwx,o::rwx; umask 077 | open 0 d/a rw,creat 666; mkdir d/e 777; mkfifo d/p 666; stat d/a m; stat d/e m; stat d/p m",
    ),
    (
        "acl-inherited-by-others",
        "mkdir d; symlink x d/l; acl d default u::rwx,u:1000:rwx,g::r-x,m::rwx,o::--- | mkfifo d/p 666; mknod d/n file 660; symlink y d/m; stat d/p m; get-acl d/n access; lstat d/m m",
    ),
    (
        "acl-inherited-by-a-users-file",
        "mkdir d; chmod d 777; acl d default u::rwx,u:1001:r--,g::---,m::rwx,o::--- | @u file d/a hi; stat d/a mo; @v cat d/a; get-acl d/a access",
    ),
    (
        "acl-by-a-user",
        "file a; file b; chown b 1000:1000 | @u acl a access u::rwx,g::rwx,o::rwx; @u acl b access u::rwx,u:1001:r--,g::---,m::r--,o::---; get-acl b access; @u get-acl a access",
    ),
    (
        "acl-kills-setgid",
        "file a; chown a 1000:77; chmod a 2755 | @u acl a access u::rwx,u:1001:r--,g::r-x,m::r-x,o::r-x; stat a m",
    ),
    ("acl-on-symlink", "symlink x l | lsetx l system.posix_acl_access hex:02000000"),
    (
        "acl-on-directory-search",
        "mkdir d; file d/a hi; chmod d 700; acl d access u::rwx,u:1000:--x,g::---,m::--x,o::--- | @u cat d/a; @u ls d; @v cat d/a",
    ),
    (
        "acl-kept-by-rename",
        "file a; acl a access u::rw-,u:1000:r--,g::r--,m::r--,o::--- | rename a b; get-acl b access; link b c; get-acl c access",
    ),
    (
        "acl-changed-by-chown",
        "file a; acl a access u::rw-,u:1000:r--,g::r--,m::r--,o::--- | chown a 1000:1000; get-acl a access; stat a mo",
    ),
];
