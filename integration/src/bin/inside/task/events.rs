//! What containerd tells its clients, as `ctr events` shows it.

use std::time::Duration;

use anyhow::Result;
use integration::Ctx;
use integration::command::Running;
use integration::wait::{Attempt, until};

use super::A_WHILE;
use crate::world::Inside;

/// A `ctr events` that listens.
pub struct Events(Running);

impl Events {
    /// Returns when it hears.
    pub fn listen(ctx: &Ctx<'_, Inside>) -> Result<Self> {
        let running = ctx.world.ctr().with(ctx.cmd("ctr"), ["events"]).start()?;
        let mut round = 0;
        until("ctr to hear of events", A_WHILE, || {
            round += 1;
            // Something for it to hear.
            let label = format!("integration={}", round % 2);
            let namespace = ctx.world.namespace.as_str();
            let labelled =
                ctx.world.ctr().with(ctx.cmd("ctr"), ["namespaces", "label", namespace, &label]).ok();
            match labelled {
                Err(error) => Attempt::Pending(error.to_string()),
                Ok(_) if running.stdout_so_far().is_empty() => Attempt::Pending(String::new()),
                Ok(_) => Attempt::Done(()),
            }
        })?;
        ctx.world
            .ctr()
            .with(ctx.cmd("ctr"), ["namespaces", "label", &ctx.world.namespace, "integration="])
            .ok()?;
        Ok(Self(running))
    }

    /// The topics about tasks of container `id`, once all of `topics` are among them.
    pub fn until(&self, id: &str, topics: &[&str], deadline: Duration) -> Result<Vec<String>> {
        let heard = until(&format!("the events {topics:?} of {id}"), deadline, || {
            let heard = self.topics(id);
            if topics.iter().all(|topic| heard.iter().any(|heard| heard == topic)) {
                Attempt::Done(heard)
            } else {
                Attempt::Pending(format!("{heard:?}"))
            }
        });
        Ok(heard?)
    }

    fn topics(&self, id: &str) -> Vec<String> {
        let text = self.0.stdout_so_far();
        let text = String::from_utf8_lossy(&text);
        let about = text.lines().filter(|line| line.contains(&format!("\"{id}\"")));
        about
            .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("/tasks/")))
            .map(str::to_owned)
            .collect()
    }
}
