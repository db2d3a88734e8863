//! Containers that say when they are warm: they are kept at that moment, in passing, for others to start from.
//!
//! Nobody waits for it, and whatever goes wrong is said in the log: a container that is not kept runs as any other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{debug, info, warn};
use tokio::time::{sleep, timeout};
use vmm::snapshot::{self, Base, Form};

use super::{Container, Shim, lock};
use crate::blocking::blocking;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::journal::Made;
use crate::ledger::{Io, Phase};
use crate::machine::Machine;
use crate::stdio::{self, Ears, LONGEST_TOLD};
use crate::template::{self, Of, Store, Unmade, Way};
use crate::warm::{self, Condition, Start, Wanted, Word};
use runtime_spec::plan::Plan;

/// Between two looks at who listens.
const LOOK: Duration = Duration::from_millis(50);

/// What a container that is to be warm waits for.
pub(super) struct Warming {
    pub(super) wanted: Wanted,
    pub(super) store: Store,
    pub(super) ears: Ears,
}

/// How a container begins.
pub(super) enum Beginning {
    /// As any other; why, if it was to be warm.
    Ordinary(Option<String>),
    /// As any other, to be kept once it is warm.
    Warming(Wanted),
    /// From one that was kept.
    Warm(Box<Start>, Wanted),
}

/// How a container of this plan begins. An error is of who asks for it; whatever else is in the way is said in the log.
pub(super) async fn beginning(plan: &Plan, store: &Store, io: &Io, namespace: &str) -> Result<Beginning> {
    let Some(machine) = plan.machine.clone() else { return Ok(Beginning::Ordinary(None)) };
    let Some(condition) = machine.warm.as_ref().map(Condition::of).transpose()? else {
        return Ok(Beginning::Ordinary(None));
    };
    let ordinary = |why: String| {
        info!("{}: it starts as any other, and nobody starts from it: {why}", plan.id);
        Beginning::Ordinary(Some(why))
    };
    if let Some(why) = warm::obstacle(plan) {
        return Ok(ordinary(why.to_owned()));
    }
    let streams = stdio::announced(io)?;
    let (looked_for, store) = (plan.clone(), store.clone());
    let namespace = namespace.to_owned();
    let looking = move || {
        let template = template::wanted(&store, &machine)?.key()?;
        let wanted = warm::wanted(&looked_for, &namespace, condition, streams, &template)?;
        if !warm::upper::is_empty(&wanted.upper)
            .attempt(format_args!("looking at {}", wanted.upper.display()))?
        {
            return Ok(Beginning::Ordinary(Some("it has files of its own already".to_owned())));
        }
        if let Some(start) = warm::find(&store, &wanted)? {
            return Ok(Beginning::Warm(Box::new(start), wanted));
        }
        if let Some(why) = store.failure(&wanted.sort.key()?) {
            return Ok(Beginning::Ordinary(Some(format!("that has failed a little while ago: {why}"))));
        }
        Ok(Beginning::Warming(wanted))
    };
    Ok(match blocking("looking for a warm container", looking).await {
        Ok(Beginning::Ordinary(Some(why))) => ordinary(why),
        Ok(beginning) => beginning,
        Err(error) => {
            warn!("{}: {error}", plan.id);
            ordinary(error.text)
        }
    })
}

