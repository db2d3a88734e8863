//! The command line, with flags as Go programs take them: `-id X`, `--id=X`, `-debug`.

use std::ffi::OsString;
use std::path::PathBuf;

/// What the program is asked to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verb {
    /// Nothing was said.
    #[default]
    None,
    /// `start`: answer with the address of a shim.
    Start,
    /// `delete`: remove what a shim left.
    Delete,
    /// `serve`: be the shim; what `start` executes.
    Serve,
    /// `hold`: be the process that stands for a container.
    Hold,
    /// `-v`
    Version,
    /// `-info`
    Info,
    /// `-h`
    Help,
}

/// A command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub verb: Verb,
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-ttrpc`: containerd's ttrpc socket; from `start` to `serve`.
    pub ttrpc: String,
    /// `-publish-binary`: the containerd binary.
    pub publish_binary: PathBuf,
    /// `-bundle`: where config.json lies, for `delete`.
    pub bundle: PathBuf,
    /// `-debug`: say more in the log.
    pub debug: bool,
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Usage {
    /// A flag nobody knows.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// A flag without its value.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// A word that is no verb.
    #[error("there is no command {0}; there are start and delete")]
    Command(String),
    /// Not UTF-8.
    #[error("{0:?} is not UTF-8")]
    Text(OsString),
}

impl Args {
    /// Reads a command line, without the program's name.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, Usage> {
        let mut args = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let word = word.into_string().map_err(Usage::Text)?;
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                // Whatever follows the command is not ours to judge.
                args.verb = match word.as_str() {
                    "start" => Verb::Start,
                    "delete" => Verb::Delete,
                    "serve" => Verb::Serve,
                    "hold" => Verb::Hold,
                    _ => return Err(Usage::Command(word)),
                };
                break;
            };
            let (name, given) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let on =
                given.as_deref().is_none_or(|value| ["1", "t", "T", "true", "TRUE", "True"].contains(&value));
            match name {
                "v" | "version" if on => args.verb = Verb::Version,
                "info" if on => args.verb = Verb::Info,
                "h" | "help" if on => args.verb = Verb::Help,
                "v" | "version" | "info" | "h" | "help" => {}
                "debug" => args.debug = on,
                "namespace" | "id" | "address" | "ttrpc" | "publish-binary" | "bundle" | "socket" => {
                    let next = |word: OsString| word.into_string().map_err(Usage::Text);
                    let value = match given {
                        Some(value) => value,
                        None => next(words.next().ok_or_else(|| Usage::NoValue(name.to_owned()))?)?,
                    };
                    match name {
                        "namespace" => args.namespace = value,
                        "id" => args.id = value,
                        "address" => args.address = value,
                        "ttrpc" => args.ttrpc = value,
                        "publish-binary" => args.publish_binary = value.into(),
                        "bundle" => args.bundle = value.into(),
                        // Where sockets go is said on standard input.
                        _ => {}
                    }
                }
                _ => return Err(Usage::Unknown(name.to_owned())),
            }
            if matches!(args.verb, Verb::Version | Verb::Info | Verb::Help) {
                break;
            }
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Usage> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn as_containerd_calls_it() {
        let args = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        let expected = Args {
            verb: Verb::Start,
            namespace: "k8s.io".into(),
            id: "c1".into(),
            address: "/run/containerd/containerd.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            debug: true,
            ..Args::default()
        };
        assert_eq!(args, expected);
        let args = parse("--id=c1 -debug=false -bundle /b delete more words").unwrap();
        assert_eq!((args.verb, args.debug, args.bundle), (Verb::Delete, false, "/b".into()));
    }

    #[test]
    fn what_is_asked_and_what_is_wrong() {
        for (line, verb) in [
            ("-v", Ok(Verb::Version)),
            ("--version", Ok(Verb::Version)),
            ("-info", Ok(Verb::Info)),
            ("-id x -info", Ok(Verb::Info)),
            ("", Ok(Verb::None)),
            ("-fly", Err(Usage::Unknown("fly".into()))),
            ("-id", Err(Usage::NoValue("id".into()))),
            ("stop", Err(Usage::Command("stop".into()))),
        ] {
            assert_eq!(parse(line).map(|args| args.verb), verb, "{line}");
        }
    }
}
