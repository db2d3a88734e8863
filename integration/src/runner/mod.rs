//! Running the table: which tests, how often, what is printed and kept.

mod child;
mod round;

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::{Options, World, list, usage};
use crate::command::{printable, tail};
use crate::record::{Record, Tally, Verdict};
use crate::test::{Outcome, Test};
use round::{Interrupted, Round, Surroundings};

/// Of each log attached to a failing test, this many lines are printed. `--logs` keeps all.
const ATTACHED_LINES: usize = 60;

/// What is said of a name that no test has, before the name.
pub const NO_SUCH_TEST: &str = "no test matches --filter";

/// Runs the program `name`: reads the command line, runs the tests it selects and returns how to exit
/// (0 all passed or skipped, 1 some failed, 2 nothing could be run).
pub fn run<W: World>(name: &str, tests: &[Test<W>]) -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    match dispatch(name, tests, &arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn dispatch<W: World>(name: &str, tests: &[Test<W>], arguments: &[OsString]) -> Result<ExitCode> {
    let mut world = W::default();
    let options = Options::parse(arguments.iter().cloned(), &mut world)?;
    check_names(tests)?;
    if options.help {
        println!("{}", usage::<W>(name));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(one) = &options.one {
        return child::run(tests, &world, one, options.scale);
    }
    let selected: Vec<&Test<W>> = tests.iter().filter(|test| options.filter.selects(test.name)).collect();
    let names: Vec<_> = tests.iter().map(|test| test.name).collect();
    if let Some(word) = options.filter.unmatched(&names) {
        bail!("{NO_SUCH_TEST} {word}; --list shows all");
    }
    if options.list {
        print!("{}", list(tests, &options));
        return Ok(ExitCode::SUCCESS);
    }
    Session::begin(&options, &world, arguments)?.run(&selected)
}

/// Tests are told apart by name in filters, results and the soak's state.
fn check_names<W>(tests: &[Test<W>]) -> Result<()> {
    for (index, test) in tests.iter().enumerate() {
        if tests[..index].iter().any(|earlier| earlier.name == test.name) {
            bail!("two tests are named {}; rename one", test.name);
        }
    }
    Ok(())
}

/// One run over the selected tests.
struct Session<'a, W> {
    options: &'a Options,
    world: &'a W,
    surroundings: Surroundings<'a>,
    directory: Directory,
    tally: Tally,
    broken_controls: Vec<&'static str>,
}

/// A directory that goes away with its value.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A test that has ended, with all that is to be said about it.
struct Report {
    record: Record,
    logs: Vec<(String, String)>,
}

impl<'a, W: World> Session<'a, W> {
    fn begin(options: &'a Options, world: &'a W, arguments: &'a [OsString]) -> Result<Self> {
        if let Some(logs) = &options.logs {
            fs::create_dir_all(logs)
                .with_context(|| format!("creating the log directory {}", logs.display()))?;
        }
        let path = env::temp_dir().join(format!("integration-{}", std::process::id()));
        fs::create_dir_all(&path)
            .with_context(|| format!("creating {}; is the temporary directory writable?", path.display()))?;
        Ok(Self {
            options,
            world,
            surroundings: Surroundings::prepare(arguments)?,
            directory: Directory(path),
            tally: Tally::default(),
            broken_controls: Vec::new(),
        })
    }

    fn run(mut self, tests: &[&Test<W>]) -> Result<ExitCode> {
        let ends = self.options.minutes.map(|minutes| Instant::now() + Duration::from_mins(minutes.into()));
        let width = tests.iter().map(|test| test.name.len()).max().unwrap_or(0);
        for test in tests {
            let is_late = ends.is_some_and(|ends| Instant::now() >= ends);
            match if is_late { Ok(self.left_out(test)) } else { self.test(test) } {
                Ok(report) => self.tell(test, &report, width)?,
                Err(stopped) => {
                    let Some(Interrupted { signal }) = stopped.downcast_ref() else { return Err(stopped) };
                    println!("\ninterrupted in {}", test.name);
                    println!("{}", self.tally);
                    return Ok(ExitCode::from(128 + signal));
                }
            }
        }
        if !self.broken_controls.is_empty() {
            println!(
                "\nThe bed is broken, not supermachine: nothing of the product takes part in what failed: {}.\n\
                 Mend the bed first; any other failure above may follow from this.",
                self.broken_controls.join(", ")
            );
        }
        println!("{}", self.tally);
        Ok(if self.tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Of a test for which there is no time.
    fn left_out(&self, test: &Test<W>) -> Report {
        let minutes = self.options.minutes.unwrap_or(0);
        let record = Record {
            name: test.name.into(),
            verdict: Verdict::Skipped,
            reason: Some(format!("the {minutes} minutes of --minutes are over")),
            rounds_passed: 0,
            rounds: self.options.rounds(test.rounds),
            seconds: 0.0,
            control: test.is_control(),
        };
        Report { record, logs: Vec::new() }
    }

    /// All rounds of one test, up to the first that does not pass.
    fn test(&mut self, test: &Test<W>) -> Result<Report> {
        let rounds = self.options.rounds(test.rounds);
        let begun = Instant::now();
        let mut record = Record {
            name: test.name.into(),
            verdict: Verdict::Passed,
            reason: None,
            rounds_passed: 0,
            rounds,
            seconds: 0.0,
            control: test.is_control(),
        };
        let mut logs = Vec::new();
        for number in 1..=rounds {
            let round = Round {
                name: test.name,
                number,
                deadline: test.deadline,
                checks_leaks: self.world.leaks().is_some(),
                directory: self.directory.0.join(format!("{}-{number}", test.name)),
            };
            let ended = round.run(&self.surroundings, &self.world.logs())?;
            self.keep(test.name, number, number > 1, &ended.logs)?;
            match ended.outcome {
                Outcome::Passed => record.rounds_passed += 1,
                Outcome::Skipped(reason) => {
                    (record.verdict, record.reason) = (Verdict::Skipped, Some(reason));
                    break;
                }
                Outcome::Failed(reason) => {
                    let reason =
                        if rounds > 1 { format!("round {number} of {rounds}: {reason}") } else { reason };
                    (record.verdict, record.reason) = (Verdict::Failed, Some(reason));
                    logs = ended.logs;
                    break;
                }
            }
        }
        record.seconds = (begun.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        Ok(Report { record, logs })
    }

    /// Writes the logs of a round where `--logs` says.
    fn keep(&self, name: &str, number: u32, to_existing: bool, logs: &[(String, String)]) -> Result<()> {
        let Some(directory) = &self.options.logs else { return Ok(()) };
        let path = directory.join(format!("{name}.log"));
        let mut text = String::new();
        for (title, log) in logs {
            let _ = writeln!(text, "==== round {number}: {title}\n{}", log.trim_end());
        }
        append(&path, to_existing, &text).with_context(|| format!("writing the log {}", path.display()))
    }

    fn tell(&mut self, test: &Test<W>, report: &Report, width: usize) -> Result<()> {
        let Report { record, logs } = report;
        self.tally.count(record.verdict);
        if record.verdict == Verdict::Failed && record.control {
            self.broken_controls.push(test.name);
        }
        let word = match record.verdict {
            Verdict::Passed => "pass",
            Verdict::Failed => "FAIL",
            Verdict::Skipped => "skip",
        };
        let took = Duration::from_secs_f64(record.seconds);
        let mut line = format!("{word}  {:<width$}  {:>7.2} s", test.name, took.as_secs_f64());
        if record.rounds > 1 {
            let _ = write!(line, "  {}/{} rounds", record.rounds_passed, record.rounds);
        }
        if let (Verdict::Skipped, Some(reason)) = (record.verdict, &record.reason) {
            let _ = write!(line, "  {reason}");
        }
        println!("{line}");
        if record.verdict == Verdict::Failed {
            println!("      was to prove: {}", test.proves);
            print!("{}", indent(record.reason.as_deref().unwrap_or("no reason given"), "      "));
            for (title, log) in logs {
                println!("      ---- {title}");
                print!("{}", indent(&tail(log, ATTACHED_LINES), "      | "));
            }
        }
        io::stdout().flush()?;
        if let Some(path) = &self.options.results {
            record.append(path).with_context(|| format!("appending to {}", path.display()))?;
        }
        Ok(())
    }
}

fn append(path: &Path, to_existing: bool, text: &str) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.create(true).write(true).append(to_existing).truncate(!to_existing);
    options.open(path)?.write_all(text.as_bytes())
}

fn indent(text: &str, with: &str) -> String {
    text.lines().flat_map(|line| [with.into(), printable(line), "\n".into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::{Ctx, Rounds};

    #[allow(clippy::unnecessary_wraps, reason = "the type of a test")]
    fn pass(_: &mut Ctx<'_, ()>) -> Result<Outcome> {
        Ok(Outcome::Passed)
    }

    #[test]
    fn a_name_is_used_once() {
        let test = |name| Test {
            name,
            proves: "",
            run: pass,
            deadline: Duration::from_secs(1),
            rounds: Rounds::once_or(1),
            tags: &[],
        };
        assert!(check_names(&[test("a"), test("b")]).is_ok());
        assert!(check_names(&[test("a"), test("b"), test("a")]).is_err());
    }

    #[test]
    fn indentation() {
        assert_eq!(indent("a\nb", "| "), "| a\n| b\n");
    }
}
