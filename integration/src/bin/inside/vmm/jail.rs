//! What a monitor in its jail still has, read from /proc while its guest works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::{Ctx, Outcome, Rounds, Test, pattern};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

/// What a file server needs: see capabilities(7) for the bits of CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID,
/// SETUID, MKNOD and SETFCAP.
const CAPABILITIES: &str = "00000000880000db";
const NONE: &str = "0000000000000000";

/// Lines of each thread's `status`.
const THREAD: &[(&str, &str)] = &[
    ("CapInh", NONE),
    ("CapPrm", CAPABILITIES),
    ("CapEff", CAPABILITIES),
    ("CapBnd", CAPABILITIES),
    ("CapAmb", NONE),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
];
/// Of the process. Threads of a file server have their own, since the modes of files are the guest's business.
const UMASK: &str = "0077";

/// Soft and hard.
const LIMITS: &[(&str, u64)] = &[
    ("Max core file size", 0),
    ("Max locked memory", 0),
    ("Max msgqueue size", 0),
    ("Max realtime priority", 0),
];
/// Not above.
const FILES: u64 = 1 << 20;

/// All that a path can lead to.
const ROOT: &[&str] = &[
    "boot",
    "boot/initrd",
    "boot/kernel",
    "control",
    "control/socket",
    "dev",
    "dev/kvm",
    "disk",
    "disk/0",
    "disk/0/disk",
    "proc",
    "proc/self",
    "proc/self/fd",
    "proc/self/mountinfo",
    "proc/self/pagemap",
    "proc/self/smaps",
    "share",
    "share/0",
    "share/0/file",
    "share/0/new",
    "vsock",
    "vsock/vsock",
];

/// What a descriptor may lead to, by the beginning of its name; besides, there is the console.
const DESCRIPTORS: &[&str] = &[
    "/dev/kvm",
    "/dev/null",
    "/disk/0/disk",
    "/proc/self/",
    "/share/0",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[io_uring]",
    "anon_inode:kvm-arm-vgic-v3",
    "anon_inode:kvm-vcpu:",
    "anon_inode:kvm-vm",
    "pipe:[",
    "socket:[",
];

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.jail",
        proves: "a jailed monitor serves disk, share and streams, and has no path, right, descriptor or network \
                 beyond what these need",
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

/// A network namespace that is held by a file.
struct Netns(PathBuf);

impl Netns {
    fn make(ctx: &Ctx<'_, Inside>) -> Result<Self> {
        let netns = Self(ctx.path("netns"));
        File::create(&netns.0)?;
        ctx.cmd("unshare").arg(format!("--net={}", netns.0.display())).arg("true").ok()?;
        Ok(netns)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount(&self.0) {
            eprintln!("letting go of the network namespace {}: {error}", self.0.display());
        }
    }
}

/// A control group, removed when nothing is in it any more.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make(ctx: &Ctx<'_, Inside>) -> Result<Self> {
        let path = Path::new("/sys/fs/cgroup").join(ctx.id("c"));
        fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("removing the cgroup {}: {error}", self.0.display());
        }
    }
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (netns, cgroup) = (Netns::make(ctx)?, Cgroup::make(ctx)?);
    let (root, share, disk) = (ctx.path("root"), ctx.path("share"), ctx.path("disk"));
    fs::create_dir(&root)?;
    fs::create_dir(&share)?;
    fs::write(share.join("file"), "of the host")?;
    let content = pattern::bytes(1, 1 << 20);
    fs::write(&disk, &content)?;
    // Not closed on exec: the monitor inherits it, and should not keep it.
    let inherited = nix::unistd::dup(File::open("/etc/passwd")?).context("duplicating a descriptor")?;
    let machine = boot(ctx, "g")
        .unjailed()
        .controlled()
        .options(["--cpus", "2", "--jail"])
        .options([root.as_path(), "--netns".as_ref(), &netns.0, "--cgroup".as_ref(), &cgroup.0])
        .share("s", &share, false)
        .block(&disk, false);
    let guest = up(ctx, machine, &initrd(ctx)?)?;
    drop(inherited);

    works(&guest, &share, &disk, content)?;
    let proc = PathBuf::from(format!("/proc/{}", guest.pid()));
    namespaces(&proc, &netns.0)?;
    threads(&proc)?;
    limits(&proc)?;
    paths(&proc.join("root"))?;
    mounts(&proc)?;
    descriptors(&proc, &ctx.path("g.console"))?;
    let joined = fs::read_to_string(proc.join("cgroup"))?;
    let expected = format!("0::/{}\n", cgroup.0.file_name().unwrap_or_default().display());
    ensure!(joined == expected, "the monitor is in the cgroup {joined:?}, not {expected:?}");
    ensure!(guest.ctl(["state"])? == "running\n", "it cannot be driven");

    let (control, sockets) = (guest.control_socket().to_owned(), guest.sockets().to_owned());
    guest.ends_well()?;
    for (what, directory) in
        [("root", &*root), ("control", control.parent().unwrap_or(&control)), ("vsock", &sockets)]
    {
        let left = tree(directory)?;
        ensure!(left.is_empty(), "the monitor left {left:?} in the directory of its {what}");
    }
    Ok(Outcome::Passed)
}

