//! A guest that means harm to its machine: it takes one device after the other away from Linux, does with it
//! what no driver does, and gives it back.
//!
//! The same seed does the same, but for what depends on when devices look.

mod content;
#[cfg(target_arch = "x86_64")]
mod ports;
mod rings;
mod slots;

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::mapping::{Arena, PAGE, Window};
use crate::random::Random;
use rings::{PAGES, Place, Rings, SIZE_MAX};
use slots::{LEN, Slot, register};

/// Queues beyond these are left alone.
const QUEUES_MAX: usize = 8;
/// Pages of the arena behind those of the queues.
const DATA: usize = 24;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

/// VIRTIO_F_VERSION_1, without which nothing is agreed upon.
const VERSION_1: u64 = 1 << 32;

/// What one device was put through.
#[derive(Default)]
struct Told {
    accesses: u32,
    rounds: u32,
    broken: u32,
}

struct Scribbler {
    memory: File,
    arena: Arena,
    ram_end: u64,
    random: Random,
}

/// Does `rounds` of everything with each device, and says what came of it.
pub fn run(seed: u64, rounds: u32) -> Result<()> {
    let memory = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_SYNC)
        .open("/dev/mem")
        .context("opening the machine's memory")?;
    let slots = slots::find(&memory)?;
    ensure!(!slots.is_empty(), "there is no device to scribble on");
    let arena = Arena::new(QUEUES_MAX * PAGES + DATA)?;
    let random = Random::new(seed);
    let mut scribbler = Scribbler { memory, arena, ram_end: ram_end()?, random };
    for slot in &slots {
        slot.unbind()?;
        let begun = Instant::now();
        let told = scribbler.device(slot, rounds);
        slot.bind()?;
        println!(
            "device {} at {:#x}: {} accesses, {} rounds, broken after {} of them, {:.1} s",
            slot.kind,
            slot.address,
            told.accesses,
            told.rounds,
            told.broken,
            begun.elapsed().as_secs_f64()
        );
    }
    scribbler.nowhere(slots.last().map_or(0, |slot| slot.address), rounds)?;
    #[cfg(target_arch = "x86_64")]
    println!("{} accesses to ports", ports::scribble(&mut scribbler.random, rounds)?);
    println!("scribbled");
    Ok(())
}

/// Writes anything anywhere, under the drivers too: the guest need not outlive it.
pub fn wild(seed: u64, accesses: u32) -> Result<()> {
    let memory = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_SYNC)
        .open("/dev/mem")
        .context("opening the machine's memory")?;
    let slots = slots::find(&memory)?;
    let (mut random, ram_end) = (Random::new(seed), ram_end()?);
    for _ in 0..accesses {
        let slot = &slots[random.below(slots.len() as u64) as usize];
        let value = random.pick(&[random_address(ram_end, &mut Random::new(seed)), 0, 1, 0xf]) as u32;
        let value = if random.happens(50) { value } else { random.any() as u32 };
        slot.window.write32(random.below(0x140) as usize & !3, value);
    }
    println!("went wild");
    Ok(())
}

fn random_address(ram_end: u64, random: &mut Random) -> u64 {
    random.below(ram_end) & !0xf
}

/// Where the RAM ends that this guest has booted with.
fn ram_end() -> Result<u64> {
    let map = fs::read_to_string("/proc/iomem").context("reading the map of the machine")?;
    let ends = map.lines().filter(|line| line.ends_with(" : System RAM")).filter_map(|line| {
        let (range, _) = line.split_once(" : ")?;
        u64::from_str_radix(range.split_once('-')?.1, 16).ok()
    });
    match ends.max() {
        Some(last) if last > 0 => Ok(last + 1),
        _ => bail!("the map of the machine has no RAM; is this root?"),
    }
}

impl Scribbler {
    fn device(&mut self, slot: &Slot, rounds: u32) -> Told {
        let mut told = Told::default();
        self.wipe(slot.kind);
        for _ in 0..rounds {
            told.accesses += self.registers(slot);
            told.broken += u32::from(self.rings(slot));
            told.rounds += 1;
        }
        // So that Linux finds it as it would after a crash of another driver.
        slot.window.write32(register::STATUS, 0);
        told
    }

    /// Leaves nothing of what the last device was given.
    fn wipe(&mut self, kind: u32) {
        let queues = QUEUES_MAX * PAGES;
        (0..queues).for_each(|page| self.arena.put(page, &[0; PAGE]));
        Rings { arena: &self.arena, data: queues, ram_end: self.ram_end }.clear(kind, &mut self.random);
    }

    /// A place for a queue: of this program's, or none at all.
    fn address(&mut self) -> u64 {
        let page = self.random.below(self.arena.pages() as u64) as usize;
        let inside = self.arena.address(page);
        let odd = inside + self.random.below(PAGE as u64);
        self.random.pick(&[inside, inside, odd, 0xd000_0000, 0xffff_f000, u64::MAX, 0xffff_ffff_ffff_f000])
    }

