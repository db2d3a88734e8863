//! Terminals, as a person at one finds them: other processes in a container, and containers of `ctr`'s.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use integration::command::contains;
use integration::containerd::{Exec, Stdio};
use integration::fifo::{Input, Output};
use integration::terminal::Terminal;
use integration::{Ctx, Outcome, Test};

use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.terminals",
        "the terminal of another process, and those that ctr has, take a size, Ctrl-C and the end of input as with runc",
        terminals,
    )]
}

/// Columns and lines, and what they are before.
const SIZE: (u16, u16) = (91, 37);
const BEFORE: (u16, u16) = (80, 25);
/// Waits for the size, for Ctrl-C, and for the end of its input.
const SCRIPT: &str =
    "tty >/dev/null && echo up; until [ \"$(stty size 2>/dev/null)\" = '37 91' ]; do sleep 0.1; done; echo sized
    trap 'stop=1' INT; echo ready; until [ \"$stop\" ]; do sleep 0.1; done; echo caught
    cat; echo end; test -t 2 && exit 4";
/// What is to be seen of it, but for the ends of lines, and for the terminal's word on Ctrl-C, which comes when the process
/// has its signal and may have answered already.
const SHOWN: &str = "up\nsized\nready\ncaught\ntyped\ntyped\nend\n";
const INTERRUPTED: &str = "^C";

/// How somebody speaks with a process.
trait Line {
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    fn read_until(&mut self, text: &str, deadline: Duration) -> Result<Vec<u8>>;
    fn resize(&self, size: (u16, u16)) -> Result<()>;
}

impl Line for Terminal {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Terminal::write(self, bytes)
    }

    fn read_until(&mut self, text: &str, deadline: Duration) -> Result<Vec<u8>> {
        Terminal::read_until(self, text, deadline)
    }

    fn resize(&self, size: (u16, u16)) -> Result<()> {
        Terminal::resize(self, size)
    }
}

/// Through the API.
struct Fifos<'a> {
    exec: &'a Exec<'a>,
    stdin: Input,
    stdout: Output,
}

impl Line for Fifos<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdin.write(bytes)
    }

    fn read_until(&mut self, text: &str, deadline: Duration) -> Result<Vec<u8>> {
        self.stdout.read_until(text, deadline)
    }

    fn resize(&self, (columns, lines): (u16, u16)) -> Result<()> {
        self.exec.resize((columns.into(), lines.into()))
    }
}

/// Speaks with the script, to its last words.
fn speak(line: &mut dyn Line) -> Result<Vec<u8>> {
    // The whole line: what comes while a size is tried in vain is not kept.
    let mut shown = line.read_until("\n", A_WHILE)?;
    shown.extend(sized(line)?);
    if !contains(&shown, b"ready") {
        shown.extend(line.read_until("ready", A_WHILE)?);
    }
    line.write(b"\x03")?;
    shown.extend(line.read_until("caught", A_WHILE)?);
    line.write(b"typed\n\x04")?;
    shown.extend(line.read_until("end", A_WHILE)?);
    Ok(shown)
}

/// Gives it its size. A process may speak before runc's shim knows its terminal, and until then a size is lost.
fn sized(line: &mut dyn Line) -> Result<Vec<u8>> {
    for _ in 0..10 {
        line.resize(SIZE)?;
        if let Ok(shown) = line.read_until("sized", A_WHILE / 10) {
            return Ok(shown);
        }
        // Who is told a size that it has already is not told.
        line.resize(BEFORE)?;
    }
    bail!("the terminal did not get its size")
}

fn is_right(who: &str, shown: &[u8], code: Option<u32>) -> Result<()> {
    let shown = String::from_utf8_lossy(shown).replace('\r', "");
    let without = shown.replacen(INTERRUPTED, "", 1);
    let good = shown.contains(INTERRUPTED) && without.trim_end() == SHOWN.trim_end();
    ensure!(good, "{who} shows {shown:?}");
    ensure!(code == Some(4), "{who}: exit code {code:?}");
    Ok(())
}

fn terminals(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for runtime in [RUNC, OURS] {
        in_a_container(ctx, runtime)?;
        let (ctr, id) = (ctx.world.ctr(), new_id(ctx, runtime));
        let run = ["run", "--rm", "-t", "--runtime", runtime, &ctr.image, &id, "sh", "-c", SCRIPT];
        ctx.world.with_container(&id, || on_ctr(&format!("{runtime}, ctr run"), &ctr.words(&run)))?;
    }
    Ok(Outcome::Passed)
}

fn on_ctr(who: &str, words: &[String]) -> Result<()> {
    let mut terminal = Terminal::run(words, BEFORE)?;
    let mut shown = speak(&mut terminal)?;
    let (rest, status) = terminal.end(A_WHILE)?;
    shown.extend(rest);
    is_right(who, &shown, status.code().and_then(|code| u32::try_from(code).ok()))
}

fn in_a_container(ctx: &Ctx<'_, Inside>, runtime: &str) -> Result<()> {
    let api = ctx.world.api()?;
    let task = Piped::new(ctx, &api, runtime, &["sleep", "100000"], |_| {})?;
    task.container.start()?;

    let path = |name: &str| ctx.path(&format!("{}-exec-{name}", task.id));
    let (stdin, stdout) = (Input::create(path("stdin"))?, Output::create(path("stdout"))?);
    let stdio = Stdio {
        stdin: Some(stdin.path().to_owned()),
        stdout: stdout.path().to_owned(),
        stderr: std::path::PathBuf::new(),
    };
    let exec = task.container.exec_on_terminal("api", &["sh", "-c", SCRIPT], &stdio)?;
    exec.start()?;
    let mut fifos = Fifos { exec: &exec, stdin, stdout };
    let mut shown = speak(&mut fifos)?;
    let code = exec.wait(A_WHILE)?;
    shown.extend(fifos.stdout.read_to_end(A_WHILE)?);
    exec.delete()?;
    is_right(&format!("{runtime}, Exec"), &shown, Some(code))?;

    let words = ["task", "exec", "-t", "--exec-id", "ctr", &task.id, "sh", "-c", SCRIPT];
    on_ctr(&format!("{runtime}, ctr task exec"), &ctx.world.ctr().words(&words))?;
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}
