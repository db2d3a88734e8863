//! How large a machine is: as large as its plan, and larger for each container that joins it.

use std::time::{Duration, Instant};

use log::info;
use runtime_spec::plan;
use tokio::time::sleep;
use vmm::control::{Ram, Reply, Request};

use super::Machine;
use crate::deadlines;
use crate::error::{Error, Result};
use crate::timeline::Timeline;

/// Between two looks at memory that is being plugged.
const PAUSE: Duration = Duration::from_millis(5);

/// What a restored machine is to become.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// So many processors run.
    cpus: Option<u32>,
    /// It has so many bytes of memory.
    memory: Option<u64>,
}

impl Change {
    /// From a template of this plan's to a machine of it.
    pub fn of(machine: &plan::Machine) -> Self {
        let (size, shape) = (machine.size, machine.shape);
        Self {
            cpus: (size.cpus != shape.online).then_some(size.cpus),
            memory: (size.memory > shape.memory).then_some(size.memory),
        }
    }
}

/// How far it has grown.
#[derive(Debug)]
pub struct Growth {
    /// Processors that run in it, once it is what it is planned to be.
    cpus: u32,
    /// What it has to become before, once.
    due: Change,
}

impl Growth {
    /// Of a machine that is to change before so many processors run in it.
    pub fn new(cpus: u32, due: Change) -> Self {
        Self { cpus, due }
    }
}

impl Machine {
    /// Makes a restored machine as large as it is planned, unless it was. Its containers may be made meanwhile, but not
    /// started.
    pub async fn grow(&self, timeline: &Timeline) -> Result<()> {
        let mut growth = self.growth.lock().await;
        if growth.due == Change::default() {
            return Ok(());
        }
        let _growing = timeline.phase("grow");
        self.become_planned(&mut growth).await.map_err(|error| self.explain(error))
    }

    async fn become_planned(&self, growth: &mut Growth) -> Result<()> {
        let cpus = async {
            match growth.due.cpus {
                Some(count) => self.guest.set_online_cpus(count).await,
                None => Ok(()),
            }
        };
        let memory = async {
            match growth.due.memory {
                Some(bytes) => self.plug(bytes).await,
                None => Ok(()),
            }
        };
        tokio::try_join!(cpus, memory)?;
        // What comes from now on is beyond that.
        growth.due = Change::default();
        Ok(())
    }

    /// Makes it large enough for one more container, for which a machine of its own would have this size; as far as it
    /// can grow. Returns the memory by which it has.
    pub async fn make_room(&self, size: plan::Size) -> Result<u64> {
        let mut growth = self.growth.lock().await;
        self.become_planned(&mut growth).await.map_err(|error| self.explain(error))?;
        let (ram, most) = self.numbers().await?;
        let bytes = ram.requested.saturating_add(size.memory).min(ram.max);
        let more = bytes.saturating_sub(ram.requested);
        if more < size.memory {
            info!(
                "the machine grows by {} MiB of {}: it is as large as it can be",
                more >> 20,
                size.memory >> 20
            );
        }
        let wanted = size.cpus.min(most).max(growth.cpus);
        let grown = async {
            if more > 0 {
                self.plug(bytes).await?;
            }
            if wanted > growth.cpus {
                self.guest.set_online_cpus(wanted).await?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = grown.await {
            // As it was; what does not succeed here, has failed for the same reason.
            let _ = self.resize(ram.requested).await;
            return Err(self.explain(error));
        }
        growth.cpus = wanted;
        Ok(more)
    }

    /// A container is gone for which it had grown by so much memory. The guest gives it back as it can.
    pub async fn give_back(&self, memory: u64) {
        if memory == 0 || self.is_over() {
            return;
        }
        let _alone = self.growth.lock().await;
        let given = async {
            let bytes = self.numbers().await?.0.requested.saturating_sub(memory);
            self.resize(bytes).await
        };
        if let Err(error) = given.await {
            info!("{} MiB of memory stay plugged: {error}", memory >> 20);
        }
    }

    /// What it has of memory, and how many processors.
    async fn numbers(&self) -> Result<(Ram, u32)> {
        let ask =
            |control: &mut vmm::control::Client| control.call(Request::Stats, &[], deadlines::MONITOR_CALL);
        match self.monitor.ask("asking for a machine's size", ask).await? {
            Reply::Stats(stats) => Ok((stats.ram, u32::try_from(stats.vcpus.len()).unwrap_or(u32::MAX))),
            other => Err(Error::unknown(format!("the monitor answered {other:?} for its numbers"))),
        }
    }

    async fn resize(&self, bytes: u64) -> Result<()> {
        let resize = Request::Resize { memory: Some(bytes), vcpus: None };
        let ask =
            |control: &mut vmm::control::Client| control.call(resize, &[], deadlines::MONITOR_CALL).map(drop);
        self.monitor.ask("changing a machine's memory", ask).await
    }

    /// Gives it more memory, and waits until its guest has taken it.
    async fn plug(&self, bytes: u64) -> Result<()> {
        self.resize(bytes).await?;
        let until = Instant::now() + deadlines::PLUG;
        loop {
            let actual = self.numbers().await?.0.actual;
            if actual >= bytes {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Error::deadline(format!(
                    "of the {} MiB that the machine is to have, its guest has taken {} within {:?}; give the container a \
                     lower memory limit, or the annotation dev.supermachine.boot=cold",
                    bytes >> 20,
                    actual >> 20,
                    deadlines::PLUG
                )));
            }
            sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime_spec::config::{Boot, Spoofing, Vhost};
    use runtime_spec::plan::{Shape, Size};

    use super::*;

    #[test]
    fn what_a_restored_machine_has_to_become() {
        let shape = Shape { cpus: 4, online: 2, memory: 1024, memory_max: 8192 };
        for (cpus, memory, change) in [
            (2, 1024, Change::default()),
            (2, 512, Change::default()),
            (1, 1024, Change { cpus: Some(1), memory: None }),
            (4, 2048, Change { cpus: Some(4), memory: Some(2048) }),
        ] {
            let size = Size { cpus, memory };
            let machine = plan::Machine {
                size,
                shape,
                boot: Boot::Restore,
                warm: None,
                kernel: None,
                initrd: None,
                spoofing: Spoofing::Drop,
                vhost: Vhost::Auto,
            };
            assert_eq!(Change::of(&machine), change, "{size:?}");
        }
    }
}
