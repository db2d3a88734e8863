//! Connections that become standard streams; and that whoever connects is the host.

use std::io::{Error, Result};
use std::sync::Arc;
use std::time::Duration;

use agent_api::stdio::{Answer, Header};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockListener, VsockStream};
use ttrpc::asynchronous::transport::Listener;

use super::Agent;

/// For a header, which is sent at once.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Connections that have not said yet what they are.
const AT_ONCE: usize = 256;
/// After a failure that is not about one connection.
const PAUSE: Duration = Duration::from_millis(100);

/// The next connection of the host's.
pub(super) async fn accept(listener: &VsockListener) -> VsockStream {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => return stream,
            Ok(_) => {}
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// A listener of ttrpc's.
pub(super) fn from_host(listener: VsockListener) -> Listener {
    let (give, taken) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let stream = accept(&listener).await;
            if give.send(stream).await.is_err() {
                return;
            }
        }
    });
    Listener::new(Connections(taken))
}

struct Connections(tokio::sync::mpsc::Receiver<VsockStream>);

impl futures_core::Stream for Connections {
    type Item = Result<VsockStream>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.get_mut().0.poll_recv(context).map(|stream| stream.map(Ok))
    }
}

/// Attaches connections to streams, for ever.
pub(super) async fn serve(agent: Arc<Agent>, listener: VsockListener) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = accept(&listener).await;
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let _ = timeout(HEADER_DEADLINE, attach(&agent, stream)).await;
            drop(place);
        });
    }
}

async fn attach(agent: &Agent, mut stream: VsockStream) -> Result<()> {
    let header = match Header::read(&mut stream).await? {
        Ok(header) => header,
        Err(error) => {
            stream.write_all(&[Answer::Malformed.byte()]).await?;
            return Err(Error::other(error));
        }
    };
    let answer = match agent.process(&header.id, &header.exec_id) {
        Err(_) => Answer::NoProcess,
        Ok(process) => match process.line(header.stream) {
            None => Answer::NoStream,
            Some(line) if line.has_ended() => Answer::Ended,
            Some(line) => {
                stream.write_all(&[Answer::Attached.byte()]).await?;
                line.attach(stream);
                return Ok(());
            }
        },
    };
    stream.write_all(&[answer.byte()]).await
}
