//! What goes in and comes out: terminals, files, logging processes, and more than a pipe holds.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use integration::containerd::{NewContainer, Stdio};
use integration::wait::until_true;
use integration::{Ctx, Outcome, Test, pattern};
use serde_json::json;

use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.terminal",
            "a terminal has the size it is given, and says what it says with runc",
            terminal,
        ),
        test("task.much", "all that a client sends comes back on both streams, to one that reads late", much),
        test(
            "task.file",
            "output goes to the end of a file, and all of it is there once the task is deleted",
            file,
        ),
        test(
            "task.logger",
            "a logging process gets both streams and its arguments, and has ended once the task is deleted; one that is \
             to say that it is ready and does not is an error",
            logger,
        ),
    ]
}

fn terminal(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let script = "tty; stty size; read line; echo got $line; stty size; test -t 2 && exit 4";
    let mut said = Vec::new();
    for runtime in [RUNC, OURS] {
        let on_terminal = |spec: &mut serde_json::Value| spec["process"]["terminal"] = json!(true);
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", script], on_terminal)?;
        task.container.resize((91, 37))?;
        task.container.start()?;
        let mut output = task.stdout.read_until("37 91", A_WHILE)?;
        task.container.resize((100, 50))?;
        task.stdin.write(b"typed\n")?;
        let code = task.container.wait(A_WHILE)?;
        output.extend(task.stdout.read_to_end(A_WHILE)?);
        task.end(code)?;
        ensure!(code == 4, "{runtime}: exit code {code}");
        said.push(String::from_utf8_lossy(&output).into_owned());
    }
    ensure!(said[0] == said[1], "it says {:?}, with runc {:?}", said[1], said[0]);
    ensure!(said[0].contains("got typed\r\n50 100\r\n"), "it says {:?}", said[0]);
    Ok(Outcome::Passed)
}

fn much(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let sent = pattern::bytes(11, ctx.either(3, 48) << 20);
    for runtime in [RUNC, OURS] {
        let Piped { mut container, mut stdin, mut stdout, mut stderr, .. } =
            Piped::new(ctx, &api, runtime, &["tee", "/dev/stderr"], |_| {})?;
        container.start()?;
        let left = ctx.left().mul_f64(0.8);
        let (out, err, code) = std::thread::scope(|scope| {
            let out = scope.spawn(move || {
                // Until then everything on the way is full.
                std::thread::sleep(Duration::from_secs(2));
                stdout.read_to_end(left)
            });
            let err = scope.spawn(move || stderr.read_to_end(left));
            stdin.write(&sent)?;
            drop(stdin);
            container.close_stdin()?;
            let code = container.wait(A_WHILE)?;
            let joined = |reader: std::thread::ScopedJoinHandle<'_, Result<Vec<u8>>>| {
                reader.join().map_err(|_| anyhow::anyhow!("a reader broke"))?
            };
            anyhow::Ok((joined(out)?, joined(err)?, code))
        })?;
        container.delete_task()?;
        container.delete()?;
        ensure!(code == 0, "{runtime}: exit code {code}");
        for (name, got) in [("output", out), ("errors", err)] {
            let wrong = pattern::wrong(11, 0, &got);
            ensure!(
                got.len() == sent.len() && wrong.is_none(),
                "{runtime}: of {} bytes {} came as {name}; the first wrong one is {wrong:?}",
                sent.len(),
                got.len()
            );
        }
    }
    Ok(Outcome::Passed)
}

/// What the container of the two tests below says: much, and a complaint.
const SAYS: &str = "echo complaint >&2; seq 1 20000";

fn said() -> String {
    (1..=20_000).fold(String::new(), |text, number| text + &number.to_string() + "\n")
}

fn run_with(ctx: &Ctx<'_, Inside>, runtime: &str, stdio: &Stdio) -> Result<String> {
    let api = ctx.world.api()?;
    let id = new_id(ctx, runtime);
    let process = ["sh", "-c", SAYS];
    let mut container =
        api.create(&NewContainer { id: &id, image: &ctx.world.image, runtime, process: &process })?;
    container.create_task(stdio)?;
    container.start()?;
    let code = container.wait(A_WHILE)?;
    container.delete_task()?;
    container.delete()?;
    ensure!(code == 0, "{runtime}: exit code {code}");
    Ok(id)
}

