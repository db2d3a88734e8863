//! Control: a runc container does what its client asked for, as a gRPC client like docker sees it.

use std::time::Duration;

use anyhow::{Result, ensure};
use integration::containerd::{NewContainer, Stdio};
use integration::fifo::{Input, Output};
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::{Inside, RUNC};

/// From a container's start to its end or its first words.
const A_WHILE: Duration = Duration::from_mins(1);

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &["control"],
    };
    vec![
        test(
            "control.runc-grpc-output",
            "output, errors and the exit codes 0, 1, 42 and 255 of a runc task arrive over gRPC and FIFOs",
            output,
        ),
        test("control.runc-grpc-stdin", "a runc task reads its FIFO, and CloseIO ends its input", stdin),
        test("control.runc-grpc-kill", "a runc task killed over gRPC ends with 137", kill),
    ]
}

fn output(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for code in [0, 1, 42, 255] {
        let id = ctx.id(&code.to_string());
        let script = format!("echo out-{code}; echo err-{code} >&2; exit {code}");
        let process = ["sh", "-c", &script];
        let new = NewContainer { id: &id, image: &ctx.world.image, runtime: RUNC, process: &process };
        let mut stdout = Output::create(ctx.path(&format!("stdout-{code}")))?;
        let mut stderr = Output::create(ctx.path(&format!("stderr-{code}")))?;
        let stdio = Stdio { stdin: None, stdout: stdout.path().to_owned(), stderr: stderr.path().to_owned() };
        let mut container = api.create(&new)?;
        let pid = container.create_task(&stdio)?;
        ensure!(pid != 0, "containerd gave pid 0 for a task");
        container.start()?;
        let waited = container.wait(A_WHILE)?;
        let deleted = container.delete_task()?;
        container.delete()?;
        ensure!(waited == code && deleted == code, "exit {code}: Wait says {waited}, Delete says {deleted}");
        let (out, err) = (stdout.read_to_end(A_WHILE)?, stderr.read_to_end(A_WHILE)?);
        ensure!(out == format!("out-{code}\n").as_bytes(), "stdout: {:?}", String::from_utf8_lossy(&out));
        ensure!(err == format!("err-{code}\n").as_bytes(), "stderr: {:?}", String::from_utf8_lossy(&err));
    }
    Ok(Outcome::Passed)
}

fn stdin(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let id = ctx.id("cat");
    let new = NewContainer { id: &id, image: &ctx.world.image, runtime: RUNC, process: &["cat"] };
    let mut input = Input::create(ctx.path("stdin"))?;
    let mut stdout = Output::create(ctx.path("stdout"))?;
    let stderr = Output::create(ctx.path("stderr"))?;
    let stdio = Stdio {
        stdin: Some(input.path().to_owned()),
        stdout: stdout.path().to_owned(),
        stderr: stderr.path().to_owned(),
    };
    let mut container = api.create(&new)?;
    container.create_task(&stdio)?;
    container.start()?;
    // The second line must come while the input is open: a container is spoken with, not only fed.
    for line in ["first\n", "second\n"] {
        input.write(line.as_bytes())?;
        stdout.read_until(line, A_WHILE)?;
    }
    drop(input);
    container.close_stdin()?;
    ensure!(container.wait(A_WHILE)? == 0, "cat did not end well");
    container.delete_task()?;
    container.delete()?;
    ensure!(stdout.read_to_end(A_WHILE)?.is_empty(), "there was more output than input");
    Ok(Outcome::Passed)
}

fn kill(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let id = ctx.id("sleep");
    let process = ["sh", "-c", "echo ready; exec sleep 1000"];
    let new = NewContainer { id: &id, image: &ctx.world.image, runtime: RUNC, process: &process };
    let mut stdout = Output::create(ctx.path("stdout"))?;
    let stderr = Output::create(ctx.path("stderr"))?;
    let stdio = Stdio { stdin: None, stdout: stdout.path().to_owned(), stderr: stderr.path().to_owned() };
    let mut container = api.create(&new)?;
    container.create_task(&stdio)?;
    container.start()?;
    stdout.read_until("ready", A_WHILE)?;
    container.kill(9)?;
    let status = container.wait(A_WHILE)?;
    ensure!(status == 137, "after SIGKILL the exit status is {status}");
    ensure!(container.delete_task()? == 137, "Delete has another exit status than Wait");
    container.delete()?;
    Ok(Outcome::Passed)
}
