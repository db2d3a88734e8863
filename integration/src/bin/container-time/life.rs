//! The life of a container, by the calls that containerd's clients make.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use integration::command::Cmd;
use integration::container_time::{Life, Phase, Side};
use integration::containerd::{Api, Container, NewContainer, Stdio};
use integration::fifo::Output;
use serde::Deserialize;

use crate::{Bench, STEP, memory, shim};

const CRUN: &str = "/usr/bin/crun";
/// What containers and processes say first.
const WORD: &str = "up\n";
/// So long nobody asks anything of a container before its memory is looked at.
const IDLE: Duration = Duration::from_secs(1);

/// Lives it once. Nothing is left of it, however it goes.
pub fn live(bench: &Bench, api: &Api, side: Side, number: u32) -> Result<Life> {
    let id = format!("bench-{number}-{}", side.name());
    let shim_start = shim::start(bench, side, &format!("{id}-shim")).context("starting a shim alone")?;
    let process = ["sh", "-c", "echo up; exec sleep 1000000"];
    let new = NewContainer { id: &id, image: &bench.host.image, runtime: runtime(side), process: &process };
    let mut container = match side {
        Side::Crun => api.create_through(&new, CRUN)?,
        Side::Cold => {
            api.create_with(&new, |spec| spec["annotations"]["dev.supermachine.boot"] = "cold".into())?
        }
        Side::Ours | Side::Runc => api.create(&new)?,
    };
    // When this fails, what there is of the container is removed as it is dropped.
    let life = steps(bench, &mut container, side, &id, shim_start)?;
    container.delete()?;
    Ok(life)
}

/// Who runs the containers of a side.
pub fn runtime(side: Side) -> &'static str {
    match side {
        Side::Ours | Side::Cold => "io.containerd.supermachine.v2",
        Side::Runc | Side::Crun => "io.containerd.runc.v2",
    }
}

fn steps(
    bench: &Bench,
    container: &mut Container<'_>,
    side: Side,
    id: &str,
    shim_start: f64,
) -> Result<Life> {
    let (stdio, said, _errors) = streams(bench, id)?;
    let begun = Instant::now();
    container.create_task(&stdio)?;
    let created = Instant::now();
    container.start()?;
    let started = Instant::now();
    let (first, _stdout) = said.join()?;

    let exec = exec(bench, container, id)?;
    let phases = if matches!(side, Side::Ours | Side::Cold) { timeline(id)? } else { Vec::new() };
    thread::sleep(IDLE);
    let memory = memory::of(id, side)?;

    container.kill(9)?;
    let code = container.wait(STEP)?;
    let ended = Instant::now();
    container.delete_task()?;
    let delete = ended.elapsed().as_secs_f64();
    ensure!(code == 137, "killed, it ended with {code}");
    Ok(Life {
        shim_start,
        create: created.duration_since(begun).as_secs_f64(),
        start: started.duration_since(created).as_secs_f64(),
        first_output: first.duration_since(begun).as_secs_f64(),
        exec,
        delete,
        own_mib: memory.own_mib(),
        all_mib: memory.all_mib(),
        phases,
    })
}

fn exec(bench: &Bench, container: &Container<'_>, id: &str) -> Result<f64> {
    let (stdio, said, _errors) = streams(bench, &format!("{id}-exec"))?;
    let begun = Instant::now();
    let exec = container.exec("beside", &["echo", "up"], &stdio)?;
    exec.start()?;
    let (first, _stdout) = said.join()?;
    let code = exec.wait(STEP)?;
    exec.delete()?;
    ensure!(code == 0, "the process beside it ended with {code}");
    Ok(first.duration_since(begun).as_secs_f64())
}

/// The first words of a stream.
pub struct Said(JoinHandle<Result<(Instant, Output)>>);

impl Said {
    /// Waits for them: when they came, and the stream, whose end nobody shall see before it is over. Whoever does not
    /// wait, because something failed before, leaves the thread alone.
    pub fn join(self) -> Result<(Instant, Output)> {
        self.0.join().map_err(|_| anyhow!("a reader broke"))?
    }
}

/// New FIFOs, of which the first is being read. They come before their answer, so another thread waits for them.
pub fn streams(bench: &Bench, name: &str) -> Result<(Stdio, Said, Output)> {
    let mut stdout = Output::create(bench.host.path(&format!("{name}-stdout")))?;
    let stderr = Output::create(bench.host.path(&format!("{name}-stderr")))?;
    let stdio = Stdio { stdin: None, stdout: stdout.path().to_owned(), stderr: stderr.path().to_owned() };
    let reading = thread::spawn(move || {
        stdout.read_until(WORD, STEP + STEP)?;
        Ok((Instant::now(), stdout))
    });
    Ok((stdio, Said(reading), stderr))
}

/// What our shim says of the creation, as an operator is told it.
fn timeline(id: &str) -> Result<Vec<Phase>> {
    #[derive(Deserialize)]
    struct Timeline {
        phases: Vec<Phase>,
    }
    let told = Cmd::new("supermachine", STEP).args(["timeline", "--json", id]).ok()?;
    let timeline: Timeline = serde_json::from_slice(&told.stdout).context("reading the timeline")?;
    Ok(timeline.phases)
}
