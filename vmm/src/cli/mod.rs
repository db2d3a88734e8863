//! The command line. Exit codes: 0 as wished, 1 it did not work, 2 the command makes no sense.

mod check;

use std::ffi::OsString;
use std::process::ExitCode;

use lexopt::prelude::*;

const USAGE: &str = "\
One process, one microVM.

Usage:
  supermachine-vmm check [--json]    say whether this host can run microVMs, and what to mend if not
  supermachine-vmm --version
  supermachine-vmm --help
";

/// How many words of the command line went wrong, and how.
type Usage = lexopt::Error;

/// Runs the command that `args` (without the program's name) ask for.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match run(lexopt::Parser::from_args(args)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("supermachine-vmm: {error}; see supermachine-vmm --help");
            ExitCode::from(2)
        }
    }
}

fn run(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    match args.next()? {
        Some(Long("version") | Short('V')) => {
            println!("supermachine-vmm {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Some(Long("help") | Short('h')) => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        Some(Value(command)) => match command.to_str() {
            Some("check") => check::main(args),
            _ => Err(format!("there is no command {}", command.display()).into()),
        },
        Some(other) => Err(other.unexpected()),
        None => Err("a command is missing".into()),
    }
}
