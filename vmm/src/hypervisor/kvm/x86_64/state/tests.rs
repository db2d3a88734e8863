//! On whatever KVM there is, a KVM in software will do; without any the tests of it say so and pass.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::super::super::super::{Hypervisor, PsciBy, Vcpu, Vm, VmPlan};
use super::super::super::{DEVICE, Kvm, KvmVm};
use super::super::{VmState, tsc};
use super::*;
use crate::memory;

/// A machine of two processors that have not run.
fn machine(kvm: &Kvm) -> (KvmVm, [KvmVcpu; 2]) {
    let ram = Arc::new(memory::anonymous(&[(0, 0x1_0000)]).unwrap());
    let plan = VmPlan { ram, vcpus: 2, interrupt_controller: true, registers: None, psci: PsciBy::default() };
    let vm = kvm.create_vm(&plan).unwrap();
    let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    vm.seal().unwrap();
    let mut cpuid = kvm.cpu_model().unwrap().cpuid;
    // TSC_DEADLINE, which KVM leaves to the caller.
    cpuid.iter_mut().filter(|leaf| leaf.leaf == 1).for_each(|leaf| leaf.ecx |= 1 << 24);
    for vcpu in &vcpus {
        set_cpuid(vcpu, &cpuid).unwrap();
    }
    (vm, vcpus)
}

fn kvm() -> Option<Kvm> {
    Kvm::open(DEVICE.as_ref()).inspect_err(|error| eprintln!("not tested: {error}")).ok()
}

/// What answers on a processor that cannot run guests is a KVM in software, which neither halts nor has a TSC of the
/// guest's own.
fn is_hardware() -> bool {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    processor.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}

fn saved(kvm: &Kvm) -> ([VcpuState; 2], VmState) {
    let (vm, mut vcpus) = machine(kvm);
    (vcpus.each_mut().map(|vcpu| vcpu.save().unwrap()), vm.save().unwrap())
}

/// Into another machine and out of it again. The TSC runs on, so it is as before in what comes back.
fn there_and_back(kvm: &Kvm, states: &[VcpuState; 2]) -> [VcpuState; 2] {
    let (_vm, mut vcpus) = machine(kvm);
    let mut back = Vec::new();
    for (vcpu, state) in vcpus.iter_mut().zip(states) {
        vcpu.restore(state).unwrap();
        let tsc = state.tsc.clone();
        back.push(VcpuState { tsc, ..vcpu.save().unwrap() });
    }
    back.try_into().unwrap()
}

/// Which parts are not the same: whole states fill a screen.
fn differences(a: &VcpuState, b: &VcpuState) -> Vec<String> {
    let mut parts = Vec::new();
    let mut compare = |same: bool, name: &str, shown: String| {
        if !same {
            parts.push(format!("{name} {shown}"));
        }
    };
    compare(a.cpuid == b.cpuid, "cpuid", String::new());
    compare(a.mp_state == b.mp_state, "mp_state", format!("{} {}", a.mp_state, b.mp_state));
    compare(a.general == b.general, "general", format!("{} / {}", a.general, b.general));
    compare(a.special == b.special, "special", format!("{:x?} / {:x?}", a.special, b.special));
    compare(a.rest == b.rest, "rest", format!("{:x?} / {:x?}", a.rest, b.rest));
    compare(a.nested == b.nested, "nested", String::new());
    compare(a.xsave == b.xsave, "xsave", bytes(&a.xsave, &b.xsave));
    compare(a.xcrs == b.xcrs, "xcrs", format!("{:x?} / {:x?}", a.xcrs, b.xcrs));
    compare(a.debug == b.debug, "debug", format!("{:x?} / {:x?}", a.debug, b.debug));
    let (page, other) = (a.lapic.as_deref().unwrap_or_default(), b.lapic.as_deref().unwrap_or_default());
    compare(a.lapic == b.lapic, "lapic", bytes(page, other));
    let msrs: Vec<_> = a.msrs.iter().zip(&b.msrs).filter(|(a, b)| a != b).collect();
    compare(a.msrs == b.msrs, "msrs", format!("{msrs:x?}"));
    compare(a.tsc == b.tsc, "tsc", format!("{:?} / {:?}", a.tsc, b.tsc));
    compare(a.tsc_deadline == b.tsc_deadline, "tsc_deadline", String::new());
    compare(a.events == b.events, "events", format!("{:?} / {:?}", a.events, b.events));
    assert_eq!(parts.is_empty(), a == b);
    parts
}

