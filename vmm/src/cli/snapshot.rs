//! `supermachine-vmm inspect` and `fingerprint`: what a snapshot says, and whether it could go on here.

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;
use serde_json::json;
use vmm::snapshot::{EPOCH, Header, read_header, verify};

use super::Usage;

/// Prints what the snapshot in a directory says about itself: with `--verify` after all of it was read, with `--all`
/// the state of all its parts too.
pub(super) fn inspect(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let (mut directory, mut whole, mut all) = (None, false, false);
    while let Some(arg) = args.next()? {
        match arg {
            Long("verify") => whole = true,
            Long("all") => all = true,
            Value(value) if directory.is_none() => directory = Some(PathBuf::from(value)),
            other => return Err(other.unexpected()),
        }
    }
    let directory = directory.ok_or("the directory of a snapshot is missing")?;
    let header = if whole { verify(&directory, |_, _| ()) } else { read_header(&directory) };
    let told = header.map_err(anyhow::Error::from).and_then(|header| {
        println!("{:#}", describe(&header));
        if all { tell(&directory) } else { Ok(()) }
    });
    Ok(match told {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supermachine-vmm: {error}");
            ExitCode::FAILURE
        }
    })
}

/// What no two versions need to agree upon: for people, and for comparing two snapshots of one version.
#[cfg(target_os = "linux")]
fn tell(directory: &std::path::Path) -> anyhow::Result<()> {
    use vmm::hypervisor::{Vcpu, Vm, kvm};
    use vmm::snapshot::Snapshot;

    type Processor = <kvm::KvmVcpu as Vcpu>::State;
    let mut snapshot = Snapshot::open(directory)?;
    for (id, bytes) in std::mem::take(&mut snapshot.state.vcpus).iter().enumerate() {
        println!("vcpu {id}: {:#?}", snapshot.decode::<Processor>(bytes, "a processor")?);
    }
    let vm = std::mem::take(&mut snapshot.state.vm);
    println!("vm: {:#?}", snapshot.decode::<<kvm::KvmVm as Vm>::State>(&vm, "the interrupt controller")?);
    println!("machine: {:#?}", snapshot.state);
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn tell(_directory: &std::path::Path) -> anyhow::Result<()> {
    anyhow::bail!("this build has no hypervisor whose state it could read; use a Linux host with KVM")
}

fn describe(header: &Header) -> serde_json::Value {
    let devices: Vec<_> =
        header.devices.iter().map(|slot| json!({"id": slot.id, "kind": slot.kind})).collect();
    json!({
        "epoch": EPOCH,
        "architecture": header.architecture,
        "hypervisor": header.hypervisor,
        "build": header.build,
        "created": header.created,
        "page_size": header.page_size,
        "cpus": header.vcpus,
        "memory": header.memory,
        "memory_max": header.memory_max,
        "devices": devices,
        "ram_file": header.memory_len,
        "ram_data": header.memory_data,
        "over": header.base.map(|base| json!({"ram_file": base.len, "ram_data": base.data})),
    })
}

/// Prints one line that is the same for hosts and builds between which snapshots can go.
pub(super) fn fingerprint(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    if let Some(other) = args.next()? {
        return Err(other.unexpected());
    }
    Ok(match own() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("supermachine-vmm: {error}");
            ExitCode::FAILURE
        }
    })
}

#[cfg(target_os = "linux")]
fn own() -> anyhow::Result<serde_json::Value> {
    use vmm::hypervisor::Hypervisor;
    use vmm::hypervisor::kvm::{DEVICE, Kvm};

    let kvm = Kvm::open(DEVICE.as_ref())?;
    Ok(json!({
        "epoch": EPOCH,
        "build": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "hypervisor": kvm.name(),
        "page_size": vmm::memory::page_size(),
        "processor": serde_json::to_value(kvm.fingerprint()?)?,
    }))
}

#[cfg(not(target_os = "linux"))]
fn own() -> anyhow::Result<serde_json::Value> {
    anyhow::bail!("this build has no hypervisor for this system; use a Linux host with KVM")
}
