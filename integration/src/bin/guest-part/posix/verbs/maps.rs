//! Files mapped into memory.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

use super::super::words::{Fault, Told, number, ok, shown, wrong};
use super::super::world::World;

/// A mapping; it ends when it is dropped.
pub struct Map {
    at: NonNull<c_void>,
    length: usize,
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's, and nothing refers to it any more.
        let _ = unsafe { munmap(self.at, self.length) };
    }
}

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("map", [map, slot, length, how]) => begin(world, map, slot, length, how),
        ("unmap", [map]) => number(map).map(|map| {
            world.maps.remove(&map);
            String::new()
        }),
        ("poke", [map, at, text]) => poke(world, map, at, text.as_bytes()),
        ("peek", [map, at, count]) => peek(world, map, at, count),
        ("msync", [map]) => at(world, map).and_then(|map| {
            // SAFETY: the range is this mapping's.
            ok(unsafe { msync(map.at, map.length, MsFlags::MS_SYNC) })
        }),
        _ => return None,
    })
}

fn at<'a>(world: &'a World, map: &str) -> Result<&'a Map, Fault> {
    match world.maps.get(&number(map)?) {
        Some(map) => Ok(map),
        None => Err(Fault::Named("not-mapped".to_owned())),
    }
}

/// `rw,shared`, `r,private` and so on.
fn begin(world: &mut World, map: &str, slot: &str, length: &str, how: &str) -> Told {
    let (access, sharing) = how.split_once(',').unwrap_or((how, "shared"));
    let protection =
        if access == "rw" { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    let flags = if sharing == "shared" { MapFlags::MAP_SHARED } else { MapFlags::MAP_PRIVATE };
    let Some(length) = NonZeroUsize::new(number(length)?) else { return wrong("a map of nothing") };
    // SAFETY: a new mapping where the kernel likes changes nothing that is there.
    let at = unsafe { mmap(None, length, protection, flags, world.fd(slot)?, 0) }?;
    world.maps.insert(number(map)?, Map { at, length: length.get() });
    Ok(String::new())
}

/// A mapping's place for `count` bytes at `offset`, if it has them.
fn place(world: &World, map: &str, offset: &str, count: usize) -> Result<*mut u8, Fault> {
    let (map, offset) = (at(world, map)?, number::<usize>(offset)?);
    if offset + count > map.length {
        return wrong("beyond the end of the map");
    }
    // SAFETY: the sum lies in the mapping, as has just been seen.
    Ok(unsafe { map.at.as_ptr().cast::<u8>().add(offset) })
}

fn poke(world: &World, map: &str, offset: &str, bytes: &[u8]) -> Told {
    let to = place(world, map, offset, bytes.len())?;
    // SAFETY: the mapping has room there, cases write only to writable ones, and files are as long as their maps.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    Ok(String::new())
}

fn peek(world: &World, map: &str, offset: &str, count: &str) -> Told {
    let mut bytes = vec![0; number(count)?];
    let from = place(world, map, offset, bytes.len())?;
    // SAFETY: the mapping has these bytes, and the buffer room for them.
    unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    Ok(shown(&bytes))
}
