//! Unix sockets of the host: the file would come through the share, but there is nobody behind it in the guest.
//! So the agent listens at a socket of its own, and each connection goes on over vsock to the host's.

use std::path::PathBuf;

use oci_spec::runtime::Mount;

use super::Entry;
use crate::error::{Result, unsupported};
use crate::host::Owner;
use crate::layout;
use crate::plan::{GuestSocket, Plan, Socket};
use crate::planner::Context;

pub(super) fn one(
    context: &Context<'_>,
    plan: &mut Plan,
    entry: &Entry<'_>,
    source: PathBuf,
    owner: Owner,
) -> Result<Mount> {
    let port = port(context.request.ordinal, plan.sockets.len()).ok_or_else(|| {
        let why = format!("a container can have {} sockets", layout::SOCKETS_PER_CONTAINER);
        unsupported(format!("{}.source", entry.place), source.display(), why, "bind fewer")
    })?;
    let path = layout::guest_socket(&plan.guest_id, entry.index);
    let Owner { uid, gid, mode } = owner;
    plan.sockets.push(Socket { source, port });
    plan.guest.sockets.push(GuestSocket { path: path.clone(), port, uid, gid, mode });
    Ok(entry.from("bind", path, entry.options().to_vec()))
}

/// No two sockets of a machine have the same port.
fn port(ordinal: u32, index: usize) -> Option<u32> {
    let index = u32::try_from(index).ok().filter(|index| *index < layout::SOCKETS_PER_CONTAINER)?;
    let first = layout::SOCKET_PORTS.checked_add(ordinal.checked_mul(layout::SOCKETS_PER_CONTAINER)?)?;
    // The last one means any port.
    first.checked_add(index).filter(|port| *port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Case, SOCKET};

    fn socket(destination: &str) -> serde_json::Value {
        json!({ "destination": destination, "type": "bind", "source": "/run/docker.sock" })
    }

    #[test]
    fn sockets_are_forwarded() {
        let mut case = Case::with(&json!({ "mounts": [socket("/a"), socket("/b")] }));
        case.ordinal = 2;
        let plan = case.plan();
        let ports: Vec<_> = plan.sockets.iter().map(|socket| socket.port).collect();
        assert_eq!(ports, [0x4000_0200, 0x4000_0201]);
        assert_eq!(plan.sockets[0].source, PathBuf::from("/run/docker.sock"));
        let path = PathBuf::from("/run/supermachine/sockets/c1/0");
        let Owner { uid, gid, mode } = SOCKET;
        assert_eq!(plan.guest.sockets[0], GuestSocket { path: path.clone(), port: ports[0], uid, gid, mode });
        let mount = &plan.guest.spec.mounts().as_ref().unwrap()[0];
        assert_eq!((mount.source(), mount.options()), (&Some(path), &Some(vec!["bind".to_owned()])));
        assert_eq!(plan.share.binds, []);
    }

    #[test]
    fn ports_are_bounded() {
        assert_eq!(port(0, 255), Some(0x4000_00ff));
        assert_eq!(port(0, 256), None);
        assert_eq!(port(u32::MAX, 0), None);
        assert_eq!(port(0x00bf_ffff, 255), None);
    }
}
