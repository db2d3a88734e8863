//! Hooks that run on the host: programs that are told of a container on their standard input.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{Hook, State};
use serde::{Deserialize, Serialize};

use crate::deadlines;

/// As much as is kept of what a hook says.
const LONGEST_TEXT: u64 = 4096;

/// Hooks, and what they are told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Which.
    pub hooks: Vec<Hook>,
    /// Of what.
    pub state: State,
    /// Where.
    pub bundle: PathBuf,
}

impl Run {
    /// Runs one after the other; the first that fails is the end. Blocks.
    pub fn all(&self) -> io::Result<()> {
        self.hooks.iter().try_for_each(|hook| self.one(hook))
    }

    /// Runs all. What fails is logged. Blocks.
    pub fn all_despite_errors(&self) {
        for error in self.hooks.iter().filter_map(|hook| self.one(hook).err()) {
            warn!("{error}");
        }
    }

    fn one(&self, hook: &Hook) -> io::Result<()> {
        let name = hook.path().display();
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("the hook {name}: {error}"));
        // A file, so that nobody waits for a hook that does not read a state longer than a pipe.
        let mut state = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
        serde_json::to_writer(&mut state, &self.state)?;
        state.rewind()?;
        let mut command = Command::new(hook.path());
        let args = hook.args().as_deref().unwrap_or_default();
        if let Some((own, rest)) = args.split_first() {
            command.arg0(own).args(rest);
        }
        let env = hook.env().iter().flatten().filter_map(|variable| variable.split_once('='));
        command.env_clear().envs(env).stdin(state).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.bundle.is_dir() {
            command.current_dir(&self.bundle);
        }
        let mut child = command.spawn().map_err(failed)?;
        let seconds = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
        let within = seconds.map_or(deadlines::HOOK, Duration::from_secs);
        let said = listen(&mut child);
        let status = wait(&mut child, within).map_err(failed)?;
        if status.success() {
            return Ok(());
        }
        let said = said.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        Err(failed(io::Error::other(format!("{status}: {}", said.trim_end()))))
    }
}

/// What it says, as far as it says it before it ends. Something it leaves behind may hold the pipes longer.
fn listen(child: &mut Child) -> std::sync::mpsc::Receiver<String> {
    let (send, receive) = std::sync::mpsc::channel();
    let streams: [Option<Box<dyn Read + Send>>; 2] =
        [child.stdout.take().map(|s| Box::new(s) as _), child.stderr.take().map(|s| Box::new(s) as _)];
    let send_text = move || {
        let mut text = Vec::new();
        for mut stream in streams.into_iter().flatten() {
            let _ = (&mut stream).take(LONGEST_TEXT).read_to_end(&mut text);
            let _ = io::copy(&mut stream, &mut io::sink());
        }
        let _ = send.send(String::from_utf8_lossy(&text).into_owned());
    };
    std::thread::spawn(send_text);
    receive
}

fn wait(child: &mut Child, within: Duration) -> io::Result<std::process::ExitStatus> {
    let until = Instant::now() + within;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("it did not end within {within:?}")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, timeout: Option<i64>) -> io::Result<()> {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into());
        hook.set_args(Some(["name", "-c", script].map(str::to_owned).to_vec()));
        hook.set_env(Some(vec!["A=b=c".to_owned()]));
        hook.set_timeout(timeout);
        let mut state = State::default();
        state.set_id("c1".to_owned());
        // More than a pipe holds.
        state.set_annotations(Some([("long".to_owned(), "x".repeat(1 << 18))].into()));
        Run { hooks: vec![hook], state, bundle: "/".into() }.all()
    }

    #[test]
    fn hooks_read_the_state_and_have_their_environment_only() {
        run("grep -q c1 && test \"$A\" = b=c && test -z \"$HOME\" && test $0 = name", None).unwrap();
        let error = run("echo much >&2; exit 7", None).unwrap_err().to_string();
        assert!(error.contains("/bin/sh") && error.contains('7') && error.contains("much"), "{error}");
    }

    #[test]
    fn hooks_have_deadlines() {
        let begun = Instant::now();
        assert_eq!(run("exec sleep 60", Some(1)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
