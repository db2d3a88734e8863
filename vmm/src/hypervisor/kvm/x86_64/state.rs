//! All that there is of a processor, and in which order KVM wants to give and take it.
//!
//! Reading some of it changes some other: the power state comes first, because KVM takes in a start-up IPI when it is
//! asked for it, and pending events come last. Writing follows what depends on what: CPUID decides what may be written
//! at all, the APIC's mode is in the special registers, a deadline is compared with the TSC and needs an APIC that is
//! in the mode for it, and events come last, since setting registers drops them.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVMIO, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_nested_state,
    kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::super::super::Error;
use super::super::{Attempt, KvmErrno, KvmVcpu};
use super::msrs::{self, IA32_TSC_DEADLINE};
use super::tsc::Tsc;
use super::{
    cpuid_leaf, general_from_kvm, general_to_kvm, segment, segment_from, set_cpuid, special_from_kvm,
    special_to_kvm, xsave_size,
};
use crate::arch::x86_64::{CpuidLeaf, Msr, Registers, Segment, SpecialRegisters};

ioctl_iowr_nr!(KVM_GET_NESTED_STATE, KVMIO, 0xbe, kvm_nested_state);
ioctl_iow_nr!(KVM_SET_NESTED_STATE, KVMIO, 0xbf, kvm_nested_state);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// A processor, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// As KVM answers it; none where nobody set it.
    cpuid: Vec<CpuidLeaf>,
    mp_state: u32,
    general: Registers,
    special: SpecialRegisters,
    rest: RestOfSpecial,
    /// Of the guest's own guests, where KVM can run such.
    nested: Option<Nested>,
    /// The XSAVE area, in the format of the instruction.
    xsave: Vec<u8>,
    /// Extended control registers by number.
    xcrs: Vec<(u32, u64)>,
    debug: Debug,
    /// The APIC's page, where there is one.
    lapic: Option<Vec<u8>>,
    msrs: Vec<Msr>,
    tsc: Tsc,
    tsc_deadline: u64,
    events: Events,
}

