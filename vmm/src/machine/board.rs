//! What is soldered on: the devices that every machine has, and their places on the buses.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Error, OnSystemEvent};
use crate::bus::BusDevice;
use crate::console::{InputPort, Output};
#[cfg(target_arch = "aarch64")]
use crate::devices::pl011::{self, Pl011};
#[cfg(target_arch = "x86_64")]
use crate::devices::power::AcpiPower;
#[cfg(target_arch = "x86_64")]
use crate::devices::uart16550::{self, Uart16550};
use crate::hypervisor::{PsciBy, Trigger, Vm};
use crate::memory::GuestRam;
use crate::snapshot::MachineState;
use crate::vcpu::{Buses, Power};

/// The board of one machine.
pub(super) struct Board {
    /// Its buses, with room for more.
    pub(super) buses: Buses,
    /// The serial port, for input.
    pub(super) console: Arc<dyn InputPort>,
    /// The power button.
    pub(super) power: Option<Wire>,
    /// Says that the generation id has changed.
    pub(super) generation: Wire,
    /// What of it has a state.
    pub(super) chips: Chips,
}

/// What of a board has a state, which is looked at and replaced while its machine stands still.
#[derive(Debug)]
pub(super) struct Chips {
    #[cfg(target_arch = "x86_64")]
    serial: Arc<Uart16550>,
    #[cfg(target_arch = "x86_64")]
    power: Arc<AcpiPower>,
    #[cfg(target_arch = "aarch64")]
    serial: Arc<Pl011>,
}

impl Chips {
    /// All that there is to know.
    pub(super) fn save(&self) -> BoardState {
        BoardState {
            serial: self.serial.save(),
            #[cfg(target_arch = "x86_64")]
            events: self.power.save(),
        }
    }

    /// They go on from a state, on a machine whose interrupt controller does.
    pub(super) fn restore(&self, state: &BoardState) -> Result<(), Error> {
        self.serial
            .restore(&state.serial)
            .map_err(|source| Error::Host { what: "start the console", source })?;
        #[cfg(target_arch = "x86_64")]
        self.power.restore(state.events)?;
        Ok(())
    }
}

/// All that there is of a board.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    serial: uart16550::State,
    /// Events that the guest has not taken.
    events: u8,
}

/// All that there is of a board.
#[cfg(target_arch = "aarch64")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    serial: pl011::State,
}

#[cfg(test)]
impl BoardState {
    /// Some state.
    pub(crate) fn example() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            serial: uart16550::State::example(),
            #[cfg(target_arch = "x86_64")]
            events: 1,
            #[cfg(target_arch = "aarch64")]
            serial: pl011::State::default(),
        }
    }
}

/// Tells the guest something, each time that it is called.
pub(super) type Wire = Box<dyn Fn() -> Result<(), crate::hypervisor::Error> + Send + Sync>;

/// A board after reset.
#[cfg(target_arch = "x86_64")]
pub(super) fn assemble<V: Vm>(vm: &V, output: Arc<Output>, on_event: OnSystemEvent) -> Result<Board, Error> {
    use crate::arch::x86_64::layout;
    use crate::devices::power::{self, KeyboardReset, Panic};

    let line = vm.irq_line(layout::SERIAL_LINE, Trigger::Edge)?;
    let serial = Uart16550::new(line, output);
    let serial = Arc::new(serial.map_err(|source| Error::Host { what: "start the console", source })?);
    let power =
        Arc::new(AcpiPower::new(Arc::clone(&on_event), vm.irq_line(layout::POWER_LINE, Trigger::Edge)?));
    let mut buses = Buses::default();
    let ports: [(_, _, _, Arc<dyn BusDevice>); 4] = [
        ("serial", layout::SERIAL_PORT, uart16550::WINDOW, Arc::clone(&serial) as _),
        ("power", layout::POWER_PORT, power::WINDOW, Arc::clone(&power) as _),
        ("panic", layout::PANIC_PORT, 1, Arc::new(Panic(Arc::clone(&on_event)))),
        ("keyboard", KeyboardReset::PORT, 1, Arc::new(KeyboardReset(on_event))),
    ];
    for (name, port, len, device) in ports {
        buses.ports.insert(name, u64::from(port), len, device)?;
    }
    let notify = |event| -> Wire {
        let power = Arc::clone(&power);
        Box::new(move || power.notify(event))
    };
    let (button, generation) = (notify(power::EVENT_POWER_BUTTON), notify(power::EVENT_GENERATION));
    let chips = Chips { serial: Arc::clone(&serial), power };
    Ok(Board { buses, console: serial, power: Some(button), generation, chips })
}

/// A board after reset. Power is PSCI's business here, and in the hypervisor.
#[cfg(target_arch = "aarch64")]
pub(super) fn assemble<V: Vm>(vm: &V, output: Arc<Output>, _on_event: OnSystemEvent) -> Result<Board, Error> {
    use crate::arch::aarch64::layout;

    let irq = vm.irq_line(layout::SERIAL_LINE, Trigger::Level)?;
    let serial = Arc::new(Pl011::new(irq, output));
    let mut buses = Buses::default();
    let device: Arc<dyn BusDevice> = Arc::clone(&serial) as _;
    buses.memory.insert("serial", layout::SERIAL_BASE, pl011::WINDOW, device)?;
    let line = vm.irq_line(layout::GENERATION_LINE, Trigger::Edge)?;
    let generation = move || line.set(true).and_then(|()| line.set(false));
    let chips = Chips { serial: Arc::clone(&serial) };
    Ok(Board { buses, console: serial, power: None, generation: Box::new(generation), chips })
}

/// The hypervisor does that here.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::unnecessary_wraps, reason = "as on the other architecture")]
pub(super) fn power(
    _psci: PsciBy,
    _hardware_ids: &[u64],
    _ram: &GuestRam,
    _saved: Option<&MachineState>,
) -> Result<Option<Power>, &'static str> {
    Ok(None)
}

/// What turns processors on and off, where the hypervisor does not; as it was in a machine that was saved.
#[cfg(target_arch = "aarch64")]
pub(super) fn power(
    psci: PsciBy,
    hardware_ids: &[u64],
    ram: &GuestRam,
    saved: Option<&MachineState>,
) -> Result<Option<Power>, &'static str> {
    use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
    let ranges = ram.iter().map(|region| {
        let start = region.start_addr().raw_value();
        start..start + region.len()
    });
    if psci != PsciBy::Monitor {
        return Ok(None);
    }
    let power = Power::new(hardware_ids, ranges.collect());
    if let Some(saved) = saved {
        restore_power(Some(&power), saved)?;
    }
    Ok(Some(power))
}

/// There is none.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::unnecessary_wraps, reason = "as on the other architecture")]
pub(super) fn restore_power(_power: Option<&Power>, _saved: &MachineState) -> Result<(), &'static str> {
    Ok(())
}

/// Processors are on or off as they were.
#[cfg(target_arch = "aarch64")]
pub(super) fn restore_power(power: Option<&Power>, saved: &MachineState) -> Result<(), &'static str> {
    let Some(power) = power else { return Ok(()) };
    power.restore(saved.power.as_ref().ok_or("the snapshot does not say which processors are on")?)
}

#[cfg(test)]
mod tests;
