//! What of a machine is no processor's: the interrupt controllers on its board, and its clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
};
use serde::{Deserialize, Serialize};

use super::super::super::Error;
use super::super::KvmVm;
use super::super::vm::{call, unfit};

/// All that there is of a machine beside its processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Nanoseconds of the clock that guests share with KVM.
    clock: u64,
    /// Where there is an interrupt controller.
    chips: Option<Chips>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Chips {
    /// Master and slave, each as the bytes of `struct kvm_pic_state`: a byte a register.
    pics: [[u8; PIC_LEN]; 2],
    io_apic: IoApic,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct IoApic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    irr: u32,
    redirtbl: [u64; 24],
}

const PIC_LEN: usize = size_of::<kvm_bindings::kvm_pic_state>();
const PICS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

impl VmState {
    pub(in super::super) fn save(vm: &KvmVm) -> Result<Self, Error> {
        let clock = call("KVM_GET_CLOCK", vm.fd().get_clock())?.clock;
        let chips = vm.plan().interrupt_controller.then(|| Chips::save(vm)).transpose()?;
        Ok(Self { clock, chips })
    }

    /// The clock goes on from where it was: KVM is not told that real time has passed, which would be a leap of the
    /// guest's monotonic clock.
    pub(in super::super) fn restore(&self, vm: &KvmVm) -> Result<(), Error> {
        match (&self.chips, vm.plan().interrupt_controller) {
            (Some(chips), true) => chips.restore(vm)?,
            (None, false) => {}
            (Some(_), false) => {
                return Err(unfit("it has an interrupt controller, and this machine has none"));
            }
            (None, true) => return Err(unfit("it has no interrupt controller, and this machine has one")),
        }
        let clock = kvm_clock_data { clock: self.clock, ..kvm_clock_data::default() };
        call("KVM_SET_CLOCK", vm.fd().set_clock(&clock))
    }
}

impl Chips {
    fn save(vm: &KvmVm) -> Result<Self, Error> {
        let [master, slave] = PICS;
        Ok(Self {
            pics: [pic(&get(vm, master)?), pic(&get(vm, slave)?)],
            io_apic: io_apic(&get(vm, KVM_IRQCHIP_IOAPIC)?),
        })
    }

    fn restore(&self, vm: &KvmVm) -> Result<(), Error> {
        for (pic, id) in self.pics.iter().zip(PICS) {
            let mut dummy = [0; 512];
            for (to, from) in dummy.iter_mut().zip(pic) {
                *to = from.cast_signed();
            }
            set(vm, id, &kvm_irqchip__bindgen_ty_1 { dummy })?;
        }
        let IoApic { base_address, ioregsel, id, irr, redirtbl } = self.io_apic;
        let redirtbl = redirtbl.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits });
        let ioapic = kvm_ioapic_state { base_address, ioregsel, id, irr, pad: 0, redirtbl };
        set(vm, KVM_IRQCHIP_IOAPIC, &kvm_irqchip__bindgen_ty_1 { ioapic })
    }
}

fn get(vm: &KvmVm, chip_id: u32) -> Result<kvm_irqchip, Error> {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    call("KVM_GET_IRQCHIP", vm.fd().get_irqchip(&mut chip))?;
    Ok(chip)
}

fn set(vm: &KvmVm, chip_id: u32, chip: &kvm_irqchip__bindgen_ty_1) -> Result<(), Error> {
    call("KVM_SET_IRQCHIP", vm.fd().set_irqchip(&kvm_irqchip { chip_id, pad: 0, chip: *chip }))
}

/// The registers in what [`get`] gave for a PIC.
fn pic(chip: &kvm_irqchip) -> [u8; PIC_LEN] {
    let mut registers = [0; PIC_LEN];
    // SAFETY: all members of the union are plain numbers, and all of its bytes were set before the kernel filled in
    // some. Those of a PIC are the first.
    let bytes = unsafe { chip.chip.dummy };
    for (to, from) in registers.iter_mut().zip(bytes) {
        *to = from.cast_unsigned();
    }
    registers
}

/// The registers in what [`get`] gave for the I/O APIC.
fn io_apic(chip: &kvm_irqchip) -> IoApic {
    // SAFETY: all members of the union are plain numbers, and all of its bytes were set before the kernel filled in
    // this one.
    let kvm_ioapic_state { base_address, ioregsel, id, irr, redirtbl, .. } = unsafe { chip.chip.ioapic };
    // SAFETY: both members of an entry are the same 64 bits, of which all patterns are values.
    let redirtbl = redirtbl.map(|entry| unsafe { entry.bits });
    IoApic { base_address, ioregsel, id, irr, redirtbl }
}
