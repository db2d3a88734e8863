//! The 16550A serial port: `vm-superio`'s chip on our bus, with our console behind it, and time between
//! what is sent.

mod pace;

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

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

/// One port.
pub struct Uart16550 {
    chip: Mutex<Serial<Pulse, NoEvents, Sink>>,
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
        let pulse = Pulse { pace: Pace::new(wire.clone())?, wire, sending: Cell::new(false) };
        Ok(Self { chip: Mutex::new(Serial::new(pulse, Sink(output))), gate: InputGate::default() })
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

    proptest! {
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
