//! `Create`: from a bundle to a container whose process waits to be started.

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::CreateTaskRequest;
use log::{info, warn};
use oci_spec::runtime::ContainerState;
use runtime_spec::host::{Host, Pod, Task};
use runtime_spec::plan::{Block, Network, Plan};
use runtime_spec::{Kind, Request, RootfsMount, layout};

use super::origin::{Past, Resumed, Source, again, rejoin, restored};
use super::warm::{Beginning, Warming, beginning};
use super::{Begins, Container, Shim, lock};
use crate::blocking::blocking;
use crate::checkpoint::{self, Checkpoint};
use crate::config::Options;
use crate::error::{Attempt, Error, Result};
use crate::holder::{self, Holder};
use crate::hooks::Run;
use crate::host::HostFiles;
use crate::journal::{Journal, Made};
use crate::ledger::{self, Io};
use crate::machine::{Machine, Recipe};
use crate::stdio::{Ears, Opened, Streams};
use crate::template::{self, Store, Template};
use crate::time;
use crate::timeline::Timeline;
use crate::warm::{self, Condition, Wanted, Word};
use crate::{cgroup, config, host, share};

/// What a container is made from.
pub type NewContainer = CreateTaskRequest;

/// What there is of a container that is being made; what it takes to undo it.
pub(super) struct Parts {
    id: String,
    pub(super) journal: Arc<Journal>,
    holder: Option<Holder>,
    cgroup: Option<PathBuf>,
    machine: Option<Arc<Machine>>,
    /// Of a machine that was made for this container.
    pub(super) machine_journal: Option<Arc<Journal>>,
    /// Of its own process, and of others that it has already.
    streams: HashMap<String, Arc<Streams>>,
    /// Its disks, which are in drives of the machine's.
    disks: Vec<Block>,
    begins: Begins,
    warming: Option<Warming>,
    /// The directory that was filled for it.
    filled: Option<PathBuf>,
    /// What fails now has to do with the warm container that it starts from, and with no other.
    from_warm: bool,
}

/// Why a container was not made.
struct NotMade {
    error: Error,
    /// It may be if it does not start from a warm one.
    from_warm: bool,
}

/// A container that is to be made.
struct Order {
    plan: Plan,
    store: Store,
    io: Io,
    /// What it was before, if it is to go on.
    past: Option<Past>,
    /// What it is when it is to be warm, or starts from one that was.
    warm: Option<Wanted>,
    /// What an operator is told of that.
    word: Option<Word>,
    begun: i64,
}

