//! Attributes: modes, owners, times, counts, and those of the whole file system.

use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{
    FchmodatFlags, FileStat, SFlag, UtimensatFlags, fchmod, fchmodat, fstat, futimens, lstat, stat, umask,
    utimensat,
};
use nix::sys::statvfs::statvfs;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::unistd::{AccessFlags, Gid, Uid, access, eaccess, fchown, fchownat};

use super::super::words::{Fault, Told, mode, number, ok, owner, wrong};
use super::super::world::{Times, World};
use super::names::name_of;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("stat", [path, fields]) => stat(*path).map_err(Into::into).and_then(|data| told(&data, fields)),
        ("lstat", [path, fields]) => lstat(*path).map_err(Into::into).and_then(|data| told(&data, fields)),
        ("fstat", [slot, fields]) => {
            world.fd(slot).and_then(|fd| Ok(fstat(fd)?)).and_then(|data| told(&data, fields))
        }
        ("umask", [bits]) => mode(bits).map(|bits| {
            umask(bits);
            String::new()
        }),
        ("chmod", [path, bits]) => change_mode(path, bits, FchmodatFlags::FollowSymlink),
        ("lchmod", [path, bits]) => change_mode(path, bits, FchmodatFlags::NoFollowSymlink),
        ("fchmod", [slot, bits]) => {
            mode(bits).and_then(|bits| world.fd(slot).and_then(|fd| ok(fchmod(fd, bits))))
        }
        ("chown", [path, who]) => change_owner(path, who, AtFlags::empty()),
        ("lchown", [path, who]) => change_owner(path, who, AtFlags::AT_SYMLINK_NOFOLLOW),
        ("fchown", [slot, who]) => owner(who).and_then(|(user, group)| {
            ok(fchown(world.fd(slot)?, user.map(Uid::from_raw), group.map(Gid::from_raw)))
        }),
        ("utimes", [path, atime, mtime]) => set_times(path, atime, mtime, UtimensatFlags::FollowSymlink),
        ("lutimes", [path, atime, mtime]) => set_times(path, atime, mtime, UtimensatFlags::NoFollowSymlink),
        ("futimes", [slot, atime, mtime]) => time(atime).and_then(|atime| {
            let mtime = time(mtime)?;
            ok(futimens(world.fd(slot)?, &atime, &mtime))
        }),
        ("times", [path]) => {
            times(path).map(|[atime, mtime, now]| format!("{},{}", when(atime, now), when(mtime, now)))
        }
        ("mark", paths) => mark(world, paths),
        ("changed", [path]) => changed(world, path),
        ("access", [path, how]) => ways(how).and_then(|how| ok(access(*path, how))),
        ("eaccess", [path, how]) => ways(how).and_then(|how| ok(eaccess(*path, how))),
        ("statfs", [path, field]) => file_system(path, field),
        ("born", [path]) => Ok(match std::fs::metadata(path).map(|data| data.created().is_ok()) {
            Ok(true) => "known".to_owned(),
            Ok(false) => "unknown".to_owned(),
            Err(error) => return Some(Err(error.into())),
        }),
        ("get-flags", [slot]) => inode_flags(world, slot),
        _ => return None,
    })
}

/// `t` type, `m` mode, `o` owner, `s` size, `n` links, `r` device, with commas between them.
fn told(data: &FileStat, fields: &str) -> Told {
    let field = |field| {
        Ok(match field {
            't' => name_of(SFlag::from_bits_truncate(data.st_mode)).to_owned(),
            'm' => format!("{:04o}", data.st_mode & 0o7777),
            'o' => format!("{}:{}", data.st_uid, data.st_gid),
            's' => data.st_size.to_string(),
            'n' => format!("{}link", data.st_nlink),
            'r' => format!("{}:{}", nix::sys::stat::major(data.st_rdev), nix::sys::stat::minor(data.st_rdev)),
            'b' => data.st_blksize.to_string(),
            _ => return wrong(format!("{field} is no field of stat")),
        })
    };
    Ok(fields.chars().map(field).collect::<Result<Vec<_>, Fault>>()?.join(","))
}

