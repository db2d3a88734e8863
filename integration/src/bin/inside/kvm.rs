//! Control: virtualization works in this host.
//!
//! `/dev/kvm` existing proves nothing, so something has to run: one instruction under our monitor's own
//! check, and a whole stock kernel under QEMU, which has nothing of ours in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use integration::command::CommandError;
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        Test {
            name: "kvm.check",
            proves: "`supermachine-vmm check` finds KVM usable, having run an instruction in a machine",
            run: check,
            deadline: Duration::from_mins(1),
            rounds: Rounds::once_or(20),
            tags: &[],
        },
        Test {
            name: "control.kvm-stock-kernel",
            proves: "a stock distribution kernel boots to its init under QEMU with KVM",
            run: stock_kernel,
            deadline: Duration::from_mins(2),
            rounds: Rounds::once_or(20),
            tags: &["control"],
        },
    ]
}

fn check(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let done = match ctx.cmd(&ctx.world.vmm).arg("check").run() {
        Err(CommandError::Start { command, source }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Outcome::Skipped(format!("`{command}` is not installed here")));
        }
        other => other?,
    };
    done.expect_code(0)?;
    Ok(Outcome::Passed)
}

/// What the init of the control guest begins with; its kernel's name follows.
const INIT: &str = "control guest: Linux";

fn stock_kernel(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let guest = &ctx.world.guest;
    if !Path::new("/dev/kvm").exists() {
        return Ok(Outcome::Failed("there is no /dev/kvm; this host has no virtualization".into()));
    }
    if !guest.is_dir() {
        return Ok(Outcome::Skipped(format!(
            "{} is not there; the guest's files are not installed",
            guest.display()
        )));
    }
    let kernel = find(guest, &["vmlinux", "Image"])?;
    let initrd = find(guest, &["control-initrd"])?;
    let (program, machine, console) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "virt,gic-version=host", "ttyAMA0"),
        _ => ("qemu-system-x86_64", "q35", "ttyS0"),
    };
    let append = format!("console={console} panic=-1 loglevel=7");
    let running = ctx
        .cmd(program)
        .args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-serial", "stdio", "-no-reboot", "-append", &append])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .start();
    let mut running = match running {
        Err(CommandError::Start { command, source }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Outcome::Skipped(format!("no {program} here: `{command}`: {source}")));
        }
        other => other?,
    };
    let reached = running.until_stdout_has(INIT, ctx.left().mul_f64(0.8));
    drop(running);
    reached.context("the kernel did not start its init")?;
    Ok(Outcome::Passed)
}

/// The file in `directory` whose name begins with one of `names`.
fn find(directory: &Path, names: &[&str]) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| names.iter().any(|name| entry.file_name().to_string_lossy().starts_with(name)))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
        .into_iter()
        .next()
        .with_context(|| format!("{} has no file named {}", directory.display(), names.join(" or ")))
}
