//! The GICv3 of a machine, by its registers.
//!
//! Only what the guest sets is state. Of the kind "write ones to set", the enables and what is active are cleared first: KVM
//! begins with software-generated interrupts on, and a machine that is rewound has served some since. What is pending KVM
//! takes from its user as a whole. There is no ITS and with it there are no LPIs, whose pending tables KVM would keep to itself
//! until it is told to write them to memory.
//!
//! Order: the distributor's revision decides how KVM reads the rest, and its control register comes before what it
//! controls. Where interrupts go and how they are triggered comes before the levels of their wires, and those come
//! before what is pending, since a pending level and a pending edge are kept apart.

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, kvm_device_attr,
};
use kvm_ioctls::DeviceFd;
use serde::{Deserialize, Serialize};

use super::super::super::Error;
use super::super::vm::{call, unfit};
use super::super::{Attempt, KvmVm, lock};
use crate::arch::aarch64::layout::{SPI_BASE, SPI_COUNT};

/// Distributor, and each processor's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Gic {
    shared: Bank,
    processors: Vec<Interface>,
}

/// Values of the registers of a distributor or redistributor, in the order of [`Kind`], and the levels of its wires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Bank {
    settings: Vec<u32>,
    levels: Vec<u32>,
    conditions: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Interface {
    mpidr: u64,
    private: Bank,
    /// Of the CPU interface; how many depends on its priorities.
    control: u64,
    registers: Vec<u64>,
}

const GICD_CTLR: u64 = 0x0;
const GICD_IIDR: u64 = 0x8;
const GICD_IROUTER: u64 = 0x6000;
/// In the distributor, and in the second frame of a redistributor.
const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ISACTIVER: u64 = 0x300;
const ICACTIVER: u64 = 0x380;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const GICR_SGI: u64 = 0x1_0000;

