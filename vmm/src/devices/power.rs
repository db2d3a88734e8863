//! Going to sleep, starting again, and telling the guest that something happened: the registers of
//! hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 5.6.9), and the keyboard controller's reset pulse.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::hypervisor::{Error, IrqLine, SystemEvent};

/// Number of registers of [`AcpiPower`].
pub const WINDOW: u64 = 4;
/// SLEEP_CONTROL_REG.
pub const SLEEP_CONTROL: u16 = 0;
/// SLEEP_STATUS_REG.
pub const SLEEP_STATUS: u16 = 1;
/// RESET_REG.
pub const RESET: u16 = 2;
/// What to write there.
pub const RESET_VALUE: u8 = 1;
/// Which events are pending, as the generic event device asks; reading takes them.
pub const EVENTS: u16 = 3;

/// SLP_TYP of the one sleeping state there is: off.
pub const S5_TYPE: u8 = 5;
/// Event bit: somebody pressed the power button.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// Event bit: the generation id has changed.
pub const EVENT_GENERATION: u8 = 1 << 1;

const SLP_EN: u8 = 1 << 5;
const WAK_STS: u8 = 1 << 7;

/// Hears what the guest wants of the whole machine. Called on the thread of the processor that asked.
pub type OnSystemEvent = Arc<dyn Fn(SystemEvent) + Send + Sync>;

/// The ACPI registers.
pub struct AcpiPower {
    on_event: OnSystemEvent,
    irq: Arc<dyn IrqLine>,
    pending: AtomicU8,
}

impl fmt::Debug for AcpiPower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AcpiPower(pending {:#x})", self.pending.load(Ordering::Relaxed))
    }
}

impl AcpiPower {
    /// With the wire of the generic event device, which is [edge](crate::hypervisor::Trigger::Edge).
    pub fn new(on_event: OnSystemEvent, irq: Arc<dyn IrqLine>) -> Self {
        Self { on_event, irq, pending: AtomicU8::new(0) }
    }

    /// The events that the guest has not taken, for a snapshot.
    pub fn save(&self) -> u8 {
        self.pending.load(Ordering::Acquire)
    }

    /// Tells the guest again of what it had not taken, and of nothing else. Bits that are no events are not told.
    pub fn restore(&self, pending: u8) -> Result<(), Error> {
        self.pending.store(0, Ordering::Release);
        match pending & (EVENT_POWER_BUTTON | EVENT_GENERATION) {
            0 => Ok(()),
            events => self.notify(events),
        }
    }

    /// Tells the guest. It finds out when its driver reads the events, if it has one.
    pub fn notify(&self, events: u8) -> Result<(), Error> {
        self.pending.fetch_or(events, Ordering::AcqRel);
        self.irq.set(true)?;
        self.irq.set(false)
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Some(byte) = data.first_mut() else { return };
        *byte = match offset as u16 {
            SLEEP_STATUS => WAK_STS,
            EVENTS => self.pending.swap(0, Ordering::AcqRel),
            _ => 0,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset as u16, data.first()) {
            (SLEEP_CONTROL, Some(value)) if *value == SLP_EN | S5_TYPE << 2 => {
                (self.on_event)(SystemEvent::PowerOff);
            }
            (RESET, Some(&RESET_VALUE)) => (self.on_event)(SystemEvent::Reset),
            _ => {}
        }
    }
}

/// The pvpanic device (QEMU's `docs/specs/pvpanic.rst`): a kernel that panics says so before it does
/// anything else about it, if its driver is loaded.
pub struct Panic(pub OnSystemEvent);

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Panic")
    }
}

impl Panic {
    /// The event there is: the kernel has panicked, and nothing will be saved of it.
    const PANICKED: u8 = 1 << 0;
}

impl BusDevice for Panic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(events) = data.first_mut() {
            *events = Self::PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & Self::PANICKED != 0) {
            (self.0)(SystemEvent::Crash);
        }
    }
}

/// The command register of the 8042 keyboard controller, of which one command has survived.
pub struct KeyboardReset(pub OnSystemEvent);

impl fmt::Debug for KeyboardReset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyboardReset")
    }
}

impl KeyboardReset {
    /// Its port.
    pub const PORT: u16 = 0x64;
    const PULSE_RESET_LINE: u8 = 0xfe;
}

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, _data: &mut [u8]) {
        // Both buffers empty: a command may be written.
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&Self::PULSE_RESET_LINE) {
            (self.0)(SystemEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Wire(AtomicU8);

    impl IrqLine for Wire {
        fn set(&self, high: bool) -> Result<(), Error> {
            self.0.fetch_add(u8::from(high), Ordering::Relaxed);
            Ok(())
        }
    }

    fn events() -> (OnSystemEvent, Arc<Mutex<Vec<SystemEvent>>>) {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&log);
        (Arc::new(move |event| sink.lock().unwrap().push(event)), log)
    }

    #[test]
    fn writes_that_mean_something() {
        let (on_event, log) = events();
        let power = AcpiPower::new(Arc::clone(&on_event), Arc::new(Wire::default()));
        let panic = Panic(Arc::clone(&on_event));
        let keyboard = KeyboardReset(on_event);
        let [power, panic, keyboard]: [&dyn BusDevice; 3] = [&power, &panic, &keyboard];
        let cases: [(_, _, &[u8], _); 12] = [
            (panic, 0, &[1], Some(SystemEvent::Crash)),
            (panic, 0, &[2], None),
            (panic, 0, &[], None),
            (power, SLEEP_CONTROL, &[0x34], Some(SystemEvent::PowerOff)),
            (power, SLEEP_CONTROL, &[0x14], None),
            (power, SLEEP_CONTROL, &[0x20], None),
            (power, SLEEP_CONTROL, &[], None),
            (power, RESET, &[1], Some(SystemEvent::Reset)),
            (power, RESET, &[0], None),
            (power, EVENTS, &[0xff], None),
            (keyboard, 0, &[0xfe], Some(SystemEvent::Reset)),
            (keyboard, 0, &[0xaa], None),
        ];
        for (device, offset, data, event) in cases {
            device.write(u64::from(offset), data);
            assert_eq!(log.lock().unwrap().pop(), event, "{offset} {data:?}");
        }
    }

    #[test]
    fn events_add_up_until_they_are_read() {
        let wire = Arc::new(Wire::default());
        let power = AcpiPower::new(events().0, Arc::clone(&wire) as Arc<dyn IrqLine>);
        power.notify(EVENT_POWER_BUTTON).unwrap();
        power.notify(EVENT_GENERATION).unwrap();
        assert_eq!(wire.0.load(Ordering::Relaxed), 2);
        let saved = power.save();
        for (saved, rises, expected) in [(saved, 1, 3), (0, 0, 0), (0xff, 1, 3), (0xfc, 0, 0)] {
            let wire = Arc::new(Wire::default());
            let other = AcpiPower::new(events().0, Arc::clone(&wire) as Arc<dyn IrqLine>);
            other.restore(saved).unwrap();
            assert_eq!((wire.0.load(Ordering::Relaxed), other.save()), (rises, expected), "{saved:#x}");
        }
        let mut data = [0];
        for expected in [EVENT_POWER_BUTTON | EVENT_GENERATION, 0] {
            power.read(u64::from(EVENTS), &mut data);
            assert_eq!(data, [expected]);
        }
    }
}
