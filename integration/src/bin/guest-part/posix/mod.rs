//! A table of what file system calls do, and the program that tries it.
//!
//! Each case has a directory of its own and says in one line what came of each of its steps. Nothing in it
//! depends on when or where it runs, so that two file systems are compared by comparing lines.

mod actor;
mod table;
mod tree;
mod verbs;
mod words;
mod world;

use std::env;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getegid, geteuid};

use table::Case;
use tree::And;
use world::World;

/// What of this is asked for, in words: a table to run in a directory, or a part that a case needs.
pub fn call(words: &[&str]) -> Result<()> {
    match words {
        ["table", directory] => run(Path::new(directory), ""),
        ["table", directory, prefix] => run(Path::new(directory), prefix),
        ["make-for-reading", directory] => make_for_reading(Path::new(directory)),
        ["read-only", directory] => read_only(Path::new(directory)),
        ["tree", directory] => tree::tell(Path::new(directory), And::Inodes),
        ["contents", directory] => tree::tell(Path::new(directory), And::Contents),
        ["try", directory, steps] => {
            let case = Case { name: "try".to_owned(), steps: (*steps).to_owned() };
            tell(&case, Path::new(directory))
        }
        ["wait"] => Ok(verbs::wait()?),
        ["ids"] => {
            println!("{}:{}", geteuid(), getegid());
            Ok(())
        }
        _ => bail!("this makes no sense: {}", words.join(" ")),
    }
}

/// Runs the cases whose names begin with `prefix`, each in a new directory below `directory`.
fn run(directory: &Path, prefix: &str) -> Result<()> {
    for case in table::all().iter().filter(|case| case.name.starts_with(prefix)) {
        let own = directory.join(&case.name);
        umask(Mode::from_bits_truncate(0o022));
        fs::create_dir(&own).with_context(|| format!("creating {}", own.display()))?;
        tell(case, &own)?;
    }
    Ok(())
}

/// Makes what [`read_only`] works on in the empty `directory`.
fn make_for_reading(directory: &Path) -> Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    tell(&table::readonly::given(), directory)
}

/// Runs the cases of calls that would change something, all in `directory`, which is mounted read-only.
fn read_only(directory: &Path) -> Result<()> {
    table::readonly::cases().iter().try_for_each(|case| tell(case, directory))
}

fn tell(case: &Case, directory: &Path) -> Result<()> {
    env::set_current_dir(directory).with_context(|| format!("going to {}", directory.display()))?;
    let outcome = try_out(case).map_err(|why| anyhow!("the case {}: {why}", case.name))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: {outcome}", case.name)?;
    Ok(())
}

/// The outcomes of all steps, but for those of the ones before a bar that went well: they prepare the others.
fn try_out(case: &Case) -> std::result::Result<String, String> {
    let (given, tried) = case.steps.split_once('|').unwrap_or(("", &case.steps));
    let mut world = World::default();
    let mut told = Vec::new();
    for step in steps(given) {
        if let Err(errno) = world.step(step)? {
            told.push(format!("({step}: {errno})"));
        }
    }
    for step in steps(tried) {
        told.push(world.step(step)?.unwrap_or_else(|errno| errno));
    }
    Ok(told.join(" "))
}

fn steps(text: &str) -> impl Iterator<Item = &str> {
    text.split(';').map(str::trim).filter(|step| !step.is_empty())
}
