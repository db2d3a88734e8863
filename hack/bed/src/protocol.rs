//! What the tool on this side and the init inside the emulated host say to each other; and what both do with
//! archives.
//!
//! One TCP connection carries one request. It travels as frames: a kind byte, a big-endian length
//! and that many bytes. Commands stream their input and output in such frames; TCP is the flow
//! control. Closing the connection ends the command.

mod archives;

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

pub use archives::in_a_row;

/// The port on which the emulated host listens, inside.
pub const PORT: u16 = 1024;

/// No frame is longer. A reader that sees a larger length drops the connection.
pub const MAX_FRAME: usize = 256 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A [`Request`], as JSON. The first frame of a connection.
    Request,
    /// Bytes for the command's standard input; an empty one closes it.
    Stdin,
    /// A signal number, one byte, for the command's process group.
    Signal,
    /// Rows and columns of the terminal, two big-endian `u16`.
    Resize,
    /// Bytes from the command's standard output, or from its terminal.
    Stdout,
    /// Bytes from the command's standard error.
    Stderr,
    /// The [`Reply`], as JSON. The last frame of a connection.
    Reply,
}

impl Kind {
    const ALL: [(Self, u8); 7] = [
        (Self::Request, b'R'),
        (Self::Stdin, b'I'),
        (Self::Signal, b'S'),
        (Self::Resize, b'W'),
        (Self::Stdout, b'O'),
        (Self::Stderr, b'E'),
        (Self::Reply, b'A'),
    ];

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, byte)| *byte)
    }

    fn from_byte(byte: u8) -> io::Result<Self> {
        Self::ALL.iter().find(|(_, known)| *known == byte).map(|(kind, _)| *kind).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("unknown frame kind {byte:#04x}"))
        })
    }
}

/// What the tool can ask for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Answers [`Reply::Done`] as soon as anybody listens.
    Ping,
    /// Once the services are up, makes the host fit for commands: clock, processors, shares, binaries.
    Prepare(Prepare),
    /// Runs a command.
    Exec(Exec),
    /// Once the services are up, puts the host into the state in which it can be saved: nothing of a
    /// run mounted, nothing dirty.
    Quiesce,
    /// Syncs the disks and switches the host off.
    PowerOff,
}

/// How a host is made fit for commands, after a boot or a restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// Nanoseconds since the epoch: a restored host's clock stood still.
    pub time_ns: u64,
    /// Whether a directory is shared at `/share`.
    pub share: bool,
}

/// A command to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Variables beyond the host's own.
    pub env: Vec<(String, String)>,
    /// Rows and columns where the command gets a terminal.
    pub terminal: Option<(u16, u16)>,
}

/// How a request ended.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// The command exited.
    Exited(i32),
    /// The command was ended by a signal.
    Signalled(i32),
    /// It could not be done, and why.
    Failed(String),
}

impl Reply {
    /// The exit code as a shell reports it.
    pub fn shell_code(&self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Exited(code) => *code,
            Self::Signalled(signal) => 128 + signal,
            Self::Failed(_) => 127,
        }
    }
}

/// Writes one frame.
pub fn write_frame(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too long"))?;
    let mut head = [0; 5];
    head[0] = kind.byte();
    head[1..].copy_from_slice(&length.to_be_bytes());
    // One write for small frames: each segment costs an interrupt in the emulated host.
    let mut frame = Vec::with_capacity(head.len() + payload.len());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Reads one frame; `None` when the other side closed the connection between frames.
pub fn read_frame(mut from: impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0; 5];
    if from.read(&mut head[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..])?;
    let kind = Kind::from_byte(head[0])?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

/// Writes a JSON frame.
pub fn write_json(to: impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_travel_whole() {
        for (kind, payload) in [
            (Kind::Request, b"{}".to_vec()),
            (Kind::Stdin, Vec::new()),
            (Kind::Stdout, vec![7; MAX_FRAME]),
            (Kind::Reply, b"x".to_vec()),
        ] {
            let mut wire = Vec::new();
            write_frame(&mut wire, kind, &payload).unwrap();
            assert_eq!(read_frame(wire.as_slice()).unwrap(), Some((kind, payload)));
        }
    }

    #[test]
    fn bad_frames_are_refused() {
        let mut long = vec![b'O'];
        long.extend_from_slice(&(MAX_FRAME as u32 + 1).to_be_bytes());
        for (name, wire) in [
            ("unknown kind", &b"?\0\0\0\0"[..]),
            ("too long", &long),
            ("cut in the head", &b"O\0\0"[..]),
            ("cut in the payload", &b"O\0\0\0\x05abc"[..]),
        ] {
            assert!(read_frame(wire).is_err(), "{name}");
        }
        assert!(read_frame(&b""[..]).unwrap().is_none());
        assert!(write_frame(io::sink(), Kind::Stdin, &vec![0; MAX_FRAME + 1]).is_err());
    }

    #[test]
    fn replies_become_shell_codes() {
        for (reply, code) in [
            (Reply::Done, 0),
            (Reply::Exited(42), 42),
            (Reply::Signalled(9), 137),
            (Reply::Failed(String::new()), 127),
        ] {
            assert_eq!(reply.shell_code(), code);
        }
    }
}
