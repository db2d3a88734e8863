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
    /// Line of the interrupt controller, as [`Vm::irq_line`](crate::hypervisor::Vm::irq_line) counts.
    pub line: u32,
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
    /// Line of the first slot; the others follow, one each.
    pub first_line: u32,
    /// How many slots there can be.
    pub count: u32,
}

/// No slot for a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The interrupt controller has no line left.
    #[error(
        "no interrupt is left for {id}: this machine has {count}, one for each device; leave devices out"
    )]
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
}

impl SlotMap {
    /// With all slots free.
    pub fn new(window: Window) -> Self {
        Self { window, slots: BTreeMap::new(), order: Vec::new() }
    }

    /// Takes the next slot.
    pub fn add(&mut self, id: SlotId) -> Result<Slot, Error> {
        if self.slots.contains_key(&id) {
            return Err(Error::Twice { id });
        }
        // `count` is 32 bits wide and the length never passes it.
        let index = self.order.len() as u32;
        if index >= self.window.count {
            return Err(Error::Full { id, count: self.window.count });
        }
        let slot = Slot {
            base: self.window.base + u64::from(index) * self.window.stride,
            len: self.window.stride,
            line: self.window.first_line + index,
        };
        self.slots.insert(id.clone(), slot);
        self.order.push(id);
        Ok(slot)
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

    const WINDOW: Window = Window { base: 0x1000, stride: 0x200, first_line: 5, count: 3 };

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
    fn a_name_is_taken_once() {
        let mut map = SlotMap::new(WINDOW);
        map.add(SlotId::new("a")).unwrap();
        assert_eq!(map.add(SlotId::new("a")).unwrap_err(), Error::Twice { id: SlotId::new("a") });
    }
}
