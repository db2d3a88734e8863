//! What KVM wants to hear on x86_64.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_IO_OUT, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2,
    kvm_dtable, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment,
};
use kvm_ioctls::VmFd;

use super::super::{Error, Vcpu};
use super::vm::call;
use super::{Attempt, Kvm, KvmVcpu, KvmVm};
use crate::arch::x86_64::{
    CpuModel, CpuidLeaf, DescriptorTable, Entry, Msr, Registers, Segment, SpecialRegisters,
};
use crate::memory::GuestRam;

/// Three pages that VMX without "unrestricted guest" keeps a task state segment in, and one below
/// it for an identity page table. They are where firmware would be, which these machines lack.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

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
    let cpuid = list
        .as_slice()
        .iter()
        .map(|entry| CpuidLeaf {
            leaf: entry.function,
            subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect();
    Ok(CpuModel { cpuid })
}

pub(super) fn enter_at(vcpu: &KvmVcpu, entry: &Entry) -> Result<(), Error> {
    if !entry.cpuid.is_empty() {
        let entries: Vec<_> = entry.cpuid.iter().map(cpuid_entry).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Partial {
            call: "KVM_SET_CPUID2",
            object: format!("vcpu {}", vcpu.id()),
            done: 0,
            given: entries.len(),
            next: "more leaves than KVM takes".into(),
        })?;
        vcpu.call("KVM_SET_CPUID2", vcpu.fd().set_cpuid2(&cpuid))?;
    }
    set_msrs(vcpu, &entry.msrs)?;
    if let Some((general, special)) = &entry.registers {
        set_special(vcpu, special)?;
        vcpu.call("KVM_SET_REGS", vcpu.fd().set_regs(&general_to_kvm(general)))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &KvmVcpu, msrs: &[Msr]) -> Result<(), Error> {
    if msrs.is_empty() {
        return Ok(());
    }
    let entries: Vec<_> =
        msrs.iter().map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() }).collect();
    let partial = |done: usize| Error::Partial {
        call: "KVM_SET_MSRS",
        object: format!("vcpu {}", vcpu.id()),
        done,
        given: msrs.len(),
        next: msrs.get(done).map_or_else(String::new, |m| format!("MSR {:#x} = {:#x}", m.index, m.value)),
    };
    let list = Msrs::from_entries(&entries).map_err(|_| partial(0))?;
    let done = vcpu.call("KVM_SET_MSRS", vcpu.fd().set_msrs(&list))?;
    if done < msrs.len() { Err(partial(done)) } else { Ok(()) }
}

fn set_special(vcpu: &KvmVcpu, special: &SpecialRegisters) -> Result<(), Error> {
    // The local APIC's base and the interrupt bitmap stay as KVM made them.
    let mut sregs = vcpu.call("KVM_GET_SREGS", vcpu.fd().get_sregs())?;
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
    vcpu.call("KVM_SET_SREGS", vcpu.fd().set_sregs(&sregs))
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
        ..Default::default()
    }
}

fn table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
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

// To be replaced: the state of processors and machine.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct VcpuState;
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct VmState;

pub(super) fn fingerprint(_kvm: &Kvm) -> Result<crate::arch::native::Fingerprint, Error> {
    Ok(crate::arch::native::Fingerprint {})
}
pub(super) fn save_vcpu(_vcpu: &KvmVcpu) -> Result<VcpuState, Error> {
    Ok(VcpuState)
}
pub(super) fn restore_vcpu(_vcpu: &KvmVcpu, _state: &VcpuState) -> Result<(), Error> {
    Ok(())
}
pub(super) fn stood_still(_vcpu: &KvmVcpu) -> Result<(), Error> {
    Ok(())
}
pub(super) fn save_vm(_vm: &KvmVm) -> Result<VmState, Error> {
    Ok(VmState)
}
pub(super) fn restore_vm(_vm: &KvmVm, _state: &VmState) -> Result<(), Error> {
    Ok(())
}
