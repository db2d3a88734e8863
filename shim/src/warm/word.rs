//! What becomes of a container that is to be warm, for an operator who waits for it: a line of JSON in its directory.

use std::fs;
use std::io;
use std::path::Path;

use log::debug;
use serde::{Deserialize, Serialize};

const FILE: &str = "warm";

/// The last that there is to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// It is kept as soon as it is warm.
    Waits {
        /// When that is.
        when: String,
    },
    /// It was warm, and others start from it.
    Kept {
        /// The name of what is kept.
        key: String,
    },
    /// It has started from one that was warm.
    Started {
        /// The name of that.
        key: String,
    },
    /// It starts as any other, and nobody starts from it.
    Ordinary {
        /// Why.
        why: String,
    },
}

impl Word {
    /// Leaves it in a container's directory. Nothing depends on it.
    pub fn write(&self, directory: &Path) {
        let new = directory.join(format!("{FILE}.new"));
        let written =
            serde_json::to_vec(self).map_err(io::Error::from).and_then(|text| fs::write(&new, text));
        if let Err(error) = written.and_then(|()| fs::rename(&new, directory.join(FILE))) {
            debug!("noting {self:?} in {}: {error}", directory.display());
        }
    }

    /// What was left there; none for a container that was not asked to be warm.
    pub fn read(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(directory.join(FILE)).ok()?).ok()
    }
}
