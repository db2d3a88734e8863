//! The flattened device tree: all that the guest knows of its machine.

use vm_fdt::{Error, FdtWriter};

use super::image::Range;
use super::layout::{
    GENERATION_ID, GENERATION_LINE, GENERATION_SIZE, GICD_BASE, GICD_SIZE, GICR_BASE, GICR_SIZE, RAM_BASE,
    SERIAL_BASE, SERIAL_LINE,
};
use crate::devices::pl011;
use crate::slots::SlotMap;

/// What goes into the tree.
#[derive(Debug)]
pub struct Tree<'a> {
    /// Size of RAM.
    pub ram: u64,
    /// Kernel command line.
    pub command_line: &'a str,
    /// The initrd in RAM.
    pub initrd: Option<Range>,
    /// MPIDR_EL1 of each processor.
    pub mpidrs: &'a [u64],
    /// Virtio devices.
    pub slots: &'a SlotMap,
    /// Randomness for the guest's first generator and for the address of its kernel.
    pub seed: &'a [u8; 64],
}

const GIC_PHANDLE: u32 = 1;
const CLOCK_PHANDLE: u32 = 2;
/// The rate means nothing, but drivers divide by it.
const CLOCK_HZ: u32 = 24_000_000;

const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// The affinity fields of MPIDR_EL1, which are what `reg` of a processor holds.
const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

impl Tree<'_> {
    /// The tree as the kernel reads it.
    pub fn write(&self) -> Result<Vec<u8>, Error> {
        let mut fdt = FdtWriter::new()?;
        let root = fdt.begin_node("")?;
        fdt.property_string("compatible", "linux,dummy-virt")?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 2)?;
        fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
        self.chosen(&mut fdt)?;
        self.memory(&mut fdt)?;
        self.cpus(&mut fdt)?;
        psci(&mut fdt)?;
        timer(&mut fdt)?;
        self.gic(&mut fdt)?;
        serial(&mut fdt)?;
        generation(&mut fdt)?;
        self.virtio(&mut fdt)?;
        fdt.end_node(root)?;
        fdt.finish()
    }

    fn chosen(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let node = fdt.begin_node("chosen")?;
        fdt.property_string("bootargs", self.command_line)?;
        fdt.property_string("stdout-path", &format!("/pl011@{SERIAL_BASE:x}"))?;
        if let Some(initrd) = self.initrd {
            fdt.property_u64("linux,initrd-start", initrd.start)?;
            fdt.property_u64("linux,initrd-end", initrd.end)?;
        }
        // Eight bytes place the kernel, the rest seeds the generator.
        let (place, seed) = self.seed.split_at(8);
        fdt.property("kaslr-seed", place)?;
        fdt.property("rng-seed", seed)?;
        fdt.end_node(node)
    }

    fn memory(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let node = fdt.begin_node(&format!("memory@{RAM_BASE:x}"))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &[RAM_BASE, self.ram])?;
        fdt.end_node(node)
    }

    fn cpus(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let cpus = fdt.begin_node("cpus")?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 0)?;
        for mpidr in self.mpidrs {
            let reg = mpidr & MPIDR_AFFINITY;
            let cpu = fdt.begin_node(&format!("cpu@{reg:x}"))?;
            fdt.property_string("device_type", "cpu")?;
            fdt.property_string("compatible", "arm,armv8")?;
            fdt.property_string("enable-method", "psci")?;
            fdt.property_u64("reg", reg)?;
            fdt.end_node(cpu)?;
        }
        fdt.end_node(cpus)
    }

    fn gic(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let redistributors = self.mpidrs.len() as u64 * GICR_SIZE;
        let node = fdt.begin_node(&format!("intc@{GICD_BASE:x}"))?;
        fdt.property_string("compatible", "arm,gic-v3")?;
        fdt.property_u32("#interrupt-cells", 3)?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_array_u64("reg", &[GICD_BASE, GICD_SIZE, GICR_BASE, redistributors])?;
        // Of the virtual CPU interface, unused without a nested hypervisor.
        fdt.property_array_u32("interrupts", &[PPI, 9, LEVEL_HIGH])?;
        fdt.property_phandle(GIC_PHANDLE)?;
        fdt.end_node(node)
    }

    fn virtio(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        for (_, slot) in self.slots.iter() {
            let node = fdt.begin_node(&format!("virtio_mmio@{:x}", slot.base))?;
            fdt.property_string("compatible", "virtio,mmio")?;
            fdt.property_array_u64("reg", &[slot.base, slot.len])?;
            fdt.property_array_u32("interrupts", &[SPI, slot.line, EDGE_RISING])?;
            fdt.property_null("dma-coherent")?;
            fdt.end_node(node)?;
        }
        Ok(())
    }
}

