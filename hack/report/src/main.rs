//! `report FILE.json...`: prints each file as a table and draws it as FILE.svg beside it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use report::Report;

const USAGE: &str = "\
usage: report FILE.json...

Prints each benchmark report (target/bench/NAME.json) as a table and draws it as NAME.svg beside it.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Value(file) => files.push(file.into()),
            lexopt::Arg::Long("help") | lexopt::Arg::Short('h') => {
                println!("{USAGE}");
                return Ok(());
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if files.is_empty() {
        bail!("no file given\n{USAGE}");
    }
    files.iter().try_for_each(|file| draw(file))
}

fn draw(file: &Path) -> Result<()> {
    let report = Report::read(file)?;
    let title = file.file_stem().unwrap_or_default().to_string_lossy();
    println!("{}", report::table(&title, &report));
    let picture = file.with_extension("svg");
    // A file named NAME.svg would be overwritten by its own picture.
    if picture == file {
        bail!("{} names a picture; give the .json file it is drawn from", file.display());
    }
    std::fs::write(&picture, report::svg(&title, &report))
        .with_context(|| format!("writing {}", picture.display()))?;
    println!("chart: {}", picture.display());
    Ok(())
}