fn change_mode(path: &str, bits: &str, flags: FchmodatFlags) -> Told {
    ok(fchmodat(AT_FDCWD, path, mode(bits)?, flags))
}

fn change_owner(path: &str, who: &str, flags: AtFlags) -> Told {
    let (user, group) = owner(who)?;
    ok(fchownat(AT_FDCWD, path, user.map(Uid::from_raw), group.map(Gid::from_raw), flags))
}

/// `now`, `omit`, or seconds with nanoseconds behind a point.
fn time(word: &str) -> Result<TimeSpec, Fault> {
    Ok(match word {
        "now" => TimeSpec::UTIME_NOW,
        "omit" => TimeSpec::UTIME_OMIT,
        _ => {
            let (seconds, nanoseconds) = word.split_once('.').unwrap_or((word, "0"));
            TimeSpec::new(number(seconds)?, number(nanoseconds)?)
        }
    })
}

fn set_times(path: &str, atime: &str, mtime: &str, flags: UtimensatFlags) -> Told {
    ok(utimensat(AT_FDCWD, path, &time(atime)?, &time(mtime)?, flags))
}

fn times(path: &str) -> Result<Times, Fault> {
    let data = lstat(path)?;
    Ok([
        (data.st_atime, data.st_atime_nsec),
        (data.st_mtime, data.st_mtime_nsec),
        (data.st_ctime, data.st_ctime_nsec),
    ])
}

/// A time as it was set, or that it is about now: that is when the file was last changed, by the clock of whoever
/// keeps it. Ours may not even know the year.
fn when((seconds, nanoseconds): (i64, i64), (now, _): (i64, i64)) -> String {
    const ABOUT: i64 = 600;
    if (seconds - now).abs() < ABOUT { "now".to_owned() } else { format!("{seconds}.{nanoseconds}") }
}

/// More than a tick of the clock that stamps files.
const TICK: Duration = Duration::from_millis(20);

/// Sets old times and notes them: what touches a file afterwards shows in [`changed`].
fn mark(world: &mut World, paths: &[&str]) -> Told {
    let old = TimeSpec::seconds(1_000_000_000);
    for path in paths {
        utimensat(AT_FDCWD, *path, &old, &old, UtimensatFlags::NoFollowSymlink)?;
    }
    sleep(TICK);
    for path in paths {
        world.marks.insert((*path).to_owned(), times(path)?);
    }
    Ok(String::new())
}

/// Which of its times have changed: `a`, `m`, `c`.
fn changed(world: &World, path: &str) -> Told {
    let Some(before) = world.marks.get(path) else { return Err(Fault::Named("not-marked".to_owned())) };
    let after = times(path)?;
    let letters: String =
        before.iter().zip(&after).zip("amc".chars()).filter(|((a, b), _)| a != b).map(|(_, l)| l).collect();
    Ok(if letters.is_empty() { "none".to_owned() } else { letters })
}

fn ways(word: &str) -> Result<AccessFlags, Fault> {
    word.chars().try_fold(AccessFlags::F_OK, |flags, letter| {
        Ok(flags
            | match letter {
                'r' => AccessFlags::R_OK,
                'w' => AccessFlags::W_OK,
                'x' => AccessFlags::X_OK,
                'f' => AccessFlags::F_OK,
                _ => return wrong(format!("{letter} is no access")),
            })
    })
}

fn file_system(path: &str, field: &str) -> Told {
    let told = statvfs(path)?;
    Ok(match field {
        "block" => told.block_size().to_string(),
        "fragment" => told.fragment_size().to_string(),
        "blocks" => told.blocks().to_string(),
        "files" => told.files().to_string(),
        "name" => told.name_max().to_string(),
        "room" => (told.blocks_available() > 0 && told.files_free() > 0).to_string(),
        "type" => format!("{:x}", nix::sys::statfs::statfs(path)?.filesystem_type().0),
        _ => return wrong(format!("{field} is no field of statfs")),
    })
}

/// The flags that `lsattr` shows.
fn inode_flags(world: &World, slot: &str) -> Told {
    let fd = world.fd(slot)?;
    let mut flags: libc::c_long = 0;
    // SAFETY: the request writes at most a long to where it is told to.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) })?;
    Ok("known".to_owned())
}
