//! `Create`: from a bundle to a container whose process waits to be started.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::CreateTaskRequest;
use log::{info, warn};
use oci_spec::runtime::ContainerState;
use runtime_spec::host::{Host, Pod, Task};
use runtime_spec::plan::{Block, Plan};
use runtime_spec::{Kind, Request, RootfsMount, layout};

use super::origin::Past;
use super::warm::{Beginning, Warming, beginning};
use super::{Begins, Container, Shim, lock};
use crate::blocking::blocking;
use crate::checkpoint::{self, Checkpoint};
use crate::config::Options;
use crate::error::{Attempt, Error, Result};
use crate::group;
use crate::holder::Holder;
use crate::hooks::Run;
use crate::host::HostFiles;
use crate::journal::{Journal, Made};
use crate::ledger::{self, Io};
use crate::machine::Machine;
use crate::stdio::Streams;
use crate::template::Store;
use crate::time;
use crate::timeline::Timeline;
use crate::warm::{self, Condition, Wanted, Word};
use crate::{config, host};

/// What a container is made from.
pub type NewContainer = CreateTaskRequest;

/// What there is of a container that is being made; what it takes to undo it.
pub(super) struct Parts {
    id: String,
    pub(super) journal: Arc<Journal>,
    pub(super) holder: Option<Holder>,
    pub(super) cgroup: Option<PathBuf>,
    pub(super) machine: Option<Arc<Machine>>,
    /// Of a machine that was made for this container.
    pub(super) machine_journal: Option<Arc<Journal>>,
    /// Of its own process, and of others that it has already.
    pub(super) streams: HashMap<String, Arc<Streams>>,
    /// Its disks, which are in drives of the machine's.
    pub(super) disks: Vec<Block>,
    /// Memory by which the machine has grown for it.
    pub(super) room: u64,
    pub(super) begins: Begins,
    pub(super) warming: Option<Warming>,
    /// The directory that was filled for it.
    pub(super) filled: Option<PathBuf>,
    /// What fails now has to do with the warm container that it starts from, and with no other.
    pub(super) from_warm: bool,
}

/// Why a container was not made.
struct NotMade {
    error: Error,
    /// It may be if it does not start from a warm one.
    from_warm: bool,
}

/// A container that is to be made.
pub(super) struct Order {
    pub(super) plan: Plan,
    pub(super) store: Store,
    pub(super) io: Io,
    /// What it was before, if it is to go on.
    pub(super) past: Option<Past>,
    /// What it is when it is to be warm, or starts from one that was.
    pub(super) warm: Option<Wanted>,
    /// What an operator is told of that.
    word: Option<Word>,
    begun: i64,
}

impl Shim {
    /// `Create`. Returns the task's number. What has failed has left nothing.
    pub async fn create(self: &Arc<Self>, request: NewContainer) -> Result<u32> {
        let id = request.id.clone();
        // A machine that runs is not written down meanwhile.
        let _changing = if self.machine().is_some() { Some(self.changes.read().await) } else { None };
        self.ledger.reserve(&id)?;
        let created = self.make(request).await;
        if created.is_err() {
            self.ledger.forget(&id);
        }
        created
    }

    async fn make(self: &Arc<Self>, request: NewContainer) -> Result<u32> {
        let begun = time::now();
        if request.checkpoint.is_empty() {
            // Large, and held by everybody who waits for it.
            return Box::pin(self.make_new(request, begun)).await;
        }
        let directory = PathBuf::from(&request.checkpoint);
        let read = directory.clone();
        let made = match blocking("reading a checkpoint", move || Checkpoint::open(&read)).await {
            Ok(checkpoint) => Box::pin(self.make_again(request, checkpoint, begun)).await,
            Err(error) => Err(error),
        };
        // Nothing depends on it.
        let _ = tokio::task::spawn_blocking(move || checkpoint::dispose(&directory)).await;
        made
    }

    async fn make_again(
        self: &Arc<Self>,
        request: NewContainer,
        checkpoint: Checkpoint,
        begun: i64,
    ) -> Result<u32> {
        let io = io_of(&request);
        let (plan, store) = self.plan(&request, Some(&checkpoint))?;
        let past = Some(Past::of_checkpoint(checkpoint));
        let order = Order { plan, store, io, past, warm: None, word: None, begun };
        self.make_as(&request, order).await.map_err(|NotMade { error, .. }| error)
    }

