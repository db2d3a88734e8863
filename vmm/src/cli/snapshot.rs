//! `supermachine-vmm inspect` and `fingerprint`: what a snapshot says, and whether it could go on here.

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;
use serde_json::json;
use vmm::snapshot::{EPOCH, Header, read_header, verify};

use super::Usage;

/// Prints what the snapshot in a directory says about itself; with `--verify` after all of it was read.
pub(super) fn inspect(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let (mut directory, mut all) = (None, false);
    while let Some(arg) = args.next()? {
        match arg {
            Long("verify") => all = true,
            Value(value) if directory.is_none() => directory = Some(PathBuf::from(value)),
            other => return Err(other.unexpected()),
        }
    }
    let directory = directory.ok_or("the directory of a snapshot is missing")?;
    let header = if all { verify(&directory, |_, _| ()) } else { read_header(&directory) };
    Ok(match header {
        Ok(header) => {
            println!("{:#}", describe(&header));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("supermachine-vmm: {error}");
            ExitCode::FAILURE
        }
    })
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
