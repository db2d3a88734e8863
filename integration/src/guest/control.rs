//! The control socket of a machine, spoken as its protocol says and not by the monitor's own code: what these
//! tests understand, others can write.
//!
//! A frame is the length of its JSON and the number of descriptors that come with it, 32 bits each, little
//! endian, and then the JSON.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

/// The version of the protocol that is spoken here.
pub const VERSION: u32 = 1;
/// The most bytes of JSON that a frame may have.
pub const FRAME_MAX: usize = 512 * 1024;

/// A conversation with a machine.
pub struct Control {
    stream: UnixStream,
    within: Duration,
    events: VecDeque<Value>,
    welcome: Value,
    next: u64,
}

impl Control {
    /// With the machine whose socket is at `path`; each answer may take `within`.
    pub fn connect(path: &Path, within: Duration) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        Self::over(stream, within)
    }

    /// Over a stream that is connected already.
    pub fn over(stream: UnixStream, within: Duration) -> Result<Self> {
        send(&stream, &json!({ "versions": [VERSION] }), &[])?;
        let answer = receive(&stream, within)?.context("the monitor hung up instead of a welcome")?;
        let welcome = answer.get("welcome").with_context(|| format!("no welcome: {answer}"))?.clone();
        Ok(Self { stream, within, events: VecDeque::new(), welcome, next: 1 })
    }

    /// What the monitor said of itself.
    pub fn welcome(&self) -> &Value {
        &self.welcome
    }

    /// Asks for something. A refusal is an error that says why.
    pub fn call(&mut self, request: &Value) -> Result<Value> {
        self.call_with(request, &[])
    }

    /// Asks for something, and passes descriptors along.
    pub fn call_with(&mut self, request: &Value, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        let id = self.next;
        self.next += 1;
        send(&self.stream, &json!({ "id": id, "request": request }), fds)?;
        loop {
            let message = receive(&self.stream, self.within)
                .with_context(|| format!("waiting for the answer to {request}"))?
                .with_context(|| format!("the monitor hung up instead of answering {request}"))?;
            if let Some(event) = message.get("event") {
                self.events.push_back(event.clone());
                continue;
            }
            let answer = message.get("reply").filter(|reply| reply["id"] == id);
            let result = answer.with_context(|| format!("{message} as the answer to {request}"))?;
            return match (&result["result"]["Ok"], &result["result"]["Err"]) {
                (Value::Null, refusal) => bail!("{request} is refused: {refusal}"),
                (reply, _) => Ok(reply.clone()),
            };
        }
    }

    /// The next event, if one comes within that time. After a call for `events`.
    pub fn event(&mut self, within: Duration) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match receive(&self.stream, within) {
            Ok(Some(message)) => match message.get("event") {
                Some(event) => Ok(Some(event.clone())),
                None => bail!("{message} instead of an event"),
            },
            Ok(None) => bail!("the monitor hung up instead of an event"),
            Err(error) if is_late(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn is_late(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

/// Sends `message` in a frame of its own.
pub fn send(stream: &UnixStream, message: &Value, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let payload = message.to_string();
    let mut bytes = header(payload.len(), fds.len());
    bytes.extend(payload.as_bytes());
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let space = [IoSlice::new(&bytes)];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &space, control, MsgFlags::MSG_NOSIGNAL, None)
        .with_context(|| format!("sending {message}"))?;
    if sent != bytes.len() {
        bail!("of {} bytes the monitor's socket took {sent}", bytes.len());
    }
    Ok(())
}

/// What stands before the payload of a frame.
pub fn header(length: usize, fds: usize) -> Vec<u8> {
    let word = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    [word(length), word(fds)].concat()
}

/// The next message, or nothing when the other side has hung up.
pub fn receive(stream: &UnixStream, within: Duration) -> Result<Option<Value>> {
    let ends = Instant::now() + within;
    let mut head = [0; 8];
    match read_exact(stream, &mut head, ends) {
        Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
            return Ok(None);
        }
        other => other?,
    }
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if length > FRAME_MAX {
        bail!("the monitor sent a frame of {length} bytes");
    }
    let mut payload = vec![0; length];
    read_exact(stream, &mut payload, ends)?;
    Ok(Some(serde_json::from_slice(&payload).context("reading what the monitor sent")?))
}

fn read_exact(mut stream: &UnixStream, mut buffer: &mut [u8], ends: Instant) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let left = ends.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left))?;
        match stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn a_conversation() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let monitor = thread::spawn(move || {
            let hello = receive(&theirs, SOON).unwrap().unwrap();
            assert_eq!(hello, json!({ "versions": [1] }));
            send(&theirs, &json!({ "welcome": { "version": 1 } }), &[]).unwrap();
            for result in [json!({ "Ok": "done" }), json!({ "Err": { "kind": "state", "why": "no" } })] {
                let call = receive(&theirs, SOON).unwrap().unwrap();
                send(&theirs, &json!({ "event": { "marker": 7 } }), &[]).unwrap();
                send(&theirs, &json!({ "reply": { "id": call["id"], "result": result } }), &[]).unwrap();
            }
            (&theirs).write_all(&header(3, 0)).unwrap();
        });
        let mut control = Control::over(ours, SOON).unwrap();
        assert_eq!(control.welcome()["version"], 1);
        assert_eq!(control.call(&json!("resume")).unwrap(), json!("done"));
        let refused = control.call(&json!("resume")).unwrap_err().to_string();
        assert!(refused.contains("refused") && refused.contains("no"), "{refused}");
        for _ in 0..2 {
            assert_eq!(control.event(SOON).unwrap(), Some(json!({ "marker": 7 })));
        }
        monitor.join().unwrap();
        assert!(control.event(SOON).is_err(), "half a frame and the end");
    }

    #[test]
    fn silence_is_no_event() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut control =
            Control { stream: ours, within: SOON, events: VecDeque::new(), welcome: Value::Null, next: 1 };
        assert_eq!(control.event(Duration::from_millis(20)).unwrap(), None);
    }
}