impl Shim {
    /// `Create`. Returns the task's number. What has failed has left nothing.
    pub async fn create(self: &Arc<Self>, request: NewContainer) -> Result<u32> {
        let id = request.id.clone();
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
        let tasks = containers.into_iter().filter_map(task).collect();
        Some(Pod { id: self.paths.group().to_owned(), tasks, netns: None, free_drives })
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
            begins: Begins::Anew,
            warming: None,
            filled: None,
            from_warm: false,
        })
    }

    /// Makes everything. Returns the task's number.
    async fn assemble(
        self: &Arc<Self>,
        order: &mut Order,
        parts: &mut Parts,
        timeline: &Timeline,
    ) -> Result<u32> {
        let (past, warm) = (order.past.take(), order.warm.take());
        let Order { plan, store, io, .. } = &*order;
        let begun = std::time::Instant::now();
        let files = timeline.phase("streams, process, mounts");
        let mut opened = Opened::open(io, &plan.logger).await?;
        // Before whoever is in it, as it is removed after them.
        parts.cgroup = cgroup::make(&parts.journal, &plan.cgroup)?;
        let holder = self.stand(plan, parts)?;
        let pid = holder.process().pid;
        let network = holder.network().attempt("looking at the network namespace")?;
        parts.holder = Some(holder);
        if let Some(path) = &parts.cgroup {
            cgroup::enter(path, pid).attempt(format_args!("entering the cgroup {}", path.display()))?;
        }
        let (from, resumed) = past.map(Past::split).unzip();
        if let (Some(Source::Template(template)), Some(wanted)) = (&from, &warm) {
            parts.from_warm = true;
            self.fill(parts, template, wanted).await?;
            parts.from_warm = false;
        }
        self.mount(plan, parts).await?;
        if matches!(from, Some(Source::Checkpoint(_))) {
            let (root, plan) = (self.paths.tree().join(layout::rootfs(&plan.guest_id)), plan.clone());
            let making = move || {
                let made = share::points::make(&root, &plan.guest.spec, &plan.share.binds);
                made.attempt(format_args!("making mount points in the root of {}", plan.id))
            };
            blocking("making mount points", making).await?;
        }
        drop(files);
        if let (Some(Source::Template(_)), Some(wanted)) = (&from, &warm) {
            // Before its hooks, so that none runs twice if it is made in another way after all.
            parts.from_warm = true;
            let machine = self.machine_for(plan, store, from, parts, network, timeline).await?;
            parts.machine = Some(machine.clone());
            let joined = join(plan, &machine, opened, resumed, parts).await;
            if let Err(error) = &joined
                && !machine.is_ending().await
            {
                template::refuse(store, &wanted.sort.key()?, &error.text).await;
            }
            joined?;
            parts.from_warm = false;
            info!("container {}: where a warm one was after {:?}", plan.id, begun.elapsed());
            run_hooks(plan, parts, pid, timeline).await?;
            let _network = timeline.phase("network");
            machine.bring_network(true).await?;
            return Ok(pid);
        }
        // Hooks look at the network namespace; the machine boots meanwhile.
        let hooks = run_hooks(plan, parts, pid, timeline);
        let (machine, hooked) =
            tokio::join!(self.machine_for(plan, store, from, parts, network, timeline), hooks);
        parts.machine = Some(machine?);
        parts.disks.clone_from(&plan.blocks);
        hooked?;
        let machine = parts.machine.clone().ok_or_else(|| Error::unknown("there is no machine"))?;
        let guest = &machine.guest;
        if plan.machine.is_some() {
            let _network = timeline.phase("network");
            machine.bring_network(resumed.is_some()).await?;
        }
        let booted = begun.elapsed();
        let _container = timeline.phase("container");
        if resumed.is_some() {
            join(plan, &machine, opened, resumed, parts).await?;
            info!("container {}: machine after {booted:?}, joined after {:?}", plan.id, begun.elapsed());
            return Ok(pid);
        }
        if let Some(wanted) = warm {
            let ears = Ears::default();
            opened.heard_by(ears.clone());
            parts.warming = Some(Warming { wanted, store: store.clone(), ears });
        }
        let json = serde_json::to_vec(&plan.guest).map_err(Error::unknown)?;
        let joined = async {
            guest.create(&plan.id, json, opened.announce()).await?;
            opened.join(guest, &plan.id, "").await
        };
        let joined = async { joined.await.map_err(|error| machine.explain(error)) };
        let (streams, ()) = tokio::try_join!(joined, machine.grow(timeline))?;
        parts.streams.insert(String::new(), Arc::new(streams));
        info!("container {}: machine after {booted:?}, made after {:?}", plan.id, begun.elapsed());
        if plan.machine.is_some() {
            machine.record_writes().await;
        }
        Ok(pid)
    }

    /// Gives a container the files of the warm one that it starts from, where it has none yet.
    async fn fill(&self, parts: &mut Parts, from: &Template, wanted: &Wanted) -> Result<()> {
        let path = wanted.upper.clone();
        let about = fs::metadata(&path).attempt(format_args!("looking at {}", path.display()))?;
        let (mode, owner) = (about.mode() & 0o7777, (about.uid(), about.gid()));
        parts.journal.note(Made::Filled { path, mode, owner }).attempt("writing the journal")?;
        parts.filled = Some(wanted.upper.clone());
        let (from, upper) = (from.directory.clone(), wanted.upper.clone());
        blocking("copying files", move || warm::fill(&from, &upper)).await
    }

    /// Starts the process that stands for the container.
    fn stand(&self, plan: &Plan, parts: &Parts) -> Result<Holder> {
        let network = match &plan.network {
            Network::Namespace(path) => {
                let file = fs::File::open(path).attempt(format_args!("opening {}", path.display()))?;
                holder::Network::Of(OwnedFd::from(file))
            }
            Network::New | Network::Isolated => holder::Network::New,
            Network::Pod => {
                let sandbox = self.container(self.paths.group())?;
                let network = lock(&sandbox.holder).as_ref().map(Holder::network);
                let network = network.ok_or_else(|| Error::precondition("the pod's sandbox is gone"))?;
                holder::Network::Of(network.attempt("looking at the pod's network namespace")?)
            }
        };
        let about = match &plan.network {
            Network::Namespace(path) => format!(" in the network namespace {}", path.display()),
            _ => String::new(),
        };
        let what = format!("starting the process that stands for the container{about}");
        let holder = Holder::start(network).attempt(what)?;
        parts.journal.note(Made::Process(holder.process())).attempt("writing the journal")?;
        Ok(holder)
    }

    async fn mount(&self, plan: &Plan, parts: &mut Parts) -> Result<()> {
        let machine_journal = if let Some(machine) = self.machine() {
            machine.journal.clone()
        } else {
            let directory = self.paths.machine();
            let made = Journal::create(&directory).attempt(format_args!("making {}", directory.display()))?;
            let made = Arc::new(made);
            parts.machine_journal = Some(made.clone());
            made
        };
        let new = parts.machine_journal.is_some();
        let (journal, tree) = (parts.journal.clone(), self.paths.tree());
        let (id, wanted) = (plan.guest_id.clone(), plan.share.clone());
        let mounting = move || {
            if new {
                share::make_tree(&machine_journal, &tree)?;
            }
            share::mount_all(&journal, &tree, &id, &wanted)
        };
        blocking("mounting", mounting).await
    }

    /// The machine that runs, or a new one.
    async fn machine_for(
        self: &Arc<Self>,
        plan: &Plan,
        store: &Store,
        from: Option<Source>,
        parts: &Parts,
        network: OwnedFd,
        timeline: &Timeline,
    ) -> Result<Arc<Machine>> {
        let (Some(machine), Some(journal)) = (&plan.machine, &parts.machine_journal) else {
            let running = self.machine().ok_or_else(|| Error::precondition("the machine is gone"))?;
            running.forward(&plan.sockets)?;
            plan.resolv_conf.iter().for_each(|file| running.resolves_by(file));
            // Last, as they are taken out again with the container.
            running.insert(&plan.blocks).await?;
            return Ok(running);
        };
        // One that goes on needs them before it does.
        let (at_once, later) = match &from {
            Some(Source::Checkpoint(_)) => (plan.blocks.as_slice(), &[][..]),
            _ => (&[][..], plan.blocks.as_slice()),
        };
        let recipe = Recipe {
            paths: &self.paths,
            machine,
            blocks: at_once,
            network: &network,
            network_path: match &plan.network {
                Network::Namespace(path) => Some(path),
                _ => None,
            },
            uplink: plan.uplink.as_ref(),
            cgroup: parts.cgroup.as_deref(),
            oom_score_adj: plan.monitor.oom_score_adj,
            timeline,
        };
        let mut machine = match from {
            Some(from) => again(plan, from, store, journal, &recipe).await?,
            None => match restored(&plan.id, store, journal, &recipe).await? {
                Some(machine) => machine,
                None => Machine::boot(journal.clone(), &recipe).await?,
            },
        };
        machine.guest = machine.guest.knowing(&plan.id, &plan.guest_id);
        let machine = Arc::new(machine);
        machine.insert(later).await?;
        machine.forward(&plan.sockets)?;
        plan.resolv_conf.iter().for_each(|file| machine.resolves_by(file));
        Ok(machine)
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
            guest: machine.guest.clone(),
            spec: plan.guest.spec.clone(),
            environment: plan.logger.clone(),
            poststart,
            cgroup: parts.cgroup.take(),
            streams: Mutex::new(std::mem::take(&mut parts.streams)),
            journal: Some(parts.journal.clone()),
            holder: Mutex::new(parts.holder.take()),
        };
        self.insert(container);
        if parts.machine_journal.is_some() {
            *lock(&self.machine) = Some(machine.clone());
            self.watch(machine);
        }
        Ok(())
    }

    /// A container that is there from now on.
    pub(super) fn insert(&self, container: Container) {
        lock(&self.containers).insert(container.id.clone(), Arc::new(container));
    }

    /// Undoes what there is of a container that could not be made.
    async fn undo(&self, parts: Parts) {
        let Parts { id, journal, holder, machine, machine_journal, streams, disks, .. } = parts;
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
        }
        drop(holder);
        let undone = self.teardown(journal, machine_journal).await;
        if let Err(error) = undone {
            warn!("undoing container {id}: {error}");
        }
    }
}

