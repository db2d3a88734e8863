//! Unix sockets of the guest behind which the host answers: each connection goes on over vsock.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::sync::Arc;

use anyhow::{Context, Result};
use runtime_spec::plan::GuestSocket;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// Connections to one socket at a time; others wait to be accepted.
const AT_ONCE: usize = 128;

/// A socket that is listened on, until this is dropped.
pub struct Forwarded {
    task: JoinHandle<()>,
    socket: GuestSocket,
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.socket.path);
    }
}

/// Listens for a container.
pub fn forward(socket: &GuestSocket) -> Result<Forwarded> {
    let path = &socket.path;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(socket.mode & 0o7777))?;
    chown(path, Some(socket.uid), Some(socket.gid))?;
    let port = socket.port;
    let task = tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        // Tasks of connections end with this one.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else { return };
            while connections.try_join_next().is_some() {}
            connections.spawn(async move {
                pass_on(stream, port).await;
                drop(place);
            });
        }
    });
    Ok(Forwarded { task, socket: socket.clone() })
}

/// Until both sides have ended. A host that does not answer is a connection that ends at once.
async fn pass_on(mut stream: UnixStream, port: u32) {
    if let Ok(mut host) = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await {
        let _ = copy_bidirectional(&mut stream, &mut host).await;
    }
}
