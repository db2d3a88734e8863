//! A machine of our monitor with a stock kernel in it, as a person starts one by hand, and commands run there.
//!
//! The guest's init is the test bed's: on the word `testbed.guest` it stays in its initrd and serves requests
//! on a vsock port, which the monitor shows as a unix socket. What the guest prints goes to a file beside the
//! machine's others, which a failing test shows. Dropping a [`Guest`] kills its monitor.

pub mod control;
mod exec;
mod initrd;

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::command::{Cmd, Finished, Running, tail};
use crate::wait::{Attempt, until};

use control::Control;
pub use exec::{Ran, Session};
pub use initrd::Initrd;

/// What the kernel is told beyond what the monitor tells it: to be a guest of the tests, and to keep to what
/// matters on its console, of which each byte is an exit.
const COMMAND_LINE: &str = "testbed.guest quiet";

/// For one answer of the monitor, however busy its guest keeps the host.
const ONE_ANSWER: Duration = Duration::from_secs(30);

/// For one try to reach the guest; the tries are repeated.
const ONE_TRY: Duration = Duration::from_secs(5);

/// Where the guest's parts are: the directory a package would install, the monitor, a place for files.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Kernels and archives.
    pub guest: PathBuf,
    /// The monitor.
    pub vmm: PathBuf,
    /// A directory of this test's own, which is not that deep: a unix socket's path has 107 bytes.
    pub scratch: PathBuf,
}

impl Parts {
    /// The kernel as the monitor boots it: an ELF file on x86_64, an Image on aarch64.
    pub fn kernel(&self) -> PathBuf {
        self.guest.join(if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" })
    }
}

/// A machine about to be started: in a jail, as those of a runtime are.
pub struct Boot {
    name: String,
    directory: PathBuf,
    vmm: PathBuf,
    command: Cmd,
    controlled: bool,
    console: Option<String>,
    kernel: PathBuf,
    append: String,
    snapshot: Option<PathBuf>,
    jailed: bool,
}

impl Boot {
    /// `name` is the machine's among those of a test. `command` runs the monitor: its deadline is the machine's.
    pub fn new(parts: &Parts, name: &str, command: Cmd) -> Self {
        Self {
            name: name.to_owned(),
            directory: parts.scratch.clone(),
            vmm: parts.vmm.clone(),
            command: command.arg("run"),
            controlled: false,
            console: None,
            kernel: parts.kernel(),
            append: COMMAND_LINE.to_owned(),
            snapshot: None,
            jailed: true,
        }
    }

    /// Adds options of the monitor.
    #[must_use]
    pub fn options<A: AsRef<std::ffi::OsStr>>(mut self, options: impl IntoIterator<Item = A>) -> Self {
        self.command = self.command.args(options);
        self
    }

    /// Without the jail, or with one that the options describe.
    #[must_use]
    pub fn unjailed(mut self) -> Self {
        self.jailed = false;
        self
    }

    /// Goes on from the snapshot in `directory`, instead of booting. The initrd is then of no use.
    #[must_use]
    pub fn restore(mut self, directory: &Path) -> Self {
        self.snapshot = Some(directory.to_owned());
        self
    }

    /// Another kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: impl Into<PathBuf>) -> Self {
        self.kernel = kernel.into();
        self
    }

    /// More for the kernel's command line.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append = format!("{} {words}", self.append);
        self
    }

    /// Serves a control socket, for [`Guest::ctl`] and [`Guest::drive`]. It has a directory of its own, since a
    /// jail would take along what lies beside it.
    #[must_use]
    pub fn controlled(mut self) -> Self {
        self.controlled = true;
        self
    }

    /// Leads its console elsewhere, in the monitor's words. What the guest prints is then not kept.
    #[must_use]
    pub fn console(mut self, place: String) -> Self {
        self.console = Some(place);
        self
    }

    /// Shares `directory` under `tag`.
    #[must_use]
    pub fn share(self, tag: &str, directory: &Path, read_only: bool) -> Self {
        let suffix = if read_only { ":ro" } else { "" };
        self.options(["--share".to_owned(), format!("{tag}={}{suffix}", directory.display())])
    }

    /// Gives it `image` as a disk.
    #[must_use]
    pub fn block(self, image: &Path, read_only: bool) -> Self {
        let suffix = if read_only { ":ro" } else { "" };
        self.options(["--block".to_owned(), format!("{}{suffix}", image.display())])
    }

    /// Starts the monitor, and does not wait for anything.
    pub fn start(self, initrd: &Initrd) -> Result<Guest> {
        let console = self.directory.join(format!("{}.console", self.name));
        let vsock = self.directory.join(&self.name);
        fs::create_dir(&vsock).with_context(|| format!("creating {}", vsock.display()))?;
        let control = self.directory.join(format!("{}.control", self.name)).join("socket");
        let mut command = self.command;
        if self.controlled {
            let directory = control.with_file_name("");
            fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
            command = command.arg("--control").arg(&control);
        }
        if self.jailed {
            let root = self.directory.join(format!("{}.jail", self.name));
            fs::create_dir(&root).with_context(|| format!("creating {}", root.display()))?;
            command = command.arg("--jail").arg(root);
        }
        let place = self.console.unwrap_or_else(|| format!("file:{}", console.display()));
        let command = match &self.snapshot {
            Some(directory) => command.arg("--restore").arg(directory),
            None => command
                .arg("--kernel")
                .arg(&self.kernel)
                .arg("--initrd")
                .arg(initrd.path())
                .args(["--append", &self.append]),
        };
        let command = command.args(["--console", &place]).arg("--vsock").arg(&vsock);
        let begun = Instant::now();
        Ok(Guest { running: command.start()?, vmm: self.vmm, vsock, control, console, begun })
    }

    /// Starts the monitor and waits until the guest answers, at most for `within`.
    pub fn up(self, initrd: &Initrd, within: Duration) -> Result<Guest> {
        let mut guest = self.start(initrd)?;
        guest.until_ready(within)?;
        Ok(guest)
    }
}

