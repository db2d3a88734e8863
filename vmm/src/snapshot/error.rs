//! What can be wrong with a snapshot.

use std::io;
use std::path::PathBuf;

/// A snapshot could not be written, or is none that this monitor can go on from.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused an access.
    #[error("cannot {what} {}: {source}{}", path.display(), crate::mend::of(source))]
    File {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no snapshot: it does not begin like one", path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
    /// It is damaged.
    #[error("the snapshot {} is damaged: {why}; make it again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What shows it.
        why: String,
    },
    /// Another build of the monitor wrote it.
    #[error("the snapshot {} has format {found}, and this monitor reads {wanted}; make it again, or use the monitor that made it", path.display())]
    Epoch {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        wanted: u32,
    },
    /// It is from another kind of host.
    #[error("the snapshot {} cannot go on here: {why}", path.display())]
    Host {
        /// Which file.
        path: PathBuf,
        /// What differs.
        why: String,
    },
    /// What is to be written has no place in the format.
    #[error("cannot write the snapshot: {0}")]
    Unfit(String),
}
