//! Whole machines with kernels of a few instructions, on whatever KVM there is: hardware is not
//! needed for these, a KVM in software will do. Without any the tests say so and pass.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // clippy takes only test functions, not their helpers, for tests

#[path = "machine/code.rs"]
mod code;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::hypervisor::PsciBy;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Config, Error, Machine, Outcome, Restore, Status};
use vmm::snapshot::{self, Form, Snapshot};

const SOON: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn kvm() -> Option<Kvm> {
    Kvm::open(DEVICE.as_ref()).inspect_err(|error| eprintln!("not tested: {error}")).ok()
}

/// A kernel's file, gone when it is dropped.
struct Kernel(PathBuf);

impl Kernel {
    fn new(name: &str, parts: &[&[u8]]) -> Self {
        let path = std::env::temp_dir().join(format!("vmm-machine-{}-{name}", std::process::id()));
        fs::write(&path, code::kernel(&parts.concat())).unwrap();
        Self(path)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn build(kvm: &Kvm, kernel: &Kernel, vcpus: u32) -> (Machine, Screen) {
    let screen = Screen::default();
    let config = Config {
        kernel: kernel.0.clone(),
        initrd: None,
        command_line: String::new(),
        memory: 64 << 20,
        memory_max: None,
        vcpus,
        console: Box::new(screen.clone()),
        markers: vec![],
        psci: PsciBy::default(),
        devices: vec![],
    };
    (Machine::build(kvm, config).unwrap(), screen)
}

/// A snapshot's directory, gone when it is dropped.
struct Saved(PathBuf);

impl Saved {
    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vmm-saved-{}-{name}", std::process::id()))
    }

    fn of(machine: &Machine, name: &str) -> Self {
        let path = Self::place(name);
        snapshot::make(&path, |state, memory| machine.snapshot(state, memory, Form::Sparse)).unwrap();
        Self(path)
    }

    /// Of a machine that came from `self`.
    fn above(&self, machine: &Machine, name: &str) -> Result<Self, Error> {
        let path = Self::place(name);
        let write = |state: &File, memory: &File| machine.snapshot(state, memory, Form::Over);
        snapshot::make_over(&path, &self.0, write).map(|_| Self(path))
    }

    fn restored(&self, kvm: &Kvm) -> Machine {
        let (console, markers, devices) = (Box::new(io::sink()), vec![], vec![]);
        let snapshot = Snapshot::open(&self.0).unwrap();
        Machine::restore(kvm, Restore { snapshot, console, markers, devices }).unwrap()
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn wait(what: &str, until: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !until() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A name, the code, and whether an outcome is the one it leads to.
type Ending = (&'static str, &'static [u8], fn(&Outcome) -> bool);

#[test]
fn how_a_guest_ends_is_told_apart() {
    let Some(kvm) = kvm() else { return };
    let endings: &[Ending] = &[
        ("off", code::POWER_OFF, |outcome| matches!(outcome, Outcome::PowerOff)),
        ("reset", code::RESET, |outcome| matches!(outcome, Outcome::Reset)),
        #[cfg(target_arch = "x86_64")]
        ("crash", code::CRASH, |outcome| matches!(outcome, Outcome::Crash(_))),
    ];
    for (name, ending, expected) in endings {
        let kernel = Kernel::new(name, &[code::HI, ending]);
        let (machine, screen) = build(&kvm, &kernel, 2);
        assert_eq!(machine.status(), Status::Paused);
        assert_eq!(machine.console_stats().bytes, 0, "nothing runs before it is told to");
        machine.resume().unwrap();
        let outcome = machine.wait_for(SOON).expect(name);
        assert!(expected(&outcome), "{name}: {outcome}");
        assert_eq!(machine.status(), Status::Ended);
        assert!(matches!(machine.resume(), Err(Error::Order { .. })));
        assert!(matches!(machine.pause(SOON), Err(Error::Order { .. })));
        drop(machine);
        assert_eq!(screen.text(), "hi\n", "{name}");
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    let kernel = Kernel::new("dots", &[code::HI, code::DOTS]);
    let (machine, _screen) = build(&kvm, &kernel, 2);
    machine.resume().unwrap();
    for _ in 0..20 {
        let before = machine.console_stats().bytes;
        wait("it runs", || machine.console_stats().bytes > before);
        machine.pause(SOON).unwrap();
        assert_eq!(machine.status(), Status::Paused);
        let paused = machine.console_stats().bytes;
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.console_stats().bytes, paused);
        machine.resume().unwrap();
    }
    machine.stop();
    assert!(matches!(machine.wait(), Outcome::Stopped));
    let counts = machine.counts();
    assert!(counts.iter().all(|counts| counts.kicks > 0), "{counts:?}");
}

#[test]
fn two_machines_in_one_process_do_not_know_of_each_other() {
    let Some(kvm) = kvm() else { return };
    let (dots, off) = (
        Kernel::new("two-dots", &[code::HI, code::DOTS]),
        Kernel::new("two-off", &[code::HI, code::POWER_OFF]),
    );
    let (running, _) = build(&kvm, &dots, 1);
    running.resume().unwrap();
    wait("it runs", || running.console_stats().bytes > 10);
    for _ in 0..5 {
        let (other, screen) = build(&kvm, &off, 1);
        other.resume().unwrap();
        assert!(matches!(other.wait_for(SOON), Some(Outcome::PowerOff)));
        drop(other);
        assert_eq!(screen.text(), "hi\n");
        let before = running.console_stats().bytes;
        wait("it still runs", || running.console_stats().bytes > before);
        assert_eq!(running.status(), Status::Running);
    }
}

#[test]
fn a_machine_that_is_dropped_is_gone() {
    let Some(kvm) = kvm() else { return };
    let kernel = Kernel::new("drop", &[code::HI, code::DOTS]);
    for started in [false, true] {
        let (machine, _) = build(&kvm, &kernel, 2);
        if started {
            machine.resume().unwrap();
        }
        drop(machine);
    }
}

fn counter(machine: &Machine) -> u32 {
    machine.ram().read_obj(GuestAddress(code::COUNTER)).unwrap()
}

fn counts_on(machine: &Machine) {
    machine.resume().unwrap();
    let before = counter(machine);
    wait("it counts", || counter(machine) != before || machine.status() == Status::Ended);
    machine.pause(SOON).expect("its register and its memory are of one moment");
}

#[test]
fn a_machine_goes_back_to_its_snapshot_again_and_again() {
    let Some(kvm) = kvm() else { return };
    let kernel = Kernel::new("count", &[code::HI, code::COUNT, code::POWER_OFF]);
    let (first, _) = build(&kvm, &kernel, 2);
    first.resume().unwrap();
    wait("it counts", || counter(&first) > 0);
    first.pause(SOON).unwrap();
    let saved = Saved::of(&first, "first");
    let begin = counter(&first);
    let machine = saved.restored(&kvm);
    for round in 0..200 {
        counts_on(&machine);
        assert_ne!(counter(&machine), begin, "round {round}");
        machine.reset(&Snapshot::open(&saved.0).unwrap()).unwrap();
        assert_eq!((machine.status(), counter(&machine)), (Status::Paused, begin), "round {round}");
    }
    counts_on(&machine);
    // What is no way back changes nothing.
    let other = Saved::of(&first, "other");
    let before = counter(&machine);
    let reset = |machine: &Machine| machine.reset(&Snapshot::open(&other.0).unwrap()).unwrap_err();
    let (refused, booted) = (reset(&machine), reset(&first));
    assert!(matches!(refused, Error::Origin) && matches!(booted, Error::Booted(_)), "{refused}; {booted}");
    assert_eq!(counter(&machine), before);
    counts_on(&machine);
    machine.resume().unwrap();
    let error = machine.reset(&Snapshot::open(&saved.0).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Order { .. }), "{error}");
    assert_eq!(machine.status(), Status::Running);
}

#[test]
fn a_machine_is_saved_over_what_it_came_from() {
    let Some(kvm) = kvm() else { return };
    let kernel = Kernel::new("over", &[code::HI, code::COUNT, code::POWER_OFF]);
    let (first, _) = build(&kvm, &kernel, 2);
    counts_on(&first);
    let mut saved = Saved::of(&first, "over");
    let error = saved.above(&first, "booted").err().unwrap();
    assert!(matches!(error, Error::Booted(_)), "{error}");
    // Each over the one before it, which goes.
    for round in 0..10 {
        let machine = saved.restored(&kvm);
        counts_on(&machine);
        let before = counter(&machine);
        let above = saved.above(&machine, &format!("over-{round}")).unwrap();
        let size =
            |name: &str| std::os::unix::fs::MetadataExt::blocks(&above.0.join(name).metadata().unwrap());
        assert!(size("memory") <= size("base"), "round {round}");
        saved = above;
        let again = saved.restored(&kvm);
        assert_eq!(counter(&again), before, "round {round}");
        counts_on(&again);
        again.reset(&Snapshot::open(&saved.0).unwrap()).unwrap();
        assert_eq!(counter(&again), before, "round {round}");
        counts_on(&machine);
    }
}
