//! What KVM wants to hear on x86_64.

mod chips;
mod msrs;
mod state;
mod tsc;

use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_IO_OUT, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
    kvm_dtable, kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_xsave,
};
use kvm_ioctls::{Cap, VmFd};

use super::super::{Error, Vcpu, VmPlan};
use super::vm::call;
use super::{Attempt, Kvm, KvmVcpu, KvmVm};
use crate::arch::x86_64::{
    CpuModel, CpuidLeaf, DescriptorTable, Entry, Fingerprint, Host, Registers, Segment, SpecialRegisters,
};
use crate::memory::GuestRam;

pub use chips::VmState;
pub use state::VcpuState;

/// Three pages that VMX without "unrestricted guest" keeps a task state segment in, and one below
/// it for an identity page table. They are where firmware would be, which these machines lack.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What has been learnt of the host by making machines.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Only a vCPU says it.
    tsc_khz: OnceLock<u32>,
}

/// What the processors of a machine have to know of it and of each other.
#[derive(Debug)]
pub(super) struct Shared {
    known: Arc<Known>,
    /// Whether they have local APICs.
    has_apic: bool,
    /// Those that KVM lists.
    msrs: Vec<u32>,
    resumption: tsc::Resumption,
}

impl Shared {
    pub(super) fn new(kvm: &Kvm, plan: &VmPlan) -> Result<Self, Error> {
        let msrs = kvm.call("KVM_GET_MSR_INDEX_LIST", kvm.fd.get_msr_index_list())?;
        Ok(Self {
            known: Arc::clone(&kvm.known),
            has_apic: plan.interrupt_controller,
            msrs: msrs.as_slice().to_vec(),
            resumption: tsc::Resumption::default(),
        })
    }
}

/// Remembers what only a vCPU tells.
pub(super) fn begin_vcpu(vcpu: &KvmVcpu) -> Result<(), Error> {
    let known = &vcpu.vm.arch.known.tsc_khz;
    if known.get().is_none() {
        // Another vCPU may be there first, with the same.
        let _ = known.set(vcpu.call("KVM_GET_TSC_KHZ", vcpu.fd().get_tsc_khz())?);
    }
    Ok(())
}

/// Cheap once a machine has been made by this `kvm`: the frequency of the TSC has to be asked of a vCPU, and where
/// there has been none, one is made for it.
pub(super) fn fingerprint(kvm: &Kvm) -> Result<Fingerprint, Error> {
    let tsc_khz = if let Some(khz) = kvm.known.tsc_khz.get() {
        *khz
    } else {
        let asked = kvm.fd.create_vm().and_then(|vm| vm.create_vcpu(0)).and_then(|vcpu| vcpu.get_tsc_khz());
        let khz = kvm.call("KVM_GET_TSC_KHZ of a new vCPU", asked)?;
        *kvm.known.tsc_khz.get_or_init(|| khz)
    };
    let host = Host {
        backend: "kvm".into(),
        xsave_size: xsave_size(kvm.fd.check_extension_int(Cap::Xsave2)) as u32,
        tsc_khz,
        tsc_scales: kvm.fd.check_extension(Cap::TscControl),
        page_size: super::page_size(),
    };
    Ok(Fingerprint::new(&cpu_model(kvm)?, host))
}

/// Bytes in a vCPU's XSAVE area, by what KVM_CAP_XSAVE2 says. Kernels without it know the old size only.
fn xsave_size(capability: i32) -> usize {
    usize::try_from(capability).unwrap_or(0).max(size_of::<kvm_xsave>())
}

/// What was decided together is decided anew.
pub(super) fn rewind(vm: &KvmVm) {
    vm.shared().resumption.rewind();
}

/// EINVAL is for guests that have no such clock.
pub(super) fn stood_still(vcpu: &KvmVcpu) -> Result<(), Error> {
    match vcpu.fd().kvmclock_ctrl() {
        Err(errno) if errno.errno() == libc::EINVAL => Ok(()),
        done => vcpu.call("KVM_KVMCLOCK_CTRL", done),
    }
}

pub(super) fn create_vm(kvm: &Kvm, _ram: &GuestRam) -> Attempt<VmFd> {
    kvm.fd.create_vm()
}

/// An interrupt controller without the PIT: nothing needs it where there is a TSC-deadline timer, and
/// its kernel thread costs 14 ms when the VM is closed.
pub(super) fn prepare(vm: &KvmVm) -> Result<(), Error> {
    call("KVM_SET_IDENTITY_MAP_ADDR", vm.fd().set_identity_map_address(IDENTITY_MAP_ADDRESS))?;
    call("KVM_SET_TSS_ADDR", vm.fd().set_tss_address(TSS_ADDRESS))?;
    if vm.plan().interrupt_controller {
        call("KVM_CREATE_IRQCHIP", vm.fd().create_irq_chip())?;
    }
    Ok(())
}

/// What KVM_IRQ_LINE calls a line.
pub(super) fn irq_number(line: u32) -> u32 {
    line
}

/// KVM gives each vCPU its number as APIC id.
#[expect(clippy::unnecessary_wraps)] // it fails elsewhere
pub(super) fn hardware_id(vcpu: &KvmVcpu) -> Result<u64, Error> {
    Ok(u64::from(vcpu.id()))
}

