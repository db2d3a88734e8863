use std::sync::Mutex;

use super::*;
use crate::arch::native::{Entry, Registers};
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::hypervisor::{Error, Exit, IrqLine, Kick, Vcpu};

/// A machine that is nothing but wires.
#[derive(Default)]
struct Wires(Mutex<Vec<(u32, Arc<Wire>)>>);

impl Wires {
    fn rises(&self, line: u32) -> u32 {
        let wires = self.0.lock().unwrap();
        let wire = &wires.iter().find(|(number, _)| *number == line).unwrap().1;
        wire.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// A processor that there is none of.
enum Nobody {}

impl Vm for Wires {
    type Vcpu = Nobody;
    type State = ();

    fn create_vcpu(&self, id: u32) -> Result<Nobody, Error> {
        let source = std::io::Error::other("there is none");
        Err(Error::Call { call: "create", object: format!("vcpu {id}"), source })
    }
    fn seal(&self) -> Result<(), Error> {
        Ok(())
    }
    fn irq_line(&self, line: u32, _: Trigger) -> Result<Arc<dyn IrqLine>, Error> {
        let wire = Arc::new(Wire::default());
        self.0.lock().unwrap().push((line, Arc::clone(&wire)));
        Ok(wire)
    }
    fn doorbell(&self, _: u64, _: u32, _: &Event) -> Result<bool, Error> {
        Ok(false)
    }
    fn save(&self) -> Result<(), Error> {
        Ok(())
    }
    fn restore(&self, (): &()) -> Result<(), Error> {
        Ok(())
    }
    fn rewind(&self) -> Result<(), Error> {
        Ok(())
    }
}

impl Vcpu for Nobody {
    type State = ();

    fn id(&self) -> u32 {
        match *self {}
    }
    fn hardware_id(&self) -> Result<u64, Error> {
        match *self {}
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        match *self {}
    }
    fn enter_at(&mut self, _: &Entry) -> Result<(), Error> {
        match *self {}
    }
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        match *self {}
    }
    fn save(&mut self) -> Result<(), Error> {
        match *self {}
    }
    fn restore(&mut self, (): &()) -> Result<(), Error> {
        match *self {}
    }
    fn stood_still(&mut self) -> Result<(), Error> {
        match *self {}
    }
    fn registers(&self) -> Result<Registers, Error> {
        match *self {}
    }
}

fn board(state: Option<&BoardState>) -> Result<(Board, Wires, Arc<Output>), super::Error> {
    let wires = Wires::default();
    let output = Arc::new(Output::new(std::io::sink(), vec![], Box::new(|_| {})).unwrap());
    let board = assemble(&wires, Arc::clone(&output), Arc::new(|_| {}))?;
    if let Some(state) = state {
        board.chips.restore(state)?;
    }
    Ok((board, wires, output))
}

#[cfg(target_arch = "x86_64")]
mod serial {
    use crate::arch::x86_64::layout;

    pub const LINE: u32 = layout::SERIAL_LINE;
    /// The interrupt enable register, and received data in it.
    pub const ENABLE: (u64, u8) = (layout::SERIAL_PORT as u64 + 1, 1);
    pub const DATA: u64 = layout::SERIAL_PORT as u64;
}

#[cfg(target_arch = "aarch64")]
mod serial {
    use crate::arch::aarch64::layout;

    pub const LINE: u32 = layout::SERIAL_LINE;
    /// IMSC, and the receive interrupt in it.
    pub const ENABLE: (u64, u8) = (layout::SERIAL_BASE + 0x38, 1 << 4);
    pub const DATA: u64 = layout::SERIAL_BASE;
}

impl Board {
    fn bus(&self) -> &crate::bus::Bus {
        if cfg!(target_arch = "x86_64") { &self.buses.ports } else { &self.buses.memory }
    }

    fn input(&self) -> u8 {
        let mut data = [0];
        assert!(self.bus().read(serial::DATA, &mut data));
        data[0]
    }
}

#[test]
fn a_board_goes_on_where_it_was() {
    let (first, _, output) = board(None).unwrap();
    let (register, receive) = serial::ENABLE;
    assert!(first.bus().write(register, &[receive]));
    assert!(first.bus().write(serial::DATA, b"x"));
    assert_eq!(output.stats().bytes, 1);
    assert_eq!(first.console.offer(b"ab"), 2);
    if let Some(press) = &first.power {
        press().unwrap();
    }
    let state = first.chips.save();
    assert_eq!(first.chips.save(), state, "it is only looked at");
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<BoardState>(&bytes).unwrap(), state);

    let (second, wires, output) = board(Some(&state)).unwrap();
    assert_eq!(second.chips.save(), state);
    assert_eq!(output.stats().bytes, 0, "what was written was written there");
    assert_eq!(wires.rises(serial::LINE), 1, "there is input");
    assert_eq!([second.input(), second.input(), second.input()], [b'a', b'b', 0]);
    assert_eq!([first.input(), first.input(), first.input()], [b'a', b'b', 0], "both go on");
    events(&second, &wires);

    let (third, wires, _) = board(None).unwrap();
    assert_eq!(wires.rises(serial::LINE), 0);
    let fresh = third.chips.save();
    assert_ne!(fresh, state);

    // One that has gone on goes back.
    for state in [&state, &fresh] {
        second.chips.restore(state).unwrap();
        assert_eq!(second.chips.save(), *state);
    }
}

/// The power button that was pressed is told again, and taken once.
#[cfg(target_arch = "x86_64")]
fn events(board: &Board, wires: &Wires) {
    use crate::arch::x86_64::layout;
    use crate::devices::power::{EVENT_POWER_BUTTON, EVENTS};

    assert_eq!(wires.rises(layout::POWER_LINE), 1);
    let mut data = [0];
    for expected in [EVENT_POWER_BUTTON, 0] {
        assert!(board.buses.ports.read(u64::from(layout::POWER_PORT + EVENTS), &mut data));
        assert_eq!(data[0], expected);
    }
}

/// There is none.
#[cfg(target_arch = "aarch64")]
fn events(board: &Board, _wires: &Wires) {
    assert!(board.power.is_none());
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let (first, ..) = board(None).unwrap();
    let bytes = postcard::to_stdvec(&first.chips.save()).unwrap();
    // With the length of what waits for the guest in another place on each architecture, any byte is changed.
    let mut refused = 0;
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] = 127;
        changed.extend([0; 127]);
        let Ok((state, _)) = postcard::take_from_bytes::<BoardState>(&changed) else { continue };
        refused += u32::from(board(Some(&state)).is_err());
    }
    assert!(refused > 0);
}