/// Special registers that a processor does not begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RestOfSpecial {
    ldt: Segment,
    cr2: u64,
    cr8: u64,
    apic_base: u64,
    /// The interrupt that is on its way into the processor.
    interrupt_bitmap: [u64; 4],
    /// The top of the page tables as the processor holds it: in PAE mode it does not look into memory again.
    pdptrs: Option<[u64; 4]>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Nested {
    flags: u16,
    format: u16,
    /// Header and data.
    body: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Debug {
    db: [u64; 4],
    dr6: u64,
    dr7: u64,
    flags: u64,
}

/// `struct kvm_vcpu_events`; names are those of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Events {
    exception: Exception,
    interrupt: Interrupt,
    nmi: Nmi,
    sipi_vector: u32,
    flags: u32,
    smi: Smi,
    triple_fault_pending: u8,
    exception_has_payload: u8,
    exception_payload: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Exception {
    injected: u8,
    nr: u8,
    has_error_code: u8,
    pending: u8,
    error_code: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Interrupt {
    injected: u8,
    nr: u8,
    soft: u8,
    shadow: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Nmi {
    injected: u8,
    pending: u8,
    masked: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Smi {
    smm: u8,
    pending: u8,
    smm_inside_nmi: u8,
    latched_init: u8,
}

const LAPIC_LEN: usize = size_of::<kvm_lapic_state>();

impl VcpuState {
    pub(in super::super) fn save(vcpu: &KvmVcpu) -> Result<Self, Error> {
        let fd = vcpu.fd();
        let mp_state = vcpu.call("KVM_GET_MP_STATE", fd.get_mp_state())?.mp_state;
        let general = vcpu.call("KVM_GET_REGS", fd.get_regs())?;
        let sregs = vcpu.call("KVM_GET_SREGS", fd.get_sregs())?;
        let debug = vcpu.call("KVM_GET_DEBUGREGS", fd.get_debug_regs())?;
        let cpuid = vcpu.call("KVM_GET_CPUID2", fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        let msrs = msrs::save(vcpu)?;
        let tsc = Tsc::save(vcpu)?;
        // Before the APIC: a deadline that passes between the two is seen twice, and not never.
        let tsc_deadline = msrs::read(vcpu, IA32_TSC_DEADLINE)?;
        Ok(Self {
            cpuid: cpuid.as_slice().iter().map(cpuid_leaf).collect(),
            mp_state,
            general: general_from_kvm(&general),
            special: special_from_kvm(&sregs),
            rest: RestOfSpecial::new(vcpu, &sregs)?,
            nested: Nested::save(vcpu)?,
            xsave: get_xsave(vcpu)?,
            xcrs: get_xcrs(vcpu)?,
            debug: Debug { db: debug.db, dr6: debug.dr6, dr7: debug.dr7, flags: debug.flags },
            lapic: get_lapic(vcpu)?,
            msrs,
            tsc,
            tsc_deadline,
            events: Events::of(&vcpu.call("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?),
        })
    }

    pub(in super::super) fn restore(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let fd = vcpu.fd();
        self.check(vcpu)?;
        if vcpu.has_run() {
            // Its answers are these, and KVM takes no others any more.
            msrs::forget_async_faults(vcpu, &self.msrs)?;
        } else {
            set_cpuid(vcpu, &self.cpuid)?;
        }
        vcpu.call("KVM_SET_MP_STATE", fd.set_mp_state(kvm_mp_state { mp_state: self.mp_state }))?;
        vcpu.call("KVM_SET_REGS", fd.set_regs(&general_to_kvm(&self.general)))?;
        self.set_special(vcpu)?;
        if let Some(nested) = &self.nested {
            nested.restore(vcpu)?;
        }
        set_xsave(vcpu, &self.xsave)?;
        set_xcrs(vcpu, &self.xcrs)?;
        let Debug { db, dr6, dr7, flags } = self.debug;
        let debug = kvm_debugregs { db, dr6, dr7, flags, ..kvm_debugregs::default() };
        vcpu.call("KVM_SET_DEBUGREGS", fd.set_debug_regs(&debug))?;
        if let Some(lapic) = &self.lapic {
            let mut regs = [0; LAPIC_LEN];
            for (to, from) in regs.iter_mut().zip(lapic) {
                *to = from.cast_signed();
            }
            vcpu.call("KVM_SET_LAPIC", fd.set_lapic(&kvm_lapic_state { regs }))?;
        }
        msrs::restore(vcpu, &self.msrs)?;
        self.tsc.restore(vcpu)?;
        if let Some(lapic) = &self.lapic {
            let value = deadline(self.tsc_deadline, lapic);
            msrs::set(vcpu, &[Msr { index: IA32_TSC_DEADLINE, value }])?;
        }
        vcpu.call("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&self.events.to_kvm()))
    }

    /// What KVM does not check.
    fn check(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        if self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(vcpu.unfit(format!("{} answers of CPUID", self.cpuid.len())));
        }
        match (&self.lapic, vcpu.vm.arch.has_apic) {
            (Some(lapic), true) if lapic.len() == LAPIC_LEN => Ok(()),
            (None, false) => Ok(()),
            (Some(lapic), true) => {
                Err(vcpu.unfit(format!("the APIC's page has {} bytes, not {LAPIC_LEN}", lapic.len())))
            }
            (Some(_), false) => Err(vcpu.unfit("it has an APIC, and those of this machine have none")),
            (None, true) => Err(vcpu.unfit("it has no APIC, and those of this machine have one")),
        }
    }

    fn set_special(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let RestOfSpecial { ldt, cr2, cr8, apic_base, interrupt_bitmap, pdptrs } = &self.rest;
        let mut sregs = kvm_sregs {
            ldt: segment(ldt),
            cr2: *cr2,
            cr8: *cr8,
            apic_base: *apic_base,
            interrupt_bitmap: *interrupt_bitmap,
            ..kvm_sregs::default()
        };
        special_to_kvm(&self.special, &mut sregs);
        vcpu.call("KVM_SET_SREGS", vcpu.fd().set_sregs(&sregs))?;
        // A KVM without this call has read the four from memory, where Linux leaves them.
        if let Some(pdptrs) = pdptrs.filter(|_| has(vcpu, kvm_bindings::KVM_CAP_SREGS2)) {
            let mut sregs = vcpu.call("KVM_GET_SREGS2", get_sregs2(vcpu))?;
            sregs.flags |= u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID);
            sregs.pdptrs = pdptrs;
            vcpu.call("KVM_SET_SREGS2", set_sregs2(vcpu, &sregs))?;
        }
        Ok(())
    }
}

/// The deadline to write. One that has passed is zero once it has become an interrupt, and if that interrupt is
/// nowhere to be seen in the APIC it may be on its way there: then it is sent again, which a guest that had it takes
/// for an early one.
fn deadline(saved: u64, lapic: &[u8]) -> u64 {
    const LVT_TIMER: usize = 0x320;
    const IRR: usize = 0x200;
    const ISR: usize = 0x100;
    const LVT_MASKED: u32 = 1 << 16;
    const MODE: u32 = 0b11 << 17;
    const MODE_TSC_DEADLINE: u32 = 0b10 << 17;
    const SOON: u64 = 1;
    let register = |at: usize| {
        let bytes = lapic.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let timer = register(LVT_TIMER);
    // 256 bits, 32 to a register, 16 bytes apart.
    let vector = timer & 0xff;
    let seen = |base: usize| register(base + vector as usize / 32 * 16) >> (vector % 32) & 1 == 1;
    let awaited = timer & MODE == MODE_TSC_DEADLINE && timer & LVT_MASKED == 0;
    if saved == 0 && awaited && !seen(IRR) && !seen(ISR) { SOON } else { saved }
}

fn has(vcpu: &KvmVcpu, capability: u32) -> bool {
    vcpu.vm.fd.check_extension_raw(u64::from(capability)) > 0
}

impl RestOfSpecial {
    fn new(vcpu: &KvmVcpu, sregs: &kvm_sregs) -> Result<Self, Error> {
        const CR0_PG: u64 = 1 << 31;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LMA: u64 = 1 << 10;
        let pae = sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0;
        let pdptrs = if pae && has(vcpu, kvm_bindings::KVM_CAP_SREGS2) {
            let sregs = vcpu.call("KVM_GET_SREGS2", get_sregs2(vcpu))?;
            let valid = sregs.flags & u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
            valid.then_some(sregs.pdptrs)
        } else {
            None
        };
        Ok(Self {
            ldt: segment_from(&sregs.ldt),
            cr2: sregs.cr2,
            cr8: sregs.cr8,
            apic_base: sregs.apic_base,
            interrupt_bitmap: sregs.interrupt_bitmap,
            pdptrs,
        })
    }
}

fn get_sregs2(vcpu: &KvmVcpu) -> Attempt<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes a structure of exactly this type, of which all bit patterns are values.
    let done = unsafe { ioctl_with_mut_ref(vcpu.fd(), KVM_GET_SREGS2(), &mut sregs) };
    if done == 0 { Ok(sregs) } else { Err(KvmErrno::last()) }
}

fn set_sregs2(vcpu: &KvmVcpu, sregs: &kvm_sregs2) -> Attempt<()> {
    // SAFETY: the kernel reads a structure of exactly this type.
    let done = unsafe { ioctl_with_ref(vcpu.fd(), KVM_SET_SREGS2(), sregs) };
    if done == 0 { Ok(()) } else { Err(KvmErrno::last()) }
}

/// `struct kvm_nested_state` with room for the largest there is: header and two pages.
#[repr(C, align(8))]
struct NestedBuffer {
    flags: u16,
    format: u16,
    /// Of all of this.
    size: u32,
    body: [u8; Self::BODY],
}

impl NestedBuffer {
    const HEAD: usize = 8;
    const BODY: usize = size_of::<kvm_nested_state>() - Self::HEAD + 2 * 4096;

    fn empty() -> Self {
        Self { flags: 0, format: 0, size: size_of::<Self>() as u32, body: [0; Self::BODY] }
    }
}

impl Nested {
    fn save(vcpu: &KvmVcpu) -> Result<Option<Self>, Error> {
        if !vcpu.vm.fd.check_extension(Cap::NestedState) {
            return Ok(None);
        }
        let buffer = vcpu.call("KVM_GET_NESTED_STATE", get_nested(vcpu))?;
        let len = (buffer.size as usize).saturating_sub(NestedBuffer::HEAD).min(NestedBuffer::BODY);
        Ok(Some(Self { flags: buffer.flags, format: buffer.format, body: buffer.body[..len].to_vec() }))
    }

    fn restore(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        let mut buffer = NestedBuffer::empty();
        let Some(body) = buffer.body.get_mut(..self.body.len()) else {
            return Err(vcpu.unfit(format!("{} bytes about its own guests", self.body.len())));
        };
        body.copy_from_slice(&self.body);
        buffer.flags = self.flags;
        buffer.format = self.format;
        buffer.size = (NestedBuffer::HEAD + self.body.len()) as u32;
        vcpu.call("KVM_SET_NESTED_STATE", set_nested(vcpu, &buffer))
    }
}

fn get_nested(vcpu: &KvmVcpu) -> Attempt<NestedBuffer> {
    let mut buffer = NestedBuffer::empty();
    // SAFETY: the kernel writes at most `size` bytes, which is what there are, and all bit patterns are values.
    let done = unsafe { ioctl_with_mut_ref(vcpu.fd(), KVM_GET_NESTED_STATE(), &mut buffer) };
    if done == 0 { Ok(buffer) } else { Err(KvmErrno::last()) }
}

/// `size` of the buffer is at most that of its type.
fn set_nested(vcpu: &KvmVcpu, buffer: &NestedBuffer) -> Attempt<()> {
    // SAFETY: the kernel reads at most `size` bytes, which is no more than there are.
    let done = unsafe { ioctl_with_ref(vcpu.fd(), KVM_SET_NESTED_STATE(), buffer) };
    if done == 0 { Ok(()) } else { Err(KvmErrno::last()) }
}

/// An area of the size that KVM has on this host, zeroed.
fn empty_xsave(vcpu: &KvmVcpu) -> Result<(Xsave, usize), Error> {
    let size = xsave_size(vcpu.vm.fd.check_extension_int(Cap::Xsave2));
    let words = (size - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    let area = Xsave::new(words).map_err(|_| vcpu.unfit(format!("KVM has an XSAVE area of {size} bytes")))?;
    Ok((area, size))
}

fn get_xsave(vcpu: &KvmVcpu) -> Result<Vec<u8>, Error> {
    if !vcpu.vm.fd.check_extension(Cap::Xsave2) {
        let area = vcpu.call("KVM_GET_XSAVE", vcpu.fd().get_xsave())?;
        return Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    let (mut area, size) = empty_xsave(vcpu)?;
    // SAFETY: the area has the size that KVM says its own has, and nothing in this process turns on further
    // components (arch_prctl), which would change that.
    vcpu.call("KVM_GET_XSAVE2", unsafe { vcpu.fd().get_xsave2(&mut area) })?;
    let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
    let mut bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(size);
    Ok(bytes)
}

/// The area says itself which components are in it, so a shorter one is whole.
fn set_xsave(vcpu: &KvmVcpu, bytes: &[u8]) -> Result<(), Error> {
    let (mut area, size) = empty_xsave(vcpu)?;
    if bytes.len() > size || bytes.len() < size_of::<kvm_xsave>() {
        return Err(vcpu.unfit(format!("an XSAVE area of {} bytes; this host's has {size}", bytes.len())));
    }
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    // SAFETY: only the words of the area are changed, not its length.
    let head = unsafe { area.as_mut_fam_struct() };
    for (to, from) in head.xsave.region.iter_mut().zip(words.by_ref()) {
        *to = from;
    }
    for (to, from) in area.as_mut_slice().iter_mut().zip(words) {
        *to = from;
    }
    // SAFETY: the area has the size that KVM says its own has.
    vcpu.call("KVM_SET_XSAVE", unsafe { vcpu.fd().set_xsave2(&area) })
}

fn get_xcrs(vcpu: &KvmVcpu) -> Result<Vec<(u32, u64)>, Error> {
    let xcrs = vcpu.call("KVM_GET_XCRS", vcpu.fd().get_xcrs())?;
    Ok(xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|xcr| (xcr.xcr, xcr.value)).collect())
}

fn set_xcrs(vcpu: &KvmVcpu, saved: &[(u32, u64)]) -> Result<(), Error> {
    let mut xcrs = kvm_xcrs::default();
    let Some(room) = xcrs.xcrs.get_mut(..saved.len()) else {
        return Err(vcpu.unfit(format!("{} extended control registers", saved.len())));
    };
    for (to, &(xcr, value)) in room.iter_mut().zip(saved) {
        *to = kvm_xcr { xcr, reserved: 0, value };
    }
    // As many as there was room for.
    xcrs.nr_xcrs = saved.len() as u32;
    vcpu.call("KVM_SET_XCRS", vcpu.fd().set_xcrs(&xcrs))
}

fn get_lapic(vcpu: &KvmVcpu) -> Result<Option<Vec<u8>>, Error> {
    if !vcpu.vm.arch.has_apic {
        return Ok(None);
    }
    let lapic = vcpu.call("KVM_GET_LAPIC", vcpu.fd().get_lapic())?;
    Ok(Some(lapic.regs.iter().map(|byte| byte.cast_unsigned()).collect()))
}

impl Events {
    fn of(e: &kvm_vcpu_events) -> Self {
        Self {
            exception: Exception {
                injected: e.exception.injected,
                nr: e.exception.nr,
                has_error_code: e.exception.has_error_code,
                pending: e.exception.pending,
                error_code: e.exception.error_code,
            },
            interrupt: Interrupt {
                injected: e.interrupt.injected,
                nr: e.interrupt.nr,
                soft: e.interrupt.soft,
                shadow: e.interrupt.shadow,
            },
            nmi: Nmi { injected: e.nmi.injected, pending: e.nmi.pending, masked: e.nmi.masked },
            sipi_vector: e.sipi_vector,
            flags: e.flags,
            smi: Smi {
                smm: e.smi.smm,
                pending: e.smi.pending,
                smm_inside_nmi: e.smi.smm_inside_nmi,
                latched_init: e.smi.latched_init,
            },
            triple_fault_pending: e.triple_fault.pending,
            exception_has_payload: e.exception_has_payload,
            exception_payload: e.exception_payload,
        }
    }

    fn to_kvm(&self) -> kvm_vcpu_events {
        let mut e = kvm_vcpu_events::default();
        e.exception.injected = self.exception.injected;
        e.exception.nr = self.exception.nr;
        e.exception.has_error_code = self.exception.has_error_code;
        e.exception.pending = self.exception.pending;
        e.exception.error_code = self.exception.error_code;
        e.interrupt.injected = self.interrupt.injected;
        e.interrupt.nr = self.interrupt.nr;
        e.interrupt.soft = self.interrupt.soft;
        e.interrupt.shadow = self.interrupt.shadow;
        e.nmi.injected = self.nmi.injected;
        e.nmi.pending = self.nmi.pending;
        e.nmi.masked = self.nmi.masked;
        e.sipi_vector = self.sipi_vector;
        e.flags = self.flags;
        e.smi.smm = self.smi.smm;
        e.smi.pending = self.smi.pending;
        e.smi.smm_inside_nmi = self.smi.smm_inside_nmi;
        e.smi.latched_init = self.smi.latched_init;
        e.triple_fault.pending = self.triple_fault_pending;
        e.exception_has_payload = self.exception_has_payload;
        e.exception_payload = self.exception_payload;
        e
    }
}

#[cfg(test)]
mod tests;
