//! The program that containerd executes. What it prints is read by a machine: nothing else is ever written, and an
//! error is one line on standard error.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use crate::args::{Args, Verb};
use crate::info::{self, NAME, VERSION};
use crate::{cleanup, daemon, holder};

const USAGE: &str = "\
containerd-shim-supermachine-v2 is executed by containerd for containers of the runtime io.containerd.supermachine.v2,
each of which runs in a machine of its own.

Usage:
  containerd-shim-supermachine-v2 -v       its version
  containerd-shim-supermachine-v2 -info    what it can do, as containerd reads it
  containerd-shim-supermachine-v2 -namespace NS -id ID -address SOCKET -publish-binary FILE [-debug] start
  containerd-shim-supermachine-v2 -namespace NS -id ID [-bundle DIR] delete
";

type Failure = Box<dyn std::error::Error>;

/// Runs what `words` (without the program's name) ask for.
pub fn main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A panic's text on standard error would become part of an answer; of the daemon it is the log's.
    std::panic::set_hook(Box::new(|panic| log::error!("panic: {panic}")));
    let done = Args::parse(words).map_err(Failure::from).and_then(|args| run(&args));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "containerd-shim-supermachine-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    match args.verb {
        Verb::Version => {
            print(format!("{NAME}:\n  Version: {VERSION}\n").as_bytes())?;
        }
        Verb::Info => print(&info::answer(&input()?)?)?,
        Verb::Start => print(&daemon::start(args, &input()?)?)?,
        Verb::Serve => daemon::serve(args)?,
        Verb::Delete => print(&cleanup::delete(args)?)?,
        Verb::Hold => holder::hold(),
        Verb::Help => print(USAGE.as_bytes())?,
        Verb::None => return Err(format!("a command is missing\n{USAGE}").into()),
    }
    Ok(())
}

/// All of standard input: there may be none.
fn input() -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    // Messages of ttrpc are no longer; whatever is longer is not meant for us.
    match io::stdin().take(4 << 20).read_to_end(&mut input) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(Vec::new()),
        read => read.map(|_| input),
    }
}

fn print(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}