fn psci(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

fn timer(fdt: &mut FdtWriter) -> Result<(), Error> {
    // Secure and non-secure physical, virtual, hypervisor: the PPIs of the base system architecture.
    let interrupts: Vec<u32> = [13, 14, 11, 10].iter().flat_map(|ppi| [PPI, *ppi, LEVEL_HIGH]).collect();
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    fdt.end_node(node)
}

fn serial(fdt: &mut FdtWriter) -> Result<(), Error> {
    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", CLOCK_HZ)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_PHANDLE)?;
    fdt.end_node(clock)?;

    let node = fdt.begin_node(&format!("pl011@{SERIAL_BASE:x}"))?;
    fdt.property_string_list("compatible", vec!["arm,pl011".into(), "arm,primecell".into()])?;
    fdt.property_array_u64("reg", &[SERIAL_BASE, pl011::WINDOW])?;
    fdt.property_array_u32("interrupts", &[SPI, SERIAL_LINE, LEVEL_HIGH])?;
    fdt.property_array_u32("clocks", &[CLOCK_PHANDLE, CLOCK_PHANDLE])?;
    fdt.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
    fdt.end_node(node)
}

/// The generation id, which Linux finds here since 6.10.
fn generation(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("vmgenid@{GENERATION_ID:x}"))?;
    fdt.property_string("compatible", "microsoft,vmgenid")?;
    fdt.property_array_u64("reg", &[GENERATION_ID, GENERATION_SIZE])?;
    fdt.property_array_u32("interrupts", &[SPI, GENERATION_LINE, EDGE_RISING])?;
    fdt.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::aarch64::layout::VIRTIO;
    use crate::slots::SlotId;

    fn contains(blob: &[u8], part: &[u8]) -> bool {
        blob.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_tree_names_what_the_machine_has() {
        let mut slots = SlotMap::new(VIRTIO);
        slots.add(SlotId::new("rng")).unwrap();
        slots.add(SlotId::new("vsock")).unwrap();
        let mpidrs = [0x8000_0000, 0x8000_0001, 0x8000_0100];
        let tree = Tree {
            ram: 256 << 20,
            command_line: "console=ttyAMA0",
            initrd: Some(Range { start: 0x4800_0000, end: 0x4800_1234 }),
            mpidrs: &mpidrs,
            slots: &slots,
            seed: &[0xa5; 64],
        };
        let blob = tree.write().unwrap();
        assert_eq!(blob[..4], 0xd00d_feedu32.to_be_bytes());
        for text in [
            "console=ttyAMA0\0",
            "/pl011@9000000\0",
            "cpu@0\0",
            "cpu@1\0",
            "cpu@100\0",
            "virtio_mmio@a000000\0",
            "virtio_mmio@a001000\0",
            "arm,gic-v3\0",
            "microsoft,vmgenid\0",
            "arm,psci-1.0\0arm,psci-0.2\0",
        ] {
            assert!(contains(&blob, text.as_bytes()), "{text}");
        }
        let second: Vec<u8> = [SPI, 17, EDGE_RISING].iter().flat_map(|cell| cell.to_be_bytes()).collect();
        assert!(contains(&blob, &second));
        let redistributors: Vec<u8> =
            [GICR_BASE, 3 * GICR_SIZE].iter().flat_map(|cell| cell.to_be_bytes()).collect();
        assert!(contains(&blob, &redistributors));
    }

    #[test]
    fn a_machine_without_devices_or_initrd_has_a_tree_too() {
        let slots = SlotMap::new(VIRTIO);
        let tree = Tree {
            ram: 128 << 20,
            command_line: "",
            initrd: None,
            mpidrs: &[0],
            slots: &slots,
            seed: &[0; 64],
        };
        let blob = tree.write().unwrap();
        assert!(!contains(&blob, b"linux,initrd"));
        assert!(!contains(&blob, b"virtio_mmio"));
    }
}
