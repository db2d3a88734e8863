//! The register files of a virtual processor, in no hypervisor's terms.

use std::fmt;

use serde::{Deserialize, Serialize};

/// General registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rip={:#x} rflags={:#x} rsp={:#x} rbp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} \
             rdi={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} r14={:#x} r15={:#x}",
            self.rip,
            self.rflags,
            self.rsp,
            self.rbp,
            self.rax,
            self.rbx,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.r8,
            self.r9,
            self.r10,
            self.r11,
            self.r12,
            self.r13,
            self.r14,
            self.r15
        )
    }
}

/// A segment register with the descriptor it caches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Linear address of the first byte.
    pub base: u64,
    /// Offset of the last byte, in bytes whatever the granularity.
    pub limit: u32,
    /// The visible part.
    pub selector: u16,
    /// Type field of the descriptor.
    pub kind: u8,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Segment present.
    pub present: bool,
    /// Code or data (true) rather than system (false).
    pub code_or_data: bool,
    /// Default operand size is 32 bits.
    pub default_big: bool,
    /// 64-bit code segment.
    pub long: bool,
    /// The limit was given in pages.
    pub granularity: bool,
    /// The descriptor's bit for systems software.
    pub available: bool,
    /// No segment: any use of it faults.
    pub unusable: bool,
}

impl Segment {
    const CODE: u8 = 0b1011; // execute, read, accessed
    const DATA: u8 = 0b0011; // read, write, accessed
    const TSS32_BUSY: u8 = 0b1011;

    /// What `mov` into a segment register leaves behind in real mode: 64 KiB at selector * 16.
    pub const fn real_mode_data(selector: u16) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            selector,
            kind: Self::DATA,
            dpl: 0,
            present: true,
            code_or_data: true,
            default_big: false,
            long: false,
            granularity: false,
            available: false,
            unusable: false,
        }
    }

    /// The code segment that goes with [`Segment::real_mode_data`].
    pub const fn real_mode_code(selector: u16) -> Self {
        Self { kind: Self::CODE, ..Self::real_mode_data(selector) }
    }

    /// A flat 4 GiB segment of 32-bit data at privilege level 0.
    pub const fn flat_data(selector: u16) -> Self {
        Self {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            default_big: true,
            granularity: true,
            ..Self::real_mode_data(0)
        }
    }

    /// A flat 4 GiB segment of 32-bit code at privilege level 0.
    pub const fn flat_code(selector: u16) -> Self {
        Self { kind: Self::CODE, ..Self::flat_data(selector) }
    }

    /// The task register as VMX wants it on every entry: a busy TSS, even if nobody switches tasks.
    pub const fn busy_tss(selector: u16) -> Self {
        Self {
            kind: Self::TSS32_BUSY,
            base: 0,
            limit: 0x67,
            selector,
            code_or_data: false,
            ..Self::real_mode_data(0)
        }
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Offset of its last byte.
    pub limit: u16,
}

/// Segments, tables and control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SpecialRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.ET: reads as one on every processor since the 486.
pub const CR0_ET: u64 = 1 << 4;
/// The bit of RFLAGS that is always set.
pub const RFLAGS_RESERVED: u64 = 1 << 1;

impl SpecialRegisters {
    /// 16-bit real mode, every segment at base 0.
    pub const fn real_mode() -> Self {
        let data = Segment::real_mode_data(0);
        Self {
            cs: Segment::real_mode_code(0),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment::busy_tss(0),
            gdt: DescriptorTable { base: 0, limit: 0 },
            idt: DescriptorTable { base: 0, limit: 0x3ff },
            cr0: CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
        }
    }
}

/// One answer of the CPUID instruction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub leaf: u32,
    /// Value of ECX this answer is for; `None` where the leaf has no subleaves.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// A model specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Msr {
    pub index: u32,
    pub value: u64,
}

/// Everything a processor needs before its first instruction.
///
/// Processors that wait for a start-up IPI need only the CPUID answers and the MSRs: their
/// registers stay as reset left them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What CPUID answers; empty means "leave the hypervisor's choice".
    pub cpuid: Vec<CpuidLeaf>,
    /// MSRs to set.
    pub msrs: Vec<Msr>,
    /// Registers of the processor that boots.
    pub registers: Option<(Registers, SpecialRegisters)>,
}
