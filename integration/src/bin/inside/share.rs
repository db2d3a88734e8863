//! Control: the directory shared with whoever started this host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "control.share",
        proves: "the shared directory keeps what is written to it, large and small, and is another file system",
        run: share,
        deadline: Duration::from_mins(1),
        rounds: Rounds::once_or(5),
        tags: &["control"],
    }]
}

/// That the files come out on the other side is a test of `outside`, which can see both.
fn share(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let share = &ctx.world.share;
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let here = share.display().to_string();
    if !mounts.lines().any(|line| line.split(' ').nth(1) == Some(here.as_str())) {
        return Ok(Outcome::Skipped(format!("{here} is not mounted; start this host with --share DIR")));
    }
    let directory = share.join(ctx.id("files"));
    fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let file = directory.join("file");
    for size in [0_usize, 1, 4096, 3 << 20] {
        let bytes: Vec<u8> = (0..size).map(|index| (index * 31 % 251) as u8).collect();
        fs::write(&file, &bytes).with_context(|| format!("writing {size} bytes to {}", file.display()))?;
        let found = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        ensure!(found == bytes, "{size} bytes written, {} read, or not the same", found.len());
    }
    let moved = directory.join("moved");
    fs::rename(&file, &moved).with_context(|| format!("renaming {}", file.display()))?;
    ensure!(!file.exists() && moved.exists(), "a renamed file is still at its old name");
    fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    Ok(Outcome::Passed)
}
