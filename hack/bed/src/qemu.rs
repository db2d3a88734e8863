//! QEMU: which one is good enough, how it is told what to emulate, and its process.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::accel::Accel;
use crate::cache::{Cache, Run, digest};
use crate::newer_qemu::{KEEPS_INTERRUPTS, NewerQemu};
use crate::progress::say;
use crate::spec::{Arch, Spec};
use crate::tools::{capture, command, take_signals};

/// Older ones emulate the 16-byte compare-and-exchange wrongly, which Go programs use.
const OLDEST: (u32, u32) = (8, 0);

/// The QEMU of one architecture.
#[derive(Clone)]
pub struct Qemu {
    /// What starts it, before its arguments.
    words: Vec<String>,
    modules: Option<PathBuf>,
    version: String,
}

const fn program(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "qemu-system-x86_64",
        Arch::Aarch64 => "qemu-system-aarch64",
    }
}

/// The Debian package that has it.
pub const fn package(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-arm",
    }
}

impl Qemu {
    /// The machine's own, or a newer one where that would fail now and then.
    pub fn find(cache: &Cache, arch: Arch, accel: Accel, rebuild: bool) -> Result<Self> {
        let own = Self::own(arch)?;
        if arch != Arch::X86_64 || accel != Accel::Tcg || own.is_at_least(KEEPS_INTERRUPTS) {
            return Ok(own);
        }
        match NewerQemu::open(cache, arch, rebuild).and_then(|newer| Self::newer(&newer, arch)) {
            Ok(newer) => Ok(newer),
            Err(error) => {
                say(format_args!(
                    "QEMU {} is used, under which a host hangs now and then; a newer one cannot be had: {error:#}",
                    own.version
                ));
                Ok(own)
            }
        }
    }

    fn own(arch: Arch) -> Result<Self> {
        let (program, package) = (program(arch), package(arch));
        let own = Self::of(vec![program.to_owned()], None)
            .with_context(|| format!("{program} is needed: apt-get install {package} (or run make setup)"))?;
        if !own.is_at_least(OLDEST) {
            bail!(
                "{program} is version {}, whose 16-byte compare-and-exchange is broken under emulation; \
                 version {} or newer is needed. make setup installs it (on Debian 12 from backports)",
                own.version,
                OLDEST.0
            );
        }
        Ok(own)
    }

    fn newer(newer: &NewerQemu, arch: Arch) -> Result<Self> {
        let mut words = newer.words(program(arch))?;
        words.extend(newer.data());
        Self::of(words, Some(newer.modules()))
    }

    /// Asks it for its version, which also shows that it starts.
    fn of(words: Vec<String>, modules: Option<PathBuf>) -> Result<Self> {
        let mut qemu = Self { words, modules, version: String::new() };
        let text = capture(qemu.told(command(&qemu.words[0])).arg("--version"))?;
        text.split_whitespace().nth(3).unwrap_or_default().clone_into(&mut qemu.version);
        Ok(qemu)
    }

