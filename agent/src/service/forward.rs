//! Connections to localhost that are made on the host.

use std::sync::Arc;
use std::time::Duration;

use agent_api::forward::{CONNECTED, Header, REFUSED};
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_vsock::{VsockListener, VsockStream};

use super::stdio::accept;

/// For a header, which is sent at once, and for a connection to this very machine.
const DEADLINE: Duration = Duration::from_secs(10);
/// Connections at a time; others wait.
const AT_ONCE: usize = 1024;

/// Passes them on, for ever.
pub(super) async fn serve(listener: VsockListener) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let host = accept(&listener).await;
        tokio::spawn(async move {
            // Either side may go at any time.
            let _ = pass_on(host).await;
            drop(place);
        });
    }
}

async fn pass_on(mut host: VsockStream) -> std::io::Result<()> {
    let header = timeout(DEADLINE, Header::read(&mut host)).await??;
    match timeout(DEADLINE, TcpStream::connect(header.address())).await {
        Ok(Ok(mut stream)) => {
            host.write_all(&[CONNECTED]).await?;
            copy_bidirectional(&mut host, &mut stream).await.map(drop)
        }
        _ => host.write_all(&[REFUSED]).await,
    }
}
