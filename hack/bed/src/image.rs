//! The disk of the emulated host: Debian packages unpacked, configured and made into a file system.
//!
//! No package's scripts run, so a foreign architecture is as easy as one's own, and neither root nor
//! a loop device is needed.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, NEWER_SUITE, SUITE};
use crate::cache::{Cache, digest, file_name, remove_tree};
use crate::kernel::{Initrd, kernel_version, module_order, packaged_kernel, write_bootable};
use crate::progress::Step;
use crate::qemu;
use crate::spec::Arch;
use crate::tools::{self, run};
use crate::{guest, oci};

/// What every host has. Dependencies follow by themselves; recommendations do not.
const PACKAGES: &str = "base-files base-passwd bash coreutils dash diffutils findutils grep gzip hostname kmod libc-bin \
    login mawk mount ncurses-base procps psmisc sed tar util-linux xz-utils \
    ethtool iproute2 iptables iputils-ping nftables passt socat \
    containerd containernetworking-plugins criu crun docker-buildx docker-cli docker-compose docker.io gvproxy runc \
    busybox-static e2fsprogs erofs-utils fio iperf3 jq strace \
    python3-minimal libpython3-stdlib redis-server";

/// Taken from the newer suite, beside the ones of the suite.
const NEWER: [&str; 2] = ["containerd", "runc"];

/// Never needed in a test bed, and half of what is unpacked.
const LEFT_OUT: [&str; 18] = [
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
    "./usr/share/i18n/*",
    "./usr/share/gtk-doc/*",
    "./usr/share/info/*",
    "./usr/share/lintian/*",
    "*/kernel/drivers/gpu/*",
    "*/kernel/drivers/media/*",
    "*/kernel/drivers/infiniband/*",
    "*/kernel/drivers/iio/*",
    "*/kernel/drivers/net/ethernet/*",
    "*/kernel/drivers/net/wireless/*",
    "*/kernel/drivers/scsi/*",
    "*/kernel/drivers/staging/*",
    "*/kernel/drivers/usb/*",
    "*/kernel/drivers/hid/*",
    "*/kernel/sound/*",
];

/// Modules with which the host finds its disk, its network and the shared directories.
const HOST_MODULES: [&str; 8] =
    ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "virtio_net", "9pnet_virtio", "9p", "virtio_rng"];

/// The files that configure the host. They are part of what names an image.
const FILES: [(&str, u32, &str); 8] = [
    ("usr/local/lib/testbed/services", 0o755, include_str!("../files/services")),
    ("usr/local/sbin/service", 0o755, include_str!("../files/service")),
    ("etc/containerd/base-1.7.toml", 0o644, include_str!("../files/base-1.7.toml")),
    ("etc/containerd/base-2.1.toml", 0o644, include_str!("../files/base-2.1.toml")),
    ("etc/containerd/cri-1.7.toml", 0o644, include_str!("../files/cri-1.7.toml")),
    ("etc/containerd/cri-2.1.toml", 0o644, include_str!("../files/cri-2.1.toml")),
    ("etc/cni/net.d/10-testbed.conflist", 0o644, include_str!("../files/cni.conflist")),
    ("usr/local/lib/testbed/guest-init", 0o755, include_str!("../files/guest-init")),
];

/// What a change of makes another image.
const RECIPE: [&str; 5] = [
    include_str!("image.rs"),
    include_str!("apt.rs"),
    include_str!("guest.rs"),
    include_str!("oci.rs"),
    include_str!("kernel.rs"),
];

/// The disk is sparse: it takes what is in it.
const DISK: &str = "16G";
/// What building takes: downloads, the unpacked tree and the disk.
const ROOM: u64 = 4 << 30;