/// All devices do their work from inside.
fn works(guest: &Guest, share: &Path, disk: &Path, mut content: Vec<u8>) -> Result<()> {
    guest.sh("mkdir /s; mount -t virtiofs s /s; cat /s/file", A_MOMENT)?;
    // Each right of the file server: given away, kept from its owner, set-group-id, whiteouts.
    let script = "cd /s; mkdir new; cd new; echo x > given; chown 1000:2000 given; chmod 2755 given; \
                  echo y > closed; chmod 0 closed; cat closed; mknod whiteout c 0 0; \
                  dd if=/dev/vda bs=64k 2>/dev/null | sha256sum; \
                  printf new | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null";
    guest.sh(script, A_MOMENT)?;
    let made = fs::symlink_metadata(share.join("new/given"))?;
    let found = (made.uid(), made.gid(), made.permissions().mode() & 0o7777);
    ensure!(found == (1000, 2000, 0o2755), "the guest's file belongs to {found:?}");
    let whiteout = fs::symlink_metadata(share.join("new/whiteout"))?;
    ensure!(whiteout.rdev() == 0 && !whiteout.is_file(), "the guest's device node is {whiteout:?}");
    content[..3].copy_from_slice(b"new");
    ensure!(fs::read(disk)? == content, "the disk is not what the guest has written");
    fs::remove_dir_all(share.join("new"))?;
    fs::write(share.join("new"), "")?;
    Ok(())
}

fn namespaces(proc: &Path, netns: &Path) -> Result<()> {
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}"));
    let its = |name: &str| fs::read_link(proc.join("ns").join(name));
    ensure!(its("mnt")? != own("mnt")?, "the monitor sees the host's mounts");
    ensure!(its("net")? != own("net")?, "the monitor sees the host's network");
    let (given, joined) = (fs::metadata(netns)?, fs::metadata(proc.join("ns/net"))?);
    ensure!(
        (given.dev(), given.ino()) == (joined.dev(), joined.ino()),
        "the monitor's network is not the one that it was given"
    );
    Ok(())
}

fn threads(proc: &Path) -> Result<()> {
    for task in fs::read_dir(proc.join("task"))? {
        status(&task?.path(), THREAD)?;
    }
    status(proc, &[("Umask", UMASK)])
}

/// The lines of a `status` that must be as they are here.
fn status(of: &Path, expected: &[(&str, &str)]) -> Result<()> {
    let text = fs::read_to_string(of.join("status"))?;
    let lines: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        .collect();
    let line = |key: &str| lines.get(key).copied().unwrap_or("missing");
    for (key, expected) in expected {
        let found = line(key);
        ensure!(found == *expected, "{key} of the thread {:?} is {found}, not {expected}", line("Name"));
    }
    Ok(())
}

fn limits(proc: &Path) -> Result<()> {
    let text = fs::read_to_string(proc.join("limits"))?;
    let limit = |name: &str| -> Result<Vec<u64>> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let line = line.with_context(|| format!("there is no limit {name}"))?;
        Ok(line.split_whitespace().take(2).map(|word| word.parse().unwrap_or(u64::MAX)).collect())
    };
    for (name, most) in LIMITS.iter().copied().chain([("Max open files", FILES)]) {
        let found = limit(name)?;
        ensure!(found.iter().all(|value| *value <= most), "{name}: {found:?}, not {most}");
    }
    Ok(())
}

/// Everything below `directory`, without what is below the descriptors in /proc.
fn tree(directory: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(path) = todo.pop() {
        let entries = fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))?;
        for entry in entries {
            let entry = entry?;
            let inside = entry.path();
            let name = inside.strip_prefix(directory)?.display().to_string();
            if entry.file_type()?.is_dir() && !name.ends_with("proc/self/fd") {
                todo.push(inside);
            }
            found.insert(name);
        }
    }
    Ok(found)
}

fn paths(root: &Path) -> Result<()> {
    let (found, meant) = (tree(root)?, ROOT.iter().map(ToString::to_string).collect());
    let more: Vec<_> = found.difference(&meant).collect();
    let less: Vec<_> = meant.difference(&found).collect();
    ensure!(more.is_empty(), "its root has {more:?} too");
    ensure!(less.is_empty(), "its root lacks {less:?}");
    let created = File::create(root.join("new"));
    ensure!(created.is_err(), "its root can be written");
    Ok(())
}

/// Nothing can be executed, no device but the hypervisor's be opened, and only what is the guest's to change be
/// changed.
fn mounts(proc: &Path) -> Result<()> {
    const WRITABLE: [&str; 5] = ["/dev/kvm", "/disk/0/disk", "/share/0", "/vsock", "/control"];
    let text = fs::read_to_string(proc.join("mountinfo"))?;
    let mut places = BTreeSet::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(place), Some(options)) = (fields.get(4), fields.get(5)) else { continue };
        let has = |option: &str| options.split(',').any(|found| found == option);
        ensure!(has("nosuid") && has("noexec"), "in the jail programs can be run: {line}");
        ensure!(has("nodev") || *place == "/dev/kvm", "in the jail devices can be opened: {line}");
        ensure!(has("ro") || WRITABLE.contains(place), "in the jail this can be written: {line}");
        ensure!(
            !fields.iter().any(|field| field.starts_with("shared:")),
            "the host would see mounts: {line}"
        );
        places.insert(*place);
    }
    for place in WRITABLE {
        ensure!(places.contains(place), "{place} is no mount of its own: {text}");
    }
    Ok(())
}

fn descriptors(proc: &Path, console: &Path) -> Result<()> {
    let root = fs::metadata(proc.join("root"))?;
    for entry in fs::read_dir(proc.join("fd"))? {
        let path = entry?.path();
        let Ok(target) = fs::read_link(&path) else { continue };
        let name = target.display().to_string();
        let known = DESCRIPTORS.iter().any(|known| name.starts_with(known));
        let found = fs::metadata(&path)?;
        // The jail's own, which the file server holds to open by handle, and not the host's.
        let is_root = name == "/" && (found.dev(), found.ino()) == (root.dev(), root.ino());
        ensure!(known || is_root || target == console, "the monitor has {name} open");
    }
    Ok(())
}