impl Shim {
    /// A container was started: once it is warm, it is kept.
    pub(super) fn warm_up(self: &Arc<Self>, container: &Arc<Container>) {
        let Some(warming) = lock(&container.warming).take() else { return };
        let (shim, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            match shim.warm(&container, &warming).await {
                Ok(()) => shim.keep_warm(&container, &warming).await,
                Err(why) => {
                    info!("{}: nobody starts from it: {why}", container.id);
                    Word::Ordinary { why }.write(&shim.directory(&container.id));
                }
            }
            warming.ears.close();
        });
    }

    /// Returns once it is warm.
    async fn warm(&self, container: &Container, warming: &Warming) -> std::result::Result<(), String> {
        let id = container.id.as_str();
        let mut ended = self.ledger.waiter(id, "").map_err(|error| error.text)?;
        let warm = async {
            match &warming.wanted.condition {
                Condition::Created => {}
                Condition::After(time) => sleep(*time).await,
                // What it has said is looked at once more before it is kept.
                Condition::Log(line) => drop(warming.ears.line(line).await),
                Condition::Listen(port) => loop {
                    match container.guest.listening(id).await {
                        Ok(ports) if port.is_none_or(|port| ports.contains(&port)) && !ports.is_empty() => {
                            break;
                        }
                        Ok(_) => {}
                        Err(error) => debug!("asking who listens in {id}: {error}"),
                    }
                    sleep(LOOK).await;
                },
            }
        };
        let when = &warming.wanted.sort.when;
        tokio::select! {
            warm = timeout(deadlines::WARM, warm) => warm.map_err(|_| {
                let why = format!("after {:?} it was not warm yet ({when})", deadlines::WARM);
                if let Ok(key) = warming.wanted.sort.key() {
                    warming.store.note_failure(&key, &why);
                }
                why
            }),
            _ = ended.wait_for(Option::is_some) => Err(format!("it has ended before it was warm ({when})")),
        }
    }

    /// Keeps a container that is warm.
    pub(super) async fn keep_warm(&self, container: &Container, warming: &Warming) {
        let sort = &warming.wanted.sort;
        let kept = template::obtain(&warming.store, Of::Warm(sort.clone()), Duration::ZERO, async |making| {
            let _alone = self.changes.write().await;
            self.keep(container, warming, making).await
        });
        let word = match kept.await {
            Ok((template, way)) => {
                let how = if way == Way::Made { "and kept as" } else { "as is already" };
                info!("{} is warm, {how} {}", container.id, template.key);
                Word::Kept { key: template.key.as_str().to_owned() }
            }
            Err(error) => {
                warn!("{} is warm, but nobody starts from it: {error}", container.id);
                Word::Ordinary { why: error.text }
            }
        };
        word.write(&self.directory(&container.id));
    }

    async fn keep(
        &self,
        container: &Container,
        warming: &Warming,
        making: &template::Making,
    ) -> std::result::Result<(), Unmade> {
        let id = container.id.as_str();
        if let Some(why) = self.obstacle() {
            return Err(Unmade::Here(Error::precondition(why)));
        }
        let over = || Unmade::Here(Error::precondition("it stands still or has ended by now"));
        let started = match self.ledger.view(id, "").map_err(Unmade::Here)?.phase {
            Phase::Running => true,
            Phase::Created => false,
            _ => return Err(over()),
        };
        let machine = self.machine().ok_or_else(over)?;
        // Should this shim die meanwhile.
        let key = warming.wanted.sort.key().map_err(Unmade::Here)?;
        if let Some(journal) = &container.journal {
            let noted = journal.note(Made::Making(warming.store.making(&key)));
            noted.attempt("writing the journal").map_err(Unmade::Here)?;
        }
        // Whether it was written, or not, for a reason that whoever comes next has, too.
        let writing = AtomicBool::new(false);
        let kept = self.while_still(container, &machine, started, false, async |about| {
            if container.touched.load(Ordering::Relaxed) {
                return Err(Error::precondition(
                    "other processes were run in it, or its limits changed, which nobody else is to have",
                ));
            }
            if container.streams("").is_some_and(|streams| streams.is_fed()) {
                return Err(Error::precondition("it was sent input, which nobody else is to read"));
            }
            writing.store(true, Ordering::Relaxed);
            // All that was said has arrived.
            let said = [warming.ears.stdout.told(), warming.ears.stderr.told()];
            let [Some(stdout), Some(stderr)] = said else {
                let most = LONGEST_TOLD >> 10;
                return Err(Error::precondition(format!("it has said more than {most} KiB already")));
            };
            let what = "keeping a warm container";
            let (describing, files) = (making.try_clone().attempt(what)?, making.try_clone().attempt(what)?);
            let described = move || warm::describe(&describing, about, started, &[stdout, stderr]);
            blocking(what, described).await?;
            let upper = warming.wanted.upper.clone();
            let files = move || warm::keep_files(&files, &upper);
            let base = base(&machine, making).await;
            let form = if base.is_some() { Form::Over } else { Form::Sparse };
            machine.save(&making.state, &making.memory, form, true, files).await?;
            let directory = making.directory().to_owned();
            blocking("looking at a warm container", move || match snapshot::read_header(&directory) {
                Ok(header) if header.base == base => Ok(()),
                Ok(_) => Err(Error::unknown("its machine has come from another snapshot than was believed")),
                Err(error) => Err(Error::unknown(error)),
            })
            .await
        });
        match kept.await {
            Err(error) if writing.load(Ordering::Relaxed) && !machine.is_ending().await => {
                Err(Unmade::Anywhere(error))
            }
            kept => kept.map_err(Unmade::Here),
        }
    }
}

/// Links what the machine's memory comes from to where it is to be kept, so that only what it has changed has to be. Where
/// that is not there any more, all of it is.
async fn base(machine: &Machine, making: &template::Making) -> Option<Base> {
    let (below, directory) = (machine.snapshot()?.to_owned(), making.directory().to_owned());
    let linking = move || snapshot::link(&below, &directory).map_err(Error::unknown);
    match blocking("linking what lies under a warm container", linking).await {
        Ok(header) => Some(header.lowest()),
        Err(error) => {
            debug!("all memory of a warm container is kept: {error}");
            None
        }
    }
}
