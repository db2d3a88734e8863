//! The PL011 UART (ARM DDI 0183).
//!
//! What is here: data, flags, the receive interrupt, the identification registers. What is not, and
//! no driver misses: transmit interrupts (the transmit FIFO is always empty, so the Linux driver
//! drains by polling), the receive timeout (an interrupt comes with the first byte), modem lines and
//! DMA. Baud rate and line control are stored and read back, since drivers read before they write.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::{self, BusDevice};
use crate::console::{InputGate, InputPort, Output};
use crate::hypervisor::IrqLine;

/// Size of the window of registers.
pub const WINDOW: u64 = 0x1000;
/// Depth of the receive FIFO in the revision that the identification registers name.
pub const FIFO: usize = 32;

const DR: u64 = 0x000;
const FR: u64 = 0x018;
const ILPR: u64 = 0x020;
const IBRD: u64 = 0x024;
const FBRD: u64 = 0x028;
const LCR_H: u64 = 0x02c;
const CR: u64 = 0x030;
const IFLS: u64 = 0x034;
const IMSC: u64 = 0x038;
const RIS: u64 = 0x03c;
const MIS: u64 = 0x040;
const DMACR: u64 = 0x048;
const PERIPH_ID: u64 = 0xfe0;
const LAST: u64 = 0xfff;

const FR_RXFE: u32 = 1 << 4;
const FR_RXFF: u32 = 1 << 6;
const FR_TXFE: u32 = 1 << 7;
const INT_RX: u32 = 1 << 4;
/// All interrupts that IMSC has a bit for.
const INT_ALL: u32 = 0x7ff;

/// UARTPeriphID0 to 3 and UARTPCellID0 to 3; without them the AMBA bus leaves the device alone.
const IDENTIFICATION: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Everything that a snapshot must hold. The interrupt is not part of it: it follows from the rest. Nor is what the
/// guest wrote: that is the sink's, where it is on its way already, and a guest that goes on twice has not
/// written it twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    receive: VecDeque<u8>,
    imsc: u32,
    ilpr: u32,
    ibrd: u32,
    fbrd: u32,
    lcr_h: u32,
    cr: u32,
    ifls: u32,
    dmacr: u32,
}

impl Default for State {
    /// After reset: everything off but the enables of transmitter and receiver.
    fn default() -> Self {
        Self {
            receive: VecDeque::new(),
            imsc: 0,
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            lcr_h: 0,
            cr: 0x300,
            ifls: 0x12,
            dmacr: 0,
        }
    }
}

impl State {
    /// Whether a port can be in this state. One that is read from somewhere may be any.
    fn check(&self) -> io::Result<()> {
        match self.receive.len() {
            0..=FIFO => Ok(()),
            len => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("its FIFO was saved with {len} bytes, which it has no room for"),
            )),
        }
    }

    fn ris(&self) -> u32 {
        if self.receive.is_empty() { 0 } else { INT_RX }
    }

    fn mis(&self) -> u32 {
        self.ris() & self.imsc
    }

    fn fr(&self) -> u32 {
        let empty = if self.receive.is_empty() { FR_RXFE } else { 0 };
        let full = if self.receive.len() >= FIFO { FR_RXFF } else { 0 };
        FR_TXFE | empty | full
    }

    /// Also takes the byte out of the FIFO when it is the data register that is read.
    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            DR => self.receive.pop_front().map_or(0, u32::from),
            FR => self.fr(),
            ILPR => self.ilpr,
            IBRD => self.ibrd,
            FBRD => self.fbrd,
            LCR_H => self.lcr_h,
            CR => self.cr,
            IFLS => self.ifls,
            IMSC => self.imsc,
            RIS => self.ris(),
            MIS => self.mis(),
            DMACR => self.dmacr,
            PERIPH_ID..=LAST if offset.is_multiple_of(4) => {
                u32::from(IDENTIFICATION[((offset - PERIPH_ID) / 4) as usize])
            }
            _ => 0,
        }
    }

    /// Everything but the data register, which leaves the device.
    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            ILPR => self.ilpr = value & 0xff,
            IBRD => self.ibrd = value & 0xffff,
            FBRD => self.fbrd = value & 0x3f,
            LCR_H => self.lcr_h = value & 0xff,
            CR => self.cr = value & 0xffff,
            IFLS => self.ifls = value & 0x3f,
            IMSC => self.imsc = value & INT_ALL,
            DMACR => self.dmacr = value & 0x7,
            // ICR among them: the receive interrupt is there for as long as data is, so that clearing
            // it has no effect.
            _ => {}
        }
    }
}

