//! What requests are made of: of the right shape for the kind of device, with nothing right in them.

use crate::mapping::PAGE;
use crate::random::Random;

pub const NET: u32 = 1;
pub const BLOCK: u32 = 2;
pub const BALLOON: u32 = 5;
pub const VSOCK: u32 = 19;
pub const MEM: u32 = 24;
pub const FS: u32 = 26;

/// Numbers that programs trip over.
pub const EDGES: &[u64] = &[
    0,
    1,
    2,
    0x7f,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

fn edge(random: &mut Random) -> u64 {
    if random.happens(60) { random.pick(EDGES) } else { random.any() }
}

/// A page with a request to a device of that `kind`.
pub fn request(kind: u32, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    // A balloon obeys what it is told, whichever page it is: told of pages that are none, it must not.
    if kind == BALLOON {
        for entry in bytes.chunks_mut(4) {
            entry.copy_from_slice(&(0x8000_0000 | random.any() as u32).to_le_bytes());
        }
        return bytes;
    }
    random.fill(&mut bytes);
    let mut at = 0;
    let mut put = |value: u64, width: usize| {
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        at += width;
    };
    match kind {
        NET => {
            // Flags, kind of segmentation, four lengths and offsets, buffers.
            put(random.below(8), 1);
            put(random.pick(&[0, 1, 3, 4, 5, 0x81, 0xff]), 1);
            (0..5).for_each(|_| put(edge(random), 2));
        }
        BLOCK => {
            put(random.pick(&[0, 1, 4, 8, 11, 13, 14, 99, 0xffff_ffff]), 4);
            put(0, 4);
            put(edge(random), 8);
        }
        VSOCK => {
            put(random.pick(&[3, 3, 3, 3, 2, u64::MAX]), 8);
            put(random.pick(&[2, 2, 2, 2, 3, 0]), 8);
            put(random.below(4000), 4);
            put(random.pick(&[1024, 7000, 7001, 0, 0xffff_ffff]), 4);
            put(random.pick(&[0, 0, 16, 4096, 0xffff_ffff]), 4);
            put(random.pick(&[1, 1, 1, 1, 2, 0xffff]), 2);
            put(random.pick(&[1, 1, 1, 2, 3, 4, 5, 6, 7, 0, 99]), 2);
            put(random.below(4), 4);
            put(edge(random), 4);
            put(edge(random), 4);
        }
        MEM => {
            put(random.below(5), 8);
            put(random.pick(&[0, 0x1_0000_0000, 0x8000_0000, 0x1_0020_0000, u64::MAX]), 8);
            put(random.pick(&[0, 1, 2, 0x7f, 0xffff]), 2);
        }
        FS => {
            // Length, operation, number, inode, user, group, process, padding, and a name.
            put(random.pick(&[0, 1, 39, 40, 44, 64, 512, 0xffff_ffff]), 4);
            let operation = if random.happens(80) { random.below(54) } else { edge(random) };
            put(operation, 4);
            put(random.any(), 8);
            put(random.pick(&[1, 1, 1, 2, 0, u64::MAX]), 8);
            (0..4).for_each(|_| put(edge(random), 4));
            let names = [
                *b"../../etc/passwd\0",
                *b"/etc/passwd\0\0\0\0\0\0",
                *b"a\0b\0c\0d\0e\0f\0g\0h\0i",
                [b'x'; 17],
            ];
            let name = random.pick(&names);
            let after = random.pick(&[0, 8, 16, 24]);
            bytes[40 + after..40 + after + name.len()].copy_from_slice(&name);
        }
        _ => {}
    }
    bytes
}