fn bytes(a: &[u8], b: &[u8]) -> String {
    let at = (0..a.len().max(b.len())).find(|&at| a.get(at) != b.get(at));
    at.map_or_else(String::new, |at| format!("at {at:#x}: {:x?} / {:x?}", a.get(at), b.get(at)))
}

fn assert_alike(name: &str, a: &[VcpuState; 2], b: &[VcpuState; 2]) {
    for (id, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(differences(a, b), Vec::<String>::new(), "{name}: vcpu {id}");
    }
}

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    state.msrs.iter_mut().find(|msr| msr.index == index).unwrap().value = value;
}

/// What is changed in a state, and its name.
type Change = (&'static str, fn(&mut VcpuState));

#[test]
fn whatever_is_in_a_state_is_in_the_next() {
    let changes: &[Change] = &[
        ("nothing", |_| {}),
        ("general registers", |state| {
            let r = &mut state.general;
            (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp) = (1, 2, 3, 4, 5, 6, 7, 8);
            (r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15) = (9, 10, 11, 12, 13, 14, 15, 16);
            (r.rip, r.rflags) = (0x1234, 0x246);
        }),
        ("segments", |state| {
            state.special.fs.base = 0x1234_5678_9abc;
            state.special.gdt.base = 0x5000;
            state.special.gdt.limit = 0x77;
            state.rest.ldt.base = 0x4321;
        }),
        ("control registers", |state| {
            (state.rest.cr2, state.special.cr3) = (0xdead_b000, 0x3000);
            state.special.cr4 = 1 << 9 | 1 << 3;
        }),
        ("debug registers", |state| {
            state.debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
            state.debug.dr7 = 0x401;
        }),
        ("extended control", |state| state.xcrs[0].1 = 0b11),
        ("the APIC", |state| {
            let lapic = state.lapic.as_mut().unwrap();
            // Spurious interrupts: on, vector 0xff. Timer: masked, vector 0x31.
            lapic[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
            lapic[0x320..0x324].copy_from_slice(&0x1_0031u32.to_le_bytes());
        }),
        ("a deadline that is far away", |state| {
            let lapic = state.lapic.as_mut().unwrap();
            lapic[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
            lapic[0x320..0x324].copy_from_slice(&0x4_0031u32.to_le_bytes());
            state.tsc_deadline = state.tsc.value() + 1_000_000 * u64::from(state.tsc.khz());
        }),
        ("MSRs", |state| {
            set_msr(state, 0xc000_0081, 0x0023_0010_0000_0000);
            set_msr(state, 0xc000_0082, 0xffff_ffff_8000_1000);
            set_msr(state, 0xc000_0102, 0xffff_8880_0000_0000);
            set_msr(state, 0x174, 0x10);
            set_msr(state, 0x277, 0x0007_0106_0007_0406);
            set_msr(state, 0x2ff, 0xc06);
        }),
        ("an NMI in service", |state| state.events.nmi.masked = 1),
        ("vector registers", |state| {
            // MXCSR, and XMM0 with the bit that says that it is there.
            state.xsave[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
            state.xsave[160..168].copy_from_slice(&0x0123_4567_89ab_cdefu64.to_le_bytes());
            state.xsave[512] |= 0b10;
        }),
    ];
    let Some(kvm) = kvm() else { return };
    let (states, _) = saved(&kvm);
    for (name, change) in changes {
        let mut states = states.clone();
        change(&mut states[0]);
        assert_alike(name, &there_and_back(&kvm, &states), &states);
    }
}

#[test]
fn a_processor_that_waits_still_does() {
    let Some(kvm) = kvm() else { return };
    let ([first, second], _) = saved(&kvm);
    assert_eq!(first.mp_state, kvm_bindings::KVM_MP_STATE_RUNNABLE);
    assert_eq!(second.mp_state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);
    // Not where a reset leads to: KVM lets nobody wait there.
    let general = Registers { rip: 0x1000, ..first.general };
    let halted = VcpuState { mp_state: kvm_bindings::KVM_MP_STATE_HALTED, general, ..first };
    let states = [halted, second];
    assert_alike("halted, and waiting", &there_and_back(&kvm, &states), &states);
}

#[test]
fn what_cannot_be_this_processor_s_is_refused() {
    let cases: &[Change] = &[
        ("300 answers of CPUID", |state| state.cpuid = vec![CpuidLeaf::default(); 300]),
        ("the APIC's page has 1023 bytes", |state| state.lapic.as_mut().unwrap().truncate(1023)),
        ("it has no APIC", |state| state.lapic = None),
        ("an XSAVE area of 100 bytes", |state| state.xsave.truncate(100)),
        ("an XSAVE area of 1048576 bytes", |state| state.xsave.resize(1 << 20, 0)),
        ("17 extended control registers", |state| state.xcrs = vec![(0, 1); 17]),
        ("9000 bytes about its own guests", |state| {
            state.nested = Some(Nested { flags: 0, format: 0, body: vec![0; 9000] });
        }),
        ("MSR 0xdeadbeef = 0x1", |state| state.msrs.push(Msr { index: 0xdead_beef, value: 1 })),
    ];
    let Some(kvm) = kvm() else { return };
    let (states, _) = saved(&kvm);
    for (expected, damage) in cases {
        let mut state = states[0].clone();
        damage(&mut state);
        let (_vm, mut vcpus) = machine(&kvm);
        let error = vcpus[0].restore(&state).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("vcpu 0"), "{error}");
    }
}

#[test]
fn a_read_only_register_that_is_as_it_should_be_is_no_hindrance() {
    /// IA32_MTRRCAP.
    const READ_ONLY: u32 = 0xfe;
    let Some(kvm) = kvm() else { return };
    let (_vm, [vcpu, _]) = machine(&kvm);
    let value = msrs::read(&vcpu, READ_ONLY).unwrap();
    let pat = Msr { index: 0x277, value: 0x0606 };
    msrs::restore(&vcpu, &[Msr { index: READ_ONLY, value }, pat]).unwrap();
    assert_eq!(msrs::read(&vcpu, 0x277).unwrap(), 0x0606, "those behind it are written");
    let error = msrs::restore(&vcpu, &[pat, Msr { index: READ_ONLY, value: value + 1 }]).unwrap_err();
    assert!(error.to_string().contains("took 1 of 2 values"), "{error}");
}

#[test]
fn what_lies_between_the_counters_of_two_processors_stays() {
    const BETWEEN: u64 = 123_456_789;
    let Some(kvm) = kvm() else { return };
    let (_vm, mut vcpus) = machine(&kvm);
    if !is_hardware() || !tsc::has_offset(&vcpus[0]) {
        eprintln!("not tested: guests have the host's TSC, or KVM does not tell its offset");
        return;
    }
    let offset = |vcpu: &KvmVcpu| tsc::offset(vcpu).unwrap();
    let before = offset(&vcpus[0]);
    tsc::set_offset(&vcpus[1], before.wrapping_add(BETWEEN)).unwrap();
    let states = vcpus.each_mut().map(|vcpu| vcpu.save().unwrap());
    thread::sleep(Duration::from_millis(20));
    let (_vm, mut vcpus) = machine(&kvm);
    for (vcpu, state) in vcpus.iter_mut().zip(&states) {
        thread::sleep(Duration::from_millis(20));
        vcpu.restore(state).unwrap();
    }
    assert_eq!(offset(&vcpus[1]).wrapping_sub(offset(&vcpus[0])), BETWEEN);
    assert_ne!(offset(&vcpus[0]), before, "it stood still");

    // By value, all have what the first had.
    let mut forgetful = states.clone();
    for state in &mut forgetful {
        state.tsc.forget_offset();
    }
    let (_vm, mut vcpus) = machine(&kvm);
    for (vcpu, state) in vcpus.iter_mut().zip(&forgetful) {
        vcpu.restore(state).unwrap();
    }
    let (value, saved) = (msrs::read(&vcpus[0], msrs::IA32_TSC).unwrap(), states[0].tsc.value());
    let second = u64::from(states[0].tsc.khz()) * 1000;
    assert!((saved..saved + 30 * second).contains(&value), "{value} is not soon after {saved}");
    assert_eq!(offset(&vcpus[0]), offset(&vcpus[1]));

    let mut mixed = states;
    mixed[1].tsc.forget_offset();
    let (_vm, mut vcpus) = machine(&kvm);
    vcpus[0].restore(&mixed[0]).unwrap();
    assert!(vcpus[1].restore(&mixed[1]).unwrap_err().to_string().contains("with its offset"));
}

#[test]
fn chips_and_clock_come_back_as_they_were() {
    let Some(kvm) = kvm() else { return };
    let (_, mut state) = saved(&kvm);
    state.disturb();
    let (vm, _vcpus) = machine(&kvm);
    vm.restore(&state).unwrap();
    let again = vm.save().unwrap();
    assert!(again.is_like(&state), "{again:?} is not {state:?}");
}

#[test]
fn a_deadline_that_may_be_on_its_way_is_sent_again() {
    const DEADLINE: u32 = 0b10 << 17;
    const MASKED: u32 = 1 << 16;
    // The timer's entry, a vector that is requested or in service, what was saved, what is written.
    for (timer, at, saved, expected) in [
        (DEADLINE | 0xec, None, 5, 5),
        (DEADLINE | 0xec, None, 0, 1),
        (DEADLINE | 0x21, None, 0, 1),
        (DEADLINE | MASKED | 0xec, None, 0, 0),
        (0b01 << 17 | 0xec, None, 0, 0),
        (0xec, None, 0, 0),
        (DEADLINE | 0xec, Some((0x200, 0xec)), 0, 0),
        (DEADLINE | 0xec, Some((0x100, 0xec)), 0, 0),
        (DEADLINE | 0xec, Some((0x200, 0xeb)), 0, 1),
    ] {
        let mut lapic = vec![0; LAPIC_LEN];
        lapic[0x320..0x324].copy_from_slice(&u32::to_le_bytes(timer));
        if let Some((base, vector)) = at {
            lapic[base + vector / 32 * 16 + vector % 32 / 8] = 1 << (vector % 8);
        }
        assert_eq!(deadline(saved, &lapic), expected, "{timer:#x} {at:?} {saved}");
    }
    assert_eq!(deadline(0, &[]), 0);
}

#[test]
fn events_come_back_as_they_were() {
    let mut events = kvm_vcpu_events::default();
    // Each field another value.
    events.exception.injected = 1;
    events.exception.nr = 2;
    events.exception.has_error_code = 3;
    events.exception.pending = 4;
    events.exception.error_code = 5;
    events.interrupt.injected = 6;
    events.interrupt.nr = 7;
    events.interrupt.soft = 8;
    events.interrupt.shadow = 9;
    events.nmi.injected = 10;
    events.nmi.pending = 11;
    events.nmi.masked = 12;
    events.sipi_vector = 13;
    events.flags = 14;
    events.smi.smm = 15;
    events.smi.pending = 16;
    events.smi.smm_inside_nmi = 17;
    events.smi.latched_init = 18;
    events.triple_fault.pending = 19;
    events.exception_has_payload = 20;
    events.exception_payload = 21;
    assert_eq!(Events::of(&events).to_kvm(), events);
}