/// One port.
pub struct Pl011 {
    inner: Mutex<Inner>,
    irq: Arc<dyn IrqLine>,
    output: Arc<Output>,
    gate: InputGate,
}

struct Inner {
    state: State,
    // The level that the wire has.
    raised: bool,
}

impl fmt::Debug for Pl011 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pl011({:?})", self.lock().state)
    }
}

impl Pl011 {
    /// A port after reset, with `irq` as its [level](crate::hypervisor::Trigger::Level) interrupt.
    pub fn new(irq: Arc<dyn IrqLine>, output: Arc<Output>) -> Self {
        let inner = Inner { state: State::default(), raised: false };
        Self { inner: Mutex::new(inner), irq, output, gate: InputGate::default() }
    }

    /// Goes on from a state; the processors must be paused. The wire is driven to where the state says it must be.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        state.check()?;
        let mut inner = self.lock();
        // Whatever the wire was before, it is driven.
        inner.raised = state.mis() == 0;
        inner.state = state.clone();
        self.update(&mut inner);
        Ok(())
    }

    /// For a snapshot; the processors must be paused.
    pub fn save(&self) -> State {
        self.lock().state.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the wire at `MIS != 0`. To be called with the lock held after every change, so that two
    /// threads cannot drive it in the wrong order.
    fn update(&self, inner: &mut Inner) {
        let wanted = inner.state.mis() != 0;
        if wanted == inner.raised {
            return;
        }
        match self.irq.set(wanted) {
            Ok(()) => inner.raised = wanted,
            Err(error) => log::error!("the console's interrupt: {error}"),
        }
    }
}

impl BusDevice for Pl011 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        let was_empty = inner.state.receive.is_empty();
        bus::answer(data, inner.state.read(offset));
        self.update(&mut inner);
        let took = offset == DR && !was_empty;
        drop(inner);
        if took {
            self.gate.open();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == DR {
            if let Some(byte) = data.first() {
                self.output.push(&[*byte]);
            }
            return;
        }
        let mut inner = self.lock();
        inner.state.write(offset, bus::value(data));
        self.update(&mut inner);
    }
}

