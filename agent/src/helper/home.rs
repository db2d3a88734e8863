//! Where a user lives, for processes that are not told. The C library would look it up with whatever modules the
//! container brings, so the file is read here, and never beyond the container's root.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// A passwd that is longer is not read to its end.
const LONGEST: u64 = 1 << 20;

/// A directory to look for others in: nobody is asked to open it.
pub fn place(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits()).open(path)
}

/// `HOME=...`, unless the environment has one.
pub fn complete(environment: &mut Vec<String>, root: impl AsFd, uid: u32) {
    if environment.iter().any(|entry| entry.starts_with("HOME=")) {
        return;
    }
    let home = passwd(root).and_then(|passwd| home_in(&passwd, uid)).unwrap_or_else(|| "/".to_owned());
    environment.push(format!("HOME={home}"));
}

fn passwd(root: impl AsFd) -> Option<String> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(root, "etc/passwd", how).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [_, _, id, _, _, home, ..] = fields[..] else { return None };
        (id.parse() == Ok(uid) && home.starts_with('/')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nx:y:1000:1:/relative:relative:/\n\
                      b:x:1000:1::/home/b:/bin/sh\n";
        for (uid, home) in [(0, Some("/root")), (1000, Some("/home/b")), (1, None)] {
            assert_eq!(home_in(passwd, uid).as_deref(), home, "{uid}");
        }
    }

    #[test]
    fn environments() {
        let root = place(Path::new("/")).unwrap();
        let mut told = vec!["HOME=/x".to_owned()];
        complete(&mut told, &root, 0);
        assert_eq!(told, ["HOME=/x"]);
        let mut unknown = Vec::new();
        complete(&mut unknown, &root, 4_000_000_000);
        assert_eq!(unknown, ["HOME=/"]);
    }
}
