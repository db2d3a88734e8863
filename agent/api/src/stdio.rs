//! The connections that carry standard streams.
//!
//! The shim connects to [`STDIO_PORT`](crate::STDIO_PORT) and sends a [`Header`]; the agent answers with one
//! [`Answer`] byte. After [`Answer::Attached`] the connection is the stream:
//!
//! - *stdin*: what the shim sends the process reads. The end of the shim's direction is the end of the
//!   process's input (of a terminal it means nothing). The agent sends nothing, and ends its direction when
//!   nobody reads any more.
//! - *stdout*, *stderr*: what the process writes, and the end when nobody holds the other end of the pipe. A process's exit
//!   does not cut it short.
//!
//! Nothing is buffered beyond pipes and sockets, so a reader that is slow slows the writer. A connection that
//! breaks takes nothing from the process, which waits until the stream is attached again: that is how streams
//! survive a machine's snapshot. One that comes while another is attached takes its place.
//!
//! ```text
//! 0     4        5       6          7             8      8+n         8+n+m
//! | SMIO | version | stream | id length n | exec length m | id ... | exec id ... |
//! ```

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{LONGEST_ID, is_id};

const MAGIC: [u8; 4] = *b"SMIO";
const VERSION: u8 = 1;
const FIXED: usize = 8;

/// The longest header.
pub const LONGEST_HEADER: usize = FIXED + 2 * LONGEST_ID;

/// Which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// What the process reads; with a terminal, what is typed.
    Stdin,
    /// What it writes; with a terminal, all of what is shown.
    Stdout,
    /// What it writes about what it does. A terminal has none.
    Stderr,
}

impl Stream {
    /// Each of them, in the order of their descriptors.
    pub const ALL: [Self; 3] = [Self::Stdin, Self::Stdout, Self::Stderr];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

/// Whose stream a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The container.
    pub id: String,
    /// The exec, or empty.
    pub exec_id: String,
    /// Which of its streams.
    pub stream: Stream,
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is not a header.
    #[error("it does not begin with SMIO")]
    Magic,
    /// It is one of another version.
    #[error("its version is {0}, this side's is {VERSION}")]
    Version(u8),
    /// There is no such stream.
    #[error("stream {0} is none of 0 (stdin), 1 (stdout) and 2 (stderr)")]
    Stream(u8),
    /// It does not name a process.
    #[error("it does not name a process")]
    Id,
    /// More bytes, or fewer, than it says.
    #[error("it has {0} bytes")]
    Length(usize),
}

/// What the agent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The stream follows.
    Attached,
    /// There is no such process.
    NoProcess,
    /// It has no such stream.
    NoStream,
    /// It has ended already.
    Ended,
    /// The header was malformed.
    Malformed,
}

impl Answer {
    const ALL: [Self; 5] = [Self::Attached, Self::NoProcess, Self::NoStream, Self::Ended, Self::Malformed];

    /// As it is sent.
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// As it was sent.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

impl Header {
    /// As it is sent. None, if an id cannot be one.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let exec_is_good = self.exec_id.is_empty() || is_id(&self.exec_id);
        let lengths = (u8::try_from(self.id.len()), u8::try_from(self.exec_id.len()));
        let (Ok(id), Ok(exec), true, true) = (lengths.0, lengths.1, is_id(&self.id), exec_is_good) else {
            return None;
        };
        let mut bytes = Vec::with_capacity(LONGEST_HEADER);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, self.stream as u8, id, exec]);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.exec_id.as_bytes());
        Some(bytes)
    }

    /// As it was sent: all of it and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else {
            return Err(Malformed::Length(bytes.len()));
        };
        let (stream, id, exec) = fixed_part(*fixed)?;
        if rest.len() != id + exec {
            return Err(Malformed::Length(bytes.len()));
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| Malformed::Id);
        let (id, exec_id) = (text(&rest[..id])?, text(&rest[id..])?);
        if !is_id(&id) || !(exec_id.is_empty() || is_id(&exec_id)) {
            return Err(Malformed::Id);
        }
        Ok(Self { id, exec_id, stream })
    }

    /// Reads one, and not a byte beyond it.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Result<Self, Malformed>> {
        let mut bytes = [0; LONGEST_HEADER];
        from.read_exact(&mut bytes[..FIXED]).await?;
        let Some((fixed, rest)) = bytes.split_first_chunk_mut::<FIXED>() else {
            return Ok(Err(Malformed::Length(0)));
        };
        let length = match fixed_part(*fixed) {
            Ok((_, id, exec)) => id + exec,
            Err(error) => return Ok(Err(error)),
        };
        from.read_exact(&mut rest[..length]).await?;
        Ok(Self::decode(&bytes[..FIXED + length]))
    }
}

