//! `docs/soak.md`: what ran, how often, what failed, on which commit, when.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use integration::Verdict;
use integration::command::printable;

use crate::date;
use crate::part::{Done, Part};

/// The page: all parts, and what is known of each.
pub struct Page {
    pub rows: Vec<(Part, Option<Done>)>,
}

impl Page {
    pub fn failed(&self) -> usize {
        self.count(Verdict::Failed)
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.done().filter(|(_, done)| done.record.verdict == verdict).count()
    }

    fn done(&self) -> impl Iterator<Item = (&Part, &Done)> {
        self.rows.iter().filter_map(|(part, done)| Some((part, done.as_ref()?)))
    }

    /// One line that counts the parts.
    pub fn summary(&self) -> String {
        let to_do = self.rows.len() - self.done().count();
        let rounds: u64 = self.done().map(|(_, done)| u64::from(done.record.rounds_passed)).sum();
        format!(
            "{} parts: {} passed, {} failed, {} skipped, {to_do} to do; {rounds} rounds passed",
            self.rows.len(),
            self.count(Verdict::Passed),
            self.failed(),
            self.count(Verdict::Skipped),
        )
    }

    /// Writes the page, creating its directory; a reader sees the old one or the new one.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let aside = path.with_extension("md.new");
        fs::write(&aside, self.text())?;
        fs::rename(aside, path)
    }

    fn text(&self) -> String {
        let mut text = format!(
            "# Soak\n\n\
             What takes too long for every change, run often enough to find what is rare. Written by `make \
             soak`; do not\nedit. Each part is one test in one environment; a part ends with its first round \
             that fails. A soak is carried on whenever there is time: each row is of the commit that it \
             names,\nand what was run longest ago is run next.\n\n\
             {}.\n",
            self.summary()
        );
        self.failures(&mut text);
        text += "\n## Parts\n\n| test | where | rounds passed | result | took | when (UTC) | commit |\n\
                 |---|---|---:|---|---:|---|---|\n";
        for (part, Done { began, commit, record }) in self.done() {
            let _ = writeln!(
                text,
                "| {} | {} | {} of {} | {} | {} | {} | `{commit}` |",
                part.test,
                part.place(),
                record.rounds_passed,
                record.rounds,
                match record.verdict {
                    Verdict::Passed => "passed".to_owned(),
                    Verdict::Failed => "**failed**".to_owned(),
                    Verdict::Skipped =>
                        format!("skipped: {}", cell(record.reason.as_deref().unwrap_or("no reason"))),
                },
                duration(record.seconds),
                date::text(*began)
            );
        }
        self.to_do(&mut text);
        text
    }

    /// What was never run, by place: names only where something was.
    fn to_do(&self, text: &mut String) {
        let mut places: Vec<(String, Vec<&str>, usize)> = Vec::new();
        for (part, done) in &self.rows {
            let place = part.place();
            if places.last().is_none_or(|(last, ..)| *last != place) {
                places.push((place, Vec::new(), 0));
            }
            if let Some((_, left, all)) = places.last_mut() {
                *all += 1;
                if done.is_none() {
                    left.push(&part.test);
                }
            }
        }
        places.retain(|(_, left, _)| !left.is_empty());
        if !places.is_empty() {
            *text += "\n## To do\n\n";
        }
        for (place, left, all) in places {
            let _ = match left.len() {
                some if some < all => writeln!(text, "- {place}, {some} of {all}: {}", left.join(", ")),
                _ => writeln!(text, "- {place}: all {all}"),
            };
        }
    }

    fn failures(&self, text: &mut String) {
        if self.failed() == 0 {
            return;
        }
        *text += "\n## Failures\n";
        for (part, done) in self.done().filter(|(_, done)| done.record.verdict == Verdict::Failed) {
            let bed = if done.record.control { " (control group: the bed is broken)" } else { "" };
            let _ = writeln!(text, "\n{}, {}{bed}:\n", part.test, part.place());
            for line in done.record.reason.as_deref().unwrap_or("no reason given").lines() {
                let _ = writeln!(text, "    {}", printable(line));
            }
        }
    }
}

/// `reason` on one line of a table.
fn cell(reason: &str) -> String {
    printable(&reason.replace('\n', " ")).replace('|', "\\|")
}

fn duration(seconds: f64) -> String {
    let minutes = seconds / 60.0;
    if minutes < 1.0 { format!("{seconds:.1} s") } else { format!("{minutes:.1} min") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::part::Suite;
    use integration::Record;

    fn row(test: &str, verdict: Option<Verdict>, reason: Option<&str>) -> (Part, Option<Done>) {
        let part = Part {
            suite: Suite::Inside { containerd: "2.1".into(), boots: false },
            arch: "x86_64".into(),
            test: test.into(),
        };
        let done = verdict.map(|verdict| Done {
            began: 1_735_689_600,
            commit: "abc".into(),
            record: Record {
                name: test.into(),
                verdict,
                reason: reason.map(str::to_owned),
                rounds_passed: 19,
                rounds: 20,
                seconds: 90.0,
                control: false,
            },
        });
        (part, done)
    }

    fn elsewhere(test: &str) -> (Part, Option<Done>) {
        (Part { suite: Suite::Outside, arch: "aarch64".into(), test: test.into() }, None)
    }

    #[test]
    fn everything_is_told_and_nothing_breaks_the_table() {
        let page = Page {
            rows: vec![
                row("good", Some(Verdict::Passed), None),
                row("bad", Some(Verdict::Failed), Some("round 20 of 20:\n\u{1b}[31mred")),
                row("absent", Some(Verdict::Skipped), Some("no a|b\nhere")),
                row("later", None, None),
                row("last", None, None),
                elsewhere("one"),
                elsewhere("two"),
            ],
        };
        assert_eq!(page.summary(), "7 parts: 1 passed, 1 failed, 1 skipped, 4 to do; 57 rounds passed");
        let text = page.text();
        for piece in [
            "run next.\n\n7 parts",
            "| good | x86_64, containerd 2.1 | 19 of 20 | passed | 1.5 min | 2025-01-01 00:00 | `abc` |",
            "| bad | x86_64, containerd 2.1 | 19 of 20 | **failed** |",
            "skipped: no a\\|b here |",
            "\n## To do\n\n- x86_64, containerd 2.1, 2 of 5: later, last\n- aarch64: all 2\n",
            "## Failures\n\nbad, x86_64, containerd 2.1:\n\n    round 20 of 20:\n    \\u{1b}[31mred\n",
        ] {
            assert!(text.contains(piece), "{piece:?} is missing in\n{text}");
        }
    }

    #[test]
    fn without_failures_there_is_no_such_section() {
        let page = Page { rows: vec![row("good", Some(Verdict::Passed), None)] };
        assert!(!page.text().contains("Failures"));
    }
}
