//! Running the programs of the machine: their failure says which call it was and what it printed.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};

/// A command that ends with this process, however that ends, and takes signals as usual.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: prctl and sigprocmask are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            set_pdeathsig(Signal::SIGKILL)?;
            take_signals()?;
            Ok(())
        });
    }
    command
}

/// Undoes, in a child, that this process leaves its signals to one thread: the mask is inherited.
pub fn take_signals() -> nix::Result<()> {
    SigSet::empty().thread_set_mask()
}

/// A command to which files of this user look like root's, for making an image of them.
pub fn command_as_root(program: &str) -> Command {
    if nix::unistd::geteuid().is_root() {
        return command(program);
    }
    let mut command = command("fakeroot");
    command.args(["--", program]);
    command
}

/// Runs to success; what it prints is shown only in the error.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs to success; its standard output.
pub fn capture(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?.stdout).into_owned())
}

/// Runs to success; all it printed.
pub fn output(command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| not_started(command))?;
    if !output.status.success() {
        bail!(failed(command, &output));
    }
    Ok(output)
}

/// Runs to success, calling `watch` twice a second meanwhile.
pub fn run_watched(command: &mut Command, mut watch: impl FnMut()) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| not_started(command))?;
    let mut stderr = child.stderr.take().context("no pipe from the program")?;
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        text
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        watch();
        thread::sleep(Duration::from_millis(500));
    };
    let stderr = reader.join().unwrap_or_default();
    if !status.success() {
        bail!(failed(command, &Output { status, stdout: Vec::new(), stderr }));
    }
    Ok(())
}

fn not_started(command: &Command) -> String {
    format!(
        "cannot run {}: is it installed? make setup installs what the test bed needs",
        command.get_program().display()
    )
}

fn failed(command: &Command, output: &Output) -> String {
    let arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_string_lossy).collect();
    let mut line = arguments.join(" ");
    if line.len() > 300 {
        line.truncate(line.floor_char_boundary(300));
        line.push_str(" ...");
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let tail: Vec<&str> = said.lines().rev().take(20).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    format!(
        "{} {line}\nended with {}\n{}",
        command.get_program().to_string_lossy(),
        output.status,
        tail.join("\n")
    )
}
