//! On whatever KVM there is; without any the tests say so and pass.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::super::{Exit, Hypervisor, PsciBy, Vcpu, Vm, VmPlan};
use super::super::super::{DEVICE, Kvm};
use super::super::registers::PTIMER_CNT;
use super::super::{PC, SP_EL1, core_register, system_register};
use super::*;
use crate::arch::aarch64::Entry;
use crate::memory;

const RAM: u64 = 0x4000_0000;

/// A machine of two processors that have not run.
fn machine_with(kvm: &Kvm, psci: PsciBy) -> (KvmVm, [KvmVcpu; 2]) {
    let ram = Arc::new(memory::anonymous(&[(RAM, 0x1_0000)]).unwrap());
    // hvc #0, and on the spot for ever.
    ram.write_slice(&[0x02, 0x00, 0x00, 0xd4, 0x00, 0x00, 0x00, 0x14], GuestAddress(RAM)).unwrap();
    let vm =
        kvm.create_vm(&VmPlan { ram, vcpus: 2, interrupt_controller: true, registers: None, psci }).unwrap();
    let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    vm.seal().unwrap();
    (vm, vcpus)
}

fn machine(kvm: &Kvm) -> (KvmVm, [KvmVcpu; 2]) {
    machine_with(kvm, PsciBy::Hypervisor)
}

fn kvm() -> Option<Kvm> {
    Kvm::open(DEVICE.as_ref()).inspect_err(|error| eprintln!("not tested: {error}")).ok()
}

type States = ([VcpuState; 2], VmState);

fn save((vm, vcpus): &mut (KvmVm, [KvmVcpu; 2])) -> States {
    (vcpus.each_mut().map(|vcpu| vcpu.save().unwrap()), vm.save().unwrap())
}

fn restored(kvm: &Kvm, (states, vm_state): &States) -> (KvmVm, [KvmVcpu; 2]) {
    let (vm, mut vcpus) = machine(kvm);
    for (vcpu, state) in vcpus.iter_mut().zip(states) {
        vcpu.restore(state).unwrap();
    }
    vm.restore(vm_state).unwrap();
    (vm, vcpus)
}

/// Says which registers are not the same: whole states fill a screen. The counter runs on.
fn assert_alike(name: &str, there: &States, back: &States) {
    for (id, (a, b)) in there.0.iter().zip(&back.0).enumerate() {
        assert_eq!(a.registers.differences(&b.registers), Vec::<String>::new(), "{name}: vcpu {id}");
        assert_eq!(VcpuState { count: b.count, ..a.clone() }, *b, "{name}: vcpu {id}");
    }
    assert_eq!(there.1, back.1, "{name}");
}

const TTBR0_EL1: u64 = system_register(3, 0, 2, 0, 0);
const VBAR_EL1: u64 = system_register(3, 0, 12, 0, 0);
const TPIDR_EL0: u64 = system_register(3, 3, 13, 0, 2);
const SCTLR_EL1: u64 = system_register(3, 0, 1, 0, 0);
/// By the accident that the module of registers tells of.
const CNTV_CVAL_EL0: u64 = system_register(3, 3, 14, 0, 2);
const CNTV_CTL_EL0: u64 = system_register(3, 3, 14, 3, 1);
const V0: u64 = 0x6040_0000_0010_0054;