impl InputPort for Pl011 {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let room = FIFO.saturating_sub(inner.state.receive.len());
        let taken = bytes.len().min(room);
        inner.state.receive.extend(&bytes[..taken]);
        self.update(&mut inner);
        taken
    }

    fn gate(&self) -> &InputGate {
        &self.gate
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::hypervisor;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl IrqLine for Wire {
        fn set(&self, high: bool) -> Result<(), hypervisor::Error> {
            self.0.store(high, Ordering::Relaxed);
            Ok(())
        }
    }

    const ICR: u64 = 0x044;

    fn port() -> (Pl011, Arc<Wire>) {
        let wire = Arc::new(Wire::default());
        let output = Arc::new(Output::new(std::io::sink(), vec![], Box::new(|_| {})).unwrap());
        (Pl011::new(Arc::clone(&wire) as Arc<dyn IrqLine>, output), wire)
    }

    fn get(port: &Pl011, offset: u64) -> u32 {
        let mut data = [0; 4];
        port.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(port: &Pl011, offset: u64, value: u32) {
        port.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn registers_after_reset() {
        let (port, _) = port();
        for (offset, value) in [
            (DR, 0),
            (0x004, 0),
            (FR, FR_TXFE | FR_RXFE),
            (IBRD, 0),
            (CR, 0x300),
            (IFLS, 0x12),
            (IMSC, 0),
            (RIS, 0),
            (MIS, 0),
            (ICR, 0),
            (0x04c, 0),
            (0x800, 0),
            (0xfe0, 0x11),
            (0xfe4, 0x10),
            (0xfe8, 0x14),
            (0xfec, 0x00),
            (0xff0, 0x0d),
            (0xff4, 0xf0),
            (0xff8, 0x05),
            (0xffc, 0xb1),
            (0xffd, 0),
        ] {
            assert_eq!(get(&port, offset), value, "{offset:#x}");
        }
    }

    #[test]
    fn settings_read_back_within_their_width() {
        let (port, _) = port();
        for (offset, mask) in [
            (ILPR, 0xff),
            (IBRD, 0xffff),
            (FBRD, 0x3f),
            (LCR_H, 0xff),
            (CR, 0xffff),
            (IFLS, 0x3f),
            (IMSC, 0x7ff),
            (DMACR, 0x7),
            (RIS, 0),
            (FR, FR_TXFE | FR_RXFE),
            (PERIPH_ID, 0x11),
        ] {
            set(&port, offset, 0xffff_ffff);
            assert_eq!(get(&port, offset), mask, "{offset:#x}");
        }
    }

    #[test]
    fn the_wire_is_high_while_data_is_there_and_wanted() {
        let (port, wire) = port();
        let high = || wire.0.load(Ordering::Relaxed);
        assert_eq!(port.offer(b"ab"), 2);
        assert!(!high(), "masked");
        assert_eq!((get(&port, RIS), get(&port, MIS)), (INT_RX, 0));
        set(&port, IMSC, INT_RX);
        assert!(high());
        assert_eq!(get(&port, MIS), INT_RX);
        set(&port, ICR, 0x7ff);
        assert!(high(), "clearing does not take the data away");
        assert_eq!(get(&port, DR), u32::from(b'a'));
        assert!(high());
        set(&port, IMSC, 0);
        assert!(!high());
        set(&port, IMSC, INT_RX);
        assert!(high());
        assert_eq!(get(&port, DR), u32::from(b'b'));
        assert!(!high());
        assert_eq!(get(&port, DR), 0);
        assert_eq!(get(&port, FR), FR_TXFE | FR_RXFE);
    }

    #[test]
    fn the_fifo_is_bounded_and_keeps_its_order() {
        let (port, _) = port();
        let bytes: Vec<u8> = (1..=100).collect();
        assert_eq!(port.offer(&bytes), FIFO);
        assert_eq!(port.offer(&bytes), 0);
        assert_eq!(get(&port, FR) & (FR_RXFF | FR_RXFE), FR_RXFF);
        for byte in &bytes[..FIFO] {
            assert_eq!(get(&port, DR), u32::from(*byte));
        }
        assert_eq!(port.offer(&bytes), FIFO);
    }

    #[test]
    fn what_the_guest_writes_goes_out_a_byte_at_a_time() {
        let (port, _) = port();
        for byte in b"hello" {
            port.write(DR, &[*byte, 0xff, 0xff, 0xff]);
        }
        port.write(DR, &[]);
        assert_eq!(port.output.stats().bytes, 5);
    }

    #[test]
    fn a_restored_port_drives_its_wire_again() {
        let (port, _) = port();
        port.offer(b"x");
        set(&port, IMSC, INT_RX);
        let state = port.save();
        let (again, wire) = self::port();
        again.restore(&state).unwrap();
        assert!(wire.0.load(Ordering::Relaxed));
        assert_eq!(again.save(), state);
        assert_eq!((get(&again, DR), get(&again, DR)), (u32::from(b'x'), 0));
        assert!(!wire.0.load(Ordering::Relaxed));
        // A controller that was saved with the wire high hears that it is not.
        wire.0.store(true, Ordering::Relaxed);
        again.restore(&again.save()).unwrap();
        assert!(!wire.0.load(Ordering::Relaxed));
    }

    #[test]
    fn more_input_than_fits_is_refused() {
        for (len, ok) in [(0, true), (FIFO, true), (FIFO + 1, false)] {
            let state = State { receive: vec![0; len].into(), ..State::default() };
            assert_eq!(port().0.restore(&state).is_ok(), ok, "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_access_upsets_it(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u64..WINDOW, proptest::collection::vec(any::<u8>(), 0..9)), 0..200),
        ) {
            let (port, wire) = port();
            for (store, offset, mut data) in accesses {
                if store { port.write(offset, &data) } else { port.read(offset, &mut data) }
                port.offer(&data);
                let state = port.save();
                prop_assert!(state.receive.len() <= FIFO);
                prop_assert_eq!(wire.0.load(Ordering::Relaxed), state.mis() != 0);
            }
        }
    }
}