/// Joins what goes on in a machine to its streams.
async fn join(
    plan: &Plan,
    machine: &Machine,
    opened: Opened,
    resumed: Option<Resumed>,
    parts: &mut Parts,
) -> Result<()> {
    let resumed = resumed.ok_or_else(|| Error::unknown("there is nothing that goes on"))?;
    parts.begins = if resumed.started { Begins::Still } else { Begins::Held };
    machine.heard.store(resumed.about.last_event, Ordering::Relaxed);
    let rejoined = rejoin(plan, &machine.guest, opened, resumed).await;
    parts.streams = rejoined.map_err(|error| machine.explain(error))?;
    Ok(())
}

fn io_of(request: &NewContainer) -> Io {
    Io {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

/// Those that run before a container starts, with what follows it noted before.
async fn run_hooks(plan: &Plan, parts: &Parts, pid: u32, timeline: &Timeline) -> Result<()> {
    let hooks = &plan.hooks;
    let run = |hooks: &[oci_spec::runtime::Hook], status| Run {
        hooks: hooks.to_vec(),
        state: plan.state(status, pid.cast_signed()),
        bundle: plan.bundle.clone(),
    };
    if !hooks.poststop.is_empty() {
        let poststop = run(&hooks.poststop, ContainerState::Stopped);
        parts.journal.note(Made::Poststop(poststop)).attempt("writing the journal")?;
    }
    let first = [hooks.prestart.as_slice(), hooks.create_runtime.as_slice()].concat();
    if first.is_empty() {
        return Ok(());
    }
    let _hooks = timeline.phase("hooks");
    let first = run(&first, ContainerState::Creating);
    blocking("running hooks", move || first.all().map_err(Error::unknown)).await
}
