//! What KVM wants to hear on aarch64.

mod counter;
mod gic;
mod identity;
mod registers;
mod state;

use std::collections::BTreeMap;
use std::sync::Mutex;

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2,
    KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER, KVM_CAP_ARM_VM_IPA_SIZE, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_REG_ARM_CORE,
    KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_smccc_filter,
    kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER, kvm_vcpu_init,
};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemory};

use super::super::{Error, PsciBy, Vcpu, VmPlan};
use super::vm::call;
use super::{Attempt, Kvm, KvmVcpu, KvmVm, lock};
use crate::arch::aarch64::layout::{GICD_BASE, GICR_BASE, SPI_BASE, SPI_COUNT};
use crate::arch::aarch64::{CpuModel, Entry, Registers, psci};
use crate::memory::GuestRam;

pub(super) use identity::fingerprint;
pub use state::{VcpuState, VmState};

/// What the processors of a machine have to know of it and of each other.
#[derive(Debug)]
pub(super) struct Shared {
    psci: PsciBy,
    counter: counter::Counter,
    /// MPIDR_EL1 of each that has been made, by number: the GIC knows them by that.
    mpidrs: Mutex<BTreeMap<u32, u64>>,
}

impl Shared {
    #[expect(clippy::unnecessary_wraps, reason = "as on the other architecture")]
    pub(super) fn new(_kvm: &Kvm, plan: &VmPlan) -> Result<Self, Error> {
        Ok(Self { psci: plan.psci, counter: counter::Counter::default(), mpidrs: Mutex::default() })
    }
}

/// The width that every KVM has, and the default where none is asked for.
const DEFAULT_IPA_BITS: u32 = 40;

/// PSTATE at the entry: EL1 on its own stack pointer, all interrupts masked, as Linux demands.
const PSTATE_EL1H_MASKED: u64 = 0x3c5;

pub(super) fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Attempt<VmFd> {
    let needed = (u64::BITS - ram.last_addr().raw_value().leading_zeros()).max(DEFAULT_IPA_BITS);
    if kvm.fd.check_extension_raw(u64::from(KVM_CAP_ARM_VM_IPA_SIZE)) > 0 {
        // Hosts with fewer physical address bits than the default exist.
        let limit = u32::try_from(kvm.fd.get_host_ipa_limit()).unwrap_or(DEFAULT_IPA_BITS);
        kvm.fd.create_vm_with_ipa_size(needed.min(limit))
    } else {
        kvm.fd.create_vm()
    }
}

#[expect(clippy::unnecessary_wraps)] // it fails elsewhere
pub(super) fn cpu_model(_kvm: &Kvm) -> Result<CpuModel, Error> {
    Ok(CpuModel)
}

/// The GIC is configured here because it wants to know all vCPUs: each gets a redistributor.
pub(super) fn seal(vm: &KvmVm) -> Result<(), Error> {
    vm.shared().counter.begin(vm)?;
    if !vm.plan().interrupt_controller {
        return Ok(());
    }
    let mut gic = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, fd: 0, flags: 0 };
    let gic = call("KVM_CREATE_DEVICE (GICv3)", vm.fd().create_device(&mut gic))?;
    let lines = SPI_BASE + SPI_COUNT;
    let set = |group: u32, attr: u32, value: Option<&u64>| {
        let attr = kvm_device_attr {
            flags: 0,
            group,
            attr: u64::from(attr),
            addr: value.map_or(0, |v| std::ptr::from_ref(v) as u64),
        };
        call("KVM_SET_DEVICE_ATTR (GICv3)", gic.set_device_attr(&attr))
    };
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(&GICD_BASE))?;
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, Some(&GICR_BASE))?;
    // The kernel reads 32 bits here, which little endian puts first.
    set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&u64::from(lines)))?;
    set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
    // A second call would have failed on KVM_CREATE_DEVICE, so the cell is empty.
    let _ = vm.gic.set(gic);
    Ok(())
}

/// What was decided together is decided anew.
pub(super) fn rewind(vm: &KvmVm) {
    vm.shared().counter.rewind();
}

/// What KVM_IRQ_LINE calls a line.
pub(super) fn irq_number(line: u32) -> u32 {
    KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (SPI_BASE + line)
}

/// Settles before anything runs who answers PSCI calls.
pub(super) fn prepare(vm: &KvmVm) -> Result<(), Error> {
    if vm.plan().psci == PsciBy::Hypervisor {
        return Ok(());
    }
    for base in psci::FUNCTIONS {
        let filter = kvm_smccc_filter {
            base,
            nr_functions: psci::FUNCTIONS_LEN,
            // The constants are a byte wide in the structure.
            action: kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as u8,
            ..kvm_smccc_filter::default()
        };
        let attr = kvm_device_attr {
            flags: 0,
            group: KVM_ARM_VM_SMCCC_CTRL,
            attr: u64::from(KVM_ARM_VM_SMCCC_FILTER),
            addr: std::ptr::from_ref(&filter) as u64,
        };
        call("KVM_SET_DEVICE_ATTR (SMCCC filter, Linux 6.4)", vm.fd().set_device_attr(&attr))?;
    }
    Ok(())
}

