//! Why there is no plan: what was asked, where it stands, why not, and what to do.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Something in a request that is not planned for.
///
/// Every kind names the place: a JSON path in config.json (`linux.devices[3]`), a key of the
/// configuration, an annotation, or a field of the call (`rootfs[1]`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not JSON, or not of the shape that the specification gives it.
    #[error("{path}: cannot be read: {problem}")]
    Malformed {
        /// Where.
        path: String,
        /// What the parser says.
        problem: String,
    },
    /// It contradicts the specification, or itself.
    #[error("{path} {asked}: {why}")]
    Invalid {
        /// Where.
        path: String,
        /// What was asked.
        asked: String,
        /// Why it cannot be meant.
        why: String,
    },
    /// It is valid, and a container in a machine of its own cannot have it.
    #[error("{path} {asked} cannot be honoured: {why}; {instead}")]
    Unsupported {
        /// Where.
        path: String,
        /// What was asked.
        asked: String,
        /// Why not.
        why: String,
        /// What to do.
        instead: String,
    },
    /// Something of the host's is not there. Clients look for the words of the C library in it.
    #[error("{path} {}: no such file or directory on the host; create it first", asked.display())]
    Missing {
        /// Where.
        path: String,
        /// The host's path.
        asked: PathBuf,
    },
    /// The configuration cannot be used.
    #[error("configuration {origin}: {problem}")]
    Config {
        /// Which file or option.
        origin: String,
        /// What is wrong, with the key.
        problem: String,
    },
    /// An annotation is unknown, not allowed, or makes no sense.
    #[error("annotation {key}={value:?}: {problem}")]
    Annotation {
        /// Its name.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl Error {
    /// Where the cause stands; never empty.
    pub fn path(&self) -> &str {
        match self {
            Error::Malformed { path, .. }
            | Error::Invalid { path, .. }
            | Error::Unsupported { path, .. }
            | Error::Missing { path, .. } => path,
            Error::Config { origin, .. } => origin,
            Error::Annotation { key, .. } => key,
        }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn invalid(path: impl Into<String>, asked: impl Display, why: impl Into<String>) -> Error {
    Error::Invalid { path: path.into(), asked: asked.to_string(), why: why.into() }
}

pub(crate) fn unsupported(
    path: impl Into<String>,
    asked: impl Display,
    why: impl Into<String>,
    instead: impl Into<String>,
) -> Error {
    Error::Unsupported {
        path: path.into(),
        asked: asked.to_string(),
        why: why.into(),
        instead: instead.into(),
    }
}

pub(crate) fn missing(path: impl Into<String>, asked: &Path) -> Error {
    Error::Missing { path: path.into(), asked: asked.to_path_buf() }
}

/// `linux.devices`, 3 -> `linux.devices[3]`.
pub(crate) fn at(list: &str, index: usize) -> String {
    format!("{list}[{index}]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_where_what_why_and_what_to_do() {
        let error = unsupported(at("linux.devices", 3), "/dev/nvidia0", "the guest has none", "leave it out");
        assert_eq!(
            error.to_string(),
            "linux.devices[3] /dev/nvidia0 cannot be honoured: the guest has none; leave it out"
        );
        assert_eq!(error.path(), "linux.devices[3]");
        let error = missing("mounts[0].source", Path::new("/a"));
        assert!(error.to_string().contains("no such file or directory"), "{error}");
    }
}
