//! From a plan to what it says: streams, a process, mounts, a machine, and the container in it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::info;
use oci_spec::runtime::ContainerState;
use runtime_spec::layout;
use runtime_spec::plan::{Network, Plan};

use super::create::{Order, Parts};
use super::origin::{Past, Resumed, Source, again, rejoin, restored};
use super::warm::Warming;
use super::{Begins, Shim, lock};
use crate::blocking::blocking;
use crate::error::{Attempt, Error, Result};
use crate::holder::{self, Holder};
use crate::hooks::Run;
use crate::journal::{Journal, Made};
use crate::machine::{Machine, Recipe};
use crate::stdio::{Ears, Opened};
use crate::template::{self, Store, Template};
use crate::timeline::Timeline;
use crate::warm::{self, Wanted};
use crate::{cgroup, share};

impl Shim {
    /// Makes everything. Returns the task's number.
    pub(super) async fn assemble(
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
            run_hooks(plan, &parts.journal, pid, timeline).await?;
            let _network = timeline.phase("network");
            machine.bring_network(true).await?;
            return Ok(pid);
        }
        // Hooks look at the network namespace; the machine boots meanwhile.
        let journal = parts.journal.clone();
        let hooks = run_hooks(plan, &journal, pid, timeline);
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
            let announcing = guest.create(&plan.id, json, opened.announce());
            opened.join_while(guest, &plan.id, "", announcing).await.flatten()
        };
        let joined = async { joined.await.map_err(|error| machine.explain(error)) };
        let (streams, ()) = tokio::try_join!(joined, machine.grow(timeline))?;
        parts.streams.insert(String::new(), Arc::new(streams));
        info!("container {}: machine after {booted:?}, made after {:?}", plan.id, begun.elapsed());
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
                // All are in the same.
                let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
                let network =
                    containers.iter().find_map(|one| lock(&one.holder).as_ref().map(Holder::network));
                let network =
                    network.ok_or_else(|| Error::precondition("of its machine's containers none is left"))?;
                holder::Network::Of(network.attempt("looking at the machine's network namespace")?)
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
        parts: &mut Parts,
        network: OwnedFd,
        timeline: &Timeline,
    ) -> Result<Arc<Machine>> {
        let (Some(machine), Some(journal)) = (&plan.machine, &parts.machine_journal) else {
            let running = self.machine().ok_or_else(|| Error::precondition("the machine is gone"))?;
            // Whatever fails from here on, it is asked to undo.
            parts.machine = Some(running.clone());
            if let Some(size) = plan.room {
                parts.room = self.share_machine(&running, size).await?;
            }
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

/// Those that run before a container starts, with what follows it noted before.
async fn run_hooks(plan: &Plan, journal: &Journal, pid: u32, timeline: &Timeline) -> Result<()> {
    let hooks = &plan.hooks;
    let run = |hooks: &[oci_spec::runtime::Hook], status| Run {
        hooks: hooks.to_vec(),
        state: plan.state(status, pid.cast_signed()),
        bundle: plan.bundle.clone(),
    };
    if !hooks.poststop.is_empty() {
        let poststop = run(&hooks.poststop, ContainerState::Stopped);
        journal.note(Made::Poststop(poststop)).attempt("writing the journal")?;
    }
    let first = [hooks.prestart.as_slice(), hooks.create_runtime.as_slice()].concat();
    if first.is_empty() {
        return Ok(());
    }
    let _hooks = timeline.phase("hooks");
    let first = run(&first, ContainerState::Creating);
    blocking("running hooks", move || first.all().map_err(Error::unknown)).await
}