/// Features that processors are made with. A saved one can go on only where it was made with the same.
const FEATURES: u32 = 1 << KVM_ARM_VCPU_PSCI_0_2;

/// Makes the vCPU what it is at its power-on.
pub(super) fn init_vcpu(vcpu: &KvmVcpu) -> Result<(), Error> {
    let mut init = kvm_vcpu_init::default();
    call("KVM_ARM_PREFERRED_TARGET", vcpu.vm.fd.get_preferred_target(&mut init))?;
    init.features[0] |= FEATURES;
    if vcpu.id() != 0 && vcpu.vm.arch.psci == PsciBy::Hypervisor {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.call("KVM_ARM_VCPU_INIT", vcpu.fd().vcpu_init(&init))
}

/// Its first power-on, and what the machine has to know of it.
pub(super) fn begin_vcpu(vcpu: &KvmVcpu) -> Result<(), Error> {
    init_vcpu(vcpu)?;
    let mpidr = hardware_id(vcpu)?;
    lock(&vcpu.vm.arch.mpidrs).insert(vcpu.id(), mpidr);
    vcpu.vm.arch.counter.look(vcpu)
}

/// No clock of the guest's says that it stood still: its counter did too.
#[expect(clippy::unnecessary_wraps, reason = "as on the other architecture")]
pub(super) fn stood_still(_vcpu: &KvmVcpu) -> Result<(), Error> {
    Ok(())
}

/// Id of a 64-bit register of `struct kvm_regs`, by its index in that struct taken as an array.
const fn core_register(index: u64) -> u64 {
    // Core ids count in 32-bit words.
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (index * 2)
}

const SP_EL0: u64 = core_register(31);
const PC: u64 = core_register(32);
const PSTATE: u64 = core_register(33);
const SP_EL1: u64 = core_register(34);

fn set(vcpu: &KvmVcpu, id: u64, value: u64) -> Result<(), Error> {
    vcpu.call("KVM_SET_ONE_REG", vcpu.fd().set_one_reg(id, &value.to_le_bytes())).map(drop)
}

fn get(vcpu: &KvmVcpu, id: u64) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    vcpu.call("KVM_GET_ONE_REG", vcpu.fd().get_one_reg(id, &mut bytes))?;
    Ok(u64::from_le_bytes(bytes))
}

/// The registers of a call. KVM has moved on behind an HVC, but not behind an SMC.
pub(super) fn begin_call(vcpu: &KvmVcpu, is_smc: bool) -> Result<[u64; 4], Error> {
    if is_smc {
        set(vcpu, PC, get(vcpu, PC)?.wrapping_add(4))?;
    }
    let x = |index| get(vcpu, core_register(index));
    Ok([x(0)?, x(1)?, x(2)?, x(3)?])
}

/// Gives a call its answer.
pub(super) fn finish_call(vcpu: &KvmVcpu, answer: u64) -> Result<(), Error> {
    set(vcpu, core_register(0), answer)
}

/// Id of a system register, by its encoding in MRS.
const fn system_register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    KVM_REG_ARM64
        | KVM_REG_SIZE_U64
        | KVM_REG_ARM64_SYSREG as u64
        | op0 << 14
        | op1 << 11
        | crn << 7
        | crm << 3
        | op2
}

const MPIDR_EL1: u64 = system_register(3, 0, 0, 0, 5);

/// KVM assigns it by the vCPU's number.
pub(super) fn hardware_id(vcpu: &KvmVcpu) -> Result<u64, Error> {
    get(vcpu, MPIDR_EL1)
}

pub(super) fn enter_at(vcpu: &KvmVcpu, entry: &Entry) -> Result<(), Error> {
    set(vcpu, PSTATE, PSTATE_EL1H_MASKED)?;
    set(vcpu, PC, entry.pc)?;
    set(vcpu, core_register(0), entry.x0)
}

/// This KVM emulates no instructions.
#[expect(clippy::unnecessary_wraps, reason = "as on the other architecture")]
pub(super) fn may_run_again(_vcpu: &KvmVcpu) -> Result<bool, Error> {
    Ok(false)
}

pub(super) fn registers(vcpu: &KvmVcpu) -> Result<Registers, Error> {
    let mut registers = Registers {
        sp_el0: get(vcpu, SP_EL0)?,
        sp_el1: get(vcpu, SP_EL1)?,
        pc: get(vcpu, PC)?,
        pstate: get(vcpu, PSTATE)?,
        ..Registers::default()
    };
    for (index, x) in (0..).zip(&mut registers.x) {
        *x = get(vcpu, core_register(index))?;
    }
    Ok(registers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_register_ids_are_those_of_the_api_document() {
        for (id, expected) in [
            (core_register(0), 0x6030_0000_0010_0000),
            (core_register(30), 0x6030_0000_0010_003c),
            (SP_EL0, 0x6030_0000_0010_003e),
            (PC, 0x6030_0000_0010_0040),
            (PSTATE, 0x6030_0000_0010_0042),
            (SP_EL1, 0x6030_0000_0010_0044),
            (MPIDR_EL1, 0x6030_0000_0013_c005),
        ] {
            assert_eq!(id, expected);
        }
    }
}
