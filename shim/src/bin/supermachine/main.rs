//! `supermachine`: what an operator wants to know about the containers of this host.

mod check;
mod follow;
mod progress;
mod ps;
mod snapshot;
mod template;
mod timeline;
mod warm;

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lexopt::prelude::*;
use shim::info::VERSION;
use shim::inventory;
use shim::paths::ROOT;

const USAGE: &str = "\
What runs in machines of its own on this host.

Usage:
  supermachine check                    say whether this host can run machines, and what to mend if not
  supermachine ps                       containers, and what runs them
  supermachine console [-f] ID          what the console of a container's machine showed
  supermachine logs [-f] ID             what a container's shim logged
  supermachine timeline [--svg FILE] ID where the time went when it was created
  supermachine template ls              the templates that machines are restored from
  supermachine template build           make the one that containers without limits need, if it is not there
  supermachine template rm KEY...       remove some; machines that run on them go on
  supermachine template prune [--all]   remove those beyond the configured limit, or all that are not in use
  supermachine warm ls                  warm containers, from which others start
  supermachine warm build ID            wait until a container is warm that was started to be, and kept for others
  supermachine warm rm KEY...           remove some; containers that have started from them go on
  supermachine snapshot ls [DIR...]     snapshots: those of templates, and what is in other directories
  supermachine snapshot inspect DIR     what a snapshot says of itself
  supermachine snapshot verify DIR      read all of it, and say whether it is as it was written
  supermachine snapshot rm DIR          remove it
  supermachine config                   a configuration file with every key, to begin with
  supermachine version

Options:
  -n, --namespace NAME   only containers of this namespace of containerd's
  -f, --follow           go on printing what comes, until the container is gone
      --json             ps, timeline, template ls, warm ls and snapshot: for programs
      --all              template prune: whatever the limit is
      --svg FILE         timeline: write a picture, too

An ID may be cut short, as long as one container's begins so, and so may a KEY. In the place of a DIR, the KEY of a template
is its snapshot.
";

type Failure = Box<dyn Error>;

/// The command line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Call {
    verb: String,
    words: Vec<String>,
    namespace: Option<String>,
    follow: bool,
    json: bool,
    all: bool,
    svg: Option<PathBuf>,
}

fn parse(mut parser: lexopt::Parser) -> Result<Call, Failure> {
    let mut call = Call::default();
    while let Some(arg) = parser.next()? {
        match arg {
            Short('n') | Long("namespace") => call.namespace = Some(parser.value()?.string()?),
            Short('f') | Long("follow") => call.follow = true,
            Long("json") => call.json = true,
            Long("all") => call.all = true,
            Long("svg") => call.svg = Some(parser.value()?.into()),
            Short('h') | Long("help") => "help".clone_into(&mut call.verb),
            Short('v') | Long("version") => "version".clone_into(&mut call.verb),
            Value(word) if call.verb.is_empty() => call.verb = word.string()?,
            Value(word) if call.words.len() < most_words(&call.verb) => call.words.push(word.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(call)
}

/// How many words a verb takes.
fn most_words(verb: &str) -> usize {
    match verb {
        "template" | "snapshot" | "warm" => usize::MAX,
        "console" | "logs" | "timeline" => 1,
        _ => 0,
    }
}

fn main() -> ExitCode {
    match parse(lexopt::Parser::from_env()).and_then(|call| run(&call)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("supermachine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(call: &Call) -> Result<ExitCode, Failure> {
    let root = Path::new(ROOT);
    let namespace = call.namespace.as_deref();
    let entry = || -> Result<inventory::Entry, Failure> {
        let id =
            call.words.first().ok_or_else(|| format!("{} of which container? Give its ID", call.verb))?;
        Ok(inventory::find(root, namespace, id)?)
    };
    match call.verb.as_str() {
        "check" => return Ok(check::look()),
        "ps" => ps::list(&inventory::list(root, namespace), call.json)?,
        "console" => {
            let entry = entry()?;
            follow::print(&entry.console(), call.follow)?;
        }
        "logs" => {
            let entry = entry()?;
            follow::print(&entry.log(), call.follow)?;
        }
        "timeline" => timeline::show(&entry()?, call.json, call.svg.as_deref())?,
        "template" => return template::run(root, &call.words, call.json, call.all),
        "warm" => return warm::run(root, &call.words, call.json),
        "snapshot" => return snapshot::run(&call.words, call.json),
        "config" => print(&runtime_spec::config::default_file()),
        "version" => print(&format!("supermachine {VERSION}\n")),
        "help" => print(USAGE),
        "" => return Err(format!("say what to do\n{USAGE}").into()),
        other => return Err(format!("{other} is nothing to do; supermachine --help says what is").into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// For a reader that may have gone: that is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// What a guest, or somebody else, wrote is not to move a terminal's cursor.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.replace("\r\n", "\n").chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Call, String> {
        parse(lexopt::Parser::from_args(words)).map_err(|error| error.to_string())
    }

    #[test]
    fn command_lines() {
        let call = parsed(&["-n", "k8s.io", "console", "-f", "web"]).unwrap();
        assert_eq!(
            (call.verb.as_str(), call.words.as_slice(), call.follow),
            ("console", &["web".to_owned()][..], true)
        );
        assert_eq!(parsed(&["template", "rm", "a", "b"]).unwrap().words, ["rm", "a", "b"]);
        assert!(parsed(&["template", "prune", "--all"]).unwrap().all);
        assert_eq!(call.namespace.as_deref(), Some("k8s.io"));
        assert_eq!(parsed(&["timeline", "--svg", "t.svg", "x"]).unwrap().svg, Some("t.svg".into()));
        assert_eq!(parsed(&["--help"]).unwrap().verb, "help");
        assert!(parsed(&["ps", "a", "b"]).is_err() && parsed(&["--nope"]).is_err());
        assert!(run(&parsed(&["frobnicate"]).unwrap()).unwrap_err().to_string().contains("frobnicate"));
        for (words, wanted) in [
            (&["template", "fly"][..], "prune"),
            (&["snapshot", "inspect"], "Give its directory"),
            (&["template"], "ls"),
        ] {
            let error = run(&parsed(words).unwrap()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{words:?}: {error}");
        }
        assert!(run(&parsed(&["logs"]).unwrap()).unwrap_err().to_string().contains("Give its ID"));
    }

    #[test]
    fn a_guest_does_not_write_to_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\r\nc\td\n"), "a\u{fffd}[2Jb\nc\td\n");
    }
}
