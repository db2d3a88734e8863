//! The generation id, by which a guest knows that it may not be alone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

/// Where it is, to whoever looks past the driver.
const ADDRESS: u64 = if cfg!(target_arch = "aarch64") { 0x0c00_0000 } else { 0xf_8000 };

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.generation",
        proves: "a guest finds its generation id and drives it, and no two machines have the same",
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd(ctx)?;
    let mut ids = Vec::new();
    for name in ["a", "b"] {
        let guest = up(ctx, boot(ctx, name).append("iomem=relaxed"), &initrd)?;
        // A device that its driver has taken is a link there.
        let script = "cd /sys/bus/platform/drivers/vmgenid; for d in *; do if test -L $d/driver; then echo $d; fi; done";
        let bound = guest.sh(script, A_MOMENT).context("nothing has the driver of generation ids")?;
        ensure!(bound.lines().count() == 1, "the generation ids are {bound:?}");
        let script = format!("devmem {ADDRESS:#x} 64; devmem {:#x} 64", ADDRESS + 8);
        let id = guest.sh(&script, A_MOMENT)?;
        let words: Vec<u64> = id
            .lines()
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
            .collect::<Result<_, _>>()
            .with_context(|| format!("the id is {id:?}"))?;
        ensure!(words.len() == 2 && words.iter().all(|word| *word != 0), "the id is {id:?}");
        ids.push(words);
        guest.ends_well()?;
    }
    ensure!(ids[0] != ids[1], "two machines have the id {:x?}", ids[0]);
    Ok(Outcome::Passed)
}