    /// Anything to every register, in no order.
    fn registers(&mut self, slot: &Slot) -> u32 {
        const ACCESSES: u32 = 60;
        let window = &slot.window;
        for _ in 0..ACCESSES {
            let random = &mut self.random;
            let offset = match random.below(10) {
                0 => random.below(LEN as u64) as usize,
                1 => register::CONFIG + random.below(64) as usize,
                _ => random.below(register::CONFIG as u64 / 4) as usize * 4,
            };
            let value = if random.happens(50) { random.pick(content::EDGES) } else { random.any() };
            let width = if random.happens(80) { 4 } else { random.pick(&[1, 2, 8]) };
            let aligned = offset & !(width - 1);
            let place = register::QUEUE_DESC..register::QUEUE_DEVICE + 8;
            let value = match aligned {
                _ if place.contains(&aligned) => {
                    let address = self.address();
                    if aligned.is_multiple_of(8) { address } else { address >> 32 }
                }
                // Bits, and now and then none.
                register::STATUS if self.random.happens(80) => {
                    self.random.pick(&[0, 1, 3, 11, 15, 15, 0x4f, 0x8f])
                }
                register::QUEUE_SEL | register::QUEUE_NOTIFY if self.random.happens(80) => {
                    self.random.below(QUEUES_MAX as u64)
                }
                register::QUEUE_NUM if self.random.happens(80) => 1 << self.random.below(18),
                register::QUEUE_READY => self.random.below(3),
                _ => value,
            };
            let write = self.random.happens(80);
            match (width, write) {
                (1, true) => window.write8(aligned, value as u8),
                (1, false) => drop(window.read8(aligned)),
                (2, true) => window.write16(aligned, value as u16),
                (2, false) => drop(window.read16(aligned)),
                (8, true) => window.write64(aligned, value),
                (8, false) => drop(window.read64(aligned)),
                (_, true) => window.write32(aligned, value as u32),
                (_, false) => drop(window.read32(aligned)),
            }
        }
        ACCESSES
    }

    /// Resets and negotiates as a driver does, and then is none. Says whether the device gave up.
    fn rings(&mut self, slot: &Slot) -> bool {
        let window = &slot.window;
        window.write32(register::STATUS, 0);
        window.write32(register::STATUS, ACKNOWLEDGE);
        window.write32(register::STATUS, ACKNOWLEDGE | DRIVER);
        let mut features = 0;
        for half in 0..2 {
            window.write32(register::DEVICE_FEATURES_SEL, half);
            features |= u64::from(window.read32(register::DEVICE_FEATURES)) << (32 * half);
        }
        if self.random.happens(50) {
            features &= self.random.any() | VERSION_1;
        }
        for half in 0..2 {
            window.write32(register::DRIVER_FEATURES_SEL, half);
            window.write32(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        window.write32(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let rings = Rings { arena: &self.arena, data: QUEUES_MAX * PAGES, ram_end: self.ram_end };
        rings.fill(slot.kind, &mut self.random);
        let mut queues = Vec::new();
        for index in 0..QUEUES_MAX {
            window.write32(register::QUEUE_SEL, index as u32);
            let max = window.read32(register::QUEUE_NUM_MAX);
            if max == 0 {
                break;
            }
            let size = self.random.pick(&[max, max / 2, 1, 2, 16]).clamp(1, SIZE_MAX);
            let first = index * PAGES;
            let mut place = Place { table: first, driver: first + 1, device: first + 2 };
            if self.random.happens(10) {
                // One page for everything: the device writes to what it reads.
                place = Place { table: first, driver: first, device: first };
            }
            rings.build(place, size, &mut self.random);
            window.write32(register::QUEUE_NUM, size);
            for (at, page) in [
                (register::QUEUE_DESC, place.table),
                (register::QUEUE_DRIVER, place.driver),
                (register::QUEUE_DEVICE, place.device),
            ] {
                let address = self.arena.address(page);
                window.write32(at, address as u32);
                window.write32(at + 4, (address >> 32) as u32);
            }
            window.write32(register::QUEUE_READY, u32::from(self.random.happens(95)));
            queues.push((index as u32, place, size));
        }
        window.write32(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        for _ in 0..3 {
            for (index, place, size) in &queues {
                window.write32(register::QUEUE_NOTIFY, *index);
                for _ in 0..self.random.below(8) {
                    rings.disturb(*place, *size, &mut self.random);
                }
                rings.offer(*place, *size, &mut self.random);
            }
            window.write32(register::QUEUE_NOTIFY, self.random.any() as u32);
            if self.random.happens(50) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        window.write32(register::INTERRUPT_ACK, u32::MAX);
        let broken = window.read32(register::STATUS) & NEEDS_RESET != 0;
        // Else the next reset comes amid its work.
        if self.random.happens(50) {
            window.write32(register::STATUS, 0);
        }
        broken
    }

    /// Where no device is: behind the last one, and on aarch64 the serial port too.
    fn nowhere(&mut self, last: u64, rounds: u32) -> Result<()> {
        let serial = if cfg!(target_arch = "aarch64") { Some(0x0900_0000) } else { None };
        for address in [Some(last + LEN as u64), Some(last + 0x20_0000), serial].into_iter().flatten() {
            let window = Window::physical(&self.memory, address, LEN)?;
            for _ in 0..rounds * 10 {
                let offset = self.random.below(LEN as u64) as usize;
                let value = self.random.any();
                match self.random.below(6) {
                    0 => window.write8(offset, value as u8),
                    1 => window.write16(offset & !1, value as u16),
                    2 => window.write32(offset & !3, value as u32),
                    3 => window.write64(offset & !7, value),
                    4 => drop(window.read64(offset & !7)),
                    _ => drop(window.read32(offset & !3)),
                }
            }
        }
        Ok(())
    }
}
