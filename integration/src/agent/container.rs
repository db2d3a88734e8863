//! Containers of a machine, and their processes.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent_api::agent::{CreateContainerRequest, ExecRequest, Exit, Stdio};
use agent_api::stdio::Stream;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::{Machine, rootfs};

/// What a container's process is, for [`Container::create`] to be told otherwise.
pub fn config(id: &str, argv: &[&str]) -> Value {
    let capabilities =
        ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"];
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": argv,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "noNewPrivileges": true
        },
        "root": { "path": format!("/run/supermachine/share/{id}/rootfs") },
        "hostname": id,
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"])
        ],
        "linux": {
            "resources": {},
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// Which streams a process has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Streams {
    /// A terminal instead of pipes.
    pub terminal: bool,
    /// Whether it reads.
    pub stdin: bool,
}

impl Streams {
    fn message(self) -> Stdio {
        let mut stdio = Stdio::new();
        (stdio.terminal, stdio.stdin, stdio.stdout) = (self.terminal, self.stdin, true);
        stdio.stderr = !self.terminal;
        stdio
    }
}

/// A container that was made.
pub struct Container<'a> {
    machine: &'a Machine,
    id: String,
}

/// A process that was started, or is about to be.
pub struct Process<'a> {
    machine: &'a Machine,
    id: String,
    exec_id: String,
    stdin: Option<UnixStream>,
    stdout: JoinHandle<Result<Vec<u8>>>,
    stderr: Option<JoinHandle<Result<Vec<u8>>>>,
}

/// What it did.
#[derive(Debug, Default)]
pub struct Output {
    /// Its exit.
    pub exit: Exit,
    /// All that it wrote.
    pub stdout: Vec<u8>,
    /// All that it wrote of itself.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Its output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its exit status.
    pub fn status(&self) -> u32 {
        self.exit.status
    }
}

impl<'a> Container<'a> {
    /// Makes it of `config`, with a root of its own. Its process waits.
    pub fn create(machine: &'a Machine, id: &str, config: &Value, streams: Streams) -> Result<Self> {
        rootfs::make(&machine.share().join(id).join("rootfs"))?;
        Self::create_again(machine, id, config, streams)
    }

    /// The same, with the root that is there.
    pub fn create_again(machine: &'a Machine, id: &str, config: &Value, streams: Streams) -> Result<Self> {
        let guest = json!({ "spec": config, "mounts": [], "shm": null, "sockets": [], "devices": [], "sysctls": {},
            "hostname": null });
        Self::create_guest(machine, id, &guest, streams)
    }

    /// Makes it of all that the agent is told.
    pub fn create_guest(machine: &'a Machine, id: &str, guest: &Value, streams: Streams) -> Result<Self> {
        let mut request = CreateContainerRequest::new();
        (request.id, request.guest) = (id.to_owned(), serde_json::to_vec(guest)?);
        request.stdio = Some(streams.message()).into();
        machine.call(async |client, context| client.create_container(context, &request).await)?;
        Ok(Self { machine, id: id.to_owned() })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts its own process.
    pub fn start(&self, streams: Streams) -> Result<Process<'a>> {
        Process::start(self.machine, &self.id, "", streams)
    }

    /// Runs its own process to its end.
    pub fn run(&self, within: Duration) -> Result<Output> {
        self.start(Streams::default())?.finish(within)
    }

    /// Starts a process beside it.
    pub fn exec(&self, exec_id: &str, process: &Value, streams: Streams) -> Result<Process<'a>> {
        self.announce(exec_id, process, streams)?;
        self.start_exec(exec_id, streams)
    }

    /// Starts a process that was announced.
    pub fn start_exec(&self, exec_id: &str, streams: Streams) -> Result<Process<'a>> {
        Process::start(self.machine, &self.id, exec_id, streams)
    }

    /// Announces a process beside it.
    pub fn announce(&self, exec_id: &str, process: &Value, streams: Streams) -> Result<()> {
        let mut request = ExecRequest::new();
        (request.id, request.exec_id) = (self.id.clone(), exec_id.to_owned());
        request.process = serde_json::to_vec(process)?;
        request.stdio = Some(streams.message()).into();
        self.machine.call(async |client, context| client.exec(context, &request).await).map(drop)
    }

    /// Runs a shell's script beside it, and returns what it said.
    pub fn sh(&self, exec_id: &str, script: &str, within: Duration) -> Result<Output> {
        let process = config("", &["sh", "-c", script])["process"].clone();
        let output = self.exec(exec_id, &process, Streams::default())?.finish(within)?;
        self.machine.delete(&self.id, exec_id)?;
        Ok(output)
    }

    /// Removes it.
    pub fn delete(self) -> Result<Exit> {
        self.machine.delete(&self.id, "")
    }
}

impl<'a> Process<'a> {
    fn start(machine: &'a Machine, id: &str, exec_id: &str, streams: Streams) -> Result<Self> {
        let attach = |stream| machine.attach(id, exec_id, stream);
        let stdin = if streams.stdin { Some(attach(Stream::Stdin)?) } else { None };
        let stdout = collect(attach(Stream::Stdout)?);
        let stderr = if streams.terminal { None } else { Some(collect(attach(Stream::Stderr)?)) };
        machine.start(id, exec_id)?;
        Ok(Self { machine, id: id.to_owned(), exec_id: exec_id.to_owned(), stdin, stdout, stderr })
    }

    /// Feeds it.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdin
            .as_mut()
            .context("the process does not read")?
            .write_all(bytes)
            .context("feeding a process")
    }

    /// Ends its input.
    pub fn end_input(&mut self) -> Result<()> {
        let stdin = self.stdin.as_ref().context("the process does not read")?;
        stdin.shutdown(Shutdown::Write).context("ending a process's input")
    }

    /// Waits for the last of its output.
    pub fn output(self) -> Result<Vec<u8>> {
        joined(self.stdout)
    }

    /// Waits for its end, and for the last of its output.
    pub fn finish(self, within: Duration) -> Result<Output> {
        let exit = self.machine.wait(&self.id, &self.exec_id, within)?;
        let stdout = joined(self.stdout)?;
        let stderr = self.stderr.map_or(Ok(Vec::new()), joined)?;
        Ok(Output { exit, stdout, stderr })
    }
}

/// How long a process may say nothing, as one does that sleeps while others are looked at.
const SILENCE: Duration = Duration::from_mins(15);

fn collect(mut stream: UnixStream) -> JoinHandle<Result<Vec<u8>>> {
    thread::spawn(move || {
        stream.set_read_timeout(Some(SILENCE))?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).context("reading a stream")?;
        Ok(all)
    })
}

fn joined(collecting: JoinHandle<Result<Vec<u8>>>) -> Result<Vec<u8>> {
    collecting.join().map_err(|_| anyhow!("reading a stream panicked"))?
}
