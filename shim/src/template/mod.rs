//! Templates: snapshots of machines that have booted and hold nothing yet, from which containers' machines are
//! restored.
//!
//! The first container that needs a template makes it, and is restored from it, while others that need the same wait:
//! so it is there after one boot, whoever ends when, and nobody is left behind to make it. Whatever goes wrong with a
//! template is said in the log, and the machine boots; one that cannot be used is made again.

pub mod build;
pub mod digest;
pub mod key;
pub mod lock;
pub mod store;

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use runtime_spec::plan;

pub use key::{Checkpoint, Key, Of, Parts, Warm};
pub use store::{Found, Listed, Making, Store, Template};

use self::digest::Digests;
use self::lock::Lock;
use crate::error::{Attempt, Error, Result};

/// What the template of a machine of this plan is made of. Blocks.
pub fn wanted(store: &Store, machine: &plan::Machine) -> Result<Parts> {
    store.prepare()?;
    let mut digests = Digests::open(store.directory());
    let parts = Parts::find(machine, &mut digests)?;
    digests.keep();
    Ok(parts)
}

/// How a template came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It was.
    Found,
    /// It was made.
    Made,
}

/// Why a template was not made.
#[derive(Debug)]
pub enum Unmade {
    /// For a reason that whoever tries next may not have.
    Here(Error),
    /// For one that everybody has.
    Anywhere(Error),
}

/// Finds what machines are restored from or has it made: by `make`, which fills the files, or by somebody else, who is waited for. One that
/// could not be made a little while ago is not tried again.
pub async fn obtain(
    store: &Store,
    of: Of,
    wait: Duration,
    make: impl AsyncFnOnce(&Making) -> std::result::Result<(), Unmade>,
) -> Result<(Template, Way)> {
    let key = of.key()?;
    let look = |spoilt: &mut bool| match store.open(&key).attempt(format_args!("opening template {key}"))? {
        Found::Template(template) => Ok(Some(template)),
        Found::Nothing => Ok(None),
        Found::Spoilt(why) => {
            if !std::mem::replace(spoilt, true) {
                warn!("template {key} is made again: {why}");
            }
            Ok::<_, Error>(None)
        }
    };
    let mut spoilt = false;
    if let Some(template) = look(&mut spoilt)? {
        return Ok((template, Way::Found));
    }
    let lock = Arc::new(locked(store, &key, wait).await?);
    // Made while we waited.
    if let Some(template) = look(&mut spoilt)? {
        return Ok((template, Way::Found));
    }
    if let Some(why) = store.failure(&key) {
        return Err(Error::precondition(format!(
            "template {key} could not be used a little while ago: {why}"
        )));
    }
    info!("making template {key}");
    let made = async {
        // What somebody has left there may take a while to remove.
        let (beginning, named, held) = (store.clone(), key.clone(), lock.clone());
        let making = tokio::task::spawn_blocking(move || beginning.begin(&named, &held)).await;
        let making = making.map_err(std::io::Error::other).and_then(|making| making);
        let making = making.attempt(format_args!("making template {key}")).map_err(Unmade::Anywhere)?;
        make(&making).await?;
        let (store, key, lock) = (store.clone(), key.clone(), lock.clone());
        let finishing = move || {
            store.finish(&key, &lock, &making, of).attempt(format_args!("writing template {key}"))?;
            match store.open(&key).attempt(format_args!("opening template {key}"))? {
                Found::Template(template) => Ok(template),
                Found::Nothing => Err(Error::unknown(format!("template {key} is gone"))),
                Found::Spoilt(why) => Err(Error::unknown(format!("template {key}: {why}"))),
            }
        };
        let finished = tokio::task::spawn_blocking(finishing).await.map_err(Error::unknown);
        finished.and_then(|finished| finished).map_err(Unmade::Anywhere)
    };
    // Others see what came of it when the lock is free.
    match made.await {
        Ok(template) => {
            drop(lock);
            prune(store, &key).await;
            Ok((template, Way::Made))
        }
        Err(unmade) => {
            let (abandoning, named) = (store.clone(), key.clone());
            let _ = tokio::task::spawn_blocking(move || abandoning.abandon(&named, &lock)).await;
            match unmade {
                Unmade::Here(error) => Err(error),
                Unmade::Anywhere(error) => {
                    store.note_failure(&key, &error.text);
                    Err(error)
                }
            }
        }
    }
}

async fn locked(store: &Store, key: &Key, wait: Duration) -> Result<Lock> {
    let what = format!("locking template {key}");
    let (waiting, of) = (store.clone(), key.clone());
    let lock = tokio::task::spawn_blocking(move || waiting.lock(&of, wait)).await.map_err(Error::unknown)?;
    lock.attempt(&what)?.ok_or_else(|| Error::deadline(format!("{what}: somebody makes it for {wait:?} now")))
}

/// Keeps the templates within their limit.
async fn prune(store: &Store, keep: &Key) {
    let (pruning, keep) = (store.clone(), keep.clone());
    let pruned = tokio::task::spawn_blocking(move || pruning.prune(Some(&keep))).await;
    match pruned.map_err(std::io::Error::other).and_then(|pruned| pruned) {
        Ok(removed) => removed.iter().for_each(|key| info!("template {key} had to go")),
        Err(error) => warn!("pruning {}: {error}", store.directory().display()),
    }
}

/// A machine could not be restored from it, for this reason: it goes. One that never worked is not made again at once.
pub async fn discard(store: &Store, template: Template, why: &str) {
    let (store, why) = (store.clone(), why.to_owned());
    let discarding = move || {
        let key = template.key.clone();
        match store.lock(&key, Duration::ZERO) {
            // Whoever has it makes it anew already.
            Ok(None) => {}
            Ok(Some(lock)) => {
                if !template.proven {
                    store.note_failure(&key, &why);
                }
                if let Err(error) = store.remove_locked(&key, &lock) {
                    warn!("removing template {key}: {error}");
                }
            }
            Err(error) => warn!("removing template {key}: {error}"),
        }
    };
    let _ = tokio::task::spawn_blocking(discarding).await;
}

/// What is kept under this key is not what was hoped for: it goes, and nobody makes it again at once.
pub async fn refuse(store: &Store, key: &Key, why: &str) {
    let (store, key, why) = (store.clone(), key.clone(), why.to_owned());
    let refusing = move || {
        let refused = store.lock(&key, Duration::ZERO).and_then(|lock| {
            // Whoever has it makes it anew already.
            let Some(lock) = lock else { return Ok(()) };
            store.note_failure(&key, &why);
            store.remove_locked(&key, &lock)
        });
        if let Err(error) = refused {
            warn!("removing {key}: {error}");
        }
    };
    let _ = tokio::task::spawn_blocking(refusing).await;
}

#[cfg(test)]
mod tests;