    /// From a warm container, if there is one; as any other, if there is none, or that fails.
    async fn make_new(self: &Arc<Self>, request: NewContainer, begun: i64) -> Result<u32> {
        let io = io_of(&request);
        let (plan, store) = self.plan(&request, None)?;
        let (past, warm, word) = match beginning(&plan, &store, &io, self.paths.namespace()).await? {
            Beginning::Ordinary(why) => (None, None, why.map(|why| Word::Ordinary { why })),
            Beginning::Warming(wanted) => {
                let when = wanted.sort.when.clone();
                (None, Some(wanted), Some(Word::Waits { when }))
            }
            Beginning::Warm(start, wanted) => {
                let key = start.template.key.as_str().to_owned();
                (Some(Past::of_warm(*start)), Some(wanted), Some(Word::Started { key }))
            }
        };
        let order = Order {
            plan: plan.clone(),
            store: store.clone(),
            io: io.clone(),
            past,
            warm: warm.clone(),
            word,
            begun,
        };
        match self.make_as(&request, order).await {
            Err(NotMade { error, from_warm: true }) => {
                warn!("{}: it starts as any other: {error}", plan.id);
                let warm =
                    warm.filter(|wanted| wanted.sort.key().is_ok_and(|key| store.failure(&key).is_none()));
                let word = match &warm {
                    Some(wanted) => Word::Waits { when: wanted.sort.when.clone() },
                    None => Word::Ordinary { why: error.text },
                };
                let order = Order { plan, store, io, past: None, warm, word: Some(word), begun };
                self.make_as(&request, order).await.map_err(|NotMade { error, .. }| error)
            }
            made => made.map_err(|NotMade { error, .. }| error),
        }
    }

    async fn make_as(
        self: &Arc<Self>,
        request: &NewContainer,
        mut order: Order,
    ) -> std::result::Result<u32, NotMade> {
        let id = order.plan.id.clone();
        let mut parts = self.begin(&id).map_err(|error| NotMade { error, from_warm: false })?;
        let directory = self.directory(&id);
        if let Some(word) = order.word.take() {
            word.write(&directory);
        }
        let timeline = Timeline::of(&directory);
        if let Some(born) = self.born.take() {
            drop(timeline.phase_since(born, "shim"));
        }
        let _all = timeline.phase_since(order.begun, "create");
        let (bundle, rootfs) = (request.bundle.clone(), request.rootfs.clone());
        let made = async {
            let pid = Box::pin(self.assemble(&mut order, &mut parts, &timeline)).await?;
            self.register(&order.plan, &mut parts)?;
            if let Some(filled) = parts.filled.take() {
                parts.journal.note(Made::Kept(filled)).attempt("writing the journal")?;
            }
            self.ledger.made(&id, ledger::Made { bundle, rootfs, io: order.io, pid })?;
            Ok(pid)
        };
        match made.await {
            Ok(pid) => {
                Box::pin(self.keep_if_created(&id)).await;
                Ok(pid)
            }
            Err(error) => {
                lock(&self.containers).remove(&id);
                let from_warm = parts.from_warm;
                self.undo(parts).await;
                Err(NotMade { error, from_warm })
            }
        }
    }

    /// One that is warm before it is started is kept before anybody can start it.
    async fn keep_if_created(&self, id: &str) {
        let Ok(container) = self.container(id) else { return };
        let warming = lock(&container.warming)
            .take_if(|warming| matches!(warming.wanted.condition, Condition::Created));
        if let Some(warming) = warming {
            self.keep_warm(&container, &warming).await;
            warming.ears.close();
        }
    }

    fn plan(&self, request: &NewContainer, checkpoint: Option<&Checkpoint>) -> Result<(Plan, Store)> {
        let bundle = PathBuf::from(&request.bundle);
        let config = config::of(&Options::of(&request.options)?)?;
        let path = bundle.join("config.json");
        let json = fs::read(&path).attempt(format_args!("reading {}", path.display()))?;
        let (spec, notes) = runtime_spec::read::spec(&json)?;
        let rootfs: Vec<_> = request
            .rootfs
            .iter()
            .map(|mount| RootfsMount {
                typ: mount.type_.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            })
            .collect();
        let pod = self.pod();
        let (hostname, share) = (host::name(), self.paths.tree());
        let ordinal = self.ordinal.fetch_add(1, Ordering::Relaxed);
        let host =
            Host { cpus: host::cpus(), memory: host::memory(), hostname: &hostname, files: &HostFiles };
        let of = |guest_id| Request {
            id: &request.id,
            guest_id,
            namespace: self.paths.namespace(),
            bundle: &bundle,
            share: &share,
            spec: &spec,
            rootfs: &rootfs,
            terminal: request.terminal,
            ordinal,
            config: &config,
            host,
            pod: pod.as_ref(),
        };
        let mut plan = runtime_spec::plan(&of(
            checkpoint.map_or(&request.id, |checkpoint| &checkpoint.about.container)
        ))?;
        let warm = plan.machine.as_ref().is_some_and(|machine| machine.warm.is_some());
        if warm && checkpoint.is_none() && warm::obstacle(&plan).is_none() {
            // Others that start from it find their files where they are here.
            plan = runtime_spec::plan(&of(layout::WARM))?;
        }
        for note in notes.iter().chain(&plan.notes) {
            info!("{}: {}: {}", plan.id, note.path, note.text);
        }
        if let (Kind::Member { pod }, None) = (&plan.kind, &plan.machine)
            && self.machine().is_none()
        {
            return Err(Error::precondition(format!(
                "the machine of pod {pod} is not there; create the pod first"
            )));
        }
        if plan.kind == Kind::Single && group::founder(self.paths.group()) != request.id {
            return Err(Error::precondition(format!(
                "the machine of {} ends, whose network namespace {} was to share; start that first",
                group::founder(self.paths.group()),
                request.id
            )));
        }
        if let Some(checkpoint) = checkpoint {
            checkpoint.about.check(&plan, request.terminal)?;
        }
        Ok((plan, Store::new(&config.template)))
    }