pub(super) fn cpu_model(kvm: &Kvm) -> Result<CpuModel, Error> {
    let list = kvm.call("KVM_GET_SUPPORTED_CPUID", kvm.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
    let cpuid = list.as_slice().iter().map(cpuid_leaf).collect();
    Ok(CpuModel { cpuid })
}

pub(super) fn enter_at(vcpu: &KvmVcpu, entry: &Entry) -> Result<(), Error> {
    set_cpuid(vcpu, &entry.cpuid)?;
    msrs::set(vcpu, &entry.msrs)?;
    if let Some((general, special)) = &entry.registers {
        set_special(vcpu, special)?;
        vcpu.call("KVM_SET_REGS", vcpu.fd().set_regs(&general_to_kvm(general)))?;
    }
    Ok(())
}

/// None means "leave KVM's choice".
fn set_cpuid(vcpu: &KvmVcpu, leaves: &[CpuidLeaf]) -> Result<(), Error> {
    if leaves.is_empty() {
        return Ok(());
    }
    let entries: Vec<_> = leaves.iter().map(cpuid_entry).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Partial {
        call: "KVM_SET_CPUID2",
        object: format!("vcpu {}", vcpu.id()),
        done: 0,
        given: entries.len(),
        next: "more leaves than KVM takes".into(),
    })?;
    vcpu.call("KVM_SET_CPUID2", vcpu.fd().set_cpuid2(&cpuid))
}

fn set_special(vcpu: &KvmVcpu, special: &SpecialRegisters) -> Result<(), Error> {
    // The local APIC's base and the interrupt bitmap stay as KVM made them.
    let mut sregs = vcpu.call("KVM_GET_SREGS", vcpu.fd().get_sregs())?;
    special_to_kvm(special, &mut sregs);
    vcpu.call("KVM_SET_SREGS", vcpu.fd().set_sregs(&sregs))
}

fn special_to_kvm(special: &SpecialRegisters, sregs: &mut kvm_sregs) {
    sregs.cs = segment(&special.cs);
    sregs.ds = segment(&special.ds);
    sregs.es = segment(&special.es);
    sregs.fs = segment(&special.fs);
    sregs.gs = segment(&special.gs);
    sregs.ss = segment(&special.ss);
    sregs.tr = segment(&special.tr);
    sregs.gdt = table(&special.gdt);
    sregs.idt = table(&special.idt);
    sregs.cr0 = special.cr0;
    sregs.cr3 = special.cr3;
    sregs.cr4 = special.cr4;
    sregs.efer = special.efer;
}

fn special_from_kvm(sregs: &kvm_sregs) -> SpecialRegisters {
    SpecialRegisters {
        cs: segment_from(&sregs.cs),
        ds: segment_from(&sregs.ds),
        es: segment_from(&sregs.es),
        fs: segment_from(&sregs.fs),
        gs: segment_from(&sregs.gs),
        ss: segment_from(&sregs.ss),
        tr: segment_from(&sregs.tr),
        gdt: table_from(&sregs.gdt),
        idt: table_from(&sregs.idt),
        cr0: sregs.cr0,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
    }
}

pub(super) fn registers(vcpu: &KvmVcpu) -> Result<Registers, Error> {
    vcpu.call("KVM_GET_REGS", vcpu.fd().get_regs()).map(|regs| general_from_kvm(&regs))
}

/// Whether an instruction that KVM did not emulate can be run once more: nothing has come of it, not even a fault.
pub(super) fn may_run_again(vcpu: &KvmVcpu) -> Result<bool, Error> {
    let events = vcpu.call("KVM_GET_VCPU_EVENTS", vcpu.fd().get_vcpu_events())?;
    Ok(events.exception.injected == 0 && events.exception.pending == 0)
}

/// The data of a KVM_EXIT_IO: port, width of one access, whether it goes out, and the bytes. `mapped`
/// is the size of the whole mapping that `run` is the head of.
pub(super) fn port(run: &mut kvm_run, mapped: usize) -> (u16, usize, bool, &mut [u8]) {
    // SAFETY: the caller has seen KVM_EXIT_IO, for which this is the member that the kernel filled;
    // all of its bit patterns are values.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size).max(1);
    let offset = (io.data_offset as usize).min(mapped);
    let len = (size * io.count as usize).min(mapped - offset);
    let start = (&raw mut *run).cast::<u8>();
    // SAFETY: `run` is the head of a mapping of `mapped` bytes, and offset + len is at most that. The
    // slice borrows `run`, so nobody else looks at the mapping while it lives.
    let data = unsafe { std::slice::from_raw_parts_mut(start.add(offset), len) };
    (io.port, size, u32::from(io.direction) == KVM_EXIT_IO_OUT, data)
}

fn cpuid_entry(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf.leaf,
        index: leaf.subleaf.unwrap_or(0),
        flags: if leaf.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

fn cpuid_leaf(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        leaf: entry.function,
        subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

fn segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: u8::from(s.present),
        dpl: s.dpl,
        db: u8::from(s.default_big),
        s: u8::from(s.code_or_data),
        l: u8::from(s.long),
        g: u8::from(s.granularity),
        avl: u8::from(s.available),
        unusable: u8::from(s.unusable),
        ..Default::default()
    }
}

fn segment_from(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_,
        dpl: s.dpl,
        present: s.present != 0,
        code_or_data: s.s != 0,
        default_big: s.db != 0,
        long: s.l != 0,
        granularity: s.g != 0,
        available: s.avl != 0,
        unusable: s.unusable != 0,
    }
}

fn table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

fn table_from(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

macro_rules! same_fields {
    ($from:expr => $to:ident { $($field:ident),+ }) => { $to { $($field: $from.$field),+ } };
}

fn general_to_kvm(r: &Registers) -> kvm_regs {
    same_fields!(r => kvm_regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
    })
}

fn general_from_kvm(r: &kvm_regs) -> Registers {
    same_fields!(r => Registers {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
    })
}
