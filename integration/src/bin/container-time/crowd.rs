//! Many containers that are asked for at once.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use integration::container_time::{Crowd, Side};
use integration::containerd::{Api, NewContainer};
use integration::process::Memory;

use crate::life::{runtime, streams};
use crate::{Bench, CALL, STEP, memory};

/// Nobody asks anything of them before their memory is looked at.
const IDLE: Duration = Duration::from_secs(3);

/// Has `count` of them at once, by as many clients.
pub fn gather(bench: &Bench, count: u32) -> Result<Crowd> {
    let begun = Instant::now();
    let ids: Vec<_> = (0..count).map(|number| format!("bench-crowd-{number}")).collect();
    let apis = ids
        .iter()
        .map(|_| Api::connect(&bench.host.address, &bench.host.namespace, CALL))
        .collect::<Result<Vec<_>>>()?;
    let ups = thread::scope(|scope| {
        let making = ids.iter().zip(&apis).map(|(id, api)| {
            scope.spawn(move || {
                let process = ["sh", "-c", "echo up; exec sleep 1000000"];
                let new = NewContainer {
                    id,
                    image: &bench.host.image,
                    runtime: runtime(Side::Ours),
                    process: &process,
                };
                let mut container = api.create(&new)?;
                let (stdio, said, errors) = streams(bench, id)?;
                container.create_task(&stdio)?;
                container.start()?;
                let (up, stdout) = said.join()?;
                Ok((container, up, (stdout, errors)))
            })
        });
        let making: Vec<_> = making.collect();
        let made = making.into_iter().map(|one| one.join().map_err(|_| anyhow!("a client broke"))?);
        made.collect::<Result<Vec<_>>>()
    })?;
    let (mut last, mut containers) = (begun, Vec::new());
    for (container, up, streams) in ups {
        last = last.max(up);
        containers.push((container, streams));
    }
    thread::sleep(IDLE);
    let sums = ids.iter().map(|id| memory::of(id, Side::Ours).map(Memory::all_mib));
    let all: f64 = sums.sum::<Result<f64>>().context("adding up the memory")?;
    for (mut container, _streams) in containers {
        container.kill(9)?;
        let code = container.wait(STEP)?;
        container.delete_task()?;
        container.delete()?;
        ensure!(code == 137, "killed, it ended with {code}");
    }
    Ok(Crowd { count, seconds: last.duration_since(begun).as_secs_f64(), mib_each: all / f64::from(count) })
}
