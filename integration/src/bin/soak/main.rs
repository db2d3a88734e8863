//! Everything, often: the long counts of all tests, part by part.
//!
//! A part is one test in one environment. Its result is kept in `docs/soak.json`, with the commit that it is of, as
//! soon as it is there, and `docs/soak.md` is written anew from it: so a soak can be stopped at any time, and carried
//! on at another, on another commit. What was never run comes first, then what was run longest ago; what has been run
//! on this very commit is done. Several may go on in one tree at a time, each in other environments.

mod date;
mod kept;
mod page;
mod part;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use integration::command::Cmd;
use integration::{Filter, Verdict};
use kept::Kept;
use lexopt::{Arg, Parser, ValueExt};
use part::{Part, Suite};

const USAGE: &str = "\
usage: soak [OPTION]...

Runs the long counts of all tests and writes docs/soak.md: first the parts that were never run, then those that
were run longest ago, but for those of this commit. The page has all parts, whichever were chosen. To be started in the
root of the repository, with `outside` and `inside` built beside this program.

  --list                    print the parts and which are done
  --filter TEXT[,TEXT]      only tests whose name contains one of these, or is it (=TEXT), and none of those (-TEXT)
  --arch ARCH[,ARCH]        of the emulated hosts (x86_64,aarch64)
  --containerd V[,V]        for the tests inside (1.7,2.1)
  --boot WAY[,WAY]          for the tests inside, how containers' machines come to life (restore,cold)
  --minutes N               begin no part after that time
  --count N                 this many rounds of each instead of the long count
  --retry-failed            run again what has failed
  --testbed PROGRAM         the tool that runs emulated hosts (hack/testbed)
  --e2e PROGRAM             the script that runs `inside` in such a host (hack/e2e)
  --logs DIR                logs of what fails outside (target/soak)
  --page FILE               the page to write (docs/soak.md); what is known is beside it, in a file with .json";

struct Options {
    list: bool,
    filter: Filter,
    archs: Vec<String>,
    containerds: Vec<String>,
    boots: Vec<String>,
    count: Option<u32>,
    retry_failed: bool,
    testbed: PathBuf,
    e2e: PathBuf,
    minutes: Option<u64>,
    logs: PathBuf,
    page: PathBuf,
}

/// What everything is soaked on.
const ARCHS: [&str; 2] = ["x86_64", "aarch64"];
const CONTAINERDS: [&str; 2] = ["1.7", "2.1"];
const BOOTS: [&str; 2] = ["restore", "cold"];
/// What begins like this is the same with every containerd, and is soaked with the first.
const WITHOUT_CONTAINERD: [&str; 3] = ["kvm.", "vmm.", "agent."];

