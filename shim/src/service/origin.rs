//! Where a container's machine comes from: a template, or the checkpoint of another one.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::{info, warn};
use runtime_spec::config::Boot;
use runtime_spec::plan::Plan;

use super::blocking;
use crate::checkpoint::{About, Checkpoint};
use crate::deadlines;
use crate::error::{Attempt, Result};
use crate::guest::Guest;
use crate::journal::{Journal, Made};
use crate::machine::{Change, Machine, NotRestored, Recipe};
use crate::stdio::{Opened, Streams};
use crate::template::{self, Of, Store, Template, Unmade, Way};

/// A machine from a template, unless it is to boot, or has to, which the log tells.
pub(super) async fn restored(
    id: &str,
    store: &Store,
    journal: &Arc<Journal>,
    recipe: &Recipe<'_>,
) -> Result<Option<Machine>> {
    if recipe.machine.boot == Boot::Cold {
        return Ok(None);
    }
    if !recipe.blocks.is_empty() {
        info!("{id}: its machine has disks, which no template has: it boots");
        return Ok(None);
    }
    let finding = recipe.timeline.phase("template");
    let obtained = obtained(store, journal, recipe).await;
    drop(finding);
    let template = match obtained {
        Ok((template, _)) => template,
        Err(error) => {
            warn!("{id}: there is no template, its machine boots: {error}");
            return Ok(None);
        }
    };
    match Machine::restore(journal.clone(), recipe, template, Change::of(recipe.machine)).await {
        Ok(machine) => Ok(Some(machine)),
        Err(NotRestored::Other(error)) => Err(error),
        Err(NotRestored::Template(unfit, error)) => {
            warn!("{id}: template {} cannot be used and goes, its machine boots: {error}", unfit.key);
            template::discard(store, unfit, &error.text).await;
            Ok(None)
        }
    }
}

/// The template that is there, or is made now in a directory of the machine's own.
async fn obtained(store: &Store, journal: &Arc<Journal>, recipe: &Recipe<'_>) -> Result<(Template, Way)> {
    let (looking, machine) = (store.clone(), recipe.machine.clone());
    let parts = blocking("looking for a template", move || template::wanted(&looking, &machine)).await?;
    // Should this shim die meanwhile.
    let noted = |made| journal.note(made).attempt("writing the journal");
    let made_at = store.making(&parts.key()?);
    let of = Of::Template(parts.clone());
    template::obtain(store, of, deadlines::TEMPLATE, async |making| {
        noted(Made::Making(made_at)).map_err(Unmade::Here)?;
        let directory = recipe.paths.machine().join("template.d");
        let started = |process| noted(Made::Process(process));
        let made = template::build::make(&parts, making, &directory, started, |_| ()).await;
        let removed = fs::remove_dir_all(&directory);
        made?;
        removed.attempt(format_args!("removing {}", directory.display())).map_err(Unmade::Here)
    })
    .await
}

/// The machine of a container that was written down.
pub(super) async fn from_checkpoint(
    plan: &Plan,
    checkpoint: &Checkpoint,
    store: &Store,
    journal: &Arc<Journal>,
    recipe: &Recipe<'_>,
) -> Result<Machine> {
    let what = || format!("restoring {} from a checkpoint", plan.id);
    let unpacking = recipe.timeline.phase("unpack");
    let (found, preparing) = (checkpoint.clone(), store.clone());
    let digest = blocking("reading a checkpoint", move || {
        preparing.prepare()?;
        found.digest()
    });
    let of = template::Checkpoint { digest: digest.await?, container: checkpoint.about.container.clone() };
    let made_at = store.making(&of.key());
    let unpacked = template::obtain(store, Of::Checkpoint(of), deadlines::UNPACK, async |making| {
        // Should this shim die meanwhile.
        journal.note(Made::Making(made_at)).attempt("writing the journal").map_err(Unmade::Here)?;
        let (checkpoint, making) =
            (checkpoint.clone(), making.try_clone().attempt(what()).map_err(Unmade::Here)?);
        blocking("unpacking a checkpoint", move || checkpoint.unpack(&making)).await.map_err(Unmade::Here)
    });
    let (template, _) = unpacked.await?;
    drop(unpacking);
    match Machine::restore(journal.clone(), recipe, template, Change::default()).await {
        Ok(mut machine) => {
            machine.guest = machine.guest.knowing(&plan.id, &plan.guest_id);
            machine.heard.store(checkpoint.about.last_event, Ordering::Relaxed);
            Ok(machine)
        }
        Err(NotRestored::Other(error)) => Err(error.context(what())),
        Err(NotRestored::Template(unfit, error)) => {
            // Whoever restores it again unpacks it again.
            let key = unfit.key.clone();
            drop(unfit);
            let removing = store.clone();
            let removed = blocking("removing what was unpacked", move || {
                removing.remove(&key, false).attempt(format_args!("removing {key}"))
            });
            if let Err(error) = removed.await {
                warn!("{}: {error}", what());
            }
            Err(error.context(what()))
        }
    }
}

/// Joins the streams of a container that was written down: its own, and those of other processes, of which no client
/// knows any more.
pub(super) async fn rejoin(
    plan: &Plan,
    guest: &Guest,
    opened: Opened,
    about: &About,
) -> Result<HashMap<String, Arc<Streams>>> {
    let own = opened.rejoin(guest, &plan.id, "", about.streams).await?;
    let mut all = HashMap::from([(String::new(), Arc::new(own))]);
    for exec in &about.execs {
        if exec.exited {
            guest.delete(&plan.id, &exec.id).await?;
            continue;
        }
        let streams = Opened::nowhere().rejoin(guest, &plan.id, &exec.id, exec.streams).await?;
        all.insert(exec.id.clone(), Arc::new(streams));
    }
    Ok(all)
}