/// Encoding of a system register in the attribute.
const fn icc(crm: u64, op2: u64) -> u64 {
    let (op0, op1, crn) = (3, 0, if crm == 6 { 4 } else { 12 });
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const ICC_PMR_EL1: u64 = icc(6, 0);
const ICC_BPR0_EL1: u64 = icc(8, 3);
const ICC_BPR1_EL1: u64 = icc(12, 3);
const ICC_CTLR_EL1: u64 = icc(12, 4);
const ICC_SRE_EL1: u64 = icc(12, 5);
const ICC_IGRPEN0_EL1: u64 = icc(12, 6);
const ICC_IGRPEN1_EL1: u64 = icc(12, 7);
const ICC_AP0R0_EL1: u64 = icc(8, 4);
const ICC_AP1R0_EL1: u64 = icc(9, 0);

/// A group of registers of `bits` for each interrupt, from `first` to before `end`, that begins at `base`.
fn group(base: u64, bits: u64, first: u32, end: u32) -> impl Iterator<Item = u64> {
    let words = u64::from(first) * bits / 32..u64::from(end) * bits / 32;
    words.map(move |word| base + word * 4)
}

/// What is set once, and what comes and goes, of the interrupts from `first` to before `end`.
fn registers(base: u64, first: u32, end: u32) -> (Vec<u64>, Vec<u64>) {
    let settings = [(IGROUPR, 1), (IPRIORITYR, 8), (ICFGR, 2), (ISENABLER, 1)];
    let conditions = [(ISPENDR, 1), (ISACTIVER, 1)];
    let all = |groups: &[(u64, u64)]| {
        groups.iter().flat_map(|&(offset, bits)| group(base + offset, bits, first, end)).collect()
    };
    (all(&settings), all(&conditions))
}

/// Where a bank is, and what is in it.
struct Kind {
    group: u32,
    /// The upper half of each attribute: whose it is.
    owner: u64,
    settings: Vec<u64>,
    wires: Vec<u64>,
    conditions: Vec<u64>,
}

impl Kind {
    fn shared() -> Self {
        let end = SPI_BASE + SPI_COUNT;
        let (settings, conditions) = registers(0, SPI_BASE, end);
        let routers = group(GICD_IROUTER, 64, SPI_BASE, end);
        Self {
            group: KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
            owner: 0,
            settings: [GICD_IIDR, GICD_CTLR].into_iter().chain(routers).chain(settings).collect(),
            wires: (SPI_BASE..end).step_by(32).map(u64::from).collect(),
            conditions,
        }
    }

    fn private(owner: u64) -> Self {
        let (settings, conditions) = registers(GICR_SGI, 0, SPI_BASE);
        Self { group: KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, owner, settings, wires: vec![0], conditions }
    }

    fn save(&self, gic: &DeviceFd) -> Result<Bank, Error> {
        let all = |group, attributes: &[u64]| {
            let one = |attribute: &u64| get(gic, group, self.owner | attribute).map(|value| value as u32);
            attributes.iter().map(one).collect::<Result<Vec<_>, _>>()
        };
        Ok(Bank {
            settings: all(self.group, &self.settings)?,
            levels: all(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, &self.wires)?,
            conditions: all(self.group, &self.conditions)?,
        })
    }

    /// The register in which ones clear what they set in this one, where some may be set.
    fn cleared_by(&self, group: u32, attribute: u64) -> Option<u64> {
        let base = match self.group {
            KVM_DEV_ARM_VGIC_GRP_REDIST_REGS => GICR_SGI,
            _ => 0,
        };
        [ISENABLER..ICENABLER, ISACTIVER..ICACTIVER]
            .into_iter()
            .find(|set| group == self.group && (base + set.start..base + set.end).contains(&attribute))
            .map(|set| attribute + (set.end - set.start))
    }

    fn restore(&self, gic: &DeviceFd, bank: &Bank) -> Result<(), Error> {
        for (group, attributes, values) in [
            (self.group, &self.settings, &bank.settings),
            (KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, &self.wires, &bank.levels),
            (self.group, &self.conditions, &bank.conditions),
        ] {
            if attributes.len() != values.len() {
                return Err(unfit(format!(
                    "{} registers of its GIC where this one has {}",
                    values.len(),
                    attributes.len()
                )));
            }
            for (attribute, value) in attributes.iter().zip(values) {
                if let Some(clear) = self.cleared_by(group, *attribute) {
                    set(gic, group, self.owner | clear, u64::from(!*value))?;
                }
                set(gic, group, self.owner | attribute, u64::from(*value))?;
            }
        }
        Ok(())
    }
}

/// Registers of the CPU interface beside its control register, which says how many they are.
fn interface(control: u64) -> Vec<u64> {
    // PRIbits is one less than the bits of a priority; of those KVM has at least five.
    let active = match (control >> 8 & 7) + 1 {
        ..=5 => 1,
        6 => 2,
        _ => 4,
    };
    [ICC_SRE_EL1, ICC_PMR_EL1, ICC_BPR0_EL1, ICC_BPR1_EL1]
        .into_iter()
        .chain(ICC_AP0R0_EL1..ICC_AP0R0_EL1 + active)
        .chain(ICC_AP1R0_EL1..ICC_AP1R0_EL1 + active)
        .chain([ICC_IGRPEN0_EL1, ICC_IGRPEN1_EL1])
        .collect()
}

/// The affinity of MPIDR_EL1 where attributes have it.
fn owner(mpidr: u64) -> u64 {
    (mpidr >> 32 & 0xff) << 56 | (mpidr & 0xff_ffff) << 32
}

impl Gic {
    pub(super) fn save(vm: &KvmVm) -> Result<Self, Error> {
        let gic = of(vm)?;
        let mut processors = Vec::new();
        for &mpidr in lock(&vm.shared().mpidrs).values() {
            let owner = owner(mpidr);
            let cpu = |register| get(gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, owner | register);
            let control = cpu(ICC_CTLR_EL1)?;
            processors.push(Interface {
                mpidr,
                private: Kind::private(owner).save(gic)?,
                control,
                registers: interface(control).into_iter().map(cpu).collect::<Result<_, _>>()?,
            });
        }
        Ok(Self { shared: Kind::shared().save(gic)?, processors })
    }

    pub(super) fn restore(&self, vm: &KvmVm) -> Result<(), Error> {
        let gic = of(vm)?;
        let mpidrs: Vec<_> = lock(&vm.shared().mpidrs).values().copied().collect();
        if !self.processors.iter().map(|processor| processor.mpidr).eq(mpidrs.iter().copied()) {
            return Err(unfit(format!(
                "its GIC is of {} processors, this machine has {}, or they have other names",
                self.processors.len(),
                mpidrs.len()
            )));
        }
        Kind::shared().restore(gic, &self.shared)?;
        for Interface { mpidr, private, control, registers } in &self.processors {
            let owner = owner(*mpidr);
            Kind::private(owner).restore(gic, private)?;
            let names = interface(*control);
            if names.len() != registers.len() {
                return Err(unfit(format!("{} registers of an interface to the GIC", registers.len())));
            }
            let all = [(ICC_CTLR_EL1, *control)]
                .into_iter()
                .chain(names.into_iter().zip(registers.iter().copied()));
            for (register, value) in all {
                set(gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, owner | register, value)?;
            }
        }
        Ok(())
    }
}

fn of(vm: &KvmVm) -> Result<&DeviceFd, Error> {
    vm.gic.get().ok_or_else(|| unfit("the machine has not been sealed, so there is no GIC"))
}

fn attribute(group: u32, attr: u64, value: &mut u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group, attr, addr: std::ptr::from_mut(value) as u64 }
}

