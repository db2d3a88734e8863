//! What a damaged, foreign or newer snapshot comes to: an error that says what it is, whatever the damage.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::arch::native::Fingerprint;
use crate::memory::{self, Region};

/// A directory, gone when it is dropped.
struct Room(PathBuf);

impl Room {
    fn new(name: &str) -> Self {
        let thread = std::thread::current().id();
        let path =
            std::env::temp_dir().join(format!("vmm-snapshot-{}-{name}-{thread:?}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn header(written: &Written) -> Header {
    Header {
        architecture: std::env::consts::ARCH.into(),
        hypervisor: "kvm".into(),
        build: "1".into(),
        created: 7,
        page_size: memory::page_size(),
        vcpus: 1,
        memory: 64 << 20,
        memory_max: 64 << 20,
        devices: vec![Slot { id: "rng".into(), kind: 4 }],
        fingerprint: vec![1, 2, 3],
        memory_len: written.len,
        memory_data: written.data,
        memory_crc: written.crc,
        base: written.over.as_ref().map(|(base, _)| *base),
    }
}

fn state(regions: Vec<Region>) -> MachineState {
    let shape =
        Shape { vcpus: 1, memory: 64 << 20, memory_max: None, psci: crate::hypervisor::PsciBy::Hypervisor };
    let board = crate::machine::BoardState::example();
    MachineState {
        shape,
        ram: regions,
        parts: vec![Extent { offset: 0x1000, len: 0x1000 }],
        over: None,
        vcpus: vec![vec![1; 100]],
        power: None,
        vm: vec![2; 100],
        board,
        devices: vec![],
    }
}

/// Writes a small snapshot into `directory`, by the way that everybody takes.
fn write(directory: &Path) {
    let ram = memory::anonymous(&[(0, 4 << 20)]).unwrap();
    vm_memory::Bytes::write_obj(&ram, 7u64, vm_memory::GuestAddress(0x1008)).unwrap();
    make(directory, |file, memory| {
        let written = write_memory(&ram, None, memory, Form::Sparse).unwrap();
        write_state(file, &header(&written), &state(written.regions.clone()))
    })
    .unwrap();
}

/// The state's file of a small snapshot.
fn bytes() -> Vec<u8> {
    let regions = vec![Region { addr: 0, len: 4 << 20, offset: 0 }];
    let written = Written { regions, len: 4 << 20, data: 4096, crc: 1, parts: vec![], over: None };
    let mut bytes = Vec::new();
    write_state(&mut bytes, &header(&written), &state(written.regions.clone())).unwrap();
    bytes
}

fn parse(bytes: &[u8]) -> Result<(Header, MachineState), Error> {
    read_state(Path::new("good/state"), bytes)
}

#[test]
fn what_is_written_is_read() {
    let room = Room::new("same");
    let place = room.0.join("a");
    write(&place);
    let snapshot = Snapshot::open(&place).unwrap();
    assert_eq!(snapshot.state, state(snapshot.state.ram.clone()));
    assert_eq!(read_header(&place).unwrap(), snapshot.header);
    let mut steps = Vec::new();
    assert_eq!(verify(&place, |done, all| steps.push((done, all))).unwrap(), snapshot.header);
    assert_eq!(steps.last(), Some(&(4 << 20, 4 << 20)));
}

#[test]
fn each_byte_counts() {
    let good = bytes();
    for at in 0..good.len() {
        for bit in [0x01, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= bit;
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.contains("good/state"), "byte {at}: {error}");
        }
    }
    parse(&good).unwrap();
}

#[test]
fn each_length_but_one_is_wrong() {
    let good = bytes();
    for len in 0..good.len() {
        assert!(parse(&good[..len]).is_err(), "{len} bytes");
    }
    assert!(parse(&[&good[..], b"x"].concat()).is_err());
}

/// With a beginning whose checksum fits.
fn renumbered(good: &[u8], index: usize, value: u32) -> Vec<u8> {
    let mut bytes = good.to_vec();
    bytes[8 + 4 * index..12 + 4 * index].copy_from_slice(&value.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..28]);
    bytes[28..32].copy_from_slice(&sum.to_le_bytes());
    bytes
}

#[test]
fn what_it_is_instead_is_said() {
    let good = bytes();
    for (bytes, words) in [
        (b"#!/bin/sh\nexec true # and on, and on, and on".to_vec(), vec!["no snapshot"]),
        (vec![], vec!["no snapshot"]),
        (renumbered(&good, 0, EPOCH + 1), vec!["format 7", "reads 6"]),
        (renumbered(&good, 1, u32::MAX), vec!["damaged", "by its own account"]),
        (renumbered(&good, 2, u32::MAX), vec!["damaged", "by its own account"]),
        (renumbered(&good, 3, 0), vec!["checksum of its header"]),
        (renumbered(&good, 4, 0), vec!["checksum of its state"]),
    ] {
        let error = parse(&bytes).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}: {words:?}");
    }
}

