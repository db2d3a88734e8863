//! Making the host fit for commands, and fit for being saved.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::command::PATH;
use testbed::{Prepare, in_a_row};

/// What the working tree built, shared by the tool; copied to where a package would put it.
const PAYLOAD_TAG: &str = "payload";
const PAYLOAD: &str = "/run/testbed/payload";
/// Where a package has what guests are made of.
const GUEST: &str = "/usr/share/supermachine/guest";
const SHARE_TAG: &str = "share";
const SHARE: &str = "/share";

/// Sets the clock, installs the binaries and mounts the share.
pub fn prepare(how: &Prepare) -> Result<()> {
    let now = TimeSpec::from_duration(std::time::Duration::from_nanos(how.time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, now).context("setting the clock")?;
    mount_9p(PAYLOAD_TAG, PAYLOAD, true)?;
    run("cp", &["-a", "--no-preserve=ownership", &format!("{PAYLOAD}/."), "/"])?;
    unmount(PAYLOAD)?;
    assemble_initrd().context("putting the product's initrd together")?;
    if how.share {
        mount_9p(SHARE_TAG, SHARE, false)?;
    }
    Ok(())
}

/// The product's initrd: the agent, which the working tree built, and the modules, which are this host's.
fn assemble_initrd() -> Result<()> {
    let initrd = in_a_row(["agent.cpio", "modules.cpio"].map(|part| Path::new(GUEST).join(part)))?;
    fs::write(Path::new(GUEST).join("supermachine.cpio"), initrd)?;
    Ok(())
}

/// Undoes [`prepare`] and drops what need not be in the saved memory.
pub fn quiesce() -> Result<()> {
    for point in [SHARE, PAYLOAD] {
        unmount(point)?;
    }
    // SAFETY: sync has no arguments and cannot fail.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}

/// Switches the host off; does not return when it works.
pub fn power_off() -> Result<()> {
    // SAFETY: sync has no arguments and cannot fail.
    unsafe { libc::sync() };
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(errno) => bail!("switching off: {errno}"),
    }
}

/// Loopback, and the address that QEMU's user network expects its guest to have.
pub fn network() -> Result<()> {
    for arguments in [
        &["link", "set", "lo", "up"][..],
        &["address", "add", "10.0.2.15/24", "dev", "eth0"],
        &["link", "set", "eth0", "up"],
    ] {
        run("ip", arguments)?;
    }
    Ok(())
}

// KVM_CREATE_VM, whose argument 0 is the usual kind of machine.
nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xae, 0x01));
// KVM_CREATE_VCPU, whose argument is its number.
nix::ioctl_write_int_bad!(create_vcpu, nix::request_code_none!(0xae, 0x41));
// KVM_CREATE_IRQCHIP, which has no argument.
#[cfg(target_arch = "x86_64")]
nix::ioctl_write_int_bad!(create_irqchip, nix::request_code_none!(0xae, 0x60));

/// Makes a virtual machine that does nothing, for as long as this process lives.
///
/// With the first machine of a host and after the last one, the kernel rewrites its scheduler (the static key
/// `preempt_notifier_key`) while all processors run it. Under emulation one of them may still run what was there
/// before: then the host dies of a breakpoint, or forgets to tell KVM that a guest has lost its processor. The same goes
/// for KVM itself on x86_64, with the first processor whose interrupt controller is off, as each is at first
/// (`apic_sw_disabled`), and after the last one: that of this machine stays off.
pub fn keep_a_machine() -> Result<()> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("opening /dev/kvm")?;
    // SAFETY: the descriptor is open, and the argument is a number.
    // What it gives is a descriptor, which nobody closes.
    let machine = unsafe { create_vm(kvm.as_raw_fd(), 0) }.context("making a virtual machine")?;
    // SAFETY: the same.
    #[cfg(target_arch = "x86_64")]
    unsafe { create_irqchip(machine, 0) }.context("making a virtual interrupt controller")?;
    // SAFETY: the same.
    unsafe { create_vcpu(machine, 0) }.context("making a virtual processor")?;
    Ok(())
}

fn mount_9p(tag: &str, point: &str, read_only: bool) -> Result<()> {
    fs::create_dir_all(point)?;
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount(Some(tag), point, Some("9p"), flags, Some("trans=virtio,version=9p2000.L,msize=524288,cache=none"))
        .with_context(|| format!("mounting the directory shared as {tag} on {point}"))
}

fn unmount(point: &str) -> Result<()> {
    match umount2(point, MntFlags::empty()) {
        // Not mounted, or never made.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => bail!("unmounting {point}: {errno}"),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", PATH)
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
