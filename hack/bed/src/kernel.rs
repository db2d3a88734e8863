//! Kernels in the form that starts fastest, and initrds.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use cpio::newc::{self, ModeFileType};

use crate::cache::{children, file_name};
use crate::spec::Arch;
use crate::tools::{self, command};

/// Writes the kernel of the package file `from` as it is booted: on x86_64 the vmlinux inside the
/// bzImage, entered by PVH without firmware or decompressor; on aarch64 the Image as it comes.
pub fn write_bootable(from: &Path, arch: Arch, to: &Path) -> Result<()> {
    let image = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    if arch == Arch::Aarch64 {
        return Ok(fs::write(to, image)?);
    }
    let payload = bzimage_payload(&image).with_context(|| format!("{}", from.display()))?;
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        bail!("{}: the kernel inside is not compressed with zstd", from.display());
    }
    let mut zstd = command("zstd")
        .args(["-dcq"])
        .stdin(Stdio::piped())
        .stdout(File::create(to)?)
        .spawn()
        .context("cannot run zstd: make setup installs it")?;
    // The payload is followed by its length; zstd would take that for a second, broken frame.
    zstd.stdin.take().context("no pipe to zstd")?.write_all(&payload[..payload.len() - 4])?;
    let status = zstd.wait()?;
    if !status.success() {
        bail!("zstd ended with {status} on the kernel of {}", from.display());
    }
    Ok(())
}

/// The compressed kernel inside a bzImage, by the fields of its setup header (boot protocol 2.08).
fn bzimage_payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("too short for a kernel")?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    if word(0x202)? != 0x5372_6448 {
        bail!("no bzImage: the magic HdrS is missing");
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    image
        .get(start..start + word(0x24c)?)
        .filter(|payload| payload.len() > 4)
        .context("the payload is cut off")
}

/// A newc archive under construction.
pub struct Initrd<W: Write> {
    to: W,
    inode: u32,
}

impl<W: Write> Initrd<W> {
    pub fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    pub fn dir(&mut self, path: &str) -> Result<()> {
        self.entry(path, ModeFileType::Directory, 0o755, &[])
    }

    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(path, ModeFileType::Regular, mode, data)
    }

    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, ModeFileType::Symlink, 0o777, target.as_bytes())
    }

    fn entry(&mut self, path: &str, kind: ModeFileType, mode: u32, data: &[u8]) -> Result<()> {
        self.inode += 1;
        let head = newc::Builder::new(path).ino(self.inode).mode(mode).set_mode_file_type(kind);
        let mut entry = head.write(&mut self.to, u32::try_from(data.len())?);
        entry.write_all(data)?;
        entry.finish()?;
        Ok(())
    }

    pub fn finish(self) -> Result<()> {
        newc::trailer(self.to)?.flush()?;
        Ok(())
    }
}

/// The version of a kernel that was unpacked to `root`.
pub fn kernel_version(root: &Path, matches: impl Fn(&str) -> bool) -> Result<String> {
    children(&root.join("usr/lib/modules"))?
        .iter()
        .map(|path| file_name(path))
        .find(|version| matches(version))
        .context("a kernel package brought no modules")
}

/// Where its package has it.
pub fn packaged_kernel(root: &Path, version: &str) -> PathBuf {
    root.join("boot").join(format!("vmlinuz-{version}"))
}

/// The files of the modules and of all they need, in an order in which they load.
pub fn module_order(root: &Path, version: &str, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let dir = root.join("usr/lib/modules").join(version);
    let read =
        |name| fs::read_to_string(dir.join(name)).with_context(|| format!("reading {name} of {version}"));
    let order = module_closure(&read("modules.dep")?, &read("modules.builtin")?, wanted)?;
    Ok(order.iter().map(|path| dir.join(path)).collect())
}

/// A module as the kernel takes it.
pub fn unpacked(module: &Path) -> Result<Vec<u8>> {
    if module.extension().is_some_and(|suffix| suffix == "ko") {
        return Ok(fs::read(module)?);
    }
    Ok(tools::output(tools::command("xz").arg("-dc").arg(module))?.stdout)
}

/// The files of `wanted` modules and all they depend on, in an order in which they load, from the
/// `modules.dep` of a kernel's module directory. A module that is built in has no file.
fn module_closure(dep: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let name_of = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let line = dep.lines().find(|line| line.split(':').next().is_some_and(|path| name_of(path) == *name));
        let Some((path, needs)) = line.and_then(|line| line.split_once(':')) else {
            if builtin.lines().any(|path| name_of(path) == *name) {
                continue;
            }
            bail!("the kernel has no module {name}");
        };
        // depmod lists what is needed with the deepest last.
        for file in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/fs/ext4.ko.xz: kernel/fs/jbd2.ko.xz kernel/lib/crc16.ko.xz\n\
                   kernel/fs/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\n\
                   kernel/d/virtio-rng.ko.xz: kernel/lib/crc16.ko.xz\n";
        let builtin = "kernel/drivers/virtio/virtio_pci.ko\n";
        let order = module_closure(dep, builtin, &["ext4", "virtio_rng", "virtio_pci"]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/lib/crc16.ko.xz",
                "kernel/fs/jbd2.ko.xz",
                "kernel/fs/ext4.ko.xz",
                "kernel/d/virtio-rng.ko.xz"
            ]
        );
        assert!(module_closure(dep, builtin, &["nvme"]).is_err());
    }

    #[test]
    fn payloads_of_broken_kernels() {
        let mut image = vec![0; 0x1000];
        for (name, text) in [("empty", &image[..0]), ("zeros", &image[..])] {
            assert!(bzimage_payload(text).is_err(), "{name}");
        }
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x24c] = 8;
        assert_eq!(bzimage_payload(&image).unwrap().len(), 8);
        image[0x24e] = 0xff;
        assert!(bzimage_payload(&image).is_err(), "longer than the file");
    }
}
