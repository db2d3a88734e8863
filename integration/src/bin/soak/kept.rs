//! What is known of all parts, in one file that is kept with the sources: each part's last result.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::part::{Done, Part};

/// The file, and what is in it.
pub struct Kept {
    path: PathBuf,
    done: BTreeMap<String, Done>,
}

impl Kept {
    /// Reads it; there may be none yet.
    pub fn read(path: &Path) -> Result<Self> {
        let done = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("reading {}; remove it to begin anew", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        Ok(Self { path: path.to_owned(), done })
    }

    /// What is known of `part`, if it was run.
    pub fn get(&self, part: &Part) -> Option<&Done> {
        self.done.get(&part.name())
    }

    /// Has this alone until what is returned is dropped, and knows what other soaks have kept by now: one may go on
    /// for each environment.
    pub fn alone(&mut self) -> Result<File> {
        let place =
            self.path.parent().filter(|place| !place.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let held = File::open(place)
            .and_then(|held| held.lock().map(|()| held))
            .with_context(|| format!("locking {}", place.display()))?;
        *self = Self::read(&self.path)?;
        Ok(held)
    }

    /// Keeps what came of `part`: wholly or not at all.
    pub fn keep(&mut self, part: &Part, done: Done) -> Result<()> {
        self.done.insert(part.name(), done);
        let aside = self.path.with_extension("json.new");
        fs::write(&aside, serde_json::to_string_pretty(&self.done)? + "\n")
            .and_then(|()| fs::rename(&aside, &self.path))
            .with_context(|| format!("writing {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use integration::{Record, Verdict};

    use super::*;
    use crate::part::Suite;

    #[test]
    fn the_last_result_of_a_part_is_kept() {
        let directory = std::env::temp_dir().join(format!("soak-kept-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("soak.json");
        let part = Part { suite: Suite::Outside, arch: "x86_64".into(), test: "a".into() };
        let done = |commit: &str| Done {
            began: 1,
            commit: commit.into(),
            record: Record {
                name: "a".into(),
                verdict: Verdict::Passed,
                reason: None,
                rounds_passed: 1,
                rounds: 1,
                seconds: 1.0,
                control: false,
            },
        };
        let mut kept = Kept::read(&path).unwrap();
        assert_eq!(kept.get(&part), None);
        for commit in ["b", "c"] {
            kept.keep(&part, done(commit)).unwrap();
            assert_eq!(Kept::read(&path).unwrap().get(&part), Some(&done(commit)));
        }
        // Another's is kept, too.
        let (mut one, mut other) = (Kept::read(&path).unwrap(), Kept::read(&path).unwrap());
        let second = Part { test: "b".into(), ..part.clone() };
        for (kept, part) in [(&mut one, &part), (&mut other, &second)] {
            let _alone = kept.alone().unwrap();
            kept.keep(part, done("d")).unwrap();
        }
        let kept = Kept::read(&path).unwrap();
        assert_eq!((kept.get(&part), kept.get(&second)), (Some(&done("d")), Some(&done("d"))));
        fs::write(&path, "{").unwrap();
        assert!(Kept::read(&path).is_err());
        fs::remove_dir_all(directory).unwrap();
    }
}
