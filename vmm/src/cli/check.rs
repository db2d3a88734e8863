//! `supermachine-vmm check`.

use std::process::ExitCode;

use lexopt::prelude::*;

use super::Usage;

pub(super) fn main(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let mut json = false;
    while let Some(arg) = args.next()? {
        match arg {
            Long("json") => json = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(look(json))
}

#[cfg(target_os = "linux")]
fn look(json: bool) -> ExitCode {
    use vmm::hypervisor::check;

    let report = check::host(&check::Host::default());
    if json {
        println!("{:#}", report.to_json());
    } else {
        println!("{report}");
    }
    if report.usable() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(target_os = "linux"))]
fn look(_json: bool) -> ExitCode {
    eprintln!("supermachine-vmm: this build has no hypervisor for this system; use a Linux host with KVM");
    ExitCode::FAILURE
}