fn file(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    for (number, runtime) in [RUNC, OURS].into_iter().enumerate() {
        let path = ctx.path(&format!("made/log-{number}"));
        fs::create_dir_all(ctx.path("made"))?;
        fs::write(&path, "before\n")?;
        let uri = PathBuf::from(format!("file://{}", path.display()));
        run_with(ctx, runtime, &Stdio { stdin: None, stdout: uri.clone(), stderr: uri })?;
        let text = read(&path)?;
        // The two streams meet wherever they do.
        let output = text.replacen("complaint\n", "", 1);
        ensure!(output.len() < text.len(), "{runtime}: there is no complaint");
        ensure!(output == "before\n".to_owned() + &said(), "{runtime}: it has {} bytes", text.len());
    }
    Ok(Outcome::Passed)
}

/// Says that it is ready, though it has to only as `binary-v2`.
const LOGGER: &str = "#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
cat <&3 >\"$2.out\" 5>&- &
cat <&4 >\"$2.err\" 5>&- &
echo \"$1 $CONTAINER_ID $CONTAINER_NAMESPACE\" >\"$2.told\"
echo ready >&5
exec 3<&- 4<&- 5>&-
wait
echo ended >\"$2.end\"
";

fn program(path: PathBuf, script: &str) -> Result<PathBuf> {
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn logger(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let program = program(ctx.path("logger"), LOGGER)?;
    let mut number = 0;
    for (scheme, runtime) in [("binary", RUNC), ("binary", OURS), ("binary-v2", RUNC), ("binary-v2", OURS)] {
        number += 1;
        let to = ctx.path(&format!("log {number}"));
        match logged(ctx, runtime, scheme, &program, &to) {
            Err(error) if runtime == RUNC && format!("{error:#}").contains("unknown STDIO scheme") => {
                ctx.note(format!("this runc's shim has no {scheme}"));
            }
            done => done.with_context(|| format!("{runtime}, {scheme}"))?,
        }
    }
    unready(ctx)?;
    Ok(Outcome::Passed)
}

fn logged(ctx: &Ctx<'_, Inside>, runtime: &str, scheme: &str, program: &Path, to: &Path) -> Result<()> {
    let query = to.display().to_string().replace('/', "%2F").replace(' ', "+");
    let uri = PathBuf::from(format!("{scheme}://{}?to={query}", program.display()));
    let id = run_with(ctx, runtime, &Stdio { stdin: None, stdout: uri.clone(), stderr: uri })?;
    let log = |suffix: &str| PathBuf::from(format!("{}.{suffix}", to.display()));
    if runtime == RUNC {
        // It sends SIGTERM at once, and does not wait for what the process started.
        let all = said();
        until_true("runc's log", A_WHILE, || read(&log("out")).is_ok_and(|text| text.len() == all.len()))?;
    } else {
        ensure!(read(&log("end"))? == "ended\n", "the logging process did not end");
    }
    let (out, err) = (read(&log("out"))?, read(&log("err"))?);
    ensure!(out == said(), "of the output {} bytes were logged", out.len());
    ensure!(err == "complaint\n", "of the errors {err:?} was logged");
    let told = read(&log("told"))?;
    ensure!(told == format!("to {id} {}\n", ctx.world.namespace), "it was told {told:?}");
    Ok(())
}

/// One that ends without a word is ready as `binary`, and an error as `binary-v2`.
fn unready(ctx: &Ctx<'_, Inside>) -> Result<()> {
    let silent = program(ctx.path("silent"), "#!/bin/sh\nexec 5>&-\nexec cat <&3 >/dev/null\n")?;
    for (scheme, word) in [("binary", None), ("binary-v2", Some("ready"))] {
        let uri = PathBuf::from(format!("{scheme}://{}", silent.display()));
        let done = run_with(ctx, OURS, &Stdio { stdin: None, stdout: uri.clone(), stderr: uri });
        match (word, done) {
            (None, Ok(_)) => {}
            (Some(word), Err(error)) if format!("{error:#}").contains(word) => {}
            (_, done) => bail!("of a silent logging process, {scheme} says {done:?}"),
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}
