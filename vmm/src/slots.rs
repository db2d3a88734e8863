//! Which device is where: the one map that bus, device tree, ACPI tables and snapshots all read.

use std::collections::BTreeMap;
use std::fmt;

/// What a slot offers its device: a window of registers and a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Guest-physical address of the registers.
    pub base: u64,
    /// Size of the window.
    pub len: u64,
    /// Line of the interrupt controller, as [`Vm::irq_line`](crate::hypervisor::Vm::irq_line) counts. Others may have it
    /// too.
    pub line: u32,
    /// Whether others may.
    pub shared: bool,
}

/// The name of a device that stays the same from machine to machine and in snapshots: `vsock`,
/// `fs.rootfs`, `block.0`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(String);

impl SlotId {
    /// From its text.
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a machine can have slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Address of the first slot.
    pub base: u64,
    /// From one slot to the next, and the size of each.
    pub stride: u64,
    /// The first line.
    pub first_line: u32,
    /// How many lines there are.
    pub lines: u32,
    /// How many slots there can be.
    pub count: u32,
}

/// Devices that may share lines take no more than these, and then one more each of them.
const SHARED_MOST: usize = 6;

/// No slot for a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No line is left, or no address.
    #[error("no interrupt is left for {id}: this machine has {count}, one for a device; leave devices out")]
    Full {
        /// Who wants one.
        id: SlotId,
        /// How many there are.
        count: u32,
    },
    /// Two devices of one name.
    #[error("there are two devices called {id}; names must differ")]
    Twice {
        /// The name.
        id: SlotId,
    },
}

/// The slots of one machine.
#[derive(Debug, Clone)]
pub struct SlotMap {
    window: Window,
    slots: BTreeMap<SlotId, Slot>,
    order: Vec<SlotId>,
    /// Lines that are taken.
    lines: u32,
    /// Those of them that are shared, and who gets the next of them.
    shared: Vec<u32>,
    sharers: usize,
}

impl SlotMap {
    /// With all slots free.
    pub fn new(window: Window) -> Self {
        Self { window, slots: BTreeMap::new(), order: Vec::new(), lines: 0, shared: Vec::new(), sharers: 0 }
    }

    /// Takes the next slot, with a line of its own.
    pub fn add(&mut self, id: SlotId) -> Result<Slot, Error> {
        self.take(id, false)
    }

    /// Takes the next slot, with a line that others of this sort have, too. There are always some left.
    pub fn add_sharing(&mut self, id: SlotId) -> Result<Slot, Error> {
        self.take(id, true)
    }

    fn take(&mut self, id: SlotId, shared: bool) -> Result<Slot, Error> {
        if self.slots.contains_key(&id) {
            return Err(Error::Twice { id });
        }
        // `count` is 32 bits wide and the length never passes it.
        let index = self.order.len() as u32;
        if index >= self.window.count {
            return Err(Error::Full { id, count: self.window.count });
        }
        let line = if shared { self.shared_line() } else { self.own_line() };
        let Some(line) = line else { return Err(Error::Full { id, count: self.window.lines }) };
        let slot = Slot {
            base: self.window.base + u64::from(index) * self.window.stride,
            len: self.window.stride,
            line,
            shared,
        };
        self.slots.insert(id.clone(), slot);
        self.order.push(id);
        Ok(slot)
    }

    fn own_line(&mut self) -> Option<u32> {
        let line = self.window.first_line + self.lines;
        self.lines += 1;
        (self.lines <= self.window.lines).then_some(line)
    }

    fn shared_line(&mut self) -> Option<u32> {
        if self.shared.len() < SHARED_MOST
            && self.lines < self.window.lines
            && let Some(line) = self.own_line()
        {
            self.shared.push(line);
        }
        let line = self.shared.get(self.sharers % self.shared.len().max(1)).copied();
        self.sharers += 1;
        line
    }

    /// The slot of a device.
    pub fn get(&self, id: &SlotId) -> Option<Slot> {
        self.slots.get(id).copied()
    }

    /// All slots, in the order in which they were taken, which is that of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (&SlotId, Slot)> {
        self.order.iter().filter_map(|id| Some((id, self.get(id)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window { base: 0x1000, stride: 0x200, first_line: 5, lines: 3, count: 9 };

    #[test]
    fn addresses_and_lines_ascend_in_the_order_of_the_devices() {
        let mut map = SlotMap::new(WINDOW);
        for id in ["z", "a", "m"] {
            map.add(SlotId::new(id)).unwrap();
        }
        let all: Vec<_> = map.iter().map(|(id, slot)| (id.as_str(), slot.base, slot.line)).collect();
        assert_eq!(all, [("z", 0x1000, 5), ("a", 0x1200, 6), ("m", 0x1400, 7)]);
        assert_eq!(map.get(&SlotId::new("a")).unwrap().base, 0x1200);
        assert_eq!(map.get(&SlotId::new("q")), None);
    }

    #[test]
    fn more_devices_than_interrupts_is_an_error_that_names_the_device() {
        let mut map = SlotMap::new(WINDOW);
        for id in ["a", "b", "c"] {
            map.add(SlotId::new(id)).unwrap();
        }
        let full = map.add(SlotId::new("d")).unwrap_err();
        assert_eq!(full, Error::Full { id: SlotId::new("d"), count: 3 });
        assert!(full.to_string().contains("for d"));
    }

    #[test]
    fn some_share_what_lines_there_are() {
        let lines = |own: usize, window| {
            let mut map = SlotMap::new(window);
            for index in 0..own {
                map.add(SlotId::new(format!("own{index}"))).unwrap();
            }
            let shared = (0..window.count as usize - own)
                .map(|index| Some(map.add_sharing(SlotId::new(format!("shared{index}"))).ok()?.line));
            shared.collect::<Vec<_>>()
        };
        assert_eq!(lines(1, WINDOW), [6, 7, 6, 7, 6, 7, 6, 7].map(Some));
        assert_eq!(lines(3, WINDOW), [None; 6]);
        let many = lines(0, Window { lines: 20, ..WINDOW });
        assert_eq!(many, [5, 6, 7, 8, 9, 10, 5, 6, 7].map(Some));
    }

    #[test]
    fn there_are_no_more_addresses_than_fit() {
        let mut map = SlotMap::new(Window { lines: 20, ..WINDOW });
        for index in 0..9 {
            map.add(SlotId::new(format!("{index}"))).unwrap();
        }
        assert_eq!(map.add(SlotId::new("d")).unwrap_err(), Error::Full { id: SlotId::new("d"), count: 9 });
        assert!(map.add_sharing(SlotId::new("d")).is_err());
    }

    #[test]
    fn a_name_is_taken_once() {
        let mut map = SlotMap::new(WINDOW);
        map.add(SlotId::new("a")).unwrap();
        assert_eq!(map.add(SlotId::new("a")).unwrap_err(), Error::Twice { id: SlotId::new("a") });
    }
}
