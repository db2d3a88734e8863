//! What is in files: open, read, write, seek, allocate, copy.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, copy_file_range, fallocate, fcntl, open};
use nix::sys::stat::{Mode, fstat};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, dup, fdatasync, fsync, ftruncate, lseek, read, syncfs, truncate, write};

use super::super::words::{Fault, Told, check, flags, mode, number, ok, shown, size, wrong};
use super::super::world::World;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("open", [slot, path, how]) => open_as(world, slot, path, how, "644"),
        ("open", [slot, path, how, bits]) => open_as(world, slot, path, how, bits),
        ("close", [slot]) => world.close(slot),
        ("dup", [slot, to]) => duplicate(world, slot, to),
        ("write", [slot, text]) => with(world, slot, |fd| Ok(write(fd, text.as_bytes())?.to_string())),
        ("pwrite", [slot, at, text]) => put(world, slot, at, text),
        ("read", [slot, count]) => get(world, slot, None, count),
        ("pread", [slot, at, count]) => get(world, slot, Some(at), count),
        ("seek", [slot, to, whence]) => seek(world, slot, to, whence),
        ("cat", [path]) => Ok(shown(&match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(error.into())),
        })),
        ("truncate", [path, to]) => size(to).and_then(|to| ok(truncate(*path, to))),
        ("ftruncate", [slot, to]) => size(to).and_then(|to| with(world, slot, |fd| ok(ftruncate(fd, to)))),
        ("fallocate", [slot, how, at, len]) => allocate(world, slot, how, at, len),
        ("copy", [from, at, to, there, len]) => copy(world, (from, at), (to, there), len),
        ("fsync", [slot]) => with(world, slot, |fd| ok(fsync(fd))),
        ("fdatasync", [slot]) => with(world, slot, |fd| ok(fdatasync(fd))),
        ("syncfs", [slot]) => with(world, slot, |fd| ok(syncfs(fd))),
        ("set-flags", [slot, how]) => {
            flags(how).and_then(|how| with(world, slot, |fd| ok(fcntl(fd, FcntlArg::F_SETFL(how)))))
        }
        ("direct-write", [slot, skew, at, len]) => direct(world, slot, skew, at, len, true),
        ("direct-read", [slot, skew, at, len]) => direct(world, slot, skew, at, len, false),
        ("holes", [path]) => holes(path),
        ("append-race", [path, count]) => append_many(path, count),
        ("lines", [path]) => lines(path),
        ("advise", [slot]) => with(world, slot, |fd| {
            use std::os::fd::AsRawFd;
            // SAFETY: the call takes no pointer, and the descriptor is open.
            check(unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) })
        }),
        _ => return None,
    })
}

fn with(world: &World, slot: &str, act: impl FnOnce(std::os::fd::BorrowedFd<'_>) -> Told) -> Told {
    act(world.fd(slot)?)
}

fn open_as(world: &mut World, slot: &str, path: &str, how: &str, bits: &str) -> Told {
    let fd = open(path, flags(how)?, mode(bits)?)?;
    world.put(slot, fd)
}

fn duplicate(world: &mut World, slot: &str, to: &str) -> Told {
    let fd = dup(world.fd(slot)?)?;
    world.put(to, fd)
}

fn put(world: &World, slot: &str, at: &str, text: &str) -> Told {
    Ok(pwrite(world.fd(slot)?, text.as_bytes(), size(at)?)?.to_string())
}

fn get(world: &World, slot: &str, at: Option<&str>, count: &str) -> Told {
    let mut buffer = vec![0; size(count)?.unsigned_abs() as usize];
    let fd = world.fd(slot)?;
    let length = match at {
        Some(at) => pread(fd, &mut buffer, size(at)?)?,
        None => read(fd, &mut buffer)?,
    };
    Ok(shown(&buffer[..length]))
}

fn seek(world: &World, slot: &str, to: &str, whence: &str) -> Told {
    let whence = match whence {
        "set" => Whence::SeekSet,
        "cur" => Whence::SeekCur,
        "end" => Whence::SeekEnd,
        "data" => Whence::SeekData,
        "hole" => Whence::SeekHole,
        _ => return wrong(format!("{whence} is no place to seek from")),
    };
    Ok(lseek(world.fd(slot)?, size(to)?, whence)?.to_string())
}

fn allocate(world: &World, slot: &str, how: &str, at: &str, len: &str) -> Told {
    let flags = how.split(',').try_fold(FallocateFlags::empty(), |flags, name| {
        Ok::<_, Fault>(
            flags
                | match name {
                    "0" => FallocateFlags::empty(),
                    "keep" => FallocateFlags::FALLOC_FL_KEEP_SIZE,
                    "punch" => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                    "zero" => FallocateFlags::FALLOC_FL_ZERO_RANGE,
                    "collapse" => FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
                    "insert" => FallocateFlags::FALLOC_FL_INSERT_RANGE,
                    "unshare" => FallocateFlags::FALLOC_FL_UNSHARE_RANGE,
                    _ => return wrong(format!("{name} is no way to allocate")),
                },
        )
    })?;
    ok(fallocate(world.fd(slot)?, flags, size(at)?, size(len)?))
}

fn copy(world: &World, (from, at): (&str, &str), (to, there): (&str, &str), len: &str) -> Told {
    let (mut at, mut there) = (size(at)?, size(there)?);
    let len = size(len)?.unsigned_abs() as usize;
    Ok(copy_file_range(world.fd(from)?, Some(&mut at), world.fd(to)?, Some(&mut there), len)?.to_string())
}

/// A page that lies at a multiple of its size in memory, and `skew` bytes more.
const PAGE: usize = 4096;

fn direct(world: &World, slot: &str, skew: &str, at: &str, len: &str, writes: bool) -> Told {
    let (skew, len): (usize, usize) = (number(skew)?, number(len)?);
    let mut memory = vec![b'd'; PAGE + skew + len];
    let begin = memory.as_ptr().align_offset(PAGE) + skew;
    let buffer = &mut memory[begin..begin + len];
    let (fd, at) = (world.fd(slot)?, size(at)?);
    Ok(if writes { pwrite(fd, buffer, at)? } else { pread(fd, buffer, at)? }.to_string())
}

/// Whether less is stored than the size says.
fn holes(path: &str) -> Told {
    let data = std::fs::metadata(path)?;
    Ok(if data.blocks() * 512 < data.size() { "holes" } else { "none" }.to_owned())
}

const RECORD: &str = "0123456789abcdef0123456789abcde\n";

/// Appends records one at a time, each opening of the file with a position of its own.
fn append_many(path: &str, count: &str) -> Told {
    let fd = open(path, OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CLOEXEC, Mode::empty())?;
    for _ in 0..number::<u32>(count)? {
        write(fd.as_fd(), RECORD.as_bytes())?;
    }
    let _ = fstat(&fd)?;
    Ok(String::new())
}

/// How many whole records are in a file.
fn lines(path: &str) -> Told {
    let text = std::fs::read_to_string(path)?;
    let whole = text.split_inclusive('\n').filter(|line| *line == RECORD).count();
    Ok(format!("{whole}-of-{}", text.len() / RECORD.len()))
}
