//! A process that does a little of everything, checks all of it, and says a line for each step: whoever reads the lines knows
//! whether anything was lost, or came twice, wherever it has gone on in between.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::pattern;

/// What is always on its way between two sockets.
const IN_FLIGHT: usize = 4096;
/// What is in the file that has no name.
const REMOVED: usize = 64 << 10;
/// What the load writes and reads at once.
const LOAD: usize = 256 << 10;
const TICK: Duration = Duration::from_millis(5);

/// Goes on until it is killed. Files are made in `directory`.
pub fn work(directory: &Path) -> Result<()> {
    let mut state = State::begin(directory)?;
    let mut out = std::io::stdout();
    for number in 1u64.. {
        state.step(number).with_context(|| format!("step {number}"))?;
        writeln!(out, "step {number}").and_then(|()| out.flush()).context("saying so")?;
    }
    Ok(())
}

/// What answers, beside it: each line comes back.
pub fn answer() -> Result<()> {
    let mut out = std::io::stdout();
    for line in std::io::stdin().lines() {
        writeln!(out, "{}", line?)?;
        out.flush()?;
    }
    Ok(())
}

struct State {
    removed: File,
    sockets: (UnixStream, UnixStream),
    answerer: (Child, ChildStdin, BufReader<ChildStdout>),
    ticks: Arc<AtomicU64>,
    /// How many rounds the load has made, or why it makes none any more.
    load: Arc<AtomicU64>,
    last: (Instant, u64, u64),
    path: PathBuf,
}

impl State {
    fn begin(directory: &Path) -> Result<Self> {
        let path = directory.join("removed");
        let removed = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let removed = removed.with_context(|| format!("making {}", path.display()))?;
        fs::remove_file(&path)?;
        removed.write_all_at(&pattern::bytes(0, REMOVED), 0)?;
        let sockets = UnixStream::pair()?;
        (&sockets.0).write_all(&pattern::bytes(1, IN_FLIGHT))?;
        let mut child = Command::new("/proc/self/exe")
            .arg("busy-answer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting what answers")?;
        let pipes = (child.stdin.take().context("its stdin")?, child.stdout.take().context("its stdout")?);
        let (ticks, load) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        {
            let ticks = Arc::clone(&ticks);
            thread::spawn(move || {
                loop {
                    thread::sleep(TICK);
                    ticks.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        {
            let (load, file) = (Arc::clone(&load), directory.join("load"));
            thread::spawn(move || {
                for round in 0.. {
                    if let Err(error) = write_and_read(&file, round) {
                        eprintln!("guest-part: the load, round {round}: {error:#}");
                        std::process::exit(1);
                    }
                    load.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Ok(Self {
            removed,
            sockets,
            answerer: (child, pipes.0, BufReader::new(pipes.1)),
            ticks,
            load,
            last: (Instant::now(), 0, 0),
            path: directory.to_owned(),
        })
    }

    fn step(&mut self, number: u64) -> Result<()> {
        let file = &self.removed;
        let mut found = vec![0; REMOVED];
        file.read_exact_at(&mut found, 0).context("reading a removed file")?;
        ensure!(found == pattern::bytes(number - 1, REMOVED), "a removed file is not as it was left");
        file.write_all_at(&pattern::bytes(number, REMOVED), 0).context("writing to a removed file")?;

        let mut found = vec![0; IN_FLIGHT];
        (&self.sockets.1).read_exact(&mut found).context("reading from a socket")?;
        ensure!(
            found == pattern::bytes(number, IN_FLIGHT),
            "what was on its way between two sockets is not what came"
        );
        (&self.sockets.0).write_all(&pattern::bytes(number + 1, IN_FLIGHT)).context("writing to a socket")?;

        let (_, to, from) = &mut self.answerer;
        writeln!(to, "line {number}").and_then(|()| to.flush()).context("asking another process")?;
        let mut line = String::new();
        from.read_line(&mut line).context("hearing from another process")?;
        ensure!(line == format!("line {number}\n"), "another process said {line:?}");

        let code = i32::try_from(number % 100)?;
        let ended = Command::new("/proc/self/exe").args(["busy-end", &code.to_string()]).status()?;
        ensure!(ended.code() == Some(code), "a process that was to end with {code} ended with {ended}");

        self.time()?;
        ensure!(self.path.is_dir(), "the directory is gone");
        Ok(())
    }

    /// Timers fire, time goes on, and so does the load.
    fn time(&mut self) -> Result<()> {
        let (before, ticks, load) = self.last;
        let now = Instant::now();
        ensure!(now >= before, "time went back by {:?}", before - now);
        thread::sleep(TICK);
        let late = now + Duration::from_secs(60);
        while self.ticks.load(Ordering::SeqCst) == ticks || self.load.load(Ordering::SeqCst) == load {
            ensure!(Instant::now() < late, "timers, or the load, stand still");
            thread::sleep(TICK);
        }
        self.last = (now, self.ticks.load(Ordering::SeqCst), self.load.load(Ordering::SeqCst));
        Ok(())
    }
}

fn write_and_read(path: &Path, round: u64) -> Result<()> {
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    let content = pattern::bytes(round, LOAD);
    file.write_all(&content)?;
    file.sync_all()?;
    file.seek(SeekFrom::Start(0))?;
    let mut found = Vec::new();
    file.read_to_end(&mut found)?;
    ensure!(found == content, "{} is not what was written to it", path.display());
    Ok(())
}
