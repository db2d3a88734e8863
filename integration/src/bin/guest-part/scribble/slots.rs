//! Where the machine's devices are, and whether Linux drives them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::mapping::Window;

/// Registers of the MMIO transport (virtio 1.2, 4.2.2).
pub mod register {
    pub const DEVICE_ID: usize = 0x008;
    pub const DEVICE_FEATURES: usize = 0x010;
    pub const DEVICE_FEATURES_SEL: usize = 0x014;
    pub const DRIVER_FEATURES: usize = 0x020;
    pub const DRIVER_FEATURES_SEL: usize = 0x024;
    pub const QUEUE_SEL: usize = 0x030;
    pub const QUEUE_NUM_MAX: usize = 0x034;
    pub const QUEUE_NUM: usize = 0x038;
    pub const QUEUE_READY: usize = 0x044;
    pub const QUEUE_NOTIFY: usize = 0x050;
    pub const INTERRUPT_ACK: usize = 0x064;
    pub const STATUS: usize = 0x070;
    pub const QUEUE_DESC: usize = 0x080;
    pub const QUEUE_DRIVER: usize = 0x090;
    pub const QUEUE_DEVICE: usize = 0x0a0;
    pub const CONFIG: usize = 0x100;
}

/// Bytes of a device's window.
pub const LEN: usize = 0x1000;

/// A device at its place.
pub struct Slot {
    pub window: Window,
    pub address: u64,
    /// Its device id, as virtio counts them.
    pub kind: u32,
    /// Its name among virtio devices, and the directory of its driver.
    driver: Option<(String, PathBuf)>,
}

/// All devices there are.
pub fn find(memory: &File) -> Result<Vec<Slot>> {
    let map = fs::read_to_string("/proc/iomem").context("reading the map of the machine")?;
    let mut slots: Vec<Slot> = Vec::new();
    for line in map.lines() {
        let Some((address, name)) = virtio(line) else { continue };
        if slots.iter().any(|slot| slot.address == address) {
            continue;
        }
        let window = Window::physical(memory, address, LEN)?;
        let kind = window.read32(register::DEVICE_ID);
        slots.push(Slot { window, address, kind, driver: driver(name) });
    }
    Ok(slots)
}

/// A line like `  d0000000-d0000fff : LNRO0005:00`.
fn virtio(line: &str) -> Option<(u64, &str)> {
    let (range, names) = line.trim().split_once(" : ")?;
    let name = names.split(' ').next()?;
    let address = u64::from_str_radix(range.split_once('-')?.0, 16).ok()?;
    (name.starts_with("LNRO0005") || name.ends_with("virtio_mmio")).then_some((address, name))
}

fn driver(platform: &str) -> Option<(String, PathBuf)> {
    let parent = Path::new("/sys/bus/platform/devices").join(platform);
    let names = fs::read_dir(parent).ok()?.flatten();
    let name = names.map(|entry| entry.file_name()).find_map(|name| {
        let name = name.to_str()?;
        name.starts_with("virtio").then(|| name.to_owned())
    })?;
    let link = Path::new("/sys/bus/virtio/devices").join(&name).join("driver");
    Some((name, fs::canonicalize(link).ok()?))
}

impl Slot {
    /// Takes it away from Linux.
    pub fn unbind(&self) -> Result<()> {
        self.tell("unbind")
    }

    /// Gives it back.
    pub fn bind(&self) -> Result<()> {
        self.tell("bind")
    }

    fn tell(&self, what: &str) -> Result<()> {
        let Some((name, driver)) = &self.driver else { return Ok(()) };
        let path = driver.join(what);
        fs::write(&path, name).with_context(|| format!("writing {name} to {}", path.display()))
    }
}
