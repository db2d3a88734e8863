//! A host under way: started cold or from saved state, made ready, used, ended.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Error, Result, bail};
use serde_json::json;
use testbed::{Prepare, Reply, Request};

use crate::accel::Accel;
use crate::cache::{Cache, Run, children, file_name};
use crate::ending::Ending;
use crate::exec::{request, require};
use crate::image::Image;
use crate::kernel::Initrd;
use crate::payload::Payload;
use crate::qemu::{Machine, Memory, Process, Qemu};
use crate::qmp::Qmp;
use crate::saved::Saved;
use crate::spec::{Spec, Start};
use crate::tools;

/// A host that is not up within this, hangs.
pub const BOOT: Duration = Duration::from_secs(180);
/// The same for one that only continues.
const RESTORE: Duration = Duration::from_secs(60);
/// How much of the console explains a boot that failed.
const CONSOLE_LINES: usize = 50;

/// Everything that hosts are made of on this machine.
pub struct Workshop<'a> {
    pub cache: &'a Cache,
    pub spec: &'a Spec,
    pub qemu: Qemu,
    pub accel: Accel,
    pub image: Image,
    pub payload: Payload,
    pub ending: &'a Ending,
}

impl<'a> Workshop<'a> {
    pub fn open(cache: &'a Cache, start: &'a Start, ending: &'a Ending) -> Result<Self> {
        let spec = &start.spec;
        spec.check()?;
        let payload = Payload::build(spec.arch)?;
        let accel = Accel::choose(cache, spec.arch, &payload.monitor());
        let qemu = Qemu::find(cache, spec.arch, accel, start.rebuild)?;
        let image = Image::open(cache, spec.arch, start.rebuild)?;
        Ok(Self { cache, spec, qemu, accel, image, payload, ending })
    }

    /// A machine on this image, to boot.
    pub fn machine(&self, run: &Run, disk: PathBuf, share: Option<&Path>) -> Result<Machine<'a>> {
        run.stands_on("image", self.image.dir())?;
        let empty = run.dir().join("empty");
        fs::create_dir_all(&empty)?;
        let initrd = run.dir().join("initrd");
        write_initrd(&self.payload.packed_init(), &self.image.modules(), &initrd)?;
        Ok(Machine {
            spec: self.spec,
            accel: self.accel,
            kernel: self.image.kernel(),
            initrd,
            disk,
            memory: Memory::Anonymous,
            payload: self.payload.dir(),
            share: share.map_or(empty, Path::to_owned),
            kernel_append: String::new(),
            incoming: None,
        })
    }
}

/// A host that answers.
pub struct Host {
    process: Process,
    run: Run,
    port: u16,
    qmp: Qmp,
}

impl Host {
    /// Starts a host and makes it fit for commands.
    pub fn start(workshop: &Workshop, start: &Start, name: &str, stay: bool) -> Result<Self> {
        let share = start.share.as_deref();
        let cold = start.cold || start.kernel_append.is_some();
        let mut host = if cold {
            Self::boot(workshop, start, name, stay)?
        } else {
            let saved = Saved::open(workshop)?;
            Self::restore(workshop, &saved, name, share, stay)?
        };
        let prepared = host.prepare(share.is_some());
        host.or_console(prepared)?;
        Ok(host)
    }

    fn boot(workshop: &Workshop, start: &Start, name: &str, stay: bool) -> Result<Self> {
        let run = workshop.cache.new_run(name)?;
        let disk = run.dir().join("disk");
        overlay(&workshop.image.disk(), "raw", &disk)?;
        let mut machine = workshop.machine(&run, disk, start.share.as_deref())?;
        machine.kernel_append = start.kernel_append.clone().unwrap_or_default();
        Self::launch(workshop, run, &machine, stay, start.boot_timeout)
    }

    fn restore(
        workshop: &Workshop,
        saved: &Saved,
        name: &str,
        share: Option<&Path>,
        stay: bool,
    ) -> Result<Self> {
        let run = workshop.cache.new_run(name)?;
        // Names what this host stands on, so that nobody prunes it.
        run.stands_on("saved", saved.dir())?;
        let disk = run.dir().join("disk");
        overlay(&saved.disk(), "qcow2", &disk)?;
        let mut machine = workshop.machine(&run, disk, share)?;
        machine.memory = Memory::Private(saved.memory());
        machine.incoming = Some(saved.devices());
        Self::launch(workshop, run, &machine, stay, RESTORE)
    }

