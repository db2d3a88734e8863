//! The agent's side of a helper.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Pid, pipe2};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::{NOT_STARTED, Request, Response, Streams, WAITS, WORD, receive, send};
use crate::polled;
use crate::reaper::{Reaper, Status};

/// More of a failure's story than anybody reads.
const LONGEST_STORY: u64 = 16 * 1024;

/// How many wait: the first container of a machine needs one that mounts the share before its own.
const WAITING: usize = 2;
/// How long they may take to come to that.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// When others take the place of those who were asked.
const REFILL_AFTER: Duration = Duration::from_millis(100);

/// A process that a helper made.
pub struct Made {
    /// Its number.
    pub pid: i32,
    /// How it ends.
    pub end: oneshot::Receiver<Status>,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Those who work in the agent's stead. Some wait for a request before there is one: to become a process is most of what a
/// helper has to do, and a machine that is restored has had it done.
#[derive(Clone)]
pub struct Helpers {
    reaper: Reaper,
    waiting: Arc<Mutex<Vec<Helper>>>,
}

impl Helpers {
    /// With nobody who waits.
    pub fn new(reaper: Reaper) -> Self {
        Self { reaper, waiting: Arc::default() }
    }

    /// Lets a helper do something that makes a process.
    pub async fn make(&self, request: &Request, streams: Streams, within: Duration) -> Result<Made> {
        let mut helper = self.ask(request, &streams)?;
        drop(streams);
        match helper.response(within).await? {
            (Response::Made(pid), terminal) => Ok(Made { pid, end: self.reaper.watch(pid), terminal }),
            (other, _) => bail!("a helper answered {other:?}"),
        }
        // Only now the helper is let go, which makes the process ours.
    }

    /// Lets a helper do something that makes none.
    pub async fn run(&self, request: &Request, within: Duration) -> Result<()> {
        let streams = Streams { stdin: null()?, stdout: null()?, stderr: null()? };
        let mut helper = self.ask(request, &streams)?;
        match helper.response(within).await? {
            (Response::Done, _) => Ok(()),
            (other, _) => bail!("a helper answered {other:?}"),
        }
    }

    /// Has as many wait as are wanted, and returns when they do. Who does not come to that is given up.
    pub async fn get_ready(&self) -> Result<()> {
        self.fill()?;
        let starting = std::mem::take(&mut *self.waiting());
        for mut helper in starting {
            helper.waits(READY_WITHIN).await?;
            self.waiting().push(helper);
        }
        Ok(())
    }

    fn ask(&self, request: &Request, streams: &Streams) -> Result<Helper> {
        let later = self.clone();
        tokio::spawn(async move {
            // Whoever has asked wants the processors now.
            sleep(REFILL_AFTER).await;
            if let Err(error) = later.fill() {
                log::warn!("no helper waits: {error:#}");
            }
        });
        // One that was killed meanwhile hears nothing.
        let mut waiting = std::iter::from_fn(|| self.waiting().pop());
        if let Some(helper) = waiting.find(|helper| helper.ask(request, streams).is_ok()) {
            return Ok(helper);
        }
        let helper = Helper::start(&self.reaper)?;
        helper.ask(request, streams)?;
        Ok(helper)
    }

