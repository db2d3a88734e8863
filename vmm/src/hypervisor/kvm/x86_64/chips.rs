//! What of a machine is no processor's: the interrupt controllers on its board, and its clock.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
};
use serde::{Deserialize, Serialize};

use super::super::super::Error;
use super::super::KvmVm;
use super::super::vm::{call, unfit};
use super::tsc::{Distance, host_tsc};

/// All that there is of a machine beside its processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    clock: Clock,
    /// Where there is an interrupt controller.
    chips: Option<Chips>,
}

/// The clock that guests share with KVM, at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Clock {
    /// What it said, in nanoseconds.
    nanoseconds: u64,
    /// What the host's TSC read then.
    host_tsc: u64,
}

/// So close to the guest's TSC its clock should be: kernels compare them, and distrust the TSC when they differ by
/// more than some ten microseconds.
const CLOSE: u64 = 1_000;
/// How often the clock is set again to get there; a host that is busy elsewhere may come to it late each time.
const TRIES: u32 = 5;

impl Clock {
    fn read(vm: &KvmVm) -> Result<Self, Error> {
        let before = host_tsc();
        let data = call("KVM_GET_CLOCK", vm.fd().get_clock())?;
        let after = host_tsc();
        let host_tsc = if data.flags & KVM_CLOCK_HOST_TSC != 0 {
            data.host_tsc
        } else {
            before.wrapping_add(after.wrapping_sub(before) / 2)
        };
        Ok(Self { nanoseconds: data.clock, host_tsc })
    }

    /// What it says at another moment, if it goes as fast as the TSC.
    fn at(self, host_tsc: u64, khz: u32) -> u64 {
        let ticks = i128::from(host_tsc.wrapping_sub(self.host_tsc).cast_signed());
        let nanoseconds = i128::from(self.nanoseconds) + ticks * 1_000_000 / i128::from(khz.max(1));
        // A clock that was saved just now cannot be before its beginning, nor centuries later.
        u64::try_from(nanoseconds).unwrap_or(self.nanoseconds)
    }

    /// Goes on in step with the TSCs of the processors.
    fn restore(self, vm: &KvmVm) -> Result<(), Error> {
        let Some(Distance { ticks, khz }) = vm.shared().resumption.distance() else {
            return set_clock(vm, self.nanoseconds);
        };
        let mut ahead = 0u64;
        for _ in 0..TRIES {
            let wanted = self.at(host_tsc().wrapping_add(ticks), khz);
            set_clock(vm, wanted.wrapping_add(ahead))?;
            let set = Self::read(vm)?;
            let missing = self.at(set.host_tsc.wrapping_add(ticks), khz).wrapping_sub(set.nanoseconds);
            if missing.cast_signed().unsigned_abs() <= CLOSE {
                break;
            }
            // As long as it took from the one look at the TSC to the other, it will take again.
            ahead = ahead.wrapping_add(missing);
        }
        Ok(())
    }
}

fn set_clock(vm: &KvmVm, nanoseconds: u64) -> Result<(), Error> {
    let clock = kvm_clock_data { clock: nanoseconds, ..kvm_clock_data::default() };
    call("KVM_SET_CLOCK", vm.fd().set_clock(&clock))
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
        let clock = Clock::read(vm)?;
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
        self.clock.restore(vm)
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

#[cfg(test)]
impl VmState {
    /// Makes it unlike that of a new machine.
    pub(super) fn disturb(&mut self) {
        self.clock.nanoseconds += 3_600_000_000_000;
        if let Some(chips) = &mut self.chips {
            // Masks, and the vector of the first line.
            (chips.pics[0][2], chips.pics[1][2], chips.pics[0][5]) = (0xfb, 0xff, 0x30);
            // Masked, level-triggered, vector 0x41.
            chips.io_apic.redirtbl[5] = 1 << 16 | 1 << 15 | 0x41;
            chips.io_apic.ioregsel = 0x12;
        }
    }

    /// But for the clock, which runs.
    pub(super) fn is_like(&self, earlier: &Self) -> bool {
        const MINUTE: u64 = 60_000_000_000;
        self.chips == earlier.chips
            && (earlier.clock.nanoseconds..earlier.clock.nanoseconds + MINUTE)
                .contains(&self.clock.nanoseconds)
    }
}
