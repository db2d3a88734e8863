//! What a kubelet does for the pods of its node, by containerd's interface for it.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::Ctx;
use integration::cri::Cri;
use integration::cri::messages::{
    ContainerConfig, ContainerMetadata, ContainerState, ImageSpec, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
};
use integration::wait::{Attempt, until};

use crate::client::A_WHILE;
use crate::world::Inside;

/// Below which kubelets keep the cgroups of pods.
const CGROUPS: &str = "/sys/fs/cgroup/it-pods";

/// A kubelet whose pods are all of one runtime class.
pub struct Node<'a> {
    pub ctx: &'a Ctx<'a, Inside>,
    pub cri: Cri,
    pub handler: &'static str,
    made: Cell<u32>,
}

/// A pod of a node. It is the node that removes it.
pub struct Pod<'a> {
    pub node: &'a Node<'a>,
    pub id: String,
    pub config: PodSandboxConfig,
}

/// A container that was made in a pod.
pub struct Made<'a> {
    pub node: &'a Node<'a>,
    pub id: String,
    pub log: PathBuf,
}

impl<'a> Node<'a> {
    pub fn new(ctx: &'a Ctx<'a, Inside>, cri: Cri, handler: &'static str) -> Self {
        Self { ctx, cri, handler, made: Cell::new(0) }
    }

    /// A pod by which other containers are made.
    pub fn pod(&'a self) -> Result<Pod<'a>> {
        self.pod_with(|_| {})
    }

    /// The same, of a configuration that `change` has had in its hands.
    pub fn pod_with(&'a self, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Pod<'a>> {
        let number = self.made.get();
        self.made.set(number + 1);
        let name = format!("{}-{number}", self.handler);
        let logs = self.ctx.path(&format!("logs/{name}"));
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        let cgroup = format!("{CGROUPS}/{name}");
        // With all its controllers, as a kubelet makes it.
        self.ctx.cmd("sh").args(["-c", MAKE_CGROUP, "sh", &cgroup]).ok()?;
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                name,
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: "the-pod".into(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: cgroup.replace("/sys/fs/cgroup", ""),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(usual()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let id = self.cri.run_sandbox(config.clone(), self.handler)?;
        Ok(Pod { node: self, id, config })
    }

    /// Removes the pods that there are, as for those that nobody wants any more.
    pub fn tidy(&self) -> Result<()> {
        for pod in self.cri.sandboxes()? {
            self.cri.stop_sandbox(&pod.id)?;
            self.cri.remove_sandbox(&pod.id)?;
        }
        self.ctx.cmd("sh").args(["-c", REMOVE_CGROUPS, "sh", CGROUPS]).ok()?;
        Ok(())
    }
}

const MAKE_CGROUP: &str = "for part in cpu cpuset memory pids io; do
    for at in /sys/fs/cgroup ${1%/*}; do mkdir -p $at; echo +$part >$at/cgroup.subtree_control || true; done
done 2>/dev/null; mkdir -p $1";
const REMOVE_CGROUPS: &str = "[ ! -e $1 ] || find $1 -depth -type d -exec rmdir {} ';'";

/// Namespaces of pods that ask for nothing: their containers share all but processes.
pub fn usual() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }
}

/// What of a pod's configuration is Linux's.
pub fn linux(config: &mut PodSandboxConfig) -> &mut LinuxPodSandboxConfig {
    config.linux.get_or_insert_default()
}

/// A pod's namespaces.
pub fn namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    linux(config).security_context.get_or_insert_default().namespace_options.get_or_insert_default()
}

/// A container's security context.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// A container's limits.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// A place of the host's in a container.
pub fn mount(from: &Path, to: &str, readonly: bool) -> Mount {
    let (container_path, host_path) = (to.to_owned(), from.display().to_string());
    Mount { container_path, host_path, readonly }
}

impl<'a> Pod<'a> {
    /// Its addresses, the first of which is IPv4.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.node.cri.sandbox(&self.id)?.network.context("the pod has no network")?;
        let others = network.additional_ips.into_iter().map(|other| other.ip);
        Ok([network.ip].into_iter().chain(others).collect())
    }

    /// Runs a script in a new container.
    pub fn run(&self, name: &str, script: &str) -> Result<Made<'a>> {
        self.run_with(name, script, |_| {})
    }

    /// The same, of a configuration that `change` has had in its hands.
    pub fn run_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Made<'a>> {
        let made = self.make(name, script, change)?;
        self.node.cri.start(&made.id)?;
        Ok(made)
    }

    /// Makes one, and does not start it.
    pub fn make(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Made<'a>> {
        let log_path = format!("{name}.log");
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: self.node.ctx.world.image.clone() }),
            command: vec!["sh".into(), "-c".into()],
            args: vec![script.into()],
            log_path: log_path.clone(),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(self.namespaces()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        change(&mut config);
        let id = self.node.cri.create(&self.id, &self.config, config)?;
        Ok(Made { node: self.node, id, log: Path::new(&self.config.log_directory).join(log_path) })
    }

    fn namespaces(&self) -> NamespaceOption {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_default()
    }
}

impl Made<'_> {
    /// The code, what was written, and the complaints of a program that runs in it.
    pub fn exec(&self, words: &[&str]) -> Result<(i32, String, String)> {
        let done = self.node.cri.exec(&self.id, words, 0)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((done.exit_code, text(done.stdout), text(done.stderr)))
    }

    /// What a script says in it, which has to end well.
    pub fn says(&self, script: &str) -> Result<String> {
        let (code, out, err) = self.exec(&["sh", "-c", script])?;
        ensure!(code == 0, "{script:?} ended with {code}: {out:?}, {err:?}");
        Ok(out)
    }

    /// Waits for its end: how it was, in the words of `kubectl describe`.
    pub fn ended(&self) -> Result<String> {
        let status = until("a container to end", A_WHILE, || match self.node.cri.container(&self.id) {
            Ok(status) if status.state() == ContainerState::Exited => Attempt::Done(status),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        Ok(format!("{} {}", status.reason, status.exit_code))
    }

    /// What it is in.
    pub fn state(&self) -> Result<ContainerState> {
        Ok(self.node.cri.container(&self.id)?.state())
    }

    /// Has it end.
    pub fn stop(&self, after: Duration) -> Result<String> {
        self.node.cri.stop(&self.id, after)?;
        self.ended()
    }

    /// The lines of a stream in its log, each with the mark that tells whether it was whole.
    pub fn logged(&self, stream: &str) -> Result<String> {
        let log = fs::read_to_string(&self.log).with_context(|| format!("reading {}", self.log.display()))?;
        let of_stream = |line: &str| {
            let (_time, rest) = line.split_once(' ')?;
            Some(rest.strip_prefix(stream)?.trim_start().to_owned() + "\n")
        };
        Ok(log.lines().filter_map(of_stream).collect())
    }

    /// Waits until it has said so.
    pub fn until_logged(&self, line: &str) -> Result<()> {
        let wanted = format!("F {line}");
        until("a line in a log", A_WHILE, || match self.logged("stdout") {
            Ok(said) if said.lines().any(|line| line == wanted) => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        Ok(())
    }
}