/// A built image.
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The image for `arch`, built if it is not in the cache.
    pub fn open(cache: &Cache, arch: Arch, rebuild: bool) -> Result<Self> {
        let name = format!("{}-{}", arch.name(), recipe());
        let dir = cache.entry("image", &name, ROOM, rebuild, |dir| build(cache, arch, dir))?;
        cache.prune("image", &name)?;
        Ok(Self { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tells this image from any other, also from one made again from the same recipe: what a host has in its
    /// memory of a disk is about that very disk.
    pub fn identity(&self) -> Result<String> {
        let made =
            fs::metadata(self.disk())?.created().or_else(|_| fs::metadata(self.kernel())?.modified())?;
        let since = made.duration_since(SystemTime::UNIX_EPOCH)?;
        Ok(format!("{} {}", file_name(&self.dir), since.as_nanos()))
    }

    /// The root file system, raw.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// The modules for the initrd, in the order of their names.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }
}

fn recipe() -> String {
    let files = FILES.iter().map(|(_, _, text)| *text);
    digest(RECIPE.into_iter().chain(files).map(str::as_bytes))
}

fn build(cache: &Cache, arch: Arch, dir: &Path) -> Result<()> {
    crate::progress::say(format_args!(
        "the image of the {} host is built once: Debian {SUITE} with containerd, docker, QEMU and tools",
        arch.name()
    ));
    let apt = Apt::open(cache.path(&format!("apt-{}", arch.debian())), arch)?;
    let kernel = format!("linux-image-{}", arch.debian());
    let guest_kernel = guest::package(arch);
    let mut names: Vec<&str> = PACKAGES.split_whitespace().collect();
    // The monitor beside which ours is measured, too.
    names.extend([qemu::package(arch), &kernel, &guest_kernel]);
    let packages = apt.closure(&names)?;
    let newer = apt.newer(&NEWER)?;

    let root = dir.join("root");
    let step = Step::begin("unpacking");
    for (count, package) in packages.iter().enumerate() {
        step.at(format_args!("{} of {}", count + 1, packages.len()));
        unpack(package, &root)?;
    }
    for package in &newer {
        unpack(package, &root.join("opt/containerd-2.1"))?;
    }
    step.done(format_args!("{} packages", packages.len()));

    let step = Step::begin("configuring");
    configure(&root)?;
    let host = kernel_version(&root, |version| !version.contains("cloud"))?;
    let guest = kernel_version(&root, guest::is_of)?;
    for version in [&host, &guest] {
        run(tools::command("depmod").arg("-b").arg(&root).arg(version))?;
    }
    write_bootable(&packaged_kernel(&root, &host), arch, &dir.join("kernel"))?;
    pick_modules(&root, &host, &dir.join("modules"))?;
    guest_files(&root, arch, &guest)?;
    oci::write_images(&root.join("usr/bin/busybox"), arch, &root.join("usr/local/lib/testbed/busybox.tar"))?;
    step.done(format_args!("host kernel {host}, guest kernel {guest}"));

    let step = Step::begin("making the disk");
    // The journal would only make the host slower: a disk that a crash damages is thrown away.
    run(tools::command_as_root("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-m", "0", "-d"])
        .args([&root, &dir.join("disk")])
        .arg(DISK))?;
    step.done("");
    remove_tree(&root)
}

/// Everything becomes this user's; in the image it is root's.
pub fn unpack(package: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let mut contents = tools::command("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb: the test bed's image is made of Debian packages")?;
    let pipe = contents.stdout.take().context("no pipe from dpkg-deb")?;
    let mut tar = tools::command("tar");
    tar.args(["-x", "-p", "--no-same-owner", "--keep-directory-symlink", "--wildcards", "-C"]).arg(root);
    tar.args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")));
    let status = tar.stdin(pipe).status().context("cannot run tar")?;
    let packer = contents.wait()?;
    if !status.success() || !packer.success() {
        bail!("unpacking {} failed (dpkg-deb: {packer}, tar: {status})", package.display());
    }
    Ok(())
}

/// Does what the scripts of the packages would have done, as far as a test bed notices.
fn configure(root: &Path) -> Result<()> {
    for name in ["passwd", "group"] {
        fs::copy(root.join(format!("usr/share/base-passwd/{name}.master")), root.join("etc").join(name))?;
    }
    let group = root.join("etc/group");
    fs::write(&group, fs::read_to_string(&group)? + "docker:x:999:\n")?;
    for (path, text) in [
        ("etc/hostname", "testbed\n"),
        ("etc/hosts", "127.0.0.1 localhost testbed\n::1 localhost\n"),
        // Empty: there is no network outside, and each look-up would wait for one.
        ("etc/resolv.conf", ""),
        ("etc/machine-id", "5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n"),
        ("etc/subuid", "root:100000:65536\n"),
        ("etc/subgid", "root:100000:65536\n"),
    ] {
        fs::write(root.join(path), text)?;
    }
    for (link, target) in [
        ("usr/bin/awk", "mawk"),
        ("usr/bin/nc", "busybox"),
        ("usr/bin/vi", "busybox"),
        ("usr/bin/less", "busybox"),
        ("usr/sbin/iptables", "xtables-nft-multi"),
        ("usr/sbin/iptables-save", "xtables-nft-multi"),
        ("usr/sbin/iptables-restore", "xtables-nft-multi"),
        ("usr/sbin/ip6tables", "xtables-nft-multi"),
        ("usr/sbin/ip6tables-save", "xtables-nft-multi"),
        ("usr/sbin/ip6tables-restore", "xtables-nft-multi"),
        ("var/run", "/run"),
    ] {
        let path = root.join(link);
        // Some packages bring an empty directory where the link belongs.
        if path.is_dir() {
            remove_tree(&path)?;
        }
        if path.symlink_metadata().is_err() {
            symlink(target, &path).with_context(|| format!("linking {link}"))?;
        }
    }
    for (path, mode, text) in FILES {
        write_with_mode(&root.join(path), mode, text.as_bytes())?;
    }
    for dir in ["share", "run", "tmp", "proc", "sys", "dev", "root", "usr/local/bin", "var/log"] {
        fs::create_dir_all(root.join(dir))?;
    }
    Ok(())
}

fn write_with_mode(path: &Path, mode: u32, data: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, data)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn pick_modules(root: &Path, version: &str, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for (number, path) in module_order(root, version, &HOST_MODULES)?.iter().enumerate() {
        fs::copy(path, to.join(format!("{number:02}-{}", file_name(path))))
            .with_context(|| format!("copying the module {}", path.display()))?;
    }
    Ok(())
}

/// What the guests inside are made of, where the product's package would have it, and what tests add.
fn guest_files(root: &Path, arch: Arch, version: &str) -> Result<()> {
    let dir = root.join("usr/share/supermachine/guest");
    fs::create_dir_all(&dir)?;
    guest::write(root, arch, version, &dir)?;
    if arch == Arch::X86_64 {
        fs::copy(packaged_kernel(root, version), dir.join("bzImage"))?;
    }
    symlink(format!("/usr/lib/modules/{version}"), dir.join("modules"))?;
    let archive =
        |name: &str| Ok::<_, anyhow::Error>(Initrd::new(BufWriter::new(File::create(dir.join(name))?)));
    let busybox = fs::read(root.join("usr/bin/busybox"))?;
    // The control guest's init only says which kernel runs.
    let mut control = archive("control-initrd")?;
    for path in ["bin", "proc", "dev"] {
        control.dir(path)?;
    }
    control.file("bin/busybox", 0o755, &busybox)?;
    control.file("init", 0o755, include_bytes!("../files/guest-init"))?;
    control.finish()?;
    // A shell and its tools, for tests that run commands in a guest.
    let mut tools = archive("busybox.cpio")?;
    tools.dir("bin")?;
    tools.file("bin/busybox", 0o755, &busybox)?;
    for applet in oci::applets() {
        tools.link(&format!("bin/{applet}"), "busybox")?;
    }
    tools.finish()?;
    let suite = format!("Debian {SUITE}, containerd 2.1 of {NEWER_SUITE}\n");
    Ok(fs::write(root.join("etc/testbed-release"), suite)?)
}