impl Options {
    fn choose(&self, part: &Part) -> bool {
        let of_suite = match &part.suite {
            Suite::Outside => true,
            Suite::Inside { containerd, boots } => {
                let way = BOOTS[usize::from(*boots)];
                self.containerds.contains(containerd) && self.boots.iter().any(|boot| boot == way)
            }
        };
        of_suite && self.archs.contains(&part.arch) && self.filter.selects(&part.test)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing has failed.
fn run() -> Result<bool> {
    let Some(options) = parse()? else { return Ok(true) };
    let commit = commit()?;
    fs::create_dir_all(&options.logs).with_context(|| format!("creating {}", options.logs.display()))?;
    let mut kept = Kept::read(&options.page.with_extension("json"))?;
    let all = parts()?;
    let mut due: Vec<Part> = all.iter().filter(|part| options.choose(part)).cloned().collect();
    if due.is_empty() {
        bail!(
            "nothing to soak: no part is of these architectures, containerds and ways to boot, and of a test that --filter selects"
        );
    }
    // What was never run, or is to be run again, has no time, which comes first; the others keep their order where it is the
    // same.
    let again = |done: &&part::Done| !(options.retry_failed && done.record.verdict == Verdict::Failed);
    due.sort_by_key(|part| kept.get(part).filter(again).map(|done| done.began));
    if options.list {
        for part in &due {
            let done = kept.get(part);
            println!("{:<60} {}", part.name(), done.map_or("to do".into(), |done| done.in_short(&commit)));
        }
        return Ok(true);
    }
    let until = options.minutes.map(|minutes| Instant::now() + Duration::from_mins(minutes));
    for part in &due {
        match kept.get(part) {
            Some(done)
                if done.commit == commit
                    && !(options.retry_failed && done.record.verdict == Verdict::Failed) =>
            {
                println!("{:<60} done: {}", part.name(), done.in_short(&commit));
                continue;
            }
            _ if until.is_some_and(|until| Instant::now() >= until) => break,
            _ => {}
        }
        println!("{:<60} ...", part.name());
        let done = part::run(part, &options, &commit)?;
        println!("{:<60} {}", part.name(), done.in_short(&commit));
        let _alone = kept.alone()?;
        kept.keep(part, done)?;
        write_page(&options, &all, &kept)?;
    }
    let _alone = kept.alone()?;
    let page = write_page(&options, &all, &kept)?;
    println!("{}", page.summary());
    println!("page: {}", options.page.display());
    Ok(page.failed() == 0)
}

fn write_page(options: &Options, parts: &[Part], kept: &Kept) -> Result<page::Page> {
    let rows = parts.iter().map(|part| (part.clone(), kept.get(part).cloned())).collect();
    let page = page::Page { rows };
    page.write(&options.page).with_context(|| format!("writing {}", options.page.display()))?;
    Ok(page)
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options {
        list: false,
        filter: Filter::default(),
        archs: ARCHS.map(str::to_owned).to_vec(),
        containerds: CONTAINERDS.map(str::to_owned).to_vec(),
        boots: BOOTS.map(str::to_owned).to_vec(),
        count: None,
        retry_failed: false,
        testbed: "hack/testbed".into(),
        e2e: "hack/e2e".into(),
        minutes: None,
        logs: "target/soak".into(),
        page: "docs/soak.md".into(),
    };
    let words = |text: String| text.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let mut parser = Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("list") => options.list = true,
            Arg::Long("filter") => options.filter.add(&parser.value()?.string()?),
            Arg::Long("arch") => options.archs = words(parser.value()?.string()?),
            Arg::Long("containerd") => options.containerds = words(parser.value()?.string()?),
            Arg::Long("boot") => options.boots = words(parser.value()?.string()?),
            Arg::Long("count") => options.count = Some(parser.value()?.parse()?),
            Arg::Long("retry-failed") => options.retry_failed = true,
            Arg::Long("testbed") => options.testbed = parser.value()?.into(),
            Arg::Long("e2e") => options.e2e = parser.value()?.into(),
            Arg::Long("minutes") => options.minutes = Some(parser.value()?.parse()?),
            Arg::Long("logs") => options.logs = parser.value()?.into(),
            Arg::Long("page") => options.page = parser.value()?.into(),
            Arg::Long("help") | Arg::Short('h') => {
                println!("{USAGE}");
                return Ok(None);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(options))
}

/// The commit that is soaked. Changes that are not committed are another thing than the commit.
fn commit() -> Result<String> {
    let git = |arguments: &[&str]| -> Result<String> {
        let done = Cmd::new("git", Duration::from_mins(1)).args(arguments).ok()?;
        Ok(done.out().trim().to_owned())
    };
    let mut commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // These are written by the soak itself.
    if !git(&["status", "--porcelain", "--", ".", ":!docs/soak.md", ":!docs/soak.json"])?.is_empty() {
        commit += "-modified";
    }
    Ok(commit)
}

/// All parts, in the order in which they are run: what can be broken for all others first.
fn parts() -> Result<Vec<Part>> {
    let (outside, inside) = (tests("outside")?, tests("inside")?);
    let mut parts = Vec::new();
    for arch in ARCHS {
        let part = |suite: &Suite, test: &String| Part {
            suite: suite.clone(),
            arch: arch.to_owned(),
            test: test.clone(),
        };
        parts.extend(outside.iter().map(|test| part(&Suite::Outside, test)));
        for version in CONTAINERDS {
            let suite = Suite::Inside { containerd: version.to_owned(), boots: false };
            let again = version != CONTAINERDS[0];
            let knows_none = |test: &str| WITHOUT_CONTAINERD.iter().any(|place| test.starts_with(place));
            parts.extend(
                inside.iter().filter(|test| !(again && knows_none(test))).map(|test| part(&suite, test)),
            );
        }
        // Only containers' machines are restored where they could boot.
        let suite = Suite::Inside { containerd: CONTAINERDS[0].to_owned(), boots: true };
        parts.extend(inside.iter().filter(|test| test.starts_with("task.")).map(|test| part(&suite, test)));
    }
    Ok(parts)
}

/// The program `name` beside this one.
fn sibling(name: &str) -> Result<PathBuf> {
    Ok(env::current_exe().context("finding this program")?.with_file_name(name))
}

/// The names of the tests of the program `name`: the first word of each line of its list.
fn tests(name: &str) -> Result<Vec<String>> {
    let listed = Cmd::new(sibling(name)?, Duration::from_mins(1)).arg("--list").ok()?;
    Ok(listed.out().lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect())
}
