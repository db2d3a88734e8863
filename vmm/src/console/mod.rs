//! The host's side of a serial port: where the guest's bytes go and where its input comes from.
//!
//! A port hands its bytes to an [`Output`] and never waits: they go through a bounded buffer to a
//! thread that writes them. What the buffer cannot take is dropped and counted, so a guest that
//! floods its console costs the host a fixed amount of memory and nobody any time. Input goes the
//! other way with back-pressure: a reader offers bytes and waits until the guest took them.

mod input;
mod lines;
mod output;
mod pipe;
mod tail;

pub use input::{InputGate, InputPort, feed};
pub use lines::{LineScanner, MAX_LINE, Marker};
pub use output::{BACKLOG, OnMarker, Output, OutputStats};
pub use tail::Tail;