    /// Starts QEMU and waits until the host's init answers.
    pub fn launch(
        workshop: &Workshop,
        run: Run,
        machine: &Machine,
        stay: bool,
        wait: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + wait;
        let mut process = Process::start(&workshop.qemu, machine, &run, stay)?;
        workshop.ending.owns(process.id(), run.dir());
        let connected = connect(&mut process, &run, machine.incoming.as_deref(), deadline);
        let (qmp, port) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                // When QEMU is gone, what it said explains more than a closed socket.
                let said = process.require_alive();
                process.kill();
                return Err(said.err().unwrap_or(error));
            }
        };
        fs::write(run.dir().join("port"), port.to_string())?;
        let mut host = Self { process, run, port, qmp };
        let answered = host.wait_until_it_answers(deadline, wait);
        host.or_console(answered)?;
        Ok(host)
    }

    fn wait_until_it_answers(&mut self, deadline: Instant, wait: Duration) -> Result<()> {
        // QEMU takes the connection long before anybody inside listens, hence the short patience.
        while request(self.port, &Request::Ping, Duration::from_millis(300)).is_err() {
            self.process.require_alive()?;
            if Instant::now() > deadline {
                bail!("the host did not come up within {} s and was killed", wait.as_secs());
            }
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn prepare(&mut self, share: bool) -> Result<()> {
        prepare(self.port, share)
    }

    /// Adds the end of the console to an error.
    fn or_console<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            self.process.kill();
            with_console(&self.run.dir().join("console"), &error)
        })
    }

    /// Adds to an error how QEMU ended, if it did, and the end of the console.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        let result = result.map_err(|error| match self.process.require_alive() {
            Ok(()) => error,
            Err(gone) => error.context(format!("{gone:#}")),
        });
        self.or_console(result)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn run_dir(&self) -> &Path {
        self.run.dir()
    }

    /// Puts the host into the state in which it can be saved, and saves all but its memory, which
    /// is in its file already.
    pub fn save(mut self, devices: &Path) -> Result<()> {
        let quiesced = require(self.port, &Request::Quiesce, BOOT, "bringing up the host's services");
        self.or_console(quiesced)?;
        // The connection of that request must be gone from QEMU's side, too.
        sleep(Duration::from_millis(200));
        let deadline = Instant::now() + RESTORE;
        self.qmp.call("stop", &json!({}))?;
        self.qmp.save_devices(devices, deadline)?;
        self.qmp.call("quit", &json!({}))?;
        self.process.wait(deadline)
    }

    /// Ends the host. Its disk goes with it, so nothing in it needs to be written back first.
    pub fn end(mut self) {
        self.process.kill();
    }

    /// Lets the host live on after this process.
    pub fn leave(self) -> PathBuf {
        self.run.leave()
    }
}

/// Makes the host at `port` fit for commands.
pub fn prepare(port: u16, share: bool) -> Result<()> {
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let how = Prepare { time_ns: u64::try_from(time.as_nanos())?, share };
    require(port, &Request::Prepare(how), BOOT, "preparing the host")
}

/// The control socket of a QEMU that was just started and is past its incoming state, and the port
/// that leads to its host.
fn connect(
    process: &mut Process,
    run: &Run,
    incoming: Option<&Path>,
    deadline: Instant,
) -> Result<(Qmp, u16)> {
    let mut qmp = Qmp::connect(&run.dir().join("qmp"), deadline, || process.require_alive())?;
    if let Some(devices) = incoming {
        qmp.load_devices(devices, deadline)?;
    }
    let port = forwarded_port(&qmp.human("info usernet")?)?;
    Ok((qmp, port))
}

/// A host that an earlier `up` left running.
pub struct Up {
    pub dir: PathBuf,
    pub port: u16,
}

impl Up {
    pub fn find(cache: &Cache, name: &str) -> Result<Self> {
        cache.sweep()?;
        let dir = cache.path("run").join(name);
        let port = fs::read_to_string(dir.join("port"))
            .ok()
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("no host {name} is up: hack/testbed up starts one"))?;
        Ok(Self { dir, port })
    }

    /// Switches the host off and removes what it had.
    pub fn down(self, cache: &Cache) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        if let Ok(Reply::Done) = request(self.port, &Request::PowerOff, Duration::from_secs(3)) {
            while self.dir.exists() && Instant::now() < deadline {
                cache.sweep()?;
                sleep(Duration::from_millis(20));
            }
        }
        if self.dir.exists() {
            // It does not listen; QEMU does.
            let mut qmp = Qmp::connect(&self.dir.join("qmp"), Instant::now() + RESTORE, || Ok(()))?;
            qmp.call("quit", &json!({}))?;
            while self.dir.exists() {
                if Instant::now() > deadline {
                    bail!("the host in {} does not end", self.dir.display());
                }
                sleep(Duration::from_millis(20));
                cache.sweep()?;
            }
        }
        Ok(())
    }
}

/// The port on this machine that leads to the host, from `info usernet`:
/// `TCP[HOST_FORWARD] 13 127.0.0.1 40123 10.0.2.15 1024 0 0`.
fn forwarded_port(text: &str) -> Result<u16> {
    text.lines()
        .find(|line| line.contains("HOST_FORWARD"))
        .and_then(|line| line.split_whitespace().nth(3)?.parse().ok())
        .with_context(|| format!("QEMU names no forwarded port:\n{text}"))
}

/// A disk that begins as `base` and takes only what is changed.
pub fn overlay(base: &Path, format: &str, to: &Path) -> Result<()> {
    tools::run(
        tools::command("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .arg(base)
            .arg(to),
    )
}

/// The packed init, and behind it the modules: a kernel takes several archives in a row.
fn write_initrd(init: &Path, modules: &Path, to: &Path) -> Result<()> {
    let mut file = File::create(to)?;
    io::copy(&mut File::open(init).with_context(|| format!("reading {}", init.display()))?, &mut file)?;
    let mut archive = Initrd::new(BufWriter::new(file));
    archive.dir("modules")?;
    for path in children(modules)? {
        archive.file(&format!("modules/{}", file_name(&path)), 0o644, &fs::read(&path)?)?;
    }
    archive.finish()
}

fn with_console(console: &Path, error: &Error) -> Error {
    let text =
        fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
    let tail = if tail.trim().is_empty() { "(it is empty)" } else { &tail };
    anyhow::anyhow!("{error:#}\nthe last {CONSOLE_LINES} lines of its console:\n{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_from_the_monitor() {
        let text = "Hub -1 (net):\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n  \
                    TCP[HOST_FORWARD]  13       127.0.0.1 40123       10.0.2.15  1024     0     0\n";
        assert_eq!(forwarded_port(text).unwrap(), 40123);
        assert!(forwarded_port("Hub -1 (net):\n").is_err());
    }
}
