//! Locks: of whole files, of ranges by process and by opening, and leases. None of them waits unless it says so.

use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, fcntl};

use super::super::words::{Fault, Told, check, ok, size, wrong};
use super::super::world::World;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("flock", [slot, how]) => whole(world, slot, how, libc::LOCK_NB),
        ("flock-wait", [slot, how]) => whole(world, slot, how, 0),
        ("lock", [slot, how, at, len]) => set(world, slot, how, at, len, |lock| FcntlArg::F_SETLK(lock)),
        ("lock-wait", [slot, how, at, len]) => {
            set(world, slot, how, at, len, |lock| FcntlArg::F_SETLKW(lock))
        }
        ("ofd-lock", [slot, how, at, len]) => {
            set(world, slot, how, at, len, |lock| FcntlArg::F_OFD_SETLK(lock))
        }
        ("get-lock", [slot, how, at, len]) => get(world, slot, how, at, len, |lock| FcntlArg::F_GETLK(lock)),
        ("get-ofd-lock", [slot, how, at, len]) => {
            get(world, slot, how, at, len, |lock| FcntlArg::F_OFD_GETLK(lock))
        }
        ("lease", [slot, how]) => lease(world, slot, how),
        _ => return None,
    })
}

fn whole(world: &World, slot: &str, how: &str, wait: libc::c_int) -> Told {
    let how = match how {
        "sh" => libc::LOCK_SH,
        "ex" => libc::LOCK_EX,
        "un" => libc::LOCK_UN,
        _ => return wrong(format!("{how} is no lock")),
    };
    // SAFETY: the call takes no pointer, and the descriptor is open.
    check(unsafe { libc::flock(world.fd(slot)?.as_raw_fd(), how | wait) })
}

fn range(how: &str, at: &str, len: &str) -> Result<libc::flock, Fault> {
    let kind = match how {
        "rd" => libc::F_RDLCK,
        "wr" => libc::F_WRLCK,
        "un" => libc::F_UNLCK,
        _ => return wrong(format!("{how} is no lock")),
    };
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: size(at)?,
        l_len: size(len)?,
        l_pid: 0,
    })
}

fn set(
    world: &World,
    slot: &str,
    how: &str,
    at: &str,
    len: &str,
    call: impl for<'a> FnOnce(&'a libc::flock) -> FcntlArg<'a>,
) -> Told {
    ok(fcntl(world.fd(slot)?, call(&range(how, at, len)?)))
}

/// What stands in the way of a lock.
fn get(
    world: &World,
    slot: &str,
    how: &str,
    at: &str,
    len: &str,
    call: impl for<'a> FnOnce(&'a mut libc::flock) -> FcntlArg<'a>,
) -> Told {
    let mut lock = range(how, at, len)?;
    fcntl(world.fd(slot)?, call(&mut lock))?;
    let kind = match i32::from(lock.l_type) {
        libc::F_UNLCK => return Ok("free".to_owned()),
        libc::F_RDLCK => "rd",
        _ => "wr",
    };
    Ok(format!("{kind},{},{}", lock.l_start, lock.l_len))
}

fn lease(world: &World, slot: &str, how: &str) -> Told {
    let how = match how {
        "rd" => libc::F_RDLCK,
        "wr" => libc::F_WRLCK,
        "un" => libc::F_UNLCK,
        _ => return wrong(format!("{how} is no lease")),
    };
    // SAFETY: the request takes a number, and the descriptor is open.
    check(unsafe { libc::fcntl(world.fd(slot)?.as_raw_fd(), libc::F_SETLEASE, how) })
}
