//! Calls that change something, on a file system that may not change. Names of the cases are those of the calls.

use super::Case;

const GIVEN: &str = "file f content; chmod f 666; mkdir d; chmod d 777; mkdir e; file e/inner; symlink f l; mkfifo p 666; \
    setx f user.x value";

/// Each must fail, and for no other reason than that nothing may change.
const REFUSED: &[(&str, &str)] = &[
    ("open-w", "open 0 f w"),
    ("open-rw", "open 0 f rw"),
    ("open-append", "open 0 f w,append"),
    ("open-trunc", "open 0 f w,trunc"),
    ("open-read-trunc", "open 0 f r,trunc"),
    ("open-creat", "open 0 new rw,creat"),
    ("open-creat-read", "open 0 new r,creat"),
    ("open-creat-excl", "open 0 new rw,creat,excl"),
    ("open-creat-existing", "open 0 f rw,creat"),
    ("open-through-link", "open 0 l w"),
    ("mkdir", "mkdir new"),
    ("rmdir", "rmdir d"),
    ("rmdir-full", "rmdir e"),
    ("unlink", "unlink f"),
    ("unlink-symlink", "unlink l"),
    ("link", "link f new"),
    ("symlink", "symlink f new"),
    ("rename", "rename f new"),
    ("rename-over", "rename f l"),
    ("rename-noreplace", "rename f new noreplace"),
    ("rename-exchange", "rename f l exchange"),
    ("mkfifo", "mkfifo new 600"),
    ("mknod", "mknod new file 600"),
    ("mknod-device", "mknod new char:1:3 600"),
    ("truncate", "truncate f 0"),
    ("truncate-longer", "truncate f 100"),
    ("chmod", "chmod f 600"),
    ("chmod-directory", "chmod d 700"),
    ("chown", "chown f 1:1"),
    ("lchown", "lchown l 1:1"),
    ("utimes", "utimes f 1 2"),
    ("utimes-now", "utimes f now now"),
    ("lutimes", "lutimes l 1 2"),
    ("setxattr", "setx f user.y v"),
    ("setxattr-existing", "setx f user.x w"),
    ("removexattr", "rmx f user.x"),
    ("acl", "acl f access u::rw-,u:1000:r--,g::r--,m::r--,o::---"),
    ("socket", "listen 0 new"),
    ("access", "access f w"),
    ("access-directory", "access d w"),
    ("open-by-a-user", "@u open 0 f w"),
    ("mkdir-by-a-user", "@u mkdir d/new"),
    ("fchmod", "open 0 f r | fchmod 0 600"),
    ("fchown", "open 0 f r | fchown 0 1:1"),
    ("futimes", "open 0 f r | futimes 0 1 2"),
    ("fsetxattr", "open 0 f r | fsetx 0 user.y v"),
];

/// Reading goes on, and so does what only passes through.
const ALLOWED: &[(&str, &str)] = &[
    ("read", "cat f; ls .; readlink l; getx f user.x; stat f mns; type p"),
    ("open-read", "open 0 f r; read 0 7; open 0 f r,creat; seek 0 0 data; fsync 0"),
    ("fifo", "fifo-talk p"),
    ("map", "open 0 f r; map 0 0 7 rw,private; poke 0 0 C; peek 0 0 7"),
    ("lock", "open 0 f r; flock 0 ex; lock 0 rd 0 1; statfs . name"),
];

/// What makes the directory the cases work on.
pub fn given() -> Case {
    Case { name: "given".to_owned(), steps: format!("{GIVEN} | ls .") }
}

pub fn cases() -> Vec<Case> {
    let case = |family: &str, (name, steps): &(&str, &str)| Case {
        name: format!("{family}.{name}"),
        steps: (*steps).to_owned(),
    };
    let refused = REFUSED.iter().map(|line| case("refused", line));
    refused.chain(ALLOWED.iter().map(|line| case("allowed", line))).collect()
}
