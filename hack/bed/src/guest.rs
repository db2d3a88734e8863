//! What the product's guests are made of: a stock kernel, the modules that it needs, and the agent.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};
use testbed::in_a_row;

use crate::apt::Apt;
use crate::cache::{Cache, digest, file_name, remove_tree};
use crate::image::unpack;
use crate::kernel::{Initrd, kernel_version, module_order, packaged_kernel, unpacked, write_bootable};
use crate::payload::Payload;
use crate::spec::Arch;
use crate::tools::{self, run};

/// Modules for the monitor's devices, and for what containers need of their guest's kernel.
const GUEST_MODULES: [&str; 11] = [
    "virtio_mmio",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_net",
    "virtio_balloon",
    "virtio_mem",
    "overlay",
    "erofs",
    "crc32c_generic",
    "ext4",
    "virtio_blk",
];

/// What fetching and unpacking a kernel takes.
const ROOM: u64 = 1 << 30;

/// The package that brings the kernel.
pub fn package(arch: Arch) -> String {
    format!("linux-image-cloud-{}", arch.debian())
}

/// Whether it brought this one.
pub fn is_of(version: &str) -> bool {
    version.contains("cloud")
}

/// The name under which the monitor looks for it.
fn kernel(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "vmlinux",
        Arch::Aarch64 => "Image",
    }
}

/// Writes the kernel that was unpacked to `root`, and its modules as an archive: a kernel takes several in a
/// row.
pub fn write(root: &Path, arch: Arch, version: &str, dir: &Path) -> Result<()> {
    write_bootable(&packaged_kernel(root, version), arch, &dir.join(kernel(arch)))?;
    // Unpacked: a small guest has better things to do.
    let mut modules = Initrd::new(BufWriter::new(File::create(dir.join("modules.cpio"))?));
    modules.dir("modules")?;
    for (number, path) in module_order(root, version, &GUEST_MODULES)?.iter().enumerate() {
        let file = file_name(path).replace(".xz", "");
        modules.file(&format!("modules/{number:02}-{file}"), 0o644, &unpacked(path)?)?;
    }
    modules.finish()
}

/// Writes kernel and initrd as the product's package has them, for a machine without the package.
pub fn write_installed(cache: &Cache, arch: Arch, rebuild: bool, to: &Path) -> Result<()> {
    let payload = Payload::build(arch)?;
    let recipe = [include_str!("guest.rs"), include_str!("apt.rs"), include_str!("kernel.rs")];
    let name = format!("{}-{}", arch.name(), digest(recipe.map(str::as_bytes)));
    let made = cache.entry("guest", &name, ROOM, rebuild, |dir| fetch(cache, arch, dir))?;
    cache.prune("guest", &name)?;
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    fs::copy(made.join(kernel(arch)), to.join(kernel(arch)))?;
    let initrd = in_a_row([payload.packed_agent(), made.join("modules.cpio")])?;
    Ok(fs::write(to.join("supermachine.cpio"), initrd)?)
}

fn fetch(cache: &Cache, arch: Arch, dir: &Path) -> Result<()> {
    // Not the image's, which may be built meanwhile.
    let apt = Apt::open(cache.path(&format!("apt-guest-{}", arch.debian())), arch)?;
    let root = dir.join("root");
    for path in apt.closure(&[&package(arch)])? {
        if file_name(&path).starts_with("linux-image") {
            unpack(&path, &root)?;
        }
    }
    // Where depmod looks; in a whole system a package brings the link.
    symlink("usr/lib", root.join("lib"))?;
    let version = kernel_version(&root, is_of)?;
    run(tools::command("depmod").arg("-b").arg(&root).arg(&version))?;
    write(&root, arch, &version, dir)?;
    remove_tree(&root)
}
