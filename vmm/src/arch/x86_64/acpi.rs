//! The ACPI tables, hardware-reduced: what a guest learns about processors, interrupt controller,
//! power and the devices it cannot find by itself.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::power;
use crate::memory::GuestRam;
use crate::slots::{Slot, SlotMap};

const OEM: [u8; 6] = *b"SUPERM";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
/// IAPC_BOOT_ARCH: neither VGA adapter nor CMOS clock; and by the bits left out, no 8042 and no
/// legacy devices.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// What a notification of a power button or of the generation id means: it happened.
const NOTIFIED: u8 = 0x80;

/// Writes all tables and returns the address of the root pointer.
pub fn write(ram: &GuestRam, vcpus: u32, slots: &SlotMap) -> Result<u64, GuestMemoryError> {
    let mut place = Place { ram, next: layout::ACPI + (Rsdp::len() as u64).next_multiple_of(ALIGN) };
    let dsdt = place.put(&dsdt(slots))?;
    let fadt = place.put(&bytes(&fadt(dsdt)))?;
    let madt = place.put(&bytes(&madt(vcpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place.put(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    ram.write_slice(&rsdp, GuestAddress(layout::ACPI))?;
    Ok(layout::ACPI)
}

const ALIGN: u64 = 64;

struct Place<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, GuestMemoryError> {
        let at = self.next;
        self.next = (at + table.len() as u64).next_multiple_of(ALIGN);
        if self.next > layout::ACPI + layout::ACPI_SIZE {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(self.next)));
        }
        self.ram.write_slice(table, GuestAddress(at))?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(register: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::POWER_PORT + register))
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.finalize()
}

fn madt(vcpus: u32) -> impl Aml {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    // More than 255 processors would need another kind of entry; no machine has them.
    for id in 0..vcpus.min(255) as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn edge(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn dsdt(slots: &SlotMap) -> Vec<u8> {
    let mut body = Vec::new();
    serial(&mut body);
    for (index, (_, slot)) in (0u8..).zip(slots.iter()) {
        virtio(&mut body, index, slot);
    }
    events(&mut body);
    panic(&mut body);

    let s5 = Name::new(Path::new("_S5_"), &Package::new(vec![&power::S5_TYPE, &ZERO, &ZERO, &ZERO]));
    let mut table = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&Scope::raw(Path::new("_SB_"), body));
    table.append_slice(&bytes(&s5));
    table.as_slice().to_vec()
}

const SDT_HEADER: u32 = 36;

fn serial(sink: &mut dyn AmlSink) {
    let (ports, interrupt) =
        (IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8), edge(layout::SERIAL_LINE));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

fn virtio(sink: &mut dyn AmlSink, index: u8, slot: Slot) {
    // The window is below 4 GiB by its layout.
    let registers = Memory32Fixed::new(true, slot.base as u32, slot.len as u32);
    let interrupt = Interrupt::new(true, true, false, slot.shared, slot.line);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &index),
            &Name::new(Path::new("_CCA"), &acpi_tables::aml::ONE),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device, and the two devices in whose name it speaks.
fn events(sink: &mut dyn AmlSink) {
    let interrupt = edge(layout::POWER_LINE);
    let address = layout::POWER_PORT + power::EVENTS;
    let field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVNT", 8)],
    );
    let happened = |bit: u8, device: &'static str| {
        let test = And::new(&ZERO, &Local(0), &bit);
        let device = Path::new(device);
        let notify = Notify::new(&device, &NOTIFIED);
        bytes(&If::new(&test, vec![&notify]))
    };
    let pending = Path::new("EVNT");
    let take = Store::new(&Local(0), &pending);
    let (button, generation) =
        (Raw(happened(power::EVENT_POWER_BUTTON, "PWRB")), Raw(happened(power::EVENT_GENERATION, "VGEN")));
    Device::new(
        Path::new("GED0"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &address, &1u8),
            &field,
            &Method::new(Path::new("_EVT"), 1, true, vec![&take, &button, &generation]),
        ],
    )
    .to_aml_bytes(sink);

    Device::new(
        Path::new("PWRB"),
        vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")), &Name::new(Path::new("_UID"), &ZERO)],
    )
    .to_aml_bytes(sink);

    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"SMVMGID"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

fn panic(sink: &mut dyn AmlSink) {
    let port = IO::new(layout::PANIC_PORT, layout::PANIC_PORT, 1, 1);
    let resources = ResourceTemplate::new(vec![&port]);
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_CRS"), &resources),
            // Present, enabled, shown, working.
            &Name::new(Path::new("_STA"), &0xfu8),
        ],
    )
    .to_aml_bytes(sink);
}

/// AML that is bytes already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::slots::SlotId;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut table = vec![0; len as usize];
        ram.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    }

    fn word(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    fn slots(count: u32) -> SlotMap {
        let mut slots = SlotMap::new(layout::VIRTIO);
        for index in 0..count {
            let id = SlotId::new(format!("d{index}"));
            if index < 2 { slots.add(id) } else { slots.add_sharing(id) }.unwrap();
        }
        slots
    }

    #[test]
    fn all_tables_hang_together_and_add_up() {
        let ram = memory::anonymous(&layout::ram(2 << 20)).unwrap();
        let root = write(&ram, 32, &slots(layout::VIRTIO.count)).unwrap();
        let mut rsdp = [0; 36];
        ram.read_slice(&mut rsdp, GuestAddress(root)).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&ram, word(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(&ram, word(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt)), (&b"FACP"[..], 0));
        let madt = table(&ram, word(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(&ram, word(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        for name in [&b"COM1"[..], b"V000", b"V063", b"GED0", b"PWRB", b"VGEN", b"PEVT", b"_S5_"] {
            assert!(dsdt.windows(4).any(|window| window == name), "{name:?}");
        }
        assert!(!dsdt.windows(4).any(|window| window == b"V064"));
    }

    #[test]
    fn a_device_is_described_by_its_slot() {
        let slots = slots(3);
        let dsdt = dsdt(&slots);
        for (index, interrupt) in [(1, 0b0011), (2, 0b1011)] {
            let slot = slots.iter().nth(index).unwrap().1;
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((slot.base as u32).to_le_bytes());
            resources.extend((slot.len as u32).to_le_bytes());
            resources.extend([0x89, 6, 0, interrupt, 1]);
            resources.extend(slot.line.to_le_bytes());
            assert!(dsdt.windows(resources.len()).any(|window| window == resources));
        }
    }
}