    /// The pod whose machine runs.
    fn pod(&self) -> Option<Pod> {
        let free_drives = self.machine()?.free_drives();
        let containers: Vec<_> = lock(&self.containers).keys().cloned().collect();
        let task = |container: String| {
            let pid = self.ledger.view(&container, "").ok()?.pid;
            Some(Task { container, pid })
        };
        let tasks: Vec<_> = containers.into_iter().filter_map(task).collect();
        let netns = tasks.first().map(|task| PathBuf::from(format!("/proc/{}/ns/net", task.pid)));
        Some(Pod { id: group::founder(self.paths.group()).to_owned(), tasks, netns, free_drives })
    }

    fn begin(&self, id: &str) -> Result<Parts> {
        let directory = self.directory(id);
        let journal = Journal::create(&directory).attempt(format_args!("making {}", directory.display()))?;
        fs::write(directory.join("group"), self.paths.group()).attempt("writing the group")?;
        Ok(Parts {
            id: id.to_owned(),
            journal: Arc::new(journal),
            holder: None,
            cgroup: None,
            machine: None,
            machine_journal: None,
            streams: HashMap::new(),
            disks: Vec::new(),
            room: 0,
            begins: Begins::Anew,
            warming: None,
            filled: None,
            from_warm: false,
        })
    }

    fn register(self: &Arc<Self>, plan: &Plan, parts: &mut Parts) -> Result<()> {
        let machine = parts.machine.clone().ok_or_else(|| Error::unknown("there is no machine"))?;
        let state = |pid| plan.state(ContainerState::Running, pid);
        let pid = parts.holder.as_ref().map_or(0, |holder| holder.process().pid);
        let poststart = (!plan.hooks.poststart.is_empty()).then(|| Run {
            hooks: plan.hooks.poststart.clone(),
            state: state(pid.cast_signed()),
            bundle: plan.bundle.clone(),
        });
        let container = Container {
            id: plan.id.clone(),
            begins: parts.begins,
            touched: AtomicBool::new(false),
            warming: Mutex::new(parts.warming.take()),
            stays: checkpoint::obstacle(plan),
            disks: parts.disks.clone(),
            room: parts.room,
            guest: machine.guest.clone(),
            spec: plan.guest.spec.clone(),
            environment: plan.logger.clone(),
            poststart,
            cgroup: parts.cgroup.take(),
            streams: Mutex::new(std::mem::take(&mut parts.streams)),
            journal: Some(parts.journal.clone()),
            holder: Mutex::new(parts.holder.take()),
            leaving: Mutex::default(),
        };
        self.insert(container);
        if parts.machine_journal.is_some() {
            *lock(&self.machine) = Some(machine.clone());
            self.watch(machine);
        }
        if plan.room.is_some() {
            self.note_sharing();
        }
        let network = PathBuf::from(format!("/proc/{pid}/ns/net"));
        group::note(&self.directory(&plan.id), &network).attempt("noting the network namespace")
    }

    /// A container that is there from now on.
    pub(super) fn insert(&self, container: Container) {
        lock(&self.containers).insert(container.id.clone(), Arc::new(container));
    }

    /// Undoes what there is of a container that could not be made.
    async fn undo(&self, parts: Parts) {
        let Parts { id, journal, holder, machine, machine_journal, streams, disks, room, .. } = parts;
        drop(streams);
        if machine_journal.is_some() {
            lock(&self.machine).take();
            if let Some(machine) = &machine {
                machine.stop().await;
            }
        } else if let Some(machine) = &machine {
            // What the agent did not make it does not know.
            let _ = machine.guest.delete(&id, "").await;
            machine.eject(&disks).await;
            machine.give_back(room).await;
        }
        drop(holder);
        let undone = self.teardown(journal, machine_journal).await;
        if let Err(error) = undone {
            warn!("undoing container {id}: {error}");
        }
    }
}

fn io_of(request: &NewContainer) -> Io {
    Io {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}
