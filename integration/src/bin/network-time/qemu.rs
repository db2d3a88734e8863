//! A machine of QEMU's that answers, with a tap of this host. Its init is this program.

use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail};
use integration::command::Cmd;
use integration::guest::Initrd;
use integration::network_time::{Network, Side};
use nix::mount::{MsFlags, mount};

use crate::cable::{LINK, Tap};
use crate::cost::Meter;
use crate::order::{GUEST, READY};
use crate::{Bench, STEP, answer, figures};

/// As many as a machine of ours has, by default, and as much.
const PROCESSORS: &str = "2";
const MIB: &str = "1024";
const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };

/// Puts together what it boots with.
pub fn initrd(bench: &Bench) -> Result<Initrd> {
    let own = std::env::current_exe().context("finding this program to make it an init")?;
    Initrd::make(&bench.guest, &bench.host.scratch, &[&own])
}

/// Measures one once. Nothing is left of it, however it goes.
pub fn measure(bench: &Bench, initrd: &Initrd, side: Side) -> Result<Network> {
    let _tap = Tap::make()?;
    let mut running = command(&bench.guest, initrd, side == Side::Vhost)?.start()?;
    running.until_stdout_has(READY, STEP)?;
    let meter = Meter::new(LINK, Some(running.pid()))?;
    figures::take(&meter, bench.time).with_context(|| {
        let said = running.stdout_so_far();
        format!("the machine has said {:?}", String::from_utf8_lossy(&said))
    })
}

fn command(guest: &Path, initrd: &Initrd, vhost: bool) -> Result<Cmd> {
    let own = std::env::current_exe().context("finding this program's name")?;
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let init = format!("quiet panic=-1 rdinit=/bin/{name} -- init");
    let (program, machine, words) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "virt,gic-version=3", format!("console=ttyAMA0 {init}")),
        _ => (
            "qemu-system-x86_64",
            "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on",
            format!("console=ttyS0 reboot=a pci=off {init}"),
        ),
    };
    let on = if vhost { "on" } else { "off" };
    Ok(Cmd::new(program, STEP + figures::LONGEST)
        .args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-m", MIB, "-smp", PROCESSORS])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        // Threads have names.
        .args(["-name", "network-time,debug-threads=on"])
        // Devices as version 1 of the specification has them, which ours are, too.
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args(["-netdev", &format!("tap,id=tap,ifname={LINK},script=no,downscript=no,vhost={on}")])
        .args(["-device", "virtio-net-device,netdev=tap"])
        .args(["-append", &words, "-kernel"])
        .arg(guest.join(KERNEL))
        .arg("-initrd")
        .arg(initrd.path()))
}

/// The init of these machines.
pub fn init() -> ! {
    if let Err(error) = prepare().and_then(|()| answer::serve()) {
        println!("network-time, the init: {error:#}");
    }
    loop {
        thread::park();
    }
}

/// Loads drivers and sets the network up.
fn prepare() -> Result<()> {
    let none: Option<&str> = None;
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        std::fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mounting {place}"))?;
    }
    let script = format!(
        "for module in /modules/*; do busybox insmod $module; done
        busybox ip link set lo up && busybox ip address add {GUEST}/24 dev eth0 && busybox ip link set eth0 up"
    );
    // As others do whose parent is the init.
    let done = std::process::Command::new("/bin/busybox")
        .args(["sh", "-c", &script])
        .env("PATH", "/bin")
        .output()
        .context("setting the network up")?;
    if !done.status.success() {
        bail!("setting the network up: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}