    /// A command for its first word, given the others.
    fn told(&self, mut command: Command) -> Command {
        command.args(&self.words[1..]);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    fn is_at_least(&self, (major, minor): (u32, u32)) -> bool {
        let mut numbers = self.version.split('.').map(|word| word.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
    }

    /// What tells one QEMU and its machine from another: state saved by one is not read by the other.
    pub fn fingerprint(&self, spec: &Spec, accel: Accel) -> String {
        let mut words = platform(spec.arch, accel).map(str::to_owned).to_vec();
        words.extend([spec.cpus.to_string(), spec.memory_mib.to_string(), kernel_words(spec, accel)]);
        words.push(self.version.clone());
        words.push(include_str!("qemu.rs").to_owned());
        if accel == Accel::Kvm {
            // The processor is this machine's own, as its kernel shows it.
            words.push(std::fs::read_to_string("/proc/version").unwrap_or_default());
        }
        digest(words.iter().map(String::as_bytes))
    }
}

/// The memory of the host.
pub enum Memory {
    /// Written to this file, to be saved.
    Shared(PathBuf),
    /// Starts as what is in this file, and is this host's own from then on: hosts share the pages
    /// that none of them changes.
    Private(PathBuf),
    /// Nobody needs it later.
    Anonymous,
}

/// A machine, as QEMU is told of it.
pub struct Machine<'a> {
    pub spec: &'a Spec,
    pub accel: Accel,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub memory: Memory,
    pub payload: PathBuf,
    pub share: PathBuf,
    pub kernel_append: String,
    /// A file with the state of the devices to start from.
    pub incoming: Option<PathBuf>,
}

impl Machine<'_> {
    fn arguments(&self, dir: &Path) -> Vec<String> {
        let spec = self.spec;
        let [mut machine, cpu, accel] = platform(spec.arch, self.accel).map(str::to_owned);
        if !matches!(self.memory, Memory::Anonymous) {
            machine.push_str(",memory-backend=ram");
        }
        let mut words = Vec::new();
        let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
        // Started by a loader, it would have that one's name.
        add("-name", format!("testbed,process={}", program(spec.arch)));
        add("-M", machine);
        add("-cpu", cpu);
        add("-accel", accel);
        add("-smp", (spec.cpus + u32::from(spares_first(spec.arch, self.accel))).to_string());
        add("-m", spec.memory_mib.to_string());
        let file = |path: &Path, how: &str| {
            format!("memory-backend-file,id=ram,size={}M,mem-path={},{how}", spec.memory_mib, path.display())
        };
        match &self.memory {
            Memory::Shared(path) => add("-object", file(path, "share=on")),
            Memory::Private(path) => add("-object", file(path, "share=off,readonly=on,rom=off")),
            Memory::Anonymous => {}
        }
        add("-kernel", self.kernel.display().to_string());
        add("-initrd", self.initrd.display().to_string());
        add("-append", format!("{} {}", kernel_words(spec, self.accel), self.kernel_append));
        add("-drive", format!("if=none,id=root,file={},cache=unsafe,discard=unmap", escaped(&self.disk)));
        add("-device", "virtio-blk-pci,drive=root".to_owned());
        add("-device", "virtio-rng-pci".to_owned());
        // No way out; the forwarded port is chosen by the kernel and asked for afterwards.
        let port = testbed::PORT;
        add("-netdev", format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:{port}"));
        add("-device", "virtio-net-pci,netdev=net,romfile=".to_owned());
        for (tag, path) in [("payload", &self.payload), ("share", &self.share)] {
            add(
                "-fsdev",
                format!("local,id={tag},security_model=none,multidevs=remap,path={}", escaped(path)),
            );
            add("-device", format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        add("-serial", format!("file:{}", dir.join("console").display()));
        add("-qmp", format!("unix:{},server=on,wait=off", dir.join("qmp").display()));
        if self.incoming.is_some() {
            add("-incoming", "defer".to_owned());
        }
        words.extend(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        words
    }
}

/// What is emulated: machine, processor, and by what.
fn platform(arch: Arch, accel: Accel) -> [&'static str; 3] {
    match (arch, accel) {
        (Arch::X86_64, Accel::Tcg) => ["q35", "EPYC-Rome,+svm,+npt", "tcg,thread=multi"],
        (Arch::X86_64, Accel::Kvm) => ["q35", "host", "kvm"],
        (Arch::Aarch64, Accel::Tcg) => {
            ["virt,virtualization=on,gic-version=3", "max,pauth-impdef=on", "tcg,thread=multi"]
        }
        (Arch::Aarch64, Accel::Kvm) => ["virt,virtualization=on,gic-version=3", "host", "kvm"],
    }
}

/// Whether the host has one processor more than was asked for, the first, on which no program is run.
///
/// QEMU keeps the signal IGNNE# of the chipset as a bit in the first processor's flags, and clears it when any
/// processor loads x87 state, from that processor's thread, without a lock (`cpu_clear_ignne`, as of version
/// 11.1). The flags beside it say whether the first processor runs a guest and takes interrupts: now and then
/// they are put back to what they were. A guest then gets its host's registers, or the host its guest's.
fn spares_first(arch: Arch, accel: Accel) -> bool {
    (arch, accel) == (Arch::X86_64, Accel::Tcg)
}

fn kernel_words(spec: &Spec, accel: Accel) -> String {
    let own = match spec.arch {
        Arch::X86_64 if spares_first(spec.arch, accel) => "console=ttyS0 isolcpus=domain,0",
        Arch::X86_64 => "console=ttyS0",
        // The kernel keeps to EL1: the timer that it would use in EL2 is not in the state that QEMU
        // saves, so that after a restore it never fires again.
        Arch::Aarch64 => "console=ttyAMA0 kvm-arm.mode=nvhe",
    };
    format!("{own} quiet panic=-1 mitigations=off {}", spec.kernel_words())
}

/// Commas separate the parts of an option.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A running QEMU. It dies with the tool, unless it is told to stay.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub fn start(qemu: &Qemu, machine: &Machine, run: &Run, stay: bool) -> Result<Self> {
        let log = run.dir().join("qemu.log");
        let mut command = qemu.told(Command::new(&qemu.words[0]));
        command
            .args(machine.arguments(run.dir()))
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .process_group(0);
        let lock = run.lock_fd().context("the run's directory is not locked")?.as_raw_fd();
        // SAFETY: fcntl, sigprocmask and prctl are async-signal-safe, and the lock's descriptor is open in the
        // child, which is a copy of this process.
        unsafe {
            command.pre_exec(move || {
                Errno::result(libc::fcntl(lock, libc::F_SETFD, 0))?;
                take_signals()?;
                if !stay {
                    set_pdeathsig(Signal::SIGKILL)?;
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("starting {}", qemu.words[0]))?;
        fs::write(run.dir().join("pid"), child.id().to_string())?;
        Ok(Self { child, log })
    }

    /// An error with what QEMU said, if it is gone.
    pub fn require_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            // It warns of each processor feature that it does not emulate.
            let errors: Vec<&str> = said.lines().filter(|line| !line.contains(": warning: ")).collect();
            bail!("QEMU ended ({status}) {}", errors.join("\n"));
        }
        Ok(())
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself; kills it at the deadline.
    pub fn wait(&mut self, deadline: std::time::Instant) -> Result<()> {
        while std::time::Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        self.kill();
        bail!("QEMU did not end within its deadline and was killed");
    }
}