#[test]
fn its_ram_is_all_there_and_what_was_written() {
    let room = Room::new("ram");
    let place = room.0.join("a");
    write(&place);
    let path = place.join(MEMORY_FILE);
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[0x1008] ^= 1;
    let mut filled = good.clone();
    filled[0x2000] = 1;
    for (bytes, opens, sound) in [
        (&good, true, true),
        (&good[..good.len() - 1].to_vec(), false, false),
        (&[&good[..], &[0]].concat(), false, false),
        (&flipped, true, false),
        (&filled, true, false),
    ] {
        fs::write(&path, bytes).unwrap();
        assert_eq!(Snapshot::open(&place).is_ok(), opens);
        let verified = verify(&place, |_, _| ());
        assert_eq!(verified.is_ok(), sound, "{verified:?}");
    }
    fs::remove_file(&path).unwrap();
    assert!(Snapshot::open(&place).unwrap_err().to_string().contains("a/memory"));
}

/// Of some host.
#[cfg(target_arch = "x86_64")]
type Change = dyn Fn(&mut Header, &mut MachineState);

/// Writes a snapshot `above`, of a machine that came from the one in `below` and has changed a little.
fn write_above(below: &Path, above: &Path, change: &Change) -> Result<(), Error> {
    let from = Snapshot::open(below).unwrap();
    let ram = restore_memory(&from.memory, &from.state.ram).unwrap();
    vm_memory::Bytes::write_obj(&ram, 8u64, vm_memory::GuestAddress(0x10_0008)).unwrap();
    make_over(above, below, |file, memory| {
        let written = write_memory(&ram, Some(&from.memory), memory, Form::Over).unwrap();
        let mut header = header(&written);
        let (_, over) = written.over.unwrap();
        let mut state = MachineState { over: Some(over), ..state(written.regions) };
        change(&mut header, &mut state);
        write_state(file, &header, &state).map(drop)
    })
}

fn values(snapshot: &Snapshot) -> [u64; 2] {
    let ram = restore_memory(&snapshot.memory, &snapshot.state.ram).unwrap();
    [0x1008, 0x10_0008].map(|addr| vm_memory::Bytes::read_obj(&ram, vm_memory::GuestAddress(addr)).unwrap())
}

#[test]
fn one_over_another_is_whole_without_its_directory() {
    let room = Room::new("over");
    let place = |name: &str| room.0.join(name);
    write(&place("a"));
    write_above(&place("a"), &place("b"), &|_, _| ()).unwrap();
    write_above(&place("b"), &place("c"), &|_, _| ()).unwrap();
    for name in ["a", "b"] {
        fs::remove_dir_all(place(name)).unwrap();
    }
    assert_eq!(values(&Snapshot::open(&place("c")).unwrap()), [7, 8]);
    let mut steps = Vec::new();
    let header = verify(&place("c"), |done, all| steps.push((done, all))).unwrap();
    assert_eq!(steps.last(), Some(&(8 << 20, 8 << 20)));
    assert_eq!((header.memory_data, header.base.unwrap().data), (4096, 4096));
    for name in [BASE_FILE, MEMORY_FILE] {
        let path = place("c").join(name);
        let good = fs::read(&path).unwrap();
        let mut more = good.clone();
        more[2 << 20] = 1;
        fs::write(&path, more).unwrap();
        let error = verify(&place("c"), |_, _| ()).unwrap_err();
        let why = format!("{error} {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(why.contains(name) && why.contains("none of its parts"), "{why}");
        let mut bad = good.clone();
        *bad.iter_mut().find(|byte| **byte != 0).unwrap() ^= 1;
        fs::write(&path, bad).unwrap();
        let error = verify(&place("c"), |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("checksum"), "{error}");
        fs::write(&path, good).unwrap();
    }
}

#[test]
fn what_lies_over_something_else_is_refused() {
    let room = Room::new("under");
    let place = |name: &str| room.0.join(name);
    write(&place("a"));
    let changes: [(&Change, &str); 7] = [
        (&|_, state| state.over = None, "lies over"),
        (&|_, state| state.over.as_mut().unwrap().reverse(), "a part of it"),
        (&|_, state| state.over.as_mut().unwrap()[0].len = 1 << 30, "a part of it"),
        (&|_, state| state.over = Some(vec![Extent { offset: 0, len: 0 }]), "a part of it"),
        (&|_, state| state.parts[0].offset = 1, "a part of it"),
        (&|_, state| state.parts[0].len = 1 << 30, "a part of it"),
        (&|_, state| state.parts.push(state.parts[0]), "a part of it"),
    ];
    for (change, word) in changes {
        // A single part has no order.
        let two = |header: &mut Header, state: &mut MachineState| {
            state.over.as_mut().unwrap().push(Extent { offset: 3 << 20, len: 4096 });
            change(header, state);
        };
        write_above(&place("a"), &place("b"), &two).unwrap();
        let error = Snapshot::open(&place("b")).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains(word), "{error}");
        fs::remove_dir_all(place("b")).unwrap();
    }
    // More than there can be are not even read.
    let many = vec![Extent { offset: 0, len: 4096 }; 300];
    write_above(&place("a"), &place("b"), &move |_, state| state.over = Some(many.clone())).unwrap();
    let error = Snapshot::open(&place("b")).unwrap_err().to_string();
    assert!(error.contains("cannot be decoded"), "{error}");
    fs::remove_dir_all(place("b")).unwrap();
    // Not of the machine that it says, which leaves nothing.
    let error =
        write_above(&place("a"), &place("b"), &|header, _| header.base = None).unwrap_err().to_string();
    assert!(error.contains("has not come from"), "{error}");
    assert!(!place("b").exists());
    write_above(&place("a"), &place("b"), &|_, _| ()).unwrap();
    let base = place("b").join(BASE_FILE);
    fs::remove_file(&base).unwrap();
    assert!(Snapshot::open(&place("b")).unwrap_err().to_string().contains(BASE_FILE));
    fs::write(&base, b"short").unwrap();
    assert!(Snapshot::open(&place("b")).unwrap_err().to_string().contains("instead of"));
}

