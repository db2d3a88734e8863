//! Streams of `kubectl exec`, `attach` and `port-forward`, as a client has them of a containerd: channels of one WebSocket.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

/// Each message's first byte is the number of its channel.
const PROTOCOL: &str = "v4.channel.k8s.io";
/// For each thing that is waited for.
const PATIENCE: Duration = Duration::from_mins(2);

/// What a client writes, and what a port is sent and sends.
pub const DATA: u8 = 0;
/// What a program writes.
pub const STDOUT: u8 = 1;
/// How a program ended.
pub const ERROR: u8 = 3;
/// The size of a terminal.
pub const RESIZE: u8 = 4;

/// Streams that are open.
pub struct Channels {
    socket: WebSocket<TcpStream>,
    heard: BTreeMap<u8, Vec<u8>>,
}

impl Channels {
    /// Opens what `url` was given out for.
    pub fn open(url: &str) -> Result<Self> {
        let place = url.strip_prefix("http://").with_context(|| format!("{url} is no place for streams"))?;
        let (address, _) = place.split_once('/').unwrap_or((place, ""));
        let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{place}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let (socket, _) = tungstenite::client(request, stream).with_context(|| format!("opening {url}"))?;
        Ok(Self { socket, heard: BTreeMap::new() })
    }

    /// Sends this.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).with_context(|| format!("sending to channel {channel}"))
    }

    /// All that has come on a channel.
    pub fn heard(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.heard.get(&channel).map_or(&[], |heard| heard)).into_owned()
    }

    /// Waits until that has come on a channel.
    pub fn until_heard(&mut self, channel: u8, text: &str) -> Result<()> {
        while !self.heard(channel).contains(text) {
            if !self.hear()? {
                bail!("{text:?} did not come on channel {channel}: {:?}", self.heard);
            }
        }
        Ok(())
    }

    /// Waits until nothing more comes.
    pub fn until_closed(&mut self) -> Result<()> {
        while self.hear()? {}
        Ok(())
    }

    /// Whether something came, of which there may be more.
    fn hear(&mut self) -> Result<bool> {
        match self.socket.read() {
            Ok(Message::Binary(message)) => {
                if let Some((channel, bytes)) = message.split_first() {
                    self.heard.entry(*channel).or_default().extend(bytes);
                }
                Ok(true)
            }
            Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => Ok(false),
            Ok(_) => Ok(true),
            Err(error) => Err(error).with_context(|| format!("waiting for more than {:?}", self.heard)),
        }
    }
}