/// A machine that was started. Dropping it kills the monitor.
pub struct Guest {
    running: Running,
    vmm: PathBuf,
    vsock: PathBuf,
    control: PathBuf,
    console: PathBuf,
    begun: Instant,
}

impl Guest {
    /// The monitor's process.
    pub fn pid(&self) -> i32 {
        self.running.pid()
    }

    /// Since the monitor was started.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// What the guest has printed so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// The directory with the sockets of the machine's streams.
    pub fn sockets(&self) -> &Path {
        &self.vsock
    }

    /// Where its control socket is, if it is [controlled](Boot::controlled).
    pub fn control_socket(&self) -> &Path {
        &self.control
    }

    /// What `supermachine-vmm ctl` does with the machine and `words`, however that ends.
    pub fn try_ctl<A: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Result<Finished> {
        Ok(Cmd::new(&self.vmm, ONE_ANSWER).traced().arg("ctl").arg(&self.control).args(words).run()?)
    }

    /// What `supermachine-vmm ctl` prints for `words`, which must go well.
    pub fn ctl<A: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Result<String> {
        Ok(self.try_ctl(words)?.expect_code(0)?.out().into_owned())
    }

    /// A conversation by its control socket.
    pub fn drive(&self) -> Result<Control> {
        Control::connect(&self.control, ONE_ANSWER)
    }

    /// What the machine has counted so far.
    pub fn stats(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.ctl(["stats"])?).context("reading the machine's statistics")
    }

    /// Waits until the guest's init answers.
    pub fn until_ready(&mut self, within: Duration) -> Result<()> {
        let answered = until("the guest to answer", within, || {
            if self.running.has_ended() {
                return Attempt::Done(Err(()));
            }
            match self.connect(testbed::PORT).and_then(|stream| exec::ping(&stream, ONE_TRY)) {
                Ok(()) => Attempt::Done(Ok(())),
                Err(error) => Attempt::Pending(format!("{error:#}")),
            }
        });
        match answered {
            Ok(Ok(())) => Ok(()),
            Ok(Err(())) => bail!("the monitor ended before the guest answered{}", self.told()),
            Err(late) => bail!("{late}{}", self.told()),
        }
    }

    /// The end of what monitor and guest said, for a message.
    fn told(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.running.stderr_so_far()).into_owned();
        let mut text = String::new();
        for (who, said) in [("the monitor", stderr), ("the guest", self.console())] {
            if !said.trim().is_empty() {
                let _ = write!(text, "\n{who} said last:\n{}", tail(&said, 15));
            }
        }
        text
    }

    /// Whether it lives; an error with what was said last, if not.
    pub fn expect_alive(&mut self) -> Result<()> {
        ensure!(!self.running.has_ended(), "the monitor has ended{}", self.told());
        Ok(())
    }

    /// A stream to `port` of the guest.
    pub fn connect(&self, port: u16) -> Result<UnixStream> {
        let socket = self.vsock.join("vsock");
        let stream =
            UnixStream::connect(&socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(ONE_TRY))?;
        (&stream).write_all(format!("CONNECT {port}\n").as_bytes()).context("asking for a port")?;
        // One byte a read, as what follows the line belongs to whoever asked.
        let mut answer = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut answer).context("waiting for the port")?;
        ensure!(answer.starts_with("OK "), "no stream to port {port} of the guest: {answer:?}");
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    /// Starts `argv` in the guest; it may take `within`.
    pub fn begin<A: AsRef<str>>(
        &self,
        argv: impl IntoIterator<Item = A>,
        within: Duration,
    ) -> Result<Session> {
        let argv: Vec<String> = argv.into_iter().map(|word| word.as_ref().to_owned()).collect();
        eprintln!("guest$ {}", argv.join(" "));
        Session::begin(self.connect(testbed::PORT)?, argv, within)
    }

    /// Runs `argv` in the guest to its end.
    pub fn run<A: AsRef<str>>(&self, argv: impl IntoIterator<Item = A>, within: Duration) -> Result<Ran> {
        let ran = self.begin(argv, within)?.finish()?;
        eprintln!("  {ran}");
        Ok(ran)
    }

    /// Runs `script` with the guest's shell, expects that it goes well, and returns what it printed.
    pub fn sh(&self, script: &str, within: Duration) -> Result<String> {
        let ran = self.run(["sh", "-ec", script], within)?;
        ensure!(ran.code == 0, "in the guest `{script}` went wrong: {ran}");
        Ok(ran.out().into_owned())
    }

    /// Asks the guest's init to turn the machine off, and waits for the monitor's end.
    pub fn power_off(self) -> Result<Finished> {
        exec::power_off(&self.connect(testbed::PORT)?, ONE_TRY)?;
        self.wait()
    }

    /// [`Self::power_off`], expecting that all went well and the monitor had nothing to complain of.
    pub fn ends_well(self) -> Result<()> {
        let done = self.power_off()?.expect_code(0)?;
        ensure!(done.stderr.is_empty(), "the monitor complained of something: {}", done.err());
        Ok(())
    }

    /// Sends the monitor `signal`.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.running.signal(signal).with_context(|| format!("sending {signal} to the monitor"))
    }

    /// Whether the monitor has ended.
    pub fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// What the monitor has complained of so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.running.stderr_so_far()).into_owned()
    }

    /// Waits for the monitor's end, by the deadline it was started with.
    pub fn wait(self) -> Result<Finished> {
        Ok(self.running.wait()?)
    }
}
