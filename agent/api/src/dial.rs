//! Streams to a machine's vsock ports, by the monitor's unix socket: `CONNECT PORT`, a line, is answered by
//! `OK NUMBER`, a line, and what follows is the stream. A refused one is closed without an answer.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// `OK 4294967295` and its newline.
const LONGEST_ANSWER: usize = 14;

/// A stream to `port` of the guest behind `socket`. Takes as long as the guest does: bring a deadline.
pub async fn dial(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await.map_err(|error| {
        Error::new(error.kind(), format!("connecting to the machine at {}: {error}", socket.display()))
    })?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(LONGEST_ANSWER);
    // One byte a read, as what follows the line is the stream's.
    while answer.last() != Some(&b'\n') {
        if answer.len() == LONGEST_ANSWER {
            return Err(refused(port, &answer));
        }
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Err(refused(port, &answer));
        }
        answer.push(byte[0]);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(refused(port, &answer)) }
}

fn refused(port: u32, answer: &[u8]) -> Error {
    let answer = String::from_utf8_lossy(answer);
    Error::new(ErrorKind::ConnectionRefused, format!("no stream to port {port} of the guest: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn answers_of_a_monitor() {
        let path = std::env::temp_dir().join(format!("dial-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        for (answer, follows) in
            [("OK 7\nhello", Some("hello")), ("", None), ("NO\n", None), ("OK 11111111111111111\n", None)]
        {
            let monitor = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 11];
                stream.read_exact(&mut asked).await.unwrap();
                assert_eq!(&asked, b"CONNECT 42\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            };
            let (stream, ()) = tokio::join!(dial(&path, 42), monitor);
            let mut rest = String::new();
            match (stream, follows) {
                (Ok(mut stream), Some(follows)) => {
                    stream.read_to_string(&mut rest).await.unwrap();
                    assert_eq!(rest, follows);
                }
                (Err(error), None) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{answer:?}"),
                (other, _) => panic!("{answer:?}: {other:?}"),
            }
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(dial(&path, 42).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
