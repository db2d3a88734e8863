//! From an address to the device that answers there.
//!
//! A bus is put together once, before the first instruction, and never changes: looking up takes no
//! lock. Port space and memory space are two buses of the same kind.

use std::fmt;
use std::sync::Arc;

/// A device as a bus sees it: registers at offsets. Accesses come from any processor's thread, at
/// the same time; they must not block.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what is at `offset`, little endian. Whatever it leaves alone reads as zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Stores `data`, little endian, at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices cannot share an address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is in use.
    #[error("{name} at {base:#x}..{end:#x} overlaps {other}; give the two different slots")]
    Overlap {
        /// Who wants it.
        name: String,
        /// First address.
        base: u64,
        /// The address behind the last.
        end: u64,
        /// Who has it.
        other: String,
    },
    /// The range is empty or wraps around.
    #[error("{name} at {base:#x} with {len:#x} bytes is no range of addresses")]
    Range {
        /// Who wants it.
        name: String,
        /// First address.
        base: u64,
        /// Length.
        len: u64,
    },
}

struct Entry {
    base: u64,
    end: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    // Sorted by base, disjoint.
    entries: Vec<Entry>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|e| (format!("{:#x}..{:#x}", e.base, e.end), &e.name)))
            .finish()
    }
}

impl Bus {
    /// Puts a device at `base..base + len`.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        let name = name.into();
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(Error::Range { name, base, len }),
        };
        let at = self.entries.partition_point(|entry| entry.end <= base);
        if let Some(other) = self.entries.get(at).filter(|other| other.base < end) {
            return Err(Error::Overlap { name, base, end, other: other.name.clone() });
        }
        self.entries.insert(at, Entry { base, end, name, device });
        Ok(())
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|entry| entry.end <= addr);
        let entry = self.entries.get(at).filter(|entry| entry.base <= addr)?;
        // An access that runs over the device's end reaches nobody.
        (len as u64 <= entry.end - addr).then(|| (entry, addr - entry.base))
    }

    /// A load. Where no device is, all bits read as one, as they do on an undriven bus. Says whether
    /// somebody answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((entry, offset)) = self.find(addr, data.len()) else {
            data.fill(0xff);
            return false;
        };
        data.fill(0);
        entry.device.read(offset, data);
        true
    }

    /// A store. Says whether somebody took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((entry, offset)) = self.find(addr, data.len()) else { return false };
        entry.device.write(offset, data);
        true
    }
}

/// A register access as a number, for devices whose registers are at most 32 bits wide.
pub fn value(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Answers a load of any width with the low bytes of a 32-bit register.
pub fn answer(data: &mut [u8], value: u32) {
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Log {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn bus(ranges: &[(u64, u64)]) -> (Bus, Vec<Arc<Log>>) {
        let mut bus = Bus::default();
        let mut logs = Vec::new();
        for &(base, len) in ranges {
            let log = Arc::new(Log::default());
            bus.insert(format!("{base:x}"), base, len, Arc::clone(&log) as Arc<dyn BusDevice>).unwrap();
            logs.push(log);
        }
        (bus, logs)
    }

    #[test]
    fn an_access_reaches_the_device_that_covers_all_of_it() {
        let (bus, logs) = bus(&[(0x2000, 0x100), (0x1000, 0x10), (0x1010, 0x10)]);
        // address, width, which device, offset
        for (addr, width, found) in [
            (0x1000, 4, Some((1, 0))),
            (0x100c, 4, Some((1, 0xc))),
            (0x100d, 4, None),
            (0x1010, 1, Some((2, 0))),
            (0x101f, 1, Some((2, 0xf))),
            (0x1020, 1, None),
            (0xfff, 1, None),
            (0x20ff, 1, Some((0, 0xff))),
            (u64::MAX, 1, None),
            (u64::MAX, 8, None),
        ] {
            let mut data = vec![0; width];
            assert_eq!(bus.read(addr, &mut data), found.is_some(), "{addr:#x}");
            assert_eq!(bus.write(addr, &data), found.is_some());
            match found {
                Some((device, offset)) => {
                    assert_eq!(data[0], offset as u8);
                    let device: usize = device;
                    assert_eq!(logs[device].0.lock().unwrap().pop().unwrap().0, offset);
                }
                None => assert!(data.iter().all(|byte| *byte == 0xff)),
            }
        }
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let (mut bus, _) = bus(&[(0x1000, 0x1000)]);
        for (base, len) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0, 0x8000)] {
            let refused = bus.insert("new", base, len, Arc::new(Log::default()));
            assert!(matches!(refused, Err(Error::Overlap { .. })), "{base:#x} {len:#x}");
        }
        for (base, len) in [(0x9000, 0), (u64::MAX, 2)] {
            let refused = bus.insert("new", base, len, Arc::new(Log::default()));
            assert!(matches!(refused, Err(Error::Range { .. })));
        }
        bus.insert("below", 0xfff, 1, Arc::new(Log::default())).unwrap();
        bus.insert("above", 0x2000, 1, Arc::new(Log::default())).unwrap();
    }

    #[test]
    fn registers_are_little_endian_at_any_width() {
        assert_eq!(value(&[0x11]), 0x11);
        assert_eq!(value(&[0x11, 0x22]), 0x2211);
        assert_eq!(value(&[1, 2, 3, 4, 5, 6, 7, 8]), 0x0403_0201);
        let mut wide = [0; 8];
        answer(&mut wide, 0x0403_0201);
        assert_eq!(wide, [1, 2, 3, 4, 0, 0, 0, 0]);
    }
}