/// What is changed in a state, and its name.
type Change = (&'static str, fn(&mut States));

#[test]
fn whatever_is_in_a_state_is_in_the_next() {
    let changes: &[Change] = &[
        ("nothing", |_| {}),
        ("general registers", |(vcpus, _)| {
            for index in 0..31 {
                vcpus[0].registers.change(core_register(index), &(index + 1).to_le_bytes());
            }
            vcpus[0].registers.change(PC, &0x4000_1234u64.to_le_bytes());
            vcpus[1].registers.change(SP_EL1, &0x4000_5678u64.to_le_bytes());
        }),
        ("system registers", |(vcpus, _)| {
            for (id, value) in [
                (TTBR0_EL1, 0x4000_2000u64),
                (VBAR_EL1, 0x4000_3800),
                (TPIDR_EL0, u64::MAX),
                (SCTLR_EL1, 0x30d0_0980),
            ] {
                vcpus[0].registers.change(id, &value.to_le_bytes());
            }
        }),
        ("vector registers", |(vcpus, _)| vcpus[0].registers.change(V0, &[7; 16])),
        ("a timer", |(vcpus, _)| {
            vcpus[0].registers.change(CNTV_CVAL_EL0, &0x1234_5678_9abcu64.to_le_bytes());
            vcpus[0].registers.change(CNTV_CTL_EL0, &1u64.to_le_bytes());
        }),
        ("power", |(vcpus, _)| {
            assert_eq!([vcpus[0].mp_state, vcpus[1].mp_state], [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED]);
            vcpus[0].mp_state = KVM_MP_STATE_STOPPED;
            vcpus[1].mp_state = KVM_MP_STATE_RUNNABLE;
        }),
        ("the GIC", |(_, vm)| vm.gic.as_mut().unwrap().disturb()),
    ];
    let Some(kvm) = kvm() else { return };
    let original = save(&mut machine(&kvm));
    for (name, change) in changes {
        let mut states = original.clone();
        change(&mut states);
        assert!(*name == "nothing" || states != original, "{name}");
        let back = save(&mut restored(&kvm, &states));
        assert_alike(name, &states, &back);
    }
}

#[test]
fn what_cannot_be_this_machine_s_is_refused() {
    let cases: &[Change] = &[
        ("vcpu 0: it was made with features 0x14", |(vcpus, _)| vcpus[0].features = 0x14),
        ("registers with", |(vcpus, _)| vcpus[0].registers.spoil_values()),
        ("register 0x6030000000130000", |(vcpus, _)| vcpus[0].registers.spoil_id(0x6030_0000_0013_0000)),
        ("the VM: it has no GIC", |(_, vm)| vm.gic = None),
        ("registers of its GIC", |(_, vm)| vm.gic.as_mut().unwrap().lose_a_register()),
        ("its GIC is of 1 processors", |(_, vm)| vm.gic.as_mut().unwrap().lose_a_processor()),
        ("of an interface to the GIC", |(_, vm)| vm.gic.as_mut().unwrap().lose_an_interface()),
    ];
    let Some(kvm) = kvm() else { return };
    let original = save(&mut machine(&kvm));
    for (expected, damage) in cases {
        let mut states = original.clone();
        damage(&mut states);
        let (vm, mut vcpus) = machine(&kvm);
        let done = vcpus[0]
            .restore(&states.0[0])
            .and_then(|()| vcpus[1].restore(&states.0[1]))
            .and_then(|()| vm.restore(&states.1));
        let error = done.unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let (vm, _vcpus) = machine(&kvm);
    let error = vm.restore(&original.1).unwrap_err().to_string();
    assert!(error.contains("none of its processors has been restored"), "{error}");
}

#[test]
fn the_counters_go_on_from_where_they_were() {
    let Some(kvm) = kvm() else { return };
    // A minute and a half of the fastest there are.
    const SOON: u64 = 90_000_000_000;
    const EARLIER: u64 = 1 << 50;
    let mut states = save(&mut machine(&kvm));
    for state in &mut states.0 {
        state.count += EARLIER;
    }
    thread::sleep(Duration::from_millis(20));
    let (vm, vcpus) = restored(&kvm, &states);
    let range = states.0[0].count..states.0[0].count + SOON;
    for vcpu in &vcpus {
        let count = get(vcpu, TIMER_CNT).unwrap();
        assert!(range.contains(&count), "{count:#x} is not soon after {range:x?}");
        if vm.fd().check_extension(Cap::CounterOffset) {
            let count = get(vcpu, PTIMER_CNT).unwrap();
            assert!(range.contains(&count), "physical: {count:#x} is not soon after {range:x?}");
        } else {
            eprintln!("not tested: KVM has no offset for the physical counter");
        }
    }
}

#[test]
fn a_call_that_has_been_answered_is_finished_before_it_is_saved() {
    const ANSWER: u64 = 0x5678_1234;
    let Some(kvm) = kvm() else { return };
    if !kvm.fd.check_extension(Cap::CounterOffset) {
        eprintln!("not tested: calls are forwarded as of Linux 6.4, like offsets of the counter");
        return;
    }
    let (vm, mut vcpus) = machine_with(&kvm, PsciBy::Monitor);
    vcpus[0].enter_at(&Entry { pc: RAM, x0: 0x8400_0000 }).unwrap();
    match vcpus[0].run().unwrap() {
        Exit::Call { x, answer } => {
            assert_eq!(x[0], 0x8400_0000);
            *answer = ANSWER;
        }
        other => panic!("{other:?}"),
    }
    let states = (vcpus.each_mut().map(|vcpu| vcpu.save().unwrap()), vm.save().unwrap());
    let (vm, mut vcpus) = machine_with(&kvm, PsciBy::Monitor);
    for (vcpu, state) in vcpus.iter_mut().zip(&states.0) {
        vcpu.restore(state).unwrap();
    }
    vm.restore(&states.1).unwrap();
    let registers = vcpus[0].registers().unwrap();
    assert_eq!((registers.x[0], registers.pc), (ANSWER, RAM + 4));

    // What is entered anew has nothing of it left.
    vcpus[0].enter_at(&Entry { pc: RAM, x0: 7 }).unwrap();
    let registers = vcpus[0].registers().unwrap();
    assert_eq!((registers.x[0], registers.pc, registers.sp_el1), (7, RAM, 0));
}
