//! Running programs: no shell in between, both streams kept, and a deadline on everything.
//!
//! Each program gets a process group of its own, so that what it started ends with it, and a signal when the
//! thread that started it ends, so that it does not outlive whoever waits for it.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::wait::until_true;

/// How long the streams may stay open after the program has ended. A descendant that inherited them and
/// lives on is a defect of the program under test.
const STREAMS_AFTER_EXIT: Duration = Duration::from_secs(5);

/// A program that could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It did not start.
    #[error("starting `{command}`: {source}; is it installed and executable?")]
    Start {
        /// The program and its arguments.
        command: String,
        /// What the system said.
        source: io::Error,
    },
    /// It was still running, and was killed with its whole process group.
    #[error("`{command}` did not end within {:.1} s and was killed{output}", deadline.as_secs_f64())]
    Deadline {
        /// The program and its arguments.
        command: String,
        /// What it was given.
        deadline: Duration,
        /// The ends of its streams.
        output: String,
    },
    /// It ended, but something it started keeps its stdout or stderr open.
    #[error("`{command}` ended ({status}) but a descendant still holds its output open{output}")]
    HeldOpen {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The ends of its streams.
        output: String,
    },
    /// It ended otherwise than the caller asked for.
    #[error("`{command}` ended with {status}, expected {expected}{output}")]
    Status {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What was expected.
        expected: String,
        /// The ends of its streams.
        output: String,
    },
    /// It did not say what was waited for.
    #[error("`{command}` did not say {text:?} {why}{output}")]
    NeverSaid {
        /// The program and its arguments.
        command: String,
        /// What was waited for.
        text: String,
        /// How it came to be too late.
        why: &'static str,
        /// The ends of its streams.
        output: String,
    },
    /// The system would not say how it ended.
    #[error("waiting for `{command}`: {source}")]
    Wait {
        /// The program and its arguments.
        command: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What the program reads.
enum Input {
    Nothing,
    Bytes(Vec<u8>),
    Open,
}

/// A program about to be run.
pub struct Cmd {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    input: Input,
    deadline: Duration,
    traced: bool,
    orphaned: Signal,
}

impl Cmd {
    /// `program`, which may run for `deadline`.
    pub fn new(program: impl AsRef<OsStr>, deadline: Duration) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
            input: Input::Nothing,
            deadline,
            traced: false,
            orphaned: Signal::SIGKILL,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets a variable in its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it in `directory`.
    #[must_use]
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Feeds it `bytes` and then the end of input. Without this it reads /dev/null.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Gives it an input that stays open until it has ended.
    #[must_use]
    pub fn stdin_kept_open(mut self) -> Self {
        self.input = Input::Open;
        self
    }

    /// Lets it run for `deadline` instead.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Tells its course on stderr, for the log of a test.
    #[must_use]
    pub fn traced(mut self) -> Self {
        self.traced = true;
        self
    }

    /// Sends it `signal` instead of SIGKILL when the thread that started it is gone.
    #[must_use]
    pub fn when_orphaned(mut self, signal: Signal) -> Self {
        self.orphaned = signal;
        self
    }

    /// Runs it to its end, whatever that is.
    pub fn run(self) -> Result<Finished, CommandError> {
        self.start()?.wait()
    }

    /// Runs it and expects exit code 0.
    pub fn ok(self) -> Result<Finished, CommandError> {
        self.run()?.expect_code(0)
    }

    /// Starts it. Its deadline runs from here.
    pub fn start(self) -> Result<Running, CommandError> {
        let text = self.text();
        if self.traced {
            eprintln!("$ {text}");
        }
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment)
            .stdin(if matches!(self.input, Input::Nothing) { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let orphaned = self.orphaned;
        // SAFETY: between fork and exec this makes one system call, which neither allocates nor locks.
        unsafe { command.pre_exec(move || Ok(set_pdeathsig(Some(orphaned))?)) };
        let mut child =
            command.spawn().map_err(|source| CommandError::Start { command: text.clone(), source })?;
        let stdout = Stream::collect(child.stdout.take());
        let stderr = Stream::collect(child.stderr.take());
        let input = feed(child.stdin.take(), self.input);
        Ok(Running {
            child,
            command: text,
            begun: Instant::now(),
            deadline: self.deadline,
            stdout,
            stderr,
            input,
            traced: self.traced,
            ended: false,
        })
    }

    fn text(&self) -> String {
        let mut text = self.program.to_string_lossy().into_owned();
        for argument in &self.arguments {
            let argument = argument.to_string_lossy();
            let plain = !argument.is_empty() && !argument.contains([' ', '\n', '"', '\'']);
            let _ = if plain { write!(text, " {argument}") } else { write!(text, " {argument:?}") };
        }
        text
    }
}

/// Writes from a thread, as the program may want to be read before it reads on. The thread ends with the
/// program at the latest, since the pipe then breaks.
fn feed(pipe: Option<ChildStdin>, input: Input) -> Option<ChildStdin> {
    let mut pipe = pipe?;
    match input {
        Input::Bytes(bytes) => {
            thread::spawn(move || {
                // A program that does not want its input is free to close it.
                let _ = pipe.write_all(&bytes);
            });
            None
        }
        Input::Open => Some(pipe),
        Input::Nothing => None,
    }
}

/// One stream of a program, collected by a thread as it comes.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Stream {
    fn collect(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = vec![0; 64 * 1024];
            loop {
                match pipe.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => {
                        let part = &buffer[..count];
                        sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(part);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        });
        Self { bytes, reader }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn closed(&self) -> bool {
        self.reader.is_finished()
    }
}

/// A running program. Dropping it kills its process group.
pub struct Running {
    child: Child,
    command: String,
    begun: Instant,
    deadline: Duration,
    stdout: Stream,
    stderr: Stream,
    input: Option<ChildStdin>,
    traced: bool,
    ended: bool,
}

impl Running {
    /// Its process id, which is also its process group.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// Sends `signal` to the program alone.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// Sends `signal` to its process group, as a terminal does.
    pub fn signal_group(&self, signal: Signal) -> io::Result<()> {
        Ok(killpg(Pid::from_raw(self.pid()), signal)?)
    }

    /// Writes to an input that was kept open.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(bytes)
    }

    /// Ends an input that was kept open.
    pub fn close_stdin(&mut self) {
        self.input = None;
    }

    /// What it has written to stdout by now.
    pub fn stdout_so_far(&self) -> Vec<u8> {
        self.stdout.so_far()
    }

    /// What it has written to stderr by now.
    pub fn stderr_so_far(&self) -> Vec<u8> {
        self.stderr.so_far()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits until its stdout contains `text`, no longer than it lives.
    pub fn until_stdout_has(&mut self, text: &str, deadline: Duration) -> Result<(), CommandError> {
        let ends = Instant::now() + deadline;
        loop {
            // In this order: what it said last is there once its end has been seen.
            let over = self.has_ended() && self.stdout.closed();
            if contains(&self.stdout_so_far(), text.as_bytes()) {
                return Ok(());
            }
            if over || Instant::now() >= ends {
                let why = if over { "before it ended" } else { "in time" };
                let (command, output) = (self.command.clone(), self.output());
                return Err(CommandError::NeverSaid { command, text: text.to_owned(), why, output });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end and the end of its streams, by the deadline it was started with.
    pub fn wait(mut self) -> Result<Finished, CommandError> {
        let mut pause = Duration::from_millis(1);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(source) => return Err(CommandError::Wait { command: self.command.clone(), source }),
            }
            let left = self.deadline.saturating_sub(self.begun.elapsed());
            if left.is_zero() {
                self.end();
                let output = self.output();
                let (command, deadline) = (self.command.clone(), self.deadline);
                return Err(CommandError::Deadline { command, deadline, output });
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        self.ended = true;
        let took = self.begun.elapsed();
        let closed = until_true("streams to close", STREAMS_AFTER_EXIT, || {
            self.stdout.closed() && self.stderr.closed()
        });
        if closed.is_err() {
            let _ = self.signal_group(Signal::SIGKILL);
            let output = self.output();
            return Err(CommandError::HeldOpen { command: self.command.clone(), status, output });
        }
        let finished = Finished {
            command: self.command.clone(),
            status,
            stdout: self.stdout.so_far(),
            stderr: self.stderr.so_far(),
            took,
        };
        if self.traced {
            eprintln!("  {status} after {:.2} s{}", took.as_secs_f64(), self.output());
        }
        Ok(finished)
    }

    fn output(&self) -> String {
        streams(&self.stdout.so_far(), &self.stderr.so_far())
    }

    fn end(&mut self) {
        if !self.ended {
            // By itself, and nobody asked how?
            let before = self.child.try_wait().ok().flatten();
            let _ = self.signal_group(Signal::SIGKILL);
            let _ = self.child.wait();
            if self.traced {
                let how = before.map_or_else(|| "killed".to_owned(), |status| status.to_string());
                eprintln!(
                    "  `{}`: {how} after {:.2} s{}",
                    self.command,
                    self.begun.elapsed().as_secs_f64(),
                    self.output()
                );
            }
            self.ended = true;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The program and its arguments.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its stdout.
    pub stdout: Vec<u8>,
    /// All of its stderr.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

impl Finished {
    /// Its exit code, unless a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Its stdout as text.
    pub fn out(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }

    /// Its stderr as text.
    pub fn err(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stderr)
    }

    /// Fails unless it ended with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self, CommandError> {
        if self.code() == Some(code) {
            return Ok(self);
        }
        Err(CommandError::Status {
            output: streams(&self.stdout, &self.stderr),
            command: self.command,
            status: self.status,
            expected: format!("exit code {code}"),
        })
    }
}

/// The ends of both streams, indented, for a message; empty when both are.
fn streams(stdout: &[u8], stderr: &[u8]) -> String {
    let mut text = String::new();
    for (name, bytes) in [("stdout", stdout), ("stderr", stderr)] {
        if bytes.is_empty() {
            continue;
        }
        let _ = write!(text, "\n  {name} ({} bytes):", bytes.len());
        for line in tail(&String::from_utf8_lossy(bytes), 20).lines() {
            let _ = write!(text, "\n    | {}", shorten(&printable(line)));
        }
    }
    text
}

/// The last `count` lines of `text`.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// `line` without what a terminal would obey: what guests and broken programs say is shown to people.
pub fn printable(line: &str) -> Cow<'_, str> {
    if line.chars().all(|c| !c.is_control() || c == '\t') {
        return Cow::Borrowed(line);
    }
    let show =
        |c: char| if c.is_control() && c != '\t' { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(line.trim_end_matches('\r').chars().map(show).collect())
}

/// `line` at a length that leaves a terminal readable.
fn shorten(line: &str) -> Cow<'_, str> {
    const LONGEST: usize = 400;
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => Cow::Owned(format!("{}…", &line[..end])),
        None => Cow::Borrowed(line),
    }
}

/// Whether `haystack` contains `needle`.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    const LONG: Duration = Duration::from_secs(20);

    fn sh(script: &str, deadline: Duration) -> Cmd {
        Cmd::new("sh", deadline).args(["-c", script])
    }

    #[test]
    fn streams_code_and_signal_arrive() {
        let done = sh("echo out; echo err >&2; exit 7", LONG).run().unwrap();
        assert_eq!((done.out(), done.err(), done.code()), ("out\n".into(), "err\n".into(), Some(7)));
        let done = sh("kill -TERM $$", LONG).run().unwrap();
        assert_eq!((done.code(), done.signal()), (None, Some(15)));
    }

    #[test]
    fn input_is_fed_whatever_its_size() {
        let bytes = vec![b'x'; 1 << 20];
        let done = Cmd::new("cat", LONG).stdin(bytes.clone()).ok().unwrap();
        assert_eq!(done.stdout, bytes);
        assert_eq!(Cmd::new("cat", LONG).ok().unwrap().stdout, b"", "without input there is none");
        Cmd::new("true", LONG).stdin(bytes).ok().unwrap();
    }

    #[test]
    fn an_open_input_is_written_to_and_closed() {
        let mut cat = Cmd::new("cat", LONG).stdin_kept_open().start().unwrap();
        cat.write(b"hello\n").unwrap();
        cat.until_stdout_has("hello", LONG).unwrap();
        assert!(!cat.has_ended());
        cat.close_stdin();
        assert_eq!(cat.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn what_is_never_said_is_not_waited_for_beyond_the_end() {
        let begun = Instant::now();
        let mut short = sh("echo something; exit 3", LONG).start().unwrap();
        let error = short.until_stdout_has("anything", LONG).unwrap_err().to_string();
        assert!(error.contains("before it ended") && error.contains("something"), "{error}");
        let mut silent = sh("sleep 1000", LONG).start().unwrap();
        let error = silent.until_stdout_has("word", Duration::from_millis(100)).unwrap_err().to_string();
        assert!(error.contains("in time") && begun.elapsed() < LONG, "{error}");
    }

    #[test]
    fn the_deadline_kills_the_whole_group_and_shows_what_was_said() {
        let begun = Instant::now();
        let error =
            sh("echo started; sleep 1000 & echo $!; wait", Duration::from_millis(500)).run().unwrap_err();
        assert!(begun.elapsed() < LONG);
        let CommandError::Deadline { output, .. } = error else { panic!("{error}") };
        assert!(output.contains("started"), "{output}");
        let sleeper: i32 = output.lines().last().unwrap().trim_matches([' ', '|']).parse().unwrap();
        until_true("the sleeper to end", LONG, || process::read(sleeper).is_none_or(|p| p.is_zombie()))
            .unwrap();
    }

    #[test]
    fn a_descendant_that_holds_the_output_is_an_error() {
        let error = sh("sleep 1000 &", LONG).run().unwrap_err();
        assert!(matches!(error, CommandError::HeldOpen { .. }), "{error}");
    }

    #[test]
    fn a_program_ends_with_the_thread_that_started_it() {
        let starter = thread::spawn(|| {
            let running = sh("sleep 1000", LONG).start().unwrap();
            let pid = running.pid();
            std::mem::forget(running);
            pid
        });
        let pid = starter.join().unwrap();
        until_true("the orphan to end", LONG, || process::read(pid).is_none_or(|one| one.is_zombie()))
            .unwrap();
    }

    #[test]
    fn errors_name_the_command() {
        let error = Cmd::new("/nonexistent/tool", LONG).arg("a b").run().unwrap_err().to_string();
        assert!(error.contains("`/nonexistent/tool \"a b\"`"), "{error}");
        let error = sh("echo why >&2; exit 3", LONG).ok().unwrap_err().to_string();
        assert!(error.contains("exit code 0") && error.contains("why"), "{error}");
    }

    #[test]
    fn text_helpers() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
        assert_eq!(printable("a\tb\u{1b}[2Jc\r"), "a\tb\\u{1b}[2Jc");
        assert_eq!(shorten(&"é".repeat(500)).chars().count(), 401);
        assert!(contains(b"abc", b"bc") && contains(b"", b"") && !contains(b"ab", b"abc"));
    }
}
