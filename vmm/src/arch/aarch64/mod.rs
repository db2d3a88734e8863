//! aarch64: names are those of the Arm Architecture Reference Manual.

pub mod boot;
mod fdt;
mod fingerprint;
mod image;
pub mod layout;
pub mod psci;
mod state;

pub use fingerprint::{Fingerprint, IdRegister};
pub use psci::State as PowerState;
pub use state::{CpuModel, Entry, Registers};
