//! Where a container's machine comes from: a template, the checkpoint of another one, or one that was warm.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use log::warn;
use runtime_spec::config::Boot;
use runtime_spec::plan::Plan;

use crate::blocking::blocking;
use crate::checkpoint::{About, Checkpoint};
use crate::deadlines;
use crate::error::{Attempt, Result};
use crate::guest::Guest;
use crate::journal::{Journal, Made};
use crate::machine::{Change, Machine, NotRestored, Recipe};
use crate::stdio::{Opened, Streams};
use crate::template::{self, Of, Store, Template, Unmade, Way};
use crate::warm::{self, Start};

/// What a container was before it is made.
pub(super) struct Past {
    pub(super) about: About,
    /// Whether its process had been started.
    pub(super) started: bool,
    /// What it had said that its client has not heard.
    pub(super) said: [Vec<u8>; 2],
    /// What its machine is restored from.
    pub(super) from: Source,
    /// Whether it was another one, and is to have a name of its own.
    pub(super) renamed: bool,
}

/// What a machine that was one already is restored from.
pub(super) enum Source {
    Checkpoint(Checkpoint),
    Template(Template),
}

impl Past {
    /// One that was written down.
    pub(super) fn of_checkpoint(checkpoint: Checkpoint) -> Self {
        let about = checkpoint.about.clone();
        Self {
            about,
            started: true,
            said: Default::default(),
            from: Source::Checkpoint(checkpoint),
            renamed: false,
        }
    }

    /// One that was warm.
    pub(super) fn of_warm(start: Start) -> Self {
        let Start { template, about, started, said } = start;
        Self { about, started, said, from: Source::Template(template), renamed: true }
    }

    /// What is left of it once its machine is restored.
    pub(super) fn split(self) -> (Source, Resumed) {
        let Self { about, started, said, from, renamed } = self;
        (from, Resumed { about, started, said, renamed })
    }
}

/// A container that goes on in its machine.
pub(super) struct Resumed {
    pub(super) about: About,
    pub(super) started: bool,
    said: [Vec<u8>; 2],
    renamed: bool,
}

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

/// The machine of a container that goes on.
pub(super) async fn again(
    plan: &Plan,
    from: Source,
    store: &Store,
    journal: &Arc<Journal>,
    recipe: &Recipe<'_>,
) -> Result<Machine> {
    let (what, warm, template) = match from {
        Source::Checkpoint(checkpoint) => {
            let what = format!("restoring {} from a checkpoint", plan.id);
            (what, false, unpacked(&plan.id, &checkpoint, store, journal, recipe).await?)
        }
        Source::Template(template) => (format!("starting {} from a warm container", plan.id), true, template),
    };
    match Machine::restore(journal.clone(), recipe, template, Change::default()).await {
        Ok(machine) => Ok(machine),
        Err(NotRestored::Other(error)) => Err(error.context(what)),
        Err(NotRestored::Template(unfit, error)) => {
            let key = unfit.key.clone();
            drop(unfit);
            if warm {
                template::refuse(store, &key, &error.text).await;
                return Err(error.context(what));
            }
            // Whoever comes next unpacks it again.
            let removing = store.clone();
            let removed = blocking("removing what a machine cannot be restored from", move || {
                removing.remove(&key, false).attempt(format_args!("removing {key}"))
            });
            if let Err(error) = removed.await {
                warn!("{what}: {error}");
            }
            Err(error.context(what))
        }
    }
}

/// A checkpoint as machines are restored from it.
async fn unpacked(
    id: &str,
    checkpoint: &Checkpoint,
    store: &Store,
    journal: &Arc<Journal>,
    recipe: &Recipe<'_>,
) -> Result<Template> {
    let what = || format!("unpacking a checkpoint for {id}");
    let _unpacking = recipe.timeline.phase("unpack");
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
    unpacked.await.map(|(template, _)| template)
}

/// Joins the streams of a container that goes on: its own, and those of other processes, of which no client knows any
/// more; and gives it its name, if it was another one.
pub(super) async fn rejoin(
    plan: &Plan,
    guest: &Guest,
    mut opened: Opened,
    resumed: Resumed,
) -> Result<HashMap<String, Arc<Streams>>> {
    let Resumed { about, said: [stdout, stderr], renamed, .. } = resumed;
    if renamed && let Some(name) = warm::hostname(plan) {
        guest.set_hostname(&plan.id, name).await?;
    }
    let mut all = HashMap::new();
    for exec in &about.execs {
        if exec.exited {
            guest.delete(&plan.id, &exec.id).await?;
            continue;
        }
        let streams = Opened::nowhere().rejoin(guest, &plan.id, &exec.id, exec.streams).await?;
        all.insert(exec.id.clone(), Arc::new(streams));
    }
    // Last: its client is told at once what was said before.
    opened.tell(stdout, stderr);
    let own = opened.rejoin(guest, &plan.id, "", about.streams).await?;
    all.insert(String::new(), Arc::new(own));
    Ok(all)
}
