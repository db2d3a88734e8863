//! What differs between processors: register files, memory layout, boot protocol.
//!
//! Both architectures are compiled everywhere, since most of it is pure data and is worth testing
//! on any machine; [`native`] is the one that the hypervisor of this host can run.

pub mod aarch64;
pub mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64 as native;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as native;
