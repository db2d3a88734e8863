//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;

use crate::host::BOOT;
use crate::spec::{Spec, Start};

pub const HELP: &str = "\
hack/testbed: an emulated host with virtualization, containerd inside, for tests

  hack/testbed [OPTIONS] run -- CMD...    start a host, run CMD as root, exit with its code
  hack/testbed [OPTIONS] up               start a host that stays
  hack/testbed exec -- CMD...             run CMD in it (any number at once)
  hack/testbed shell                      the same, with a shell on this terminal
  hack/testbed console                    what its kernel printed
  hack/testbed status                     hosts that run, and what the cache holds
  hack/testbed down                       end it
  hack/testbed [OPTIONS] build            only build image and saved host
  hack/testbed clean                      remove the cache
  hack/testbed busybox-image BUSYBOX TAR  write the host's busybox image, of a static BUSYBOX
  hack/testbed guest-files DIR            write what the product's guests boot: kernel and initrd

  --arch x86_64|aarch64    of the host (default: this machine's)
  --cpus N                 default 2
  --memory MiB             default 4096
  --containerd 1.7|2.1     default 1.7
  --docker                 with dockerd
  --cri                    with containerd's Kubernetes interface and CNI
  --share DIR              DIR appears at /share, writable
  --timeout S              kill CMD after S seconds (exit code 124)
  --name NAME              of a host that stays (default: its architecture)
  --cold                   boot instead of restoring the saved host
  --kernel-append WORDS    boot with these words for the kernel, too
  --boot-timeout S         a host that is not up by then is killed (default 180)
  --rebuild                build the image anew

CMD's exit code is passed on; 125 says that the test bed itself failed.
The working tree is built and installed in the host before CMD runs.
";

pub struct Call {
    pub start: Start,
    pub verb: Verb,
    name: Option<String>,
}

impl Call {
    /// The host that stays, which this call is about.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.start.spec.arch.name().to_owned())
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verb {
    Run(Vec<String>),
    Up,
    Exec(Vec<String>),
    Shell,
    Down,
    Status,
    Console,
    Build,
    Clean,
    /// From a static busybox, the images of the host, as one tar.
    BusyboxImage(PathBuf, PathBuf),
    /// Kernel and initrd of the product's guests, there.
    GuestFiles(PathBuf),
}

/// What is asked for; `None` is help.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Call>> {
    let mut start = Start {
        spec: Spec::default(),
        share: None,
        timeout: None,
        cold: false,
        kernel_append: None,
        boot_timeout: BOOT,
        rebuild: false,
    };
    let mut name = None;
    let mut verb = None;
    let mut parser = lexopt::Parser::from_iter(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("arch") => start.spec.arch = parser.value()?.parse()?,
            Long("cpus") => start.spec.cpus = parser.value()?.parse()?,
            Long("memory") => start.spec.memory_mib = parser.value()?.parse()?,
            Long("containerd") => start.spec.containerd = parser.value()?.parse()?,
            Long("docker") => start.spec.docker = true,
            Long("cri") => start.spec.cri = true,
            Long("share") => start.share = Some(shared_dir(Path::new(&parser.value()?))?),
            Long("timeout") => start.timeout = Some(Duration::from_secs(parser.value()?.parse()?)),
            Long("name") => name = Some(host_name(parser.value()?.string()?)?),
            Long("cold") => start.cold = true,
            Long("kernel-append") => start.kernel_append = Some(parser.value()?.string()?),
            Long("boot-timeout") => start.boot_timeout = Duration::from_secs(parser.value()?.parse()?),
            Long("rebuild") => start.rebuild = true,
            Long("help") | Short('h') => return Ok(None),
            Value(word) if verb.is_none() => {
                let word = word.string()?;
                verb = Some(match word.as_str() {
                    "run" => Verb::Run(command(&mut parser)?),
                    "up" => Verb::Up,
                    "exec" => Verb::Exec(command(&mut parser)?),
                    "shell" => Verb::Shell,
                    "down" => Verb::Down,
                    "status" => Verb::Status,
                    "console" => Verb::Console,
                    "build" => Verb::Build,
                    "clean" => Verb::Clean,
                    "busybox-image" => Verb::BusyboxImage(parser.value()?.into(), parser.value()?.into()),
                    "guest-files" => Verb::GuestFiles(parser.value()?.into()),
                    "help" => return Ok(None),
                    _ => bail!("{word:?} is not something to do: hack/testbed --help lists what is"),
                });
            }
            other => return Err(other.unexpected().into()),
        }
    }
    match verb {
        Some(verb) => Ok(Some(Call { start, verb, name })),
        None => Ok(None),
    }
}

/// All that follows, with or without `--` before it.
fn command(parser: &mut lexopt::Parser) -> Result<Vec<String>> {
    let mut argv = parser
        .raw_args()?
        .map(|word| word.into_string().map_err(|word| anyhow::anyhow!("{} is not UTF-8", word.display())))
        .collect::<Result<Vec<_>>>()?;
    if argv.first().is_some_and(|word| word == "--") {
        argv.remove(0);
    }
    if argv.is_empty() {
        bail!("no command given: hack/testbed run -- CMD...");
    }
    Ok(argv)
}

fn shared_dir(path: &Path) -> Result<PathBuf> {
    let full = path.canonicalize().with_context(|| format!("--share {}", path.display()))?;
    if !full.is_dir() {
        bail!("--share {}: not a directory", path.display());
    }
    Ok(full)
}

fn host_name(name: String) -> Result<String> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if name.is_empty() || name.len() > 32 || !plain || name.starts_with("run-") || name.starts_with("saving-")
    {
        bail!(
            "--name {name:?}: letters, digits, - and _, at most 32 of them, not beginning with run- or saving-"
        );
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(words: &str) -> Result<Option<Call>> {
        parse(["testbed"].into_iter().chain(words.split_whitespace()).map(OsString::from))
    }

    #[test]
    fn calls() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (line, verb) in [
            ("run -- sh -c true", Verb::Run(words("sh -c true"))),
            ("run true --help", Verb::Run(words("true --help"))),
            ("--cpus 1 --docker up", Verb::Up),
            ("exec -- a -- b", Verb::Exec(words("a -- b"))),
            ("status", Verb::Status),
            ("down --arch aarch64", Verb::Down),
        ] {
            assert_eq!(call(line).unwrap().unwrap().verb, verb, "{line}");
        }
        for line in ["", "--help", "help", "run --help -- true"] {
            // The last one is a command named --help, which is what its user typed.
            assert_eq!(call(line).unwrap().is_none(), !line.starts_with("run"), "{line}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("--arch mips up", "mips"),
            ("--containerd 1.6 up", "1.6"),
            ("--share /nonexistent up", "/nonexistent"),
            ("run", "no command"),
            ("fly", "fly"),
            ("--name ../x up", "../x"),
            ("up down", "down"),
            ("--warm up", "warm"),
        ] {
            let error = call(line).err().map(|error| format!("{error:#}")).unwrap_or_default();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
