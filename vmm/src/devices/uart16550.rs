//! The 16550A serial port: `vm-superio`'s chip on our bus, with our console behind it, and time between
//! what is sent.

mod pace;

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, Serial};
use vm_superio::{SerialState, Trigger};

use self::pace::{Pace, Wire};

use crate::bus::BusDevice;
use crate::console::{InputGate, InputPort, Output};
use crate::hypervisor::IrqLine;

/// Number of registers.
pub const WINDOW: u64 = 8;

/// The data register while the divisor latch is off.
const DATA: u8 = 0;
/// What the interrupt is for; reading it takes it back.
const IIR: u8 = 2;

/// An interrupt that comes in pulses, as on the ISA bus.
struct Pulse {
    wire: Wire,
    pace: Pace,
    /// The guest is sending: an interrupt now says that the transmitter is empty.
    sending: Cell<bool>,
}

impl Pulse {
    fn new(wire: &Wire) -> io::Result<Self> {
        Ok(Self { pace: Pace::new(wire.clone())?, wire: wire.clone(), sending: Cell::new(false) })
    }
}

impl Trigger for Pulse {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if self.sending.get() {
            self.pace.later();
        } else {
            self.pace.now();
            self.wire.pulse();
        }
        Ok(())
    }
}

struct Sink(Arc<Output>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that a snapshot must hold: the registers, what the guest has yet to read, and what it has yet to
/// hear. What it wrote is not part of it: that is the sink's, where it is on its way already, and a guest that
/// goes on twice has not written it twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    receive: Vec<u8>,
    pace: pace::Saved,
}

impl State {
    /// One with input that was not read.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Self {
            divisor: [1, 0],
            interrupt_enable: 1,
            interrupt_identification: 1,
            line_control: 3,
            line_status: 0x61,
            modem_control: 8,
            modem_status: 0xb0,
            scratch: 0,
            receive: b"input".to_vec(),
            pace: pace::Saved::default(),
        }
    }

    fn of(chip: &Serial<Pulse, NoEvents, Sink>) -> Self {
        let state = chip.state();
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            receive: state.in_buffer,
            pace: chip.interrupt_evt().pace.save(),
        }
    }

    fn registers(&self) -> SerialState {
        SerialState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.receive.clone(),
        }
    }
}

/// One port.
pub struct Uart16550 {
    chip: Mutex<Serial<Pulse, NoEvents, Sink>>,
    wire: Wire,
    output: Arc<Output>,
    gate: InputGate,
}

impl fmt::Debug for Uart16550 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Uart16550")
    }
}

impl Uart16550 {
    /// A port after reset, with `irq` as its [edge](crate::hypervisor::Trigger::Edge) interrupt.
    pub fn new(irq: Arc<dyn IrqLine>, output: Arc<Output>) -> io::Result<Self> {
        let wire = Wire(irq);
        let chip = Serial::new(Pulse::new(&wire)?, Sink(Arc::clone(&output)));
        Ok(Self { chip: Mutex::new(chip), wire, output, gate: InputGate::default() })
    }

