//! One schema for every benchmark of the project, and two ways to look at it.
//!
//! A benchmark takes samples of ours and of a peer, interleaved, turns them into a [`Comparison`] and
//! writes a [`Report`] to `target/bench/NAME.json`. The `report` program draws a terminal table and an
//! SVG chart from such a file. Nothing here knows what was measured.

mod chart;
mod figures;
mod schema;
mod stats;
mod table;

pub use chart::svg;
pub use schema::{Comparison, ReadError, Report, WriteError};
pub use stats::{BadSamples, Summary};
pub use table::table;
