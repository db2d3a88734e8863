//! How much of the host's memory a machine takes: `smaps` of its own process, told apart by address.

use std::ops::Range;

use super::Memory;

/// Reads the text of `/proc/self/smaps`, with guest RAM at these addresses.
pub(super) fn memory(smaps: &str, ram: &[Range<u64>]) -> Memory {
    let mut memory =
        Memory { guest: ram.iter().map(|range| range.end - range.start).sum(), ..Memory::default() };
    let mut is_guest = false;
    for line in smaps.lines() {
        if let Some(found) = mapping(line) {
            is_guest = ram.iter().any(|range| range.start < found.end && found.start < range.end);
            continue;
        }
        let Some((key, bytes)) = field(line) else { continue };
        match (key, is_guest) {
            ("Rss", true) => memory.guest_resident += bytes,
            ("Pss", true) => memory.guest_share += bytes,
            ("Rss", false) => memory.monitor_resident += bytes,
            ("Pss", false) => memory.monitor_share += bytes,
            ("Private_Clean" | "Private_Dirty", false) => memory.monitor_private += bytes,
            _ => {}
        }
    }
    memory
}

/// The addresses of a mapping, from its head line. The kernel may show guest RAM together with a
/// neighbour that is anonymous and private too.
fn mapping(line: &str) -> Option<Range<u64>> {
    let (addresses, _) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// A line like `Rss:   120 kB`, in bytes.
fn field(line: &str) -> Option<(&str, u64)> {
    let (key, rest) = line.split_once(':')?;
    let number = rest.trim().strip_suffix("kB")?.trim();
    Some((key, number.parse::<u64>().ok()?.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_told_from_the_monitor() {
        let smaps = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 
Size:             262144 kB
Rss:               40960 kB
Pss:               20480 kB
Pss_Dirty:             1 kB
Private_Dirty:     20480 kB
VmFlags: rd wr mr mw me ac sd 
7f0010000000-7f0010001000 r-xp 00000000 08:01 77  /usr/bin/a:b
Size:                  4 kB
Rss:                   4 kB
Pss:                   2 kB
Private_Clean:         1 kB
Private_Dirty:         1 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]
Rss:                   8 kB
Pss:                   8 kB
";
        let found = memory(smaps, &[0x1000..0x2000, 0x7f00_0000_0000..0x7f00_0fff_f000]);
        let expected = Memory {
            guest: 256 << 20,
            guest_resident: 40 << 20,
            guest_share: 20 << 20,
            monitor_resident: 12 << 10,
            monitor_share: 10 << 10,
            monitor_private: 2 << 10,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn anything_else_counts_for_nothing() {
        for text in ["", "Rss:", "Rss: x kB", "Rss: 99999999999999999999 kB", "-", "a-b", "\n\n"] {
            assert_eq!(memory(text, &[]), Memory::default(), "{text:?}");
        }
    }
}
