//! When what happened while a container was made: a line for each phase, in a file beside its journal, for people
//! who wonder where the time goes.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::time;

/// The name of the file.
const NAME: &str = "timeline";
/// So much of a file is read: a container has some ten phases.
const LONGEST: usize = 1000;

/// A phase that is over. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What it is called.
    pub name: String,
    /// When it began.
    pub from: i64,
    /// When it was over.
    pub to: i64,
}

/// Where phases are written.
#[derive(Debug, Clone)]
pub struct Timeline(PathBuf);

impl Timeline {
    /// Of the container with that directory.
    pub fn of(directory: &Path) -> Self {
        Self(directory.join(NAME))
    }

    /// A phase begins; it is over when the result is dropped.
    pub fn phase(&self, name: &'static str) -> Running<'_> {
        self.phase_since(time::now(), name)
    }

    /// One that began at that time.
    pub fn phase_since(&self, from: i64, name: &'static str) -> Running<'_> {
        Running { timeline: self, name, from }
    }

    /// All that is there. What cannot be read is left out.
    pub fn read(&self) -> std::io::Result<Vec<Phase>> {
        let text = std::fs::read_to_string(&self.0)?;
        Ok(text.lines().take(LONGEST).filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Nobody depends on it: what cannot be written is not.
    fn write(&self, phase: &Phase) {
        let Ok(mut line) = serde_json::to_vec(phase) else { return };
        line.push(b'\n');
        let file = OpenOptions::new().append(true).create(true).open(&self.0);
        let _ = file.and_then(|mut file| file.write_all(&line));
    }
}

/// A phase that is not over.
#[must_use = "it is over when this is dropped"]
#[derive(Debug)]
pub struct Running<'a> {
    timeline: &'a Timeline,
    name: &'static str,
    from: i64,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.timeline.write(&Phase { name: self.name.to_owned(), from: self.from, to: time::now() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_written_as_they_end() {
        let directory = std::env::temp_dir().join(format!("timeline-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let timeline = Timeline::of(&directory);
        assert!(timeline.read().is_err());
        let all = timeline.phase("all");
        drop(timeline.phase("part"));
        drop(all);
        drop(timeline.phase_since(7, "before"));
        std::fs::write(directory.join("other"), "").unwrap();
        OpenOptions::new().append(true).open(directory.join(NAME)).unwrap().write_all(b"{\"na").unwrap();
        let phases = timeline.read().unwrap();
        let names: Vec<_> = phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["part", "all", "before"]);
        assert!(phases[1].from <= phases[0].from && phases[0].to <= phases[1].to);
        assert_eq!(phases[2].from, 7);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