/// The stream, and the lengths of both ids, which are bounded.
fn fixed_part(fixed: [u8; FIXED]) -> Result<(Stream, usize, usize), Malformed> {
    let [m0, m1, m2, m3, version, stream, id, exec] = fixed;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(Malformed::Magic);
    }
    if version != VERSION {
        return Err(Malformed::Version(version));
    }
    let stream = Stream::from_byte(stream).ok_or(Malformed::Stream(stream))?;
    let (id, exec) = (usize::from(id), usize::from(exec));
    if id > LONGEST_ID || exec > LONGEST_ID {
        return Err(Malformed::Id);
    }
    Ok((stream, id, exec))
}

/// The shim's half of the beginning: sends the header and reads the answer.
pub async fn attach(
    connection: &mut (impl AsyncRead + AsyncWrite + Unpin),
    header: &Header,
) -> std::io::Result<Answer> {
    let bytes = header
        .encode()
        .ok_or_else(|| std::io::Error::other(format!("{header:?} does not name a process")))?;
    connection.write_all(&bytes).await?;
    let byte = connection.read_u8().await?;
    Answer::from_byte(byte).ok_or_else(|| std::io::Error::other(format!("the agent's answer is {byte}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(id: &str, exec_id: &str, stream: Stream) -> Header {
        Header { id: id.to_owned(), exec_id: exec_id.to_owned(), stream }
    }

    #[test]
    fn headers_that_are_none() {
        let good = header("c1", "e", Stream::Stderr).encode().unwrap();
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        for (bytes, wrong) in [
            (changed(0, b's'), Malformed::Magic),
            (changed(4, 2), Malformed::Version(2)),
            (changed(5, 3), Malformed::Stream(3)),
            (changed(6, 3), Malformed::Length(good.len())),
            (changed(7, 0), Malformed::Length(good.len())),
            (changed(6, 129), Malformed::Id),
            (changed(8, b'/'), Malformed::Id),
            (changed(10, 0xff), Malformed::Id),
            (good[..good.len() - 1].to_vec(), Malformed::Length(good.len() - 1)),
            (good[..7].to_vec(), Malformed::Length(7)),
        ] {
            assert_eq!(Header::decode(&bytes), Err(wrong), "{bytes:?}");
        }
        for (id, exec) in [("", ""), ("a/b", ""), ("a", "../b"), (&"a".repeat(129), "")] {
            assert_eq!(header(id, exec, Stream::Stdin).encode(), None, "{id} {exec}");
        }
    }

    #[test]
    fn answers() {
        for answer in Answer::ALL {
            assert_eq!(Answer::from_byte(answer.byte()), Some(answer));
        }
        assert_eq!(Answer::from_byte(5), None);
    }

    #[tokio::test]
    async fn what_follows_a_header_is_left() {
        let sent = header("c1", "", Stream::Stdin);
        let mut bytes = sent.encode().unwrap();
        bytes.extend(b"input");
        let mut from = bytes.as_slice();
        assert_eq!(Header::read(&mut from).await.unwrap(), Ok(sent));
        assert_eq!(from, b"input");
    }

    proptest! {
        #[test]
        fn headers_travel(
            id in "[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}",
            exec in "([a-zA-Z0-9][a-zA-Z0-9._-]{0,127})?",
            stream in 0..3u8,
        ) {
            let sent = header(&id, &exec, Stream::from_byte(stream).unwrap());
            prop_assert_eq!(Header::decode(&sent.encode().unwrap()), Ok(sent));
        }

        #[test]
        fn anything_is_a_header_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), magic: bool) {
            if magic && bytes.len() >= 5 {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] = VERSION;
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), Some(bytes));
            }
        }
    }
}