fn get(gic: &DeviceFd, group: u32, attr: u64) -> Result<u64, Error> {
    let mut value = 0;
    // SAFETY: the kernel writes 32 or 64 bits to `value`, which lives until it returns; little endian puts the 32 where
    // they belong.
    let done = unsafe { gic.get_device_attr(&mut attribute(group, attr, &mut value)) };
    named("KVM_GET_DEVICE_ATTR", group, attr, done).map(|()| value)
}

fn set(gic: &DeviceFd, group: u32, attr: u64, mut value: u64) -> Result<(), Error> {
    named("KVM_SET_DEVICE_ATTR", group, attr, gic.set_device_attr(&attribute(group, attr, &mut value)))
}

/// Says which register it was.
fn named(what: &'static str, group: u32, attr: u64, done: Attempt<()>) -> Result<(), Error> {
    call(what, done).map_err(|error| match error {
        Error::Call { call, source, .. } => {
            Error::Call { call, object: format!("the GIC, group {group}, register {attr:#x}"), source }
        }
        other => other,
    })
}

/// For tests of those that have a GIC.
#[cfg(test)]
impl Gic {
    /// Makes it unlike that of a new machine, as a guest would.
    pub(super) fn disturb(&mut self) {
        const ENABLE_GROUP_1: u32 = 1 << 1;
        /// Interrupts 33 and 40 of 32 to 63.
        const SOME: u32 = 1 << 1 | 1 << 8;
        let kind = Kind::shared();
        let setting = |offset| kind.settings.iter().position(|setting| *setting == offset).unwrap();
        let settings = &mut self.shared.settings;
        settings[setting(GICD_CTLR)] |= ENABLE_GROUP_1;
        settings[setting(IGROUPR + 4)] |= SOME;
        settings[setting(ISENABLER + 4)] |= SOME;
        settings[setting(IPRIORITYR + 32)] = 0xa0a0_50a0;
        // KVM's are edge-triggered until they are told otherwise, and then no level is told of. 33 is.
        settings[setting(ICFGR + 8)] &= !(0b10 << 2);
        // 40 goes to the second processor.
        settings[setting(GICD_IROUTER + 8 * 40)] = 1;
        self.shared.levels[0] |= 1 << 1;
        self.shared.conditions[0] |= 1 << 8;
        // Active: 70.
        let active = kind.conditions.iter().position(|condition| *condition == ISACTIVER + 8).unwrap();
        self.shared.conditions[active] |= 1 << 6;

        let kind = Kind::private(0);
        let setting =
            |offset| kind.settings.iter().position(|setting| *setting == GICR_SGI + offset).unwrap();
        let second = &mut self.processors[1];
        second.private.settings[setting(ISENABLER)] |= 1 << 27;
        second.private.settings[setting(IPRIORITYR + 24)] = 0x8000_0000;
        // A software-generated interrupt that is pending, and the level of the timer's wire.
        second.private.conditions[0] |= 1 << 5;
        second.private.levels[0] |= 1 << 27;
        let names = interface(second.control);
        let register = |name| names.iter().position(|other| *other == name).unwrap();
        second.registers[register(ICC_PMR_EL1)] = 0xf0;
        second.registers[register(ICC_IGRPEN1_EL1)] = 1;
    }