fn fingerprint() -> Fingerprint {
    use crate::arch::x86_64::{CpuModel, Host};
    let host =
        Host { backend: "kvm".into(), page_size: 4096, xsave_size: 4096, tsc_khz: 1, tsc_scales: false };
    Fingerprint::new(&CpuModel { cpuid: Vec::new() }, host)
}

/// Of some host.
#[cfg(target_arch = "aarch64")]
fn fingerprint() -> Fingerprint {
    Fingerprint::new("kvm", 1, &[], 1, 40, 4096)
}

#[test]
fn a_host_of_another_kind_is_told_so() {
    let room = Room::new("host");
    let place = room.0.join("a");
    let ram = memory::anonymous(&[(0, 2 << 20)]).unwrap();
    let here = fingerprint();
    let with = |change: &dyn Fn(&mut Header)| {
        let _ = fs::remove_dir_all(&place);
        make(&place, |file, memory| {
            let written = write_memory(&ram, None, memory, Form::Sparse).unwrap();
            let mut header = header(&written);
            header.fingerprint = postcard::to_stdvec(&here).unwrap();
            change(&mut header);
            write_state(file, &header, &state(written.regions.clone()))
        })
        .unwrap();
        Snapshot::open(&place).and_then(|snapshot| snapshot.check_host("kvm", &here))
    };
    with(&|_| ()).unwrap();
    for (change, word) in [
        (&(|h: &mut Header| h.architecture = "riscv64".into()) as &dyn Fn(&mut Header), "riscv64"),
        (&|h: &mut Header| h.hypervisor = "hvf".into(), "hvf"),
        (&|h: &mut Header| h.page_size *= 4, "pages"),
        (&|h: &mut Header| h.fingerprint = vec![0xff; 3], "decoded"),
        (&|h: &mut Header| h.fingerprint.push(0), "decoded"),
    ] {
        let error = with(change).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]
    /// Several bytes, anywhere, to anything: an error or, where nothing has changed, the same.
    #[test]
    fn no_damage_is_taken_for_a_snapshot(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let good = bytes();
        let mut bad = good.clone();
        for (at, value) in &changes {
            bad[at.index(good.len())] = *value;
        }
        prop_assert_eq!(parse(&bad).is_ok(), bad == good);
    }

    /// Checksums protect from damage, not from malice: what decodes to something else is an error, too, or a state
    /// that whoever takes it over looks at.
    #[test]
    fn nothing_that_can_be_made_up_upsets_it(body in proptest::collection::vec(any::<u8>(), 0..400)) {
        let good = bytes();
        let header = u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
        let mut bad = renumbered(&good, 2, body.len() as u32);
        bad.truncate(32 + header);
        bad.extend(&body);
        let bad = renumbered(&bad, 4, crc32fast::hash(&body));
        let _ = parse(&bad);
    }
}
