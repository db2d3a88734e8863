//! From the initrd to a system that can hold containers.
//!
//! The kernel's first root cannot be pivoted away from, which containers have to, so a tmpfs takes its place at
//! once. What the initrd brought stays where it is, out of sight and read-only: the agent's own binary, which its
//! helpers are started from and which nobody can write to, and the modules.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{chdir, chroot};
use runtime_spec::layout;

use crate::cgroup;
use crate::machine::modules::Modules;
use crate::machine::{disks, network};
use crate::watches::Trace;

/// Where the initrd has the modules.
const MODULES: &str = "/modules";
/// An empty directory of the initrd's.
const NEW_ROOT: &str = "/root";

/// What a system has mounted: type, place, flags and options. Those of the kernel come first.
const MOUNTS: &[(&str, &str, MsFlags, &str)] = &[
    ("devtmpfs", "/dev", NOSUID_NOEXEC, "mode=0755"),
    ("proc", "/proc", ALL, ""),
    ("sysfs", "/sys", ALL, ""),
    ("tmpfs", "/run", NOSUID_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", NOSUID_NODEV, "mode=1777"),
    ("devpts", "/dev/pts", NOSUID_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", NOSUID_NODEV, "mode=1777"),
    ("mqueue", "/dev/mqueue", ALL, ""),
    ("cgroup2", cgroup::ROOT, ALL, "nsdelegate,memory_recursiveprot"),
];
const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NOSUID_NOEXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);
const ALL: MsFlags = NOSUID_NODEV.union(MsFlags::MS_NOEXEC);

/// What the rest has to know of the boot.
pub struct Booted {
    /// The modules that are not loaded yet.
    pub modules: Modules,
    /// The machine's network devices.
    pub devices: network::Devices,
    /// By which it is known when a process begins to watch files.
    pub trace: Option<Trace>,
}

/// Makes the system. There is one thread.
pub fn boot() -> Result<Booted> {
    let mut modules = Modules::open(Path::new(MODULES)).context("opening the modules")?;
    into_new_root()?;
    for (kind, point, flags, options) in MOUNTS {
        mount_one(kind, point, *flags, options)?;
    }
    crate::console::start(&fs::read_to_string("/proc/cmdline")?);
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), format!("/dev/{link}"))
            .with_context(|| format!("linking /dev/{link}"))?;
    }
    modules.load_devices()?;
    disks::leave_empty().context("letting go of empty drives")?;
    cgroup::prepare()?;
    // A machine's memory may grow later: what is plugged in is there for use, and can be taken away again.
    let _ = fs::write("/sys/devices/system/memory/auto_online_blocks", "online_movable");
    fs::write("/proc/self/oom_score_adj", "-1000").context("protecting the agent from the memory's end")?;
    for directory in [
        layout::GUEST_SHARE,
        layout::GUEST_BINDS,
        layout::GUEST_CONTAINERS,
        layout::GUEST_SOCKETS,
        layout::GUEST_SHM,
        layout::GUEST_NAMESPACES,
        crate::container::BUNDLES,
        crate::container::STATES,
    ] {
        fs::create_dir_all(directory).with_context(|| format!("creating {directory}"))?;
    }
    network::loopback_up().context("bringing up loopback")?;
    let devices = network::devices().context("parking the network devices")?;
    let trace = Trace::begin();
    if let Err(error) = &trace {
        eprintln!("changes of files by the host are not told to who watches them: {error:#}");
    }
    Ok(Booted { modules, devices, trace: trace.ok() })
}

/// How long the kernel has been there.
pub fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

fn into_new_root() -> Result<()> {
    fs::create_dir_all(NEW_ROOT)?;
    mount(Some("tmpfs"), NEW_ROOT, Some("tmpfs"), NOSUID_NODEV, Some("mode=0755"))
        .context("mounting the new root")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>)
        .context("closing the initrd")?;
    chdir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("moving the root")?;
    chroot(".").context("entering the root")?;
    chdir("/").context("entering the root")
}

fn mount_one(kind: &str, point: &str, flags: MsFlags, options: &str) -> Result<()> {
    if !Path::new(point).is_dir() {
        fs::create_dir(point).with_context(|| format!("creating {point}"))?;
    }
    mount(Some(kind), point, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} on {point}"))
}

/// Loads a module; one that is loaded already is fine.
pub fn load_module(file: &File) -> nix::Result<()> {
    use nix::kmod::{ModuleInitFlags, finit_module};
    match finit_module(file.as_fd(), &CString::default(), ModuleInitFlags::empty()) {
        Err(nix::errno::Errno::EEXIST) => Ok(()),
        done => done,
    }
}
