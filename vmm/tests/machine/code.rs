//! Kernels of a few instructions.
#![allow(dead_code)] // each test takes what it needs

pub use native::*;

/// Code that says hi on the console, and how it goes on.
#[cfg(target_arch = "x86_64")]
mod native {
    pub const HI: &[u8] = &[
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xb0, b'\n', 0xee, // mov al, ..; out dx, al
    ];
    pub const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe];
    pub const RESET: &[u8] = &[0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xeb, 0xfe];
    /// Prints dots for ever.
    pub const DOTS: &[u8] = &[0xb0, b'.', 0xee, 0xeb, 0xfd];
    /// Counts in a register and in memory for ever; comes to its end when they differ.
    pub const COUNT: &[u8] = &[
        0x31, 0xdb, 0xc7, 0x05, 0x00, 0x00, 0x30, 0x00, 0, 0, 0,
        0, // xor ebx, ebx; mov dword [COUNTER], 0
        0x43, 0xff, 0x05, 0x00, 0x00, 0x30, 0x00, // inc ebx; inc dword [COUNTER]
        0x3b, 0x1d, 0x00, 0x00, 0x30, 0x00, 0x74, 0xf1, // cmp ebx, [COUNTER]; je inc
    ];
    /// Where it counts.
    pub const COUNTER: u64 = 0x30_0000;
    /// An undefined instruction without a table of handlers.
    pub const CRASH: &[u8] = &[0x0f, 0x0b];

    /// An ELF file with the code at 1 MiB, and the note that says so.
    pub fn kernel(code: &[u8]) -> Vec<u8> {
        const DATA: usize = 64 + 2 * 56;
        let note: Vec<u8> = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let mut file = vec![0; DATA];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1]);
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        let len = code.len();
        for (at, kind, offset, address, size) in
            [(64, 1u32, DATA, 0x10_0000u64, len), (64 + 56, 4, DATA + len, 0, note.len())]
        {
            put(at, &kind.to_le_bytes());
            put(at + 8, &(offset as u64).to_le_bytes());
            put(at + 24, &address.to_le_bytes());
            put(at + 32, &(size as u64).to_le_bytes());
            put(at + 40, &(size as u64).to_le_bytes());
        }
        file.extend_from_slice(code);
        file.extend_from_slice(&note);
        file
    }
}

#[cfg(target_arch = "aarch64")]
mod native {
    pub const HI: &[u8] = &[
        0x01, 0x20, 0xa1, 0xd2, // mov x1, #0x9000000
        0x02, 0x0d, 0x80, 0x52, 0x22, 0x00, 0x00, 0x39, // mov w2, #'h'; strb w2, [x1]
        0x22, 0x0d, 0x80, 0x52, 0x22, 0x00, 0x00, 0x39, // mov w2, #'i'; strb w2, [x1]
        0x42, 0x01, 0x80, 0x52, 0x22, 0x00, 0x00, 0x39, // mov w2, #'\n'; strb w2, [x1]
    ];
    pub const POWER_OFF: &[u8] = &[0x00, 0x01, 0x80, 0x52, 0x00, 0x80, 0xb0, 0x72, 0x02, 0x00, 0x00, 0xd4];
    pub const RESET: &[u8] = &[0x20, 0x01, 0x80, 0x52, 0x00, 0x80, 0xb0, 0x72, 0x02, 0x00, 0x00, 0xd4];
    /// Counts in a register and in memory for ever; comes to its end when they differ.
    pub const COUNT: &[u8] = &[
        0x03, 0x10, 0xa8, 0xd2, 0x04, 0x00, 0x80, 0xd2, // mov x3, #COUNTER; mov x4, #0
        0x64, 0x00, 0x00, 0xf9, // str x4, [x3]
        0x84, 0x04, 0x00, 0x91, 0x65, 0x00, 0x40, 0xf9, // add x4, x4, #1; ldr x5, [x3]
        0xa5, 0x04, 0x00, 0x91, 0x65, 0x00, 0x00, 0xf9, // add x5, x5, #1; str x5, [x3]
        0x9f, 0x00, 0x05, 0xeb, 0x60, 0xff, 0xff, 0x54, // cmp x4, x5; b.eq add
    ];
    /// Where it counts.
    pub const COUNTER: u64 = 0x4080_0000;
    /// Prints dots for ever.
    pub const DOTS: &[u8] = &[0xc2, 0x05, 0x80, 0x52, 0x22, 0x00, 0x00, 0x39, 0xff, 0xff, 0xff, 0x17];

    /// An Image whose first instruction jumps over its header.
    pub fn kernel(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..4].copy_from_slice(&0x1400_0010u32.to_le_bytes());
        file[16..24].copy_from_slice(&0x1_0000u64.to_le_bytes());
        file[24] = 0xa;
        file[0x38..0x3c].copy_from_slice(b"ARM\x64");
        file.extend_from_slice(code);
        file
    }
}
