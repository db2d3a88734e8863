//! Running a command in the host: its streams become ours.

use std::io::{self, IsTerminal, Read, Write, stdin, stdout};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::ending::Ending;
use testbed::{Exec, Kind, Reply, Request, read_frame, write_frame, write_json};

/// How often a host is asked whether it lives, while a command runs there.
const PULSE: Duration = Duration::from_secs(5);
/// A host that does not answer for this long will not. A busy one needs seconds.
const HANGS: Duration = Duration::from_secs(90);

/// Sends one request that streams nothing and waits for its reply.
pub fn request(port: u16, what: &Request, wait: Duration) -> Result<Reply> {
    let stream = connect(port)?;
    stream.set_read_timeout(Some(wait))?;
    write_json(&stream, Kind::Request, what)?;
    match read_frame(&stream) {
        Ok(Some((Kind::Reply, payload))) => Ok(serde_json::from_slice(&payload)?),
        Ok(_) => bail!("the host hung up"),
        Err(error) if ran_out_of_time(&error) => {
            bail!("the host did not answer within {} s", wait.as_secs_f32())
        }
        Err(error) => Err(error.into()),
    }
}

fn ran_out_of_time(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Like [`request`], for what must succeed.
pub fn require(port: u16, what: &Request, wait: Duration, doing: &str) -> Result<()> {
    match request(port, what, wait).with_context(|| doing.to_owned())? {
        Reply::Failed(why) => bail!("{doing}: {why}"),
        _ => Ok(()),
    }
}

fn connect(port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream =
        TcpStream::connect_timeout(&address, Duration::from_secs(5)).context("connecting to the host")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Runs the command with this process's streams; its exit code as a shell tells it.
///
/// `interactive` gives it a terminal where this process has one. At the deadline the command is
/// ended and the code is 124, as `timeout` has it.
pub fn run(
    port: u16,
    argv: &[String],
    interactive: bool,
    timeout: Option<Duration>,
    ending: &Ending,
) -> Result<i32> {
    let terminal = interactive && stdin().is_terminal() && stdout().is_terminal();
    let mut env = Vec::new();
    if let (true, Ok(kind)) = (terminal, std::env::var("TERM")) {
        env.push(("TERM".to_owned(), kind));
    }
    let stream = connect(port)?;
    let what = Exec { argv: argv.to_vec(), env, terminal: terminal.then(window_size) };
    write_json(&stream, Kind::Request, &Request::Exec(what))?;
    let to = Arc::new(Mutex::new(stream.try_clone()?));
    if terminal {
        ending.restores(Terminal::make_raw()?);
        follow_window(Arc::clone(&to));
    }
    forward_input(to);
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let hung = Arc::new(AtomicBool::new(false));
    watch(port, stream.try_clone()?, Arc::clone(&hung));
    let mut code = copy_output(&stream, deadline);
    if hung.load(Ordering::Acquire) {
        code = Err(anyhow!("the host has not answered for {} s: it hangs", HANGS.as_secs()));
    }
    let _ = stream.shutdown(Shutdown::Both);
    ending.restore_terminal();
    code
}

/// Ends the command's stream when the host answers nobody any more. The thread ends with the process.
fn watch(port: u16, stream: TcpStream, hung: Arc<AtomicBool>) {
    thread::spawn(move || {
        let mut answered = Instant::now();
        while answered.elapsed() < HANGS {
            thread::sleep(PULSE);
            if request(port, &Request::Ping, HANGS / 3).is_ok() {
                answered = Instant::now();
            }
        }
        hung.store(true, Ordering::Release);
        let _ = stream.shutdown(Shutdown::Both);
    });
}

fn copy_output(stream: &TcpStream, deadline: Option<Instant>) -> Result<i32> {
    loop {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            stream.set_read_timeout(Some(left))?;
        }
        let frame = match read_frame(stream) {
            Err(error) if ran_out_of_time(&error) => {
                crate::progress::say("the command did not end within its time and was killed");
                return Ok(124);
            }
            frame => frame.context("reading from the host")?,
        };
        match frame {
            Some((Kind::Stdout, data)) => write_out(io::stdout(), &data)?,
            Some((Kind::Stderr, data)) => write_out(io::stderr(), &data)?,
            Some((Kind::Reply, payload)) => {
                let reply: Reply = serde_json::from_slice(&payload)?;
                if let Reply::Failed(why) = &reply {
                    crate::progress::say(why);
                }
                return Ok(reply.shell_code());
            }
            Some((kind, _)) => bail!("the host sent a frame of kind {kind:?}"),
            None => bail!("the host went away while the command ran"),
        }
    }
}

fn write_out(mut to: impl Write, data: &[u8]) -> Result<()> {
    to.write_all(data).and_then(|()| to.flush()).context("writing the command's output")
}

/// The connection, as the threads that write to it share it: a frame goes out whole.
type To = Arc<Mutex<TcpStream>>;

fn send(to: &To, kind: Kind, payload: &[u8]) -> io::Result<()> {
    write_frame(&*to.lock().unwrap_or_else(PoisonError::into_inner), kind, payload)
}

/// Standard input is read by a thread of its own, which ends with the process.
fn forward_input(to: To) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            // An error is the end, too: a command that reads on would wait for ever.
            let length = stdin().lock().read(&mut buffer).unwrap_or(0);
            if send(&to, Kind::Stdin, &buffer[..length]).is_err() || length == 0 {
                return;
            }
        }
    });
}

/// Tells the host when the terminal changes its size. Looking twice a second is enough for a person
/// and needs no signal.
fn follow_window(to: To) {
    thread::spawn(move || {
        let mut known = window_size();
        loop {
            thread::sleep(Duration::from_millis(500));
            let (rows, columns) = window_size();
            if (rows, columns) == known {
                continue;
            }
            known = (rows, columns);
            let payload = [rows.to_be_bytes(), columns.to_be_bytes()].concat();
            if send(&to, Kind::Resize, &payload).is_err() {
                return;
            }
        }
    });
}

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);

fn window_size() -> (u16, u16) {
    let mut size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the argument is a valid winsize; where 1 is no terminal the call fails and it keeps
    // the classic size.
    let _ = unsafe { get_window_size(1, &raw mut size) };
    (size.ws_row, size.ws_col)
}

/// The settings of the terminal before it was made raw.
pub struct Terminal(Termios);

impl Terminal {
    fn make_raw() -> Result<Self> {
        let stdin = stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }

    /// Puts them back.
    pub fn restore(&self) {
        let _ = tcsetattr(stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}
