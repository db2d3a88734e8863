//! Devices. Each is a struct with up to three faces: registers on a bus, a life (pause, resume,
//! reset), and a state that is a plain struct beside it.

pub mod pl011;
pub mod power;
pub mod uart16550;
#[cfg(not(loom))]
pub mod virtio;
