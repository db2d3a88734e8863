//! What it takes to write a container down and to have it go on, by how much memory it has changed.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use integration::container_time::{Saved, Side};
use integration::containerd::{Api, Container, NewContainer, Stdio};
use integration::fifo::{Input, Output};
use serde_json::json;

use crate::life::runtime;
use crate::{Bench, STEP};

/// What is changed, in MiB.
pub const DIRTIED: [u32; 2] = [0, 64];

/// Writes to memory, says so, and then answers each line.
fn script(mib: u32) -> String {
    format!("yes | head -c {mib}M >/mem/filled; echo ready; while read line; do echo answer $line; done")
}

/// Once for each amount.
pub fn measure(bench: &Bench, api: &Api, number: u32) -> Result<Vec<Saved>> {
    DIRTIED.iter().map(|mib| one(bench, api, number, *mib).with_context(|| format!("{mib} MiB"))).collect()
}

struct Piped<'a> {
    container: Container<'a>,
    stdin: Input,
    stdout: Output,
    _stderr: Output,
}

fn one(bench: &Bench, api: &Api, number: u32, mib: u32) -> Result<Saved> {
    let script = script(mib);
    let make = |name: &str,
                create: &dyn Fn(&mut Container<'_>, &Stdio) -> Result<u32>|
     -> Result<Piped<'_>> {
        let id = format!("bench-{number}-{name}-{mib}");
        let process = ["sh", "-c", &script];
        let new = NewContainer {
            id: &id,
            image: &bench.host.image,
            runtime: runtime(Side::Ours),
            process: &process,
        };
        let mut container = api.create_with(&new, |spec| {
            let memory = json!({ "type": "tmpfs", "source": "tmpfs", "destination": "/mem", "options": ["size=512m"] });
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(memory);
            }
        })?;
        let stdin = Input::create(bench.host.path(&format!("{id}-stdin")))?;
        let stdout = Output::create(bench.host.path(&format!("{id}-stdout")))?;
        let stderr = Output::create(bench.host.path(&format!("{id}-stderr")))?;
        let stdio = Stdio {
            stdin: Some(stdin.path().to_owned()),
            stdout: stdout.path().to_owned(),
            stderr: stderr.path().to_owned(),
        };
        create(&mut container, &stdio)?;
        Ok(Piped { container, stdin, stdout, _stderr: stderr })
    };
    let mut first = make("saved", &|container, stdio| container.create_task(stdio))?;
    first.container.start()?;
    first.stdout.read_until("ready\n", STEP)?;
    let begun = Instant::now();
    let checkpoint = first.container.checkpoint(false)?;
    let save = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut second = make("again", &|container, stdio| container.create_task_from(stdio, &checkpoint))?;
    second.container.start()?;
    second.stdin.write(b"1\n")?;
    second.stdout.read_until("answer 1\n", STEP)?;
    let restore = begun.elapsed().as_secs_f64();
    drop(checkpoint);
    for piped in [first, second] {
        let Piped { mut container, .. } = piped;
        container.kill(9)?;
        let code = container.wait(STEP)?;
        container.delete_task()?;
        container.delete()?;
        ensure!(code == 137, "killed, it ended with {code}");
    }
    Ok(Saved { mib, save, restore })
}
