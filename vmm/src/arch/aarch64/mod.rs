//! aarch64: names are those of the Arm Architecture Reference Manual.

pub mod layout;
mod state;

pub use state::{Entry, Registers};
