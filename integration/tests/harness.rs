//! The harness itself: whatever a test does, the others are run and the last line counts them all.

#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use integration::Record;
use integration::Verdict::{Failed, Passed, Skipped};
use integration::command::{Cmd, Finished};
use integration::process;

const PROGRAM: &str = env!("CARGO_BIN_EXE_misbehaving");
const LONG: Duration = Duration::from_secs(100);

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("harness-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

fn run(arguments: &[&str]) -> Finished {
    Cmd::new(PROGRAM, LONG).args(arguments).run().unwrap()
}

#[test]
fn every_way_to_go_wrong_is_told_and_counted() {
    let directory = directory("all");
    let place = |name: &str| directory.join(name).display().to_string();
    fs::write(directory.join("system"), "before\n").unwrap();
    let done = run(&["--log", &place("system"), "--results", &place("results"), "--logs", &place("logs")]);
    let out = done.out();
    assert_eq!(done.code(), Some(1), "{out}");
    assert_eq!(out.lines().last(), Some("1 passed, 7 failed, 1 skipped"), "{out}");
    for piece in [
        "2/2 rounds",
        "no such thing here",
        "round 1 of 2: it is wrong",
        "out of order",
        "ended (exit status: 0) without an outcome",
        "still running at its deadline of 2 s",
        "sleep 1234",
        "round 2 of 2: too often",
        "The bed is broken, not supermachine",
    ] {
        assert!(out.contains(piece), "{piece:?} is missing in\n{out}");
    }
    assert!(out.contains("| meanwhile") && !out.contains("| before"), "{out}");
    let kept = fs::read_to_string(directory.join("logs/logs.log")).unwrap();
    assert!(kept.contains("system\nmeanwhile"), "{kept}");

    let records = Record::parse_lines(&fs::read_to_string(directory.join("results")).unwrap()).unwrap();
    let verdicts: Vec<_> = records.iter().map(|record| (record.name.as_str(), record.verdict)).collect();
    assert_eq!(verdicts[..3], [("passes", Passed), ("skips", Skipped), ("errs", Failed)]);
    let last = records.last().unwrap();
    assert_eq!((last.name.as_str(), last.rounds_passed, last.rounds), ("second-round", 1, 2));
    let left = process::all().into_iter().filter(|one| one.arguments == "sleep 1234" && !one.is_zombie());
    assert_eq!(left.count(), 0, "the daemon lives on");
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_hang_costs_its_deadline_and_no_more() {
    let begun = Instant::now();
    let done = run(&["--filter", "=hangs,passes", "--log", "/nonexistent"]);
    assert_eq!(done.out().lines().last(), Some("1 passed, 1 failed, 0 skipped"), "{}", done.out());
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn the_selection_must_select_something() {
    let done = run(&["--filter", "pases"]);
    assert_eq!(done.code(), Some(2));
    assert!(done.err().contains("pases"), "{}", done.err());
    let listed = run(&["--list", "--filter", "second"]);
    assert_eq!((listed.code(), listed.out().lines().count()), (Some(0), 1));
}

#[test]
fn a_stopped_runner_leaves_nothing() {
    let mut running =
        Cmd::new(PROGRAM, LONG).args(["--filter", "passes,=hangs", "--log", "/nonexistent"]).start().unwrap();
    running.until_stdout_has("pass  passes", LONG).unwrap();
    let runner = running.pid();
    let below = || process::descendants(runner);
    integration::wait::until_true("the hanging test", LONG, || !below().is_empty()).unwrap();
    let children = below();
    running.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
    let done = running.wait().unwrap();
    assert_eq!(done.code(), Some(128 + 15), "{}", done.out());
    assert_eq!(done.out().lines().last(), Some("1 passed, 0 failed, 0 skipped"));
    for child in children {
        let now = process::read(child.pid).filter(|now| now.started == child.started);
        assert!(now.is_none_or(|now| now.is_zombie()), "{} lives on", child.describe());
    }
    assert!(!std::env::temp_dir().join(format!("integration-{runner}")).exists());
}
