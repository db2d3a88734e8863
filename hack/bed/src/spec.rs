//! Which host is asked for.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Error, bail};

/// The architecture of the emulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    X86_64,
    Aarch64,
}

impl Arch {
    pub const NATIVE: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    /// As the kernel and Rust call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian calls it.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// As Go and the OCI image specification call it.
    pub fn oci(self) -> &'static str {
        self.debian()
    }
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "x86_64" | "amd64" => Ok(Self::X86_64),
            "aarch64" | "arm64" => Ok(Self::Aarch64),
            _ => bail!("--arch {name:?}: x86_64 and aarch64 can be emulated"),
        }
    }
}

/// The containerd that serves inside; both are in every image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Containerd {
    /// Debian 13's.
    V1_7,
    /// Debian unstable's.
    V2_1,
}

impl Containerd {
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

impl FromStr for Containerd {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "1.7" => Ok(Self::V1_7),
            "2.1" => Ok(Self::V2_1),
            _ => bail!("--containerd {name:?}: 1.7 and 2.1 are in the image"),
        }
    }
}

/// A host, as the command line describes it. Two equal ones share a saved host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub arch: Arch,
    pub cpus: u32,
    pub memory_mib: u32,
    pub containerd: Containerd,
    pub docker: bool,
    pub cri: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            arch: Arch::NATIVE,
            cpus: 2,
            memory_mib: 4096,
            containerd: Containerd::V1_7,
            docker: false,
            cri: false,
        }
    }
}

impl Spec {
    /// A name for what is asked for, fit for a directory.
    pub fn name(&self) -> String {
        let mut name = format!(
            "{}-{}cpu-{}m-containerd{}",
            self.arch.name(),
            self.cpus,
            self.memory_mib,
            self.containerd.name()
        );
        for (on, suffix) in [(self.docker, "-docker"), (self.cri, "-cri")] {
            if on {
                name.push_str(suffix);
            }
        }
        name
    }

    /// What the services script inside reads from the kernel's command line.
    pub fn kernel_words(&self) -> String {
        format!(
            "testbed.containerd={} testbed.docker={} testbed.cri={}",
            self.containerd.name(),
            u8::from(self.docker),
            u8::from(self.cri)
        )
    }

    pub fn check(&self) -> Result<(), Error> {
        if !(1..=64).contains(&self.cpus) {
            bail!("--cpus {}: from 1 to 64", self.cpus);
        }
        if !(512..=1_048_576).contains(&self.memory_mib) {
            bail!("--memory {}: MiB, from 512 to 1048576", self.memory_mib);
        }
        Ok(())
    }
}

/// How one host is started and used.
#[derive(Clone, Debug)]
pub struct Start {
    pub spec: Spec,
    /// The directory that appears at `/share`.
    pub share: Option<PathBuf>,
    /// The command may take this long, once the host is up.
    pub timeout: Option<Duration>,
    /// Boots instead of restoring.
    pub cold: bool,
    /// Added to the kernel's command line; means a cold boot.
    pub kernel_append: Option<String>,
    /// A host that is not up by then is killed.
    pub boot_timeout: Duration,
    /// Builds the image again even if one is there.
    pub rebuild: bool,
}
