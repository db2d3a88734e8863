//! Ports of a PC: those of the monitor's devices, and those of nobody.

use std::arch::asm;
use std::io;

use anyhow::{Context, Result, ensure};

use crate::random::Random;

/// The serial port, the power registers, the place where a panic is told, the keyboard controller, and places
/// where other machines have something.
const PORTS: &[u16] = &[
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x600, 0x601, 0x602, 0x603, 0x505, 0x64, 0x60,
    0x80, 0x2f8, 0x3b0, 0x5ff, 0x604, 0xb004, LAST,
];

/// The last one from which four bytes can be read: behind it, the processor does not let a process.
const LAST: u16 = 0xfffc;
/// Below here are the interrupt controllers, of which the guest has need.
const FIRST: u64 = 0x500;

/// Whether this turns the machine off, starts it anew, or says that the kernel has crashed.
fn ends(port: u16, byte: u8) -> bool {
    match port {
        0x600 => byte & 0x20 != 0,
        0x602 => byte == 1,
        0x505 => byte & 1 != 0,
        0x64 => byte == 0xfe,
        _ => false,
    }
}

/// Registers of the serial port: interrupts, buffers, the line, the modem.
const INTERRUPTS: u16 = 0x3f9;
const BUFFERS: u16 = 0x3fa;
const LINE: u16 = 0x3fb;
const MODEM: u16 = 0x3fc;
/// What is sent is received.
const LOOP: u8 = 1 << 4;

/// As Linux had it: what it prints is to be seen again.
fn restore() {
    for (port, value) in [(LINE, 0x03), (MODEM, 0x0b), (BUFFERS, 0x07), (INTERRUPTS, 0x05)] {
        write8(port, value);
    }
}

/// Receives what it sends, for a moment: Linux would echo it, and receive that.
fn talk_to_itself(random: &mut Random) {
    for (port, value) in [(INTERRUPTS, 0), (LINE, 0x03), (MODEM, LOOP)] {
        write8(port, value);
    }
    // More than fits.
    (0..100).for_each(|_| write8(0x3f8, random.any() as u8));
    restore();
}

/// Reads and writes them, in all widths, and says how often.
pub fn scribble(random: &mut Random, rounds: u32) -> Result<u32> {
    // SAFETY: takes a number only.
    let allowed = unsafe { libc::iopl(3) };
    ensure!(allowed == 0, "{}", io::Error::last_os_error());
    let count = rounds.checked_mul(20).context("too many rounds")?;
    for _ in 0..count {
        let port = if random.happens(80) {
            random.pick(PORTS)
        } else {
            (FIRST + random.below(u64::from(LAST) - FIRST)) as u16
        };
        let mut value = random.any() as u32;
        while ends(port, value as u8) {
            value = random.any() as u32;
        }
        if port == MODEM {
            value &= !u32::from(LOOP);
            talk_to_itself(random);
        }
        match random.below(6) {
            0..2 => write8(port, value as u8),
            2 => write16(port, value as u16),
            3 => write32(port, value),
            4 => drop(read8(port)),
            _ => drop(read32(port)),
        }
    }
    restore();
    Ok(count)
}

macro_rules! outs {
    ($($name:ident $kind:ty, $instruction:literal, $register:tt;)*) => {
        $(fn $name(port: u16, value: $kind) {
            // SAFETY: the process may use ports, and a device behind one touches no memory of its own accord.
            unsafe { asm!($instruction, in("dx") port, in($register) value, options(nomem, nostack)) }
        })*
    };
}

macro_rules! ins {
    ($($name:ident $kind:ty, $instruction:literal, $register:tt;)*) => {
        $(fn $name(port: u16) -> $kind {
            let value;
            // SAFETY: as above.
            unsafe { asm!($instruction, in("dx") port, out($register) value, options(nomem, nostack)) }
            value
        })*
    };
}

outs! {
    write8 u8, "out dx, al", "al";
    write16 u16, "out dx, ax", "ax";
    write32 u32, "out dx, eax", "eax";
}

ins! {
    read8 u8, "in al, dx", "al";
    read32 u32, "in eax, dx", "eax";
}
