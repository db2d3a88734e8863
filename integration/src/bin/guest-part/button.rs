//! What an init does about the power button.

use std::fs::{self, File};
use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use nix::sys::reboot::{RebootMode, reboot};

/// `EV_KEY` and `KEY_POWER` of the kernel's interface.
const KEY: [u8; 2] = 1u16.to_ne_bytes();
const POWER: [u8; 2] = 116u16.to_ne_bytes();
/// A `struct input_event`: a time of two words, a kind, a code, a value.
const EVENT: usize = 24;

/// Waits for the power button, then turns the machine off.
pub fn wait() -> Result<()> {
    let path = device()?;
    let mut device = File::open(&path).with_context(|| format!("opening {path}"))?;
    println!("waiting");
    std::io::stdout().flush()?;
    let mut event = [0; EVENT];
    loop {
        device.read_exact(&mut event).with_context(|| format!("reading {path}"))?;
        if event[16..18] == KEY && event[18..20] == POWER {
            let never = reboot(RebootMode::RB_POWER_OFF).context("turning the machine off")?;
            match never {}
        }
    }
}

/// The input device that is the button.
fn device() -> Result<String> {
    let listed = fs::read_to_string("/proc/bus/input/devices").context("listing the input devices")?;
    for device in
        listed.split("\n\n").filter(|device| device.contains("Power Button") || device.contains("gpio-keys"))
    {
        let handlers = device.lines().find_map(|line| line.strip_prefix("H: Handlers="));
        if let Some(name) = handlers.unwrap_or_default().split(' ').find(|name| name.starts_with("event")) {
            return Ok(format!("/dev/input/{name}"));
        }
    }
    bail!("there is no power button among the input devices:\n{listed}")
}
