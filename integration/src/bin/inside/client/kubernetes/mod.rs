//! Kubernetes: what a kubelet asks of containerd for pods, each with a runtime class of runc's and one of ours.

mod features;
mod node;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use integration::command::Running;
use integration::containerd::{Api, Ctr};
use integration::cri::Cri;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};
use nix::sys::signal::Signal;

use super::{A_WHILE, Said, chosen, compare, without_firewall};
use crate::own;
use crate::world::Inside;
use features::FEATURES;
use node::Node;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "client.kubernetes",
        proves: "what a kubelet asks for pods of machines is as with pods of runc, as docs/clients.md tells",
        run: features,
        deadline: Duration::from_mins(30),
        rounds: Rounds::once_or(1),
        tags: &["client"],
    }]
}

/// The classes, as containerd knows their handlers.
const HANDLERS: [&str; 2] = ["runc", "supermachine"];

/// A containerd that serves kubelets.
struct Containerd<'a> {
    ctx: &'a Ctx<'a, Inside>,
    running: Option<Running>,
    socket: Ctr,
}

impl<'a> Containerd<'a> {
    fn start(ctx: &'a Ctx<'a, Inside>) -> Result<Self> {
        let version = ctx.world.api()?.version()?.version;
        let version = if version.starts_with("1.") { "1.7" } else { "2.1" };
        let part = |name: &str| {
            let path = format!("/etc/containerd/{name}-{version}.toml");
            fs::read_to_string(&path).with_context(|| format!("reading {path}"))
        };
        let config = ctx.path("config.toml");
        fs::write(&config, part("base")? + &part("cri")?).context("configuring containerd")?;
        let socket =
            Ctr { address: ctx.path("containerd.sock"), namespace: "k8s.io".into(), ..ctx.world.ctr() };
        let (running, _) = own::containerd(ctx, &socket, Some(&config))?;
        let containerd = Self { ctx, running: Some(running), socket };
        let file = "/usr/local/lib/testbed/busybox.tar";
        containerd.socket.with(ctx.cmd("ctr"), ["images", "import", file]).ok()?;
        let cri = containerd.cri()?;
        until("the node to be ready", A_WHILE, || match cri.ready() {
            Ok(Ok(())) => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        Ok(containerd)
    }

    fn cri(&self) -> Result<Cri> {
        Ok(Cri::new(Api::connect(&self.socket.address, &self.socket.namespace, A_WHILE)?))
    }
}

impl Drop for Containerd<'_> {
    /// As if there had never been one.
    fn drop(&mut self) {
        if let Ok(cri) = self.cri() {
            let _ = Node::new(self.ctx, cri, "").tidy();
        }
        if let Some(containerd) = self.running.take() {
            let _ = containerd.signal(Signal::SIGTERM);
            let ended = containerd.wait().map(|ended| ended.code());
            self.ctx.note(format_args!("containerd: {ended:?}"));
        }
        let reaped = own::reap_all();
        self.ctx.note(format_args!("its shims: {reaped:?}"));
        // Of its namespace, which the host's containerd does not know, places stay that are empty, and nothing else.
        without_firewall(
            self.ctx,
            "ip link del cni0; rm -rf /var/lib/cni
            rmdir /run/containerd/runc/k8s.io /run/supermachine/shims/k8s.io /run/supermachine/tasks/k8s.io",
        );
    }
}

fn features(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    if !ctx.world.owns_host() {
        return Ok(Outcome::Skipped("what pods leave of the firewall is removed here".into()));
    }
    let features = chosen(ctx, FEATURES);
    own::reap_shims()?;
    let containerd = Containerd::start(ctx)?;
    let node = |handler| anyhow::Ok(Node::new(ctx, containerd.cri()?, handler));
    let [runc, ours] = HANDLERS;
    let nodes = [node(runc)?, node(ours)?];
    let mut said: [Said; 2] = Default::default();
    for feature in &features {
        for (node, said) in nodes.iter().zip(&mut said) {
            ctx.note(format_args!("{}, with {}", feature.name, node.handler));
            said.push(match (feature.does)(node) {
                Ok(said) => (true, said),
                Err(error) => (false, format!("{error:#}")),
            });
            node.tidy()?;
        }
    }
    drop(containerd);
    let [runc, ours] = &said;
    compare(&features, runc, ours)?;
    Ok(Outcome::Passed)
}
