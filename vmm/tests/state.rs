//! Processors and machines, saved and restored, with a guest of a few instructions: on whatever KVM there is, a KVM in
//! software will do. Without any the tests say so and pass.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // clippy takes only test functions, not their helpers, for tests

#[path = "state/guest.rs"]
mod guest;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::{Bytes, GuestAddress};
use vmm::hypervisor::kvm::{DEVICE, Kvm, KvmVcpu, KvmVm};
use vmm::hypervisor::{Exit, Hypervisor, PsciBy, Vcpu, Vm, VmPlan};
use vmm::memory::{self, GuestRam};

type VcpuState = <KvmVcpu as Vcpu>::State;
type VmState = <KvmVm as Vm>::State;

fn kvm() -> Option<Kvm> {
    Kvm::open(DEVICE.as_ref()).inspect_err(|error| eprintln!("not tested: {error}")).ok()
}

/// A machine of one processor, on the thread that made it.
struct Machine {
    vcpu: KvmVcpu,
    vm: KvmVm,
}

fn ram() -> Arc<GuestRam> {
    let ram = Arc::new(memory::anonymous(&[guest::RAM]).unwrap());
    ram.write_slice(&guest::code(), GuestAddress(guest::START)).unwrap();
    ram
}

fn plan(ram: &Arc<GuestRam>) -> VmPlan {
    VmPlan {
        ram: Arc::clone(ram),
        vcpus: 1,
        interrupt_controller: true,
        registers: None,
        psci: PsciBy::default(),
    }
}

