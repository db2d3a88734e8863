//! A guest that computes for ever, in registers of all kinds and in memory, so that whatever is lost or comes twice
//! leaves another result; and that looks at its clock in each round. When it is told to, it says what it has.

pub use native::*;

/// Where it computes.
pub const DATA: u64 = RAM.0 + 0x3000;
/// Where it keeps what its clock read last.
pub const CLOCK: u64 = DATA + 0x10;
/// How often its clock has gone back.
pub const BACKWARDS: u64 = DATA + 0x18;
/// Not zero: come to an end.
pub const END: u64 = DATA + 0x20;

const MULTIPLIER: u32 = 1_664_525;

/// What it has after `rounds`: in a general register, in a vector register (where there is none, what is in the
/// general one is said twice), and in memory.
pub fn results(rounds: u32) -> [u32; 3] {
    let (mut general, mut vector, mut memory) = (0u32, 0u32, 0u32);
    for round in 1..=rounds {
        general = general.wrapping_mul(MULTIPLIER).wrapping_add(round);
        vector = vector.wrapping_add(general);
        memory ^= general;
    }
    [general, if is_hardware() { vector } else { general }, memory]
}

#[cfg(target_arch = "x86_64")]
mod native {
    use vmm::arch::native::{CpuModel, Entry, RFLAGS_RESERVED, Registers, SpecialRegisters};

    pub const RAM: (u64, u64) = (0, 0x1_0000);
    pub const START: u64 = 0x1000;
    const NOP: u8 = 0x90;
    /// In real mode, with all segments at 0.
    const CODE: &[u8] = &[
        0x66, 0x41, // inc ecx
        0x66, 0x69, 0xf6, 0x0d, 0x66, 0x19, 0x00, // imul esi, esi, MULTIPLIER
        0x66, 0x01, 0xce, // add esi, ecx
        0x66, 0x31, 0x36, 0x00, 0x30, // xor [DATA], esi
        0x66, 0x0f, 0x6e, 0xce, // movd xmm1, esi
        0x66, 0x0f, 0xfe, 0xc1, // paddd xmm0, xmm1
        0x0f, 0x31, // rdtsc
        0x66, 0x89, 0xc3, // mov ebx, eax
        0x66, 0x89, 0xd7, // mov edi, edx
        0x66, 0x2b, 0x06, 0x10, 0x30, // sub eax, [CLOCK]
        0x66, 0x1b, 0x16, 0x14, 0x30, // sbb edx, [CLOCK + 4]
        0x66, 0x83, 0x16, 0x18, 0x30, 0x00, // adc dword [BACKWARDS], 0
        0x66, 0x89, 0x1e, 0x10, 0x30, // mov [CLOCK], ebx
        0x66, 0x89, 0x3e, 0x14, 0x30, // mov [CLOCK + 4], edi
        0x80, 0x3e, 0x20, 0x30, 0x00, // cmp byte [END], 0
        0x74, 0xbe, // je start
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x66, 0x89, 0xc8, 0x66, 0xef, // mov eax, ecx; out dx, eax
        0x66, 0x89, 0xf0, 0x66, 0xef, // mov eax, esi; out dx, eax
        0x66, 0x0f, 0x7e, 0xc0, 0x66, 0xef, // movd eax, xmm0; out dx, eax
        0xf4, // hlt
    ];
    /// Its instructions with vector registers.
    const VECTOR: [(usize, usize); 2] = [(0x11, 8), (0x4f, 4)];

    /// What answers on a processor that cannot run guests is a KVM in software, which has neither vector instructions nor
    /// a clock of the guest's own.
    pub fn is_hardware() -> bool {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        processor.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
    }

    pub fn code() -> Vec<u8> {
        let mut code = CODE.to_vec();
        if !is_hardware() {
            for (at, len) in VECTOR {
                code[at..at + len].fill(NOP);
            }
        }
        code
    }

    pub fn entry(model: &CpuModel) -> Entry {
        const CR4_OSFXSR: u64 = 1 << 9;
        let registers = Registers { rip: START, rflags: RFLAGS_RESERVED, ..Registers::default() };
        let mut special = SpecialRegisters::real_mode();
        special.cr4 |= CR4_OSFXSR;
        Entry { cpuid: model.cpuid.clone(), msrs: Vec::new(), registers: Some((registers, special)) }
    }
}

#[cfg(target_arch = "aarch64")]
mod native {
    use vmm::arch::native::{CpuModel, Entry};

    pub const RAM: (u64, u64) = (0x4000_0000, 0x1_0000);
    pub const START: u64 = 0x4000_1000;
    const CODE: &[u8] = &[
        0x0a, 0x06, 0xa0, 0xd2, // mov x10, #0x300000
        0x4a, 0x10, 0x18, 0xd5, // msr cpacr_el1, x10
        0xdf, 0x3f, 0x03, 0xd5, // isb
        0xa3, 0xc1, 0x8c, 0x52, // mov w3, #0x660d
        0x23, 0x03, 0xa0, 0x72, // movk w3, #0x19, lsl #16     MULTIPLIER
        0x21, 0x04, 0x00, 0x11, // round: add w1, w1, #1
        0x42, 0x7c, 0x03, 0x1b, // mul w2, w2, w3
        0x42, 0x00, 0x01, 0x0b, // add w2, w2, w1
        0x04, 0x00, 0x40, 0xb9, // ldr w4, [x0]
        0x84, 0x00, 0x02, 0x4a, // eor w4, w4, w2
        0x04, 0x00, 0x00, 0xb9, // str w4, [x0]
        0x41, 0x00, 0x27, 0x1e, // fmov s1, w2
        0x00, 0x84, 0xa1, 0x4e, // add v0.4s, v0.4s, v1.4s
        0xdf, 0x3f, 0x03, 0xd5, // isb
        0x45, 0xe0, 0x3b, 0xd5, // mrs x5, cntvct_el0
        0x06, 0x08, 0x40, 0xf9, // ldr x6, [x0, #0x10]
        0x07, 0x18, 0x40, 0xb9, // ldr w7, [x0, #0x18]
        0xbf, 0x00, 0x06, 0xeb, // cmp x5, x6
        0xe7, 0x24, 0x87, 0x1a, // cinc w7, w7, lo
        0x07, 0x18, 0x00, 0xb9, // str w7, [x0, #0x18]
        0x05, 0x08, 0x00, 0xf9, // str x5, [x0, #0x10]
        0x08, 0x80, 0x40, 0x39, // ldrb w8, [x0, #0x20]
        0xe8, 0xfd, 0xff, 0x34, // cbz w8, round
        0x09, 0x20, 0xa1, 0xd2, // mov x9, #0x9000000
        0x21, 0x01, 0x00, 0xb9, // str w1, [x9]
        0x22, 0x01, 0x00, 0xb9, // str w2, [x9]
        0x02, 0x00, 0x26, 0x1e, // fmov w2, s0
        0x22, 0x01, 0x00, 0xb9, // str w2, [x9]
        0x00, 0x00, 0x00, 0x14, // b .
    ];

    pub fn is_hardware() -> bool {
        true
    }

    pub fn code() -> Vec<u8> {
        CODE.to_vec()
    }

    pub fn entry(_: &CpuModel) -> Entry {
        Entry { pc: START, x0: super::DATA }
    }
}