    /// Goes on from a state; the processors must be paused. An interrupt that the guest has not looked at comes again.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        let (pulse, sink) = (Pulse::new(&self.wire)?, Sink(Arc::clone(&self.output)));
        let chip = Serial::from_state(&state.registers(), pulse, NoEvents, sink).map_err(|_| {
            let why =
                format!("its FIFO was saved with {} bytes, which it has no room for", state.receive.len());
            io::Error::new(io::ErrorKind::InvalidData, why)
        })?;
        let mut current = self.lock();
        // The one before it interrupts no more.
        *current = chip;
        current.interrupt_evt().pace.restore(state.pace, &self.wire);
        Ok(())
    }

    /// For a snapshot; the processors must be paused.
    pub fn save(&self) -> State {
        State::of(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Pulse, NoEvents, Sink>> {
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Uart16550 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Registers are a byte each; wider accesses see the first.
        if let Some(byte) = data.first_mut() {
            let mut chip = self.lock();
            *byte = chip.read(offset as u8);
            if offset as u8 == IIR {
                *byte = chip.interrupt_evt().pace.identify(*byte);
            }
        }
        if offset as u8 == DATA {
            self.gate.open();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(byte) = data.first() else { return };
        let mut chip = self.lock();
        chip.interrupt_evt().sending.set(offset as u8 == DATA);
        if let Err(error) = chip.write(offset as u8, *byte) {
            // In loopback the chip feeds itself and runs full.
            log::debug!("the console dropped a byte: {error:?}");
        }
        chip.interrupt_evt().sending.set(false);
        drop(chip);
        // Any write may have emptied or unblocked the receiver (FIFO control, loopback).
        if offset as u8 != DATA {
            self.gate.open();
        }
    }
}

impl InputPort for Uart16550 {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut chip = self.lock();
        let room = chip.fifo_capacity();
        let bytes = &bytes[..bytes.len().min(room)];
        // In loopback the chip takes none and says none.
        if bytes.is_empty() { 0 } else { chip.enqueue_raw_bytes(bytes).unwrap_or(0) }
    }

    fn gate(&self) -> &InputGate {
        &self.gate
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::thread;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;
    use crate::hypervisor::testing::Wire;

    const IER: u64 = 1;
    const IIR: u64 = super::IIR as u64;
    const LCR: u64 = 3;
    const LSR: u64 = 5;
    const LSR_DATA_READY: u8 = 1;
    const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

    fn port() -> (Uart16550, Arc<Wire>, Arc<Output>) {
        let wire = Arc::new(Wire::default());
        let output = Arc::new(Output::new(io::sink(), vec![], Box::new(|_| {})).unwrap());
        (Uart16550::new(Arc::clone(&wire) as Arc<dyn IrqLine>, Arc::clone(&output)).unwrap(), wire, output)
    }

    fn get(port: &Uart16550, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn bytes_go_out_and_the_divisor_latch_does_not() {
        let (port, _, output) = port();
        port.write(0, b"a");
        port.write(LCR, &[0x80]);
        port.write(0, &[12]);
        assert_eq!(get(&port, 0), 12);
        port.write(LCR, &[0x03]);
        port.write(0, b"b");
        assert_eq!(output.stats().bytes, 2);
        assert_eq!(get(&port, LSR) & LSR_TRANSMITTER_EMPTY, LSR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn an_empty_transmitter_is_said_after_a_while_and_only_if_the_guest_does_not_know() {
        let (port, wire, _) = port();
        let pulses = || wire.0.load(Ordering::SeqCst);
        port.write(IER, &[2]);
        assert_eq!(pulses(), 1, "it is empty");
        let mut came = 1;
        for round in 0..3 {
            assert_eq!(get(&port, IIR) & 3, 2, "round {round}");
            port.write(0, b"a");
            let late = Instant::now() + Duration::from_secs(10);
            while pulses() == came && Instant::now() < late {
                thread::sleep(Duration::from_micros(100));
            }
            came += 1;
            assert_eq!(pulses(), came, "round {round}");
        }
        port.write(IER, &[0]);
        assert_eq!(get(&port, IIR) & 1, 0);
        port.write(0, b"a");
        thread::sleep(Duration::from_millis(10));
        assert_eq!(pulses(), came, "nobody asked");
    }

    #[test]
    fn input_is_bounded_and_interrupts() {
        let (port, wire, _) = port();
        port.write(IER, &[1]);
        let taken = port.offer(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000, "{taken}");
        assert_eq!(port.offer(b"y"), 0);
        assert_eq!(wire.0.load(Ordering::Relaxed), 1);
        assert_eq!(get(&port, LSR) & LSR_DATA_READY, LSR_DATA_READY);
        for _ in 0..taken {
            assert_eq!(get(&port, 0), b'x');
        }
        assert_eq!(get(&port, LSR) & LSR_DATA_READY, 0);
        assert_eq!(port.offer(b"y"), 1);
    }

    fn restored(state: &State) -> (Uart16550, Arc<Wire>) {
        let (port, wire, _) = port();
        port.restore(state).unwrap();
        (port, wire)
    }

    #[test]
    fn a_port_goes_on_where_it_was() {
        let (first, ..) = port();
        for (offset, value) in [(LCR, 0x80), (0, 1), (1, 2), (LCR, 3), (IER, 1), (7, 0x5a)] {
            first.write(offset, &[value]);
        }
        assert_eq!(first.offer(b"input"), 5);
        let state = first.save();
        assert_eq!(first.save(), state);
        let (other, wire) = restored(&state);
        assert_eq!(other.save(), state);
        assert_eq!(wire.0.load(Ordering::SeqCst), 1, "there is input");
        assert_eq!((get(&other, IIR) & 0xf, get(&other, 7)), (4, 0x5a));
        let input: Vec<u8> = (0..5).map(|_| get(&other, 0)).collect();
        assert_eq!(input, b"input");
        assert_eq!(get(&other, LSR) & LSR_DATA_READY, 0);
        // Who has heard everything hears nothing.
        let (_, wire) = restored(&other.save());
        assert_eq!(wire.0.load(Ordering::SeqCst), 0);
        // And it can go back.
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
    }

    #[test]
    fn a_guest_that_is_sending_hears_of_its_empty_transmitter_elsewhere() {
        let (first, wire, _) = port();
        first.write(IER, &[2]);
        assert_eq!(get(&first, IIR) & 3, 2);
        first.write(0, b"a");
        let state = first.save();
        let late = Instant::now() + Duration::from_secs(10);
        let (other, other_wire) = restored(&state);
        for (port, wire, before) in [(&first, wire, 1), (&other, other_wire, 0)] {
            while wire.0.load(Ordering::SeqCst) == before && Instant::now() < late {
                thread::sleep(Duration::from_micros(100));
            }
            assert!(wire.0.load(Ordering::SeqCst) > before);
            let until = Instant::now() + Duration::from_secs(10);
            while get(port, IIR) & 3 != 2 {
                assert!(Instant::now() < until);
            }
        }
    }

    #[test]
    fn more_input_than_fits_is_refused() {
        let (first, ..) = port();
        let (before, state) = (first.save(), State { receive: vec![0; 65], ..first.save() });
        let error = first.restore(&state).unwrap_err();
        assert!(error.to_string().contains("65 bytes"), "{error}");
        assert_eq!(first.save(), before);
    }

    proptest! {
        #[test]
        fn no_state_upsets_it(
            registers in any::<[u8; 9]>(),
            receive in proptest::collection::vec(any::<u8>(), 0..65),
            accesses in proptest::collection::vec((any::<bool>(), 0u64..WINDOW, any::<u8>()), 0..50),
        ) {
            let [low, high, interrupt_enable, interrupt_identification, line_control, line_status,
                modem_control, modem_status, scratch] = registers;
            let state = State {
                divisor: [low, high], interrupt_enable, interrupt_identification, line_control, line_status,
                modem_control, modem_status, scratch, receive, pace: pace::Saved::default(),
            };
            let (port, _) = restored(&state);
            prop_assert_eq!(port.save(), state);
            for (store, offset, value) in accesses {
                if store { port.write(offset, &[value]) } else { get(&port, offset); }
                port.offer(&[value]);
            }
        }

        #[test]
        fn no_access_upsets_it(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u64..WINDOW, proptest::collection::vec(any::<u8>(), 0..9)), 0..200),
        ) {
            let (port, ..) = port();
            for (store, offset, mut data) in accesses {
                if store { port.write(offset, &data) } else { port.read(offset, &mut data) }
                port.offer(&data);
            }
        }
    }
}
