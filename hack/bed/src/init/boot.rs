//! From the initrd to a mounted host, or a guest.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, sethostname};

/// The disk that carries the root, the first one on the command line of QEMU.
const ROOT_DISK: &str = "/dev/vda";
const ROOT_DEADLINE: Duration = Duration::from_secs(60);

/// What this machine is for.
pub enum Role {
    Host,
    Guest,
}

/// Loads the drivers and mounts what the machine's role asks for.
pub fn boot() -> Result<Role> {
    mount_fs("devtmpfs", "/dev", "mode=0755")?;
    mount_fs("proc", "/proc", "")?;
    mount_fs("sysfs", "/sys", "")?;
    load_modules(Path::new("/modules"))?;
    let words = fs::read_to_string("/proc/cmdline")?;
    if words.split_whitespace().any(|word| word == "testbed.guest") {
        mount_system(&GUEST)?;
        Ok(Role::Guest)
    } else {
        into_root()?;
        mount_system(&HOST)?;
        sethostname("testbed").context("setting the host name")?;
        Ok(Role::Host)
    }
}

/// Mounts the root disk and makes it the root.
fn into_root() -> Result<()> {
    wait_for(Path::new(ROOT_DISK))?;
    fs::create_dir_all("/root")?;
    mount(Some(ROOT_DISK), "/root", Some("ext4"), MsFlags::MS_NOATIME, Some("noinit_itable"))
        .with_context(|| format!("mounting {ROOT_DISK}"))?;
    for point in ["dev", "proc", "sys"] {
        let to = format!("/root/{point}");
        mount(Some(format!("/{point}").as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("moving /{point} to the root"))?;
    }
    chdir("/root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("moving the root")?;
    chroot(".").context("entering the root")?;
    chdir("/").context("entering the root")
}

/// What a host has mounted: file system, mount point and options.
const HOST: [(&str, &str, &str); 10] = [
    ("tmpfs", "/run", "mode=0755,size=50%"),
    ("tmpfs", "/tmp", "mode=1777,size=50%"),
    ("devpts", "/dev/pts", "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("mqueue", "/dev/mqueue", ""),
    ("cgroup2", "/sys/fs/cgroup", "nsdelegate"),
    ("bpf", "/sys/fs/bpf", "mode=0700"),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
    ("securityfs", "/sys/kernel/security", ""),
];

/// What suffices for a guest.
const GUEST: [(&str, &str, &str); 5] = [
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/tmp", "mode=1777"),
    ("devpts", "/dev/pts", "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "nsdelegate"),
];

fn mount_system(mounts: &[(&str, &str, &str)]) -> Result<()> {
    for (kind, point, options) in mounts {
        mount_fs(kind, point, options)?;
    }
    // A host's mounts are shared (as an init system sets them), so that propagation is the real one.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .context("sharing the mount tree")?;
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), format!("/dev/{link}"))
            .with_context(|| format!("linking /dev/{link}"))?;
    }
    Ok(())
}

fn mount_fs(kind: &str, point: &str, options: &str) -> Result<()> {
    fs::create_dir_all(point).or_else(|error| if Path::new(point).is_dir() { Ok(()) } else { Err(error) })?;
    mount(Some(kind), point, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting {kind} on {point}"))
}

/// `MODULE_INIT_COMPRESSED_FILE` of the kernel's interface, which the crate does not name yet.
const COMPRESSED_FILE: ModuleInitFlags = ModuleInitFlags::from_bits_retain(4);

/// Loads the modules of the initrd in the order of their names; the kernel unpacks them.
fn load_modules(dir: &Path) -> Result<()> {
    let mut paths = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        let packed = path.extension().is_some_and(|suffix| suffix != "ko");
        let flags = if packed { COMPRESSED_FILE } else { ModuleInitFlags::empty() };
        match finit_module(&file, &CString::default(), flags) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => bail!("loading {}: {errno}", path.display()),
        }
    }
    Ok(())
}

fn wait_for(path: &Path) -> Result<()> {
    let deadline = Instant::now() + ROOT_DEADLINE;
    while !path.exists() {
        if Instant::now() > deadline {
            bail!("{} did not appear within {} s", path.display(), ROOT_DEADLINE.as_secs());
        }
        sleep(Duration::from_millis(5));
    }
    Ok(())
}
