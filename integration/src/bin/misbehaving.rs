//! A program of tests that go wrong in every way, for the test of the harness itself.

use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use integration::{Ctx, LogSources, Outcome, Rounds, Test, World};

#[derive(Default)]
struct Nowhere {
    log: std::path::PathBuf,
}

impl World for Nowhere {
    const OPTIONS: &'static str = "  --log FILE                a log that grows";

    fn option(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool> {
        if name == "log" {
            self.log = parser.value()?.into();
        }
        Ok(name == "log")
    }

    fn logs(&self) -> LogSources {
        LogSources { files: vec![("system".into(), self.log.clone())], ..LogSources::default() }
    }
}

type Run = fn(&mut Ctx<'_, Nowhere>) -> Result<Outcome>;

fn main() -> ExitCode {
    let test = |name, run: Run, tags| Test {
        name,
        proves: "the harness copes",
        run,
        deadline: Duration::from_secs(2),
        rounds: Rounds { short: 2, long: 3 },
        tags,
    };
    let tests = [
        test("passes", |_| Ok(Outcome::Passed), &[]),
        test("skips", |_| Ok(Outcome::Skipped("no such thing here".into())), &[]),
        test("errs", |_| bail!("it is wrong"), &[]),
        test("panics", |_| panic!("out of order"), &[]),
        test("exits", |_| std::process::exit(0), &[]),
        test("hangs", |_| -> Result<Outcome> { forever() }, &[]),
        test("leaves", leaves, &[]),
        test("logs", logs, &["control"]),
        test(
            "second-round",
            |ctx| if ctx.round == 2 { bail!("too often") } else { Ok(Outcome::Passed) },
            &[],
        ),
    ];
    integration::run("misbehaving", &tests)
}

fn forever() -> ! {
    loop {
        thread::sleep(Duration::from_secs(1000));
    }
}

fn leaves(_: &mut Ctx<'_, Nowhere>) -> Result<Outcome> {
    // A daemon: in a session of its own, and its parent is gone.
    Command::new("sh").args(["-c", "setsid sleep 1234 >/dev/null 2>&1 &"]).status()?;
    Ok(Outcome::Passed)
}

fn logs(ctx: &mut Ctx<'_, Nowhere>) -> Result<Outcome> {
    std::fs::write(&ctx.world.log, "before\nmeanwhile\n")?;
    bail!("look at the log")
}
