//! Pipes, sockets, devices and programs.

use super::Line;

pub const CASES: &[Line] = &[
    (
        "fifo",
        "mkfifo p 644; lstat p tms; fifo-talk p; mkfifo p 600; open 0 p w,nonblock; open 0 p r,nonblock; open 1 p w,nonblock",
    ),
    ("fifo-between-processes", "mkfifo p 600; open 0 p rw; @b open 1 p rw | @b write 1 hello; read 0 9"),
    ("nodes", "mknod f file 640; mknod p fifo 640; mknod s sock 640; stat f tms; stat p tm; stat s tm"),
    ("devices", "mknod c char:1:3 666; mknod b block:7:5 660; lstat c tmr; lstat b tmr"),
    ("device-with-large-number", "mknod c char:511:1048575 600; lstat c r"),
    ("null-device", "mknod c char:1:3 666; open 0 c rw; write 0 hello; read 0 5"),
    ("missing-device", "mknod c char:250:250 666; open 0 c rw"),
    ("node-that-is-a-directory", "mknod d dir 755; ls ."),
    ("node-of-a-special-kind-is-empty", "mknod s sock 600; open 0 s r; truncate s 0; unlink s; ls ."),
    ("socket", "listen 0 s; lstat s t; talk 0 s; connect s; close 0; connect s; unlink s; connect s"),
    ("socket-name-is-taken", "file s | listen 0 s; connect s"),
    ("socket-of-another-process", "@b listen 0 s; connect s; @u connect s; chmod s 777; @u connect s"),
    ("socket-moved", "listen 0 s | rename s t; connect t; connect s; link t u; connect u"),
    ("datagram", "datagram s; lstat s t"),
    ("script", "script a 755; exec a; chmod a 644; exec a; chmod a 111; exec a"),
    ("script-of-a-user", "script a 700 | @u exec a; chmod a 755; @u exec a"),
    (
        "program",
        "program a 755 | write-while-running a; exec a posix ids; chown a 1000:1001; chmod a 6755; exec a posix ids; chmod a 0755; exec a posix ids; chmod a 644; exec a posix ids; link a b",
    ),
];