impl Machine {
    fn new(kvm: &Kvm, ram: &Arc<GuestRam>) -> Self {
        let vm = kvm.create_vm(&plan(ram)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vm.seal().unwrap();
        Self { vcpu, vm }
    }

    fn begun(kvm: &Kvm, ram: &Arc<GuestRam>) -> Self {
        let mut machine = Self::new(kvm, ram);
        machine.vcpu.enter_at(&guest::entry(&kvm.cpu_model().unwrap())).unwrap();
        machine
    }

    fn restored(kvm: &Kvm, ram: &Arc<GuestRam>, (vcpu, vm): &(VcpuState, VmState)) -> Self {
        let mut machine = Self::new(kvm, ram);
        machine.vcpu.restore(vcpu).unwrap();
        machine.vm.restore(vm).unwrap();
        machine.vcpu.stood_still().unwrap();
        machine
    }

    fn run_for(&mut self, time: Duration) {
        let kicker = self.vcpu.kicker();
        let kick = thread::spawn(move || {
            thread::sleep(time);
            kicker.kick();
        });
        let exit = self.vcpu.run().unwrap();
        assert!(matches!(exit, Exit::Kicked), "{exit:?}");
        kick.join().unwrap();
    }

    fn save(&mut self) -> (VcpuState, VmState) {
        (self.vcpu.save().unwrap(), self.vm.save().unwrap())
    }

    /// Lets the guest end, and gives the numbers it says.
    fn end(mut self, ram: &GuestRam) -> [u32; 3] {
        ram.write_obj(1u8, GuestAddress(guest::END)).unwrap();
        std::array::from_fn(|_| match self.vcpu.run().unwrap() {
            #[cfg(target_arch = "x86_64")]
            Exit::PortWrite { port: 0x3f8, data, .. } => u32::from_le_bytes(data.try_into().unwrap()),
            #[cfg(target_arch = "aarch64")]
            Exit::MmioWrite { addr: 0x900_0000, data } => u32::from_le_bytes(data.try_into().unwrap()),
            other => panic!("{other:?}"),
        })
    }
}

fn clock(ram: &GuestRam) -> u64 {
    ram.read_obj(GuestAddress(guest::CLOCK)).unwrap()
}

fn judge(ram: &GuestRam, [rounds, general, vector]: [u32; 3]) {
    let memory = ram.read_obj::<u32>(GuestAddress(guest::DATA)).unwrap();
    assert!(rounds > 0, "it ran");
    assert_eq!([general, vector, memory], guest::results(rounds), "after {rounds} rounds");
    assert_eq!(ram.read_obj::<u32>(GuestAddress(guest::BACKWARDS)).unwrap(), 0, "its clock went back");
}

#[test]
fn a_guest_goes_on_exactly_in_five_hundred_machines_one_after_the_other() {
    let Some(kvm) = kvm() else { return };
    let ram = ram();
    let mut machine = Machine::begun(&kvm, &ram);
    machine.run_for(Duration::from_millis(5));
    for _ in 0..500 {
        let state = machine.save();
        drop(machine);
        machine = Machine::restored(&kvm, &ram, &state);
        machine.run_for(Duration::from_micros(200));
    }
    let said = machine.end(&ram);
    judge(&ram, said);
}

#[test]
fn a_guest_goes_on_as_if_nothing_had_been_asked() {
    let Some(kvm) = kvm() else { return };
    let ram = ram();
    let mut machine = Machine::begun(&kvm, &ram);
    for _ in 0..50 {
        machine.run_for(Duration::from_micros(200));
        machine.save();
        machine.vcpu.stood_still().unwrap();
    }
    let said = machine.end(&ram);
    judge(&ram, said);
}

#[test]
fn the_guest_s_clock_stands_still_meanwhile() {
    const MEANWHILE: Duration = Duration::from_secs(2);
    let Some(kvm) = kvm() else { return };
    if !guest::is_hardware() {
        eprintln!("not tested: neither svm nor vmx, so guests have the host's clock");
        return;
    }
    let ram = ram();
    let mut machine = Machine::begun(&kvm, &ram);
    machine.run_for(Duration::from_millis(5));
    let (begun, first) = (Instant::now(), clock(&ram));
    machine.run_for(Duration::from_millis(100));
    let (ticks, span) = (clock(&ram) - first, begun.elapsed());
    let state = machine.save();
    drop(machine);
    thread::sleep(MEANWHILE);
    let before = clock(&ram);
    let mut machine = Machine::restored(&kvm, &ram, &state);
    machine.run_for(Duration::from_millis(5));
    let passed = span.as_nanos() * u128::from(clock(&ram) - before) / u128::from(ticks);
    assert!(passed > 0, "it goes on");
    assert!(passed < MEANWHILE.as_nanos() / 2, "{passed} ns have passed for the guest");
    let said = machine.end(&ram);
    judge(&ram, said);
}

/// A state of a guest that has run, as bytes.
fn encoded(kvm: &Kvm) -> (Vec<u8>, Vec<u8>) {
    let ram = ram();
    let mut machine = Machine::begun(kvm, &ram);
    machine.run_for(Duration::from_millis(2));
    let (vcpu, vm) = machine.save();
    let bytes = (postcard::to_allocvec(&vcpu).unwrap(), postcard::to_allocvec(&vm).unwrap());
    assert_eq!(postcard::from_bytes::<VcpuState>(&bytes.0).unwrap(), vcpu);
    assert_eq!(postcard::from_bytes::<VmState>(&bytes.1).unwrap(), vm);
    bytes
}

#[test]
fn a_state_cut_short_is_an_error() {
    let Some(kvm) = kvm() else { return };
    let (vcpu, vm) = encoded(&kvm);
    for len in 0..vcpu.len() {
        assert!(postcard::from_bytes::<VcpuState>(&vcpu[..len]).is_err(), "{len} of {}", vcpu.len());
    }
    for len in 0..vm.len() {
        assert!(postcard::from_bytes::<VmState>(&vm[..len]).is_err(), "{len} of {}", vm.len());
    }
}

/// Whatever is in the file, the monitor gets over it: the state is refused, or it is some processor's.
#[test]
fn a_damaged_state_is_refused_or_taken_but_nothing_breaks() {
    let Some(kvm) = kvm() else { return };
    let (vcpu, vm) = encoded(&kvm);
    let damage = |len: usize| prop::collection::vec((0..len, any::<u8>()), 1..8);
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    runner
        .run(&(damage(vcpu.len()), damage(vm.len())), |(to_vcpu, to_vm)| {
            let (mut vcpu, mut vm) = (vcpu.clone(), vm.clone());
            for (bytes, damage) in [(&mut vcpu, to_vcpu), (&mut vm, to_vm)] {
                for (at, byte) in damage {
                    bytes[at] = byte;
                }
            }
            let mut machine = Machine::new(&kvm, &ram());
            if let Ok(state) = postcard::from_bytes::<VcpuState>(&vcpu) {
                let _ = machine.vcpu.restore(&state);
            }
            if let Ok(state) = postcard::from_bytes::<VmState>(&vm) {
                let _ = machine.vm.restore(&state);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn bytes_of_no_state_at_all_are_an_error_or_some_state() {
    let config = Config { failure_persistence: None, ..Config::default() };
    proptest!(config, |(bytes in prop::collection::vec(any::<u8>(), 0..4096))| {
        let _ = postcard::from_bytes::<VcpuState>(&bytes);
        let _ = postcard::from_bytes::<VmState>(&bytes);
    });
}

#[test]
fn a_host_misses_nothing_of_itself_and_knows_it_at_once() {
    let Some(kvm) = kvm() else { return };
    let _machine = Machine::new(&kvm, &ram());
    let own = kvm.fingerprint().unwrap();
    let begun = Instant::now();
    let again = kvm.fingerprint().unwrap();
    let took = begun.elapsed();
    eprintln!("a fingerprint takes {took:?}");
    assert_eq!(own, again);
    assert_eq!(own.missing_on(&again), Vec::<String>::new());
    let bytes = postcard::to_allocvec(&own).unwrap();
    assert_eq!(postcard::from_bytes::<vmm::arch::native::Fingerprint>(&bytes).unwrap(), own);
    // Before any machine it is the same.
    assert_eq!(Kvm::open(DEVICE.as_ref()).unwrap().fingerprint().unwrap(), own);
    assert!(took < Duration::from_millis(100), "{took:?}");
}
