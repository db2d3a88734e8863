//! Sockets that a program can choose from.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::call::{bpf, owned};

/// A `BPF_MAP_TYPE_SOCKMAP`, whose keys are numbers from 0 on, of 32 bits. A socket that is closed goes from it.
#[derive(Debug)]
pub struct Sockets(OwnedFd);

impl Sockets {
    /// With room for so many.
    pub fn new(room: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            kind: u32,
            key: u32,
            value: u32,
            entries: u32,
            flags: u32,
        }
        const MAP_CREATE: libc::c_long = 0;
        const SOCKMAP: u32 = 15;
        let create = Create { kind: SOCKMAP, key: 4, value: 8, entries: room, flags: 0 };
        // SAFETY: the kernel reads the structure alone.
        Ok(Self(owned(unsafe { bpf(MAP_CREATE, &create) }?)))
    }

    /// Puts one in the place `key`.
    pub fn put(&self, key: u32, socket: &impl AsFd) -> io::Result<()> {
        #[repr(C)]
        struct Update {
            map: u32,
            room: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        const MAP_UPDATE: libc::c_long = 2;
        let value = u64::from(socket.as_fd().as_raw_fd().cast_unsigned());
        let update = Update {
            map: self.0.as_raw_fd().cast_unsigned(),
            room: 0,
            key: std::ptr::from_ref(&key) as u64,
            value: std::ptr::from_ref(&value) as u64,
            flags: 0,
        };
        // SAFETY: besides the structure the kernel reads key and value, which have the sizes of the map's and outlive the call.
        unsafe { bpf(MAP_UPDATE, &update) }.map(drop)
    }
}

impl AsFd for Sockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
