//! Connections to localhost that are made on the host.

use std::io::{ErrorKind, Result};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
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

async fn pass_on(mut host: VsockStream) -> Result<()> {
    let header = timeout(DEADLINE, Header::read(&mut host)).await??;
    match timeout(DEADLINE, connect(header.address())).await {
        Ok(Ok(mut stream)) => {
            host.write_all(&[CONNECTED]).await?;
            copy_bidirectional(&mut host, &mut stream).await.map(drop)
        }
        _ => host.write_all(&[REFUSED]).await,
    }
}

/// Who asks for `localhost` tries 127.0.0.1 first, and ::1 when that refuses. The host's side cannot refuse, as it has accepted
/// before anybody knows whether somebody listens: so the other is tried here.
async fn connect(address: SocketAddr) -> Result<TcpStream> {
    match TcpStream::connect(address).await {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused && address.ip() == Ipv4Addr::LOCALHOST => {
            TcpStream::connect((Ipv6Addr::LOCALHOST, address.port())).await
        }
        connected => connected,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn who_listens_on_one_address_of_localhost_is_found_by_the_first_that_is_tried() {
        let four = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let found = connect(four.local_addr().unwrap()).await.unwrap();
        assert_eq!(found.peer_addr().unwrap(), four.local_addr().unwrap());
        let six = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
        let port = six.local_addr().unwrap().port();
        let found = connect((Ipv4Addr::LOCALHOST, port).into()).await.unwrap();
        assert_eq!(found.peer_addr().unwrap(), six.local_addr().unwrap());
        drop(six);
        let refused = connect((Ipv4Addr::LOCALHOST, port).into()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        // Nobody who asks for that one goes on to the other.
        let port = four.local_addr().unwrap().port();
        let refused = connect((Ipv6Addr::LOCALHOST, port).into()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}
