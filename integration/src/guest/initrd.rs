//! The initrd of a test guest: archives one behind the other, which a kernel unpacks in turn, and programs a
//! test brings along in one of their own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{self, ModeFileType};

/// The archives that come with the kernel: init, drivers, shell.
const ARCHIVES: [&str; 3] = ["test-init.cpio", "modules.cpio", "busybox.cpio"];

/// A file with an initrd.
#[derive(Debug)]
pub struct Initrd(PathBuf);

impl Initrd {
    /// Puts it together in `scratch` from the archives in `guest` and `programs`, which appear in `/bin`.
    pub fn make(guest: &Path, scratch: &Path, programs: &[&Path]) -> Result<Self> {
        let path = scratch.join("initrd");
        let mut to = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        for name in ARCHIVES {
            let archive = guest.join(name);
            let mut from = File::open(&archive)
                .with_context(|| format!("opening {}, a part of the guest's initrd", archive.display()))?;
            let length = io::copy(&mut from, &mut to)
                .with_context(|| format!("copying {} to {}", archive.display(), path.display()))?;
            pad(&mut to, length)?;
        }
        for program in programs {
            add(program, &format!("bin/{}", name(program)), &mut to)
                .with_context(|| format!("bringing {} along", program.display()))?;
        }
        if !programs.is_empty() {
            newc::trailer(&mut to).context("ending the archive of what is brought along")?;
        }
        Ok(Self(path))
    }

    /// The product's, as it is.
    pub fn of_product(guest: &Path) -> Self {
        Self(guest.join("supermachine.cpio"))
    }

    /// One of nothing but `program` as its init.
    pub fn of_init(program: &Path, scratch: &Path) -> Result<Self> {
        let path = scratch.join("initrd");
        let mut to = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        add(program, "init", &mut to).with_context(|| format!("making {} an init", program.display()))?;
        newc::trailer(&mut to).context("ending the archive of an init")?;
        Ok(Self(path))
    }

    /// Adds kernel modules that the init is to load after the others, compressed as they are.
    pub fn with_modules(self, modules: &[impl AsRef<Path>]) -> Result<Self> {
        let mut to = fs::OpenOptions::new().append(true).open(&self.0).context("opening the initrd again")?;
        for (number, module) in modules.iter().enumerate() {
            let module = module.as_ref();
            // Behind all plain numbers, in this order.
            add(module, &format!("modules/x{number}-{}", name(module)), &mut to)
                .with_context(|| format!("bringing {} along", module.display()))?;
        }
        newc::trailer(&mut to).context("ending the archive of modules")?;
        Ok(self)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// An archive begins at a multiple of four bytes.
fn pad(to: &mut impl Write, length: u64) -> io::Result<()> {
    let missing = length.next_multiple_of(4) - length;
    to.write_all(&[0; 4][..missing as usize])
}

fn add(program: &Path, path: &str, to: &mut File) -> Result<()> {
    let bytes = fs::read(program)?;
    let mut entry = newc::Builder::new(path)
        .mode(0o755)
        .set_mode_file_type(ModeFileType::Regular)
        .write(&mut *to, u32::try_from(bytes.len()).context("it is too large for an archive")?);
    entry.write_all(&bytes)?;
    entry.finish()?;
    Ok(())
}

fn name(file: &Path) -> std::borrow::Cow<'_, str> {
    file.file_name().unwrap_or_default().to_string_lossy()
}
