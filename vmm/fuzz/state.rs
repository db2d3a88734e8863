//! The state's file of a snapshot, from somebody who can make checksums fit: an error, or a state that can be written again.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmm::hypervisor::{Vcpu, Vm, kvm};
use vmm::snapshot::{Header, read_state, sealed, write_state};

type Processor = <kvm::KvmVcpu as Vcpu>::State;
type Controller = <kvm::KvmVm as Vm>::State;

/// One that this host's monitor reads.
fn header() -> Vec<u8> {
    let header = Header {
        architecture: std::env::consts::ARCH.into(),
        hypervisor: "kvm".into(),
        build: "1".into(),
        created: 7,
        page_size: 4096,
        vcpus: 1,
        memory: 64 << 20,
        memory_max: 64 << 20,
        devices: Vec::new(),
        fingerprint: vec![1, 2, 3],
        memory_len: 64 << 20,
        memory_data: 4096,
        memory_crc: 1,
        base: None,
    };
    postcard::to_stdvec(&header).expect("a header is encoded")
}

fn state(header: &[u8], body: &[u8]) {
    let path = Path::new("state");
    let Ok((header, state)) = read_state(path, &sealed(header, body)) else { return };
    for vcpu in &state.vcpus {
        part::<Processor>(vcpu);
    }
    part::<Controller>(&state.vm);
    let mut again = Vec::new();
    write_state(&mut again, &header, &state).expect("what was read is not too long to be written");
    let (other, same) = read_state(path, &again).expect("what was written is read");
    assert!(other == header && same == state, "it has become something else");
}

/// A part that has an encoding of its own.
fn part<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq>(bytes: &[u8]) {
    let Ok((part, [])) = postcard::take_from_bytes::<T>(bytes) else { return };
    let again = postcard::to_stdvec(&part).expect("what was read can be written");
    assert!(postcard::from_bytes::<T>(&again).expect("what was written is read") == part);
}

fuzz_target!(|data: &[u8]| {
    // The first byte says what the others are.
    let Some((what, data)) = data.split_first() else { return };
    match what % 5 {
        0 => drop(read_state(Path::new("state"), data)),
        1 => state(data, &[]),
        2 => state(&header(), data),
        3 => part::<Processor>(data),
        _ => part::<Controller>(data),
    }
});
