//! KVM, as `Documentation/virt/kvm/api.rst` describes it. No type of it leaves this module.

pub(super) mod ability;
mod ahead;
mod irq;
mod kick;
mod vcpu;
mod vm;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
#[cfg(target_arch = "x86_64")]
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{Error as KvmErrno, Kvm as KvmFd};

use super::{Error, Hypervisor, VmPlan};
use crate::arch::native;

pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

/// The device node everybody has.
pub const DEVICE: &str = "/dev/kvm";

/// The one version of the interface there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What the calls of the bindings return.
type Attempt<T> = Result<T, KvmErrno>;

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    fd: KvmFd,
    path: PathBuf,
    #[cfg(target_arch = "x86_64")]
    known: Arc<arch::Known>,
}

impl Kvm {
    /// Opens the node and makes sure that it speaks the interface of this module.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|nul| failed(io::Error::new(io::ErrorKind::InvalidInput, nul)))?;
        let fd = KvmFd::new_with_path(name).map_err(|errno| failed(errno.into()))?;
        let found = fd.get_api_version();
        if found != API_VERSION {
            return Err(Error::Version { path: path.to_owned(), found, wanted: API_VERSION });
        }
        Ok(Self {
            fd,
            path: path.to_owned(),
            #[cfg(target_arch = "x86_64")]
            known: Arc::default(),
        })
    }

    fn call<T>(&self, call: &'static str, result: Attempt<T>) -> Result<T, Error> {
        result.map_err(|errno| Error::Call {
            call,
            object: self.path.display().to_string(),
            source: errno.into(),
        })
    }
}

/// Nobody leaves what is locked in this module half changed, so a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Size of a page of the host's memory.
fn page_size() -> u64 {
    // SAFETY: sysconf takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Every Linux answers this.
    u64::try_from(size).unwrap_or(0)
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn create_vm(&self, plan: &VmPlan) -> Result<KvmVm, Error> {
        KvmVm::new(self, plan)
    }

    fn name(&self) -> &'static str {
        "kvm"
    }

    fn cpu_model(&self) -> Result<native::CpuModel, Error> {
        arch::cpu_model(self)
    }

    fn fingerprint(&self) -> Result<native::Fingerprint, Error> {
        arch::fingerprint(self)
    }
}