    pub(super) fn lose_a_register(&mut self) {
        self.shared.settings.pop();
    }

    pub(super) fn lose_a_processor(&mut self) {
        self.processors.pop();
    }

    pub(super) fn lose_an_interface(&mut self) {
        self.processors[0].registers.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_architecture_has_them() {
        let shared = Kind::shared();
        for (offset, is_setting, is_condition) in [
            (0x0, true, false),
            (0x8, true, false),
            (0x80, false, false), // of private interrupts
            (0x84, true, false),
            (0x90, true, false),
            (0x94, false, false), // beyond the last
            (0x104, true, false),
            (0x200, false, false),
            (0x204, false, true),
            (0x304, false, true),
            (0x41c, false, false),
            (0x420, true, false),
            (0x49c, true, false),
            (0xc08, true, false),
            (0xc24, true, false),
            (0x6100, true, false),
            (0x64fc, true, false),
            (0x6500, false, false),
        ] {
            assert_eq!(shared.settings.contains(&offset), is_setting, "{offset:#x}");
            assert_eq!(shared.conditions.contains(&offset), is_condition, "{offset:#x}");
        }
        assert_eq!(shared.wires, [32, 64, 96, 128]);
        let private = Kind::private(0);
        for offset in [0x1_0080, 0x1_0400, 0x1_041c, 0x1_0c00, 0x1_0c04, 0x1_0100] {
            assert!(private.settings.contains(&offset), "{offset:#x}");
        }
        assert_eq!(private.conditions, [0x1_0200, 0x1_0300]);
        assert_eq!(private.settings.len(), 1 + 8 + 2 + 1);
    }

    #[test]
    fn enables_and_what_is_active_are_cleared_before_they_are_set() {
        for (kind, offset, expected) in [
            (Kind::shared(), 0x104, Some(0x184)),
            (Kind::shared(), 0x110, Some(0x190)),
            (Kind::shared(), 0x84, None),
            (Kind::shared(), 0x204, None),
            (Kind::shared(), 0x308, Some(0x388)),
            (Kind::shared(), 0x6100, None),
            (Kind::private(1 << 32), 0x1_0100, Some(0x1_0180)),
            (Kind::private(0), 0x1_0080, None),
            (Kind::private(0), 0x1_0200, None),
            (Kind::private(0), 0x1_0300, Some(0x1_0380)),
        ] {
            assert_eq!(kind.cleared_by(kind.group, offset), expected, "{offset:#x}");
            assert_eq!(kind.cleared_by(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, offset), None, "{offset:#x}");
        }
    }

    #[test]
    fn the_interface_has_registers_by_its_priorities() {
        for (bits, len) in [(5, 8), (6, 10), (7, 14), (8, 14)] {
            assert_eq!(interface((bits - 1) << 8).len(), len, "{bits}");
        }
        for (register, expected) in [
            (ICC_PMR_EL1, 0xc230),
            (ICC_AP1R0_EL1, 0xc648),
            (ICC_CTLR_EL1, 0xc664),
            (ICC_IGRPEN1_EL1, 0xc667),
        ] {
            assert_eq!(register, expected);
        }
    }

    #[test]
    fn owners_are_written_as_attributes_want_them() {
        for (mpidr, expected) in
            [(0x8000_0000, 0), (0x8000_0001, 1 << 32), (0x8000_0102, 0x102 << 32), (0x7_8000_0000, 7 << 56)]
        {
            assert_eq!(owner(mpidr), expected, "{mpidr:#x}");
        }
    }
}