    fn fill(&self) -> Result<()> {
        let mut waiting = self.waiting();
        waiting.retain(Helper::lives);
        while waiting.len() < WAITING {
            waiting.push(Helper::start(&self.reaper)?);
        }
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Helper>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `/dev/null`.
pub fn null() -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/null").context("opening /dev/null")?;
    Ok(file.into())
}

/// A helper that runs. Dropped, it is let go; or killed, if it has not answered.
#[derive(Debug)]
struct Helper {
    socket: AsyncFd<OwnedFd>,
    story: File,
    pid: i32,
    /// Locked to ask whether it has come.
    end: Mutex<oneshot::Receiver<Status>>,
    answered: bool,
}

impl Helper {
    fn start(reaper: &Reaper) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("making a socket for a helper")?;
        let (story, teller) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).context("making a pipe for a helper")?;
        fcntl(&teller, FcntlArg::F_SETFL(OFlag::empty())).context("making a pipe for a helper")?;
        let child = Command::new("/proc/self/exe")
            .arg0("supermachine-agent")
            .arg(WORD)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::from(teller))
            .process_group(0)
            .spawn()
            .context("starting a helper")?;
        let pid = child.id().cast_signed();
        // Its end is the reaper's business, as everybody's is.
        let end = Mutex::new(reaper.watch(pid));
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("starting a helper")?;
        let socket = polled(ours).context("starting a helper")?;
        Ok(Self { socket, story: story.into(), pid, end, answered: false })
    }

    fn lives(&self) -> bool {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(end.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    fn ask(&self, request: &Request, streams: &Streams) -> Result<()> {
        let file = memory_file(request)?;
        let fds = [
            file.as_raw_fd(),
            streams.stdin.as_raw_fd(),
            streams.stdout.as_raw_fd(),
            streams.stderr.as_raw_fd(),
        ];
        send(self.socket.as_raw_fd(), b"r", &fds).context("asking a helper")
    }

    /// Returns when it waits for a request.
    async fn waits(&mut self, within: Duration) -> Result<()> {
        match timeout(within, self.receive()).await {
            Ok(Ok((bytes, _))) if bytes == WAITS => Ok(()),
            other => bail!("a helper does not come to wait: {other:?}{}", self.told()),
        }
    }

    async fn receive(&self) -> std::io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        loop {
            let mut ready = self.socket.readable().await?;
            let received = ready.try_io(|fd| receive(fd.as_raw_fd(), 1).map_err(std::io::Error::from));
            if let Ok(received) = received {
                return received;
            }
        }
    }

    async fn response(&mut self, within: Duration) -> Result<(Response, Option<OwnedFd>)> {
        let answer = timeout(within, async {
            loop {
                match self.receive().await {
                    // It was asked before it said so.
                    Ok((bytes, _)) if bytes == WAITS => {}
                    other => return other,
                }
            }
        });
        let (bytes, mut fds) = match answer.await {
            Ok(Ok(received)) => received,
            Ok(Err(error)) => return Err(error).context("waiting for a helper"),
            Err(_) => bail!("not done within {} s{}", within.as_secs(), self.told()),
        };
        if bytes.is_empty() {
            bail!("the helper ended without an answer{}", self.told());
        }
        let response = serde_json::from_slice(&bytes).context("reading a helper's answer")?;
        self.answered = true;
        match response {
            Response::Failed(why) if why.starts_with(NOT_STARTED) => Err(anyhow!("{why}")),
            Response::Failed(why) => {
                let story = self.told();
                let cause = story.lines().next().unwrap_or_default();
                Err(anyhow!("{why}{cause}"))
            }
            response => Ok((response, fds.pop())),
        }
    }

    /// What it said so far, for a message.
    fn told(&mut self) -> String {
        let mut story = Vec::new();
        let _ = Read::by_ref(&mut self.story).take(LONGEST_STORY).read_to_end(&mut story);
        let story = String::from_utf8_lossy(&story);
        let story = story.trim();
        if story.is_empty() { String::new() } else { format!(": {story}") }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // As long as its end has not been told, the number is its own.
        if !self.answered && self.lives() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// The request in a file that has no name.
fn memory_file(request: &Request) -> Result<File> {
    // SAFETY: the name is a literal; the result is checked.
    let fd = unsafe { libc::memfd_create(c"request".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = Errno::result(fd).context("making a file for a helper")?;
    // SAFETY: the kernel has just made it, and nobody else knows its number.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut writer = std::io::BufWriter::new(file.as_fd().try_clone_to_owned().map(File::from)?);
    serde_json::to_writer(&mut writer, request).context("writing a request")?;
    writer.flush()?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}
