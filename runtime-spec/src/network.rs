//! The network namespace that a machine is in.
//!
//! The container itself has the network of its machine, so the guest's spec has no network namespace. On
//! the host the monitor is in the namespace that was asked for, or in a new one, which clients fill. A network behind a
//! socket is for machines whose namespace nobody else has set up.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::error::{Result, at, invalid, missing, unsupported};
use crate::host::Found;
use crate::namespaces::{Whose, refuse_host, whose};
use crate::plan::{Network, Plan, Uplink};
use crate::planner::Context;

/// By which nerdctl tells runtimes that are machines of the namespace it has made.
const NERDCTL: &str = "nerdctl/network-namespace";

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let request = context.request;
    let namespaces = request.spec.linux().iter().filter_map(|linux| linux.namespaces().as_ref()).flatten();
    let found = namespaces.enumerate().find(|(_, ns)| ns.typ() == LinuxNamespaceType::Network);
    plan.network = match (request.pod.is_some(), found) {
        (_, None) => host(context, plan)?,
        (false, Some((index, namespace))) => of_machine(context, plan, index, namespace)?,
        (true, Some((index, namespace))) => of_member(context, plan, index, namespace)?,
    };
    let network = &context.settings.config.network;
    let Some(socket) = network.socket.as_ref().filter(|_| request.pod.is_none()) else { return Ok(()) };
    if let Network::Namespace(path) = &plan.network {
        let place =
            found.map_or_else(|| "linux.namespaces".to_owned(), |(index, _)| at("linux.namespaces", index));
        return Err(unsupported(
            place,
            path.display(),
            format!("the network of the container is behind {socket} (network.socket, or its annotation)"),
            "give it a new network namespace, or leave the socket out",
        ));
    }
    plan.uplink = Some(Uplink {
        socket: socket.of(request.id),
        addresses: network.address.clone(),
        gateways: network.gateway.clone(),
    });
    Ok(())
}

fn host(context: &Context<'_>, plan: &mut Plan) -> Result<Network> {
    refuse_host(context, plan, "network", "loopback")?;
    Ok(if context.request.pod.is_some() { Network::Pod } else { Network::Isolated })
}

fn of_machine(
    context: &Context<'_>,
    plan: &mut Plan,
    index: usize,
    namespace: &LinuxNamespace,
) -> Result<Network> {
    let place = format!("{}.path", at("linux.namespaces", index));
    let annotation = || context.request.spec.annotations().as_ref()?.get(NERDCTL).map(PathBuf::from);
    let (place, path) = match whose(context, namespace) {
        Whose::Host => return host(context, plan),
        Whose::Others(path) | Whose::Pods(path) => (place, path),
        Whose::New => match annotation() {
            Some(path) => (format!("annotations.{NERDCTL}"), path),
            None => return Ok(Network::New),
        },
    };
    match context.request.host.files.look(&path) {
        Found::Missing => Err(missing(place, &path)),
        Found::Namespace { initial: true, .. } => host(context, plan),
        Found::Namespace { initial: false, .. } => Ok(Network::Namespace(path)),
        _ => Err(invalid(place, path.display(), "this is not a namespace")),
    }
}

fn of_member(
    context: &Context<'_>,
    plan: &mut Plan,
    index: usize,
    namespace: &LinuxNamespace,
) -> Result<Network> {
    let why = "containers of a pod have the network of its machine";
    let instead = "give it the network namespace of the pod";
    let place = at("linux.namespaces", index);
    match whose(context, namespace) {
        Whose::Pods(_) => Ok(Network::Pod),
        Whose::Others(path) if is_the_machines(context, &path) => Ok(Network::Pod),
        Whose::Host => host(context, plan),
        Whose::New => Err(unsupported(place, "a new network namespace", why, instead)),
        Whose::Others(path) => Err(unsupported(place, path.display(), why, instead)),
    }
}

/// Whether a path leads to the namespace that the machine is in.
fn is_the_machines(context: &Context<'_>, path: &Path) -> bool {
    let files = context.request.host.files;
    let Some(machines) = context.request.pod.and_then(|pod| pod.netns.as_ref()) else { return false };
    let found = files.look(path);
    matches!(found, Found::Namespace { .. }) && found == files.look(machines)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Reach;
    use crate::host::{Pod, Task};
    use crate::testing::Case;

    fn case(network: Option<Value>) -> Case {
        let mut case = Case::new();
        let list = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
        list.retain(|entry| entry["type"] != "network");
        list.extend(network);
        case
    }

    fn at_path(path: &str) -> Case {
        case(Some(json!({ "type": "network", "path": path })))
    }

    fn in_pod(mut case: Case) -> Case {
        case.pod = Some(Pod {
            id: "p1".to_owned(),
            tasks: vec![Task { container: "p1".to_owned(), pid: 100 }],
            netns: Some("/run/netns/a".into()),
            free_drives: 0,
        });
        case
    }

    #[test]
    fn of_a_machine() {
        assert_eq!(case(Some(json!({ "type": "network" }))).plan().network, Network::New);
        assert_eq!(at_path("").plan().network, Network::New);
        assert_eq!(at_path("/run/netns/a").plan().network, Network::Namespace("/run/netns/a".into()));
        assert_eq!(at_path("/run/netns/gone").error().path(), "linux.namespaces[5].path");
        for other in ["/dir", "/file"] {
            assert_eq!(at_path(other).error().path(), "linux.namespaces[5].path", "{other}");
        }
        let mut nerdctl = at_path("");
        nerdctl.spec["annotations"] = json!({ NERDCTL: "/run/netns/a" });
        assert_eq!(nerdctl.plan().network, Network::Namespace("/run/netns/a".into()));
        nerdctl.spec["annotations"] = json!({ NERDCTL: "/run/netns/gone" });
        assert!(nerdctl.error().path().starts_with("annotations."));
    }

    #[test]
    fn behind_a_socket() {
        let with = |mut case: Case| {
            case.config.network.socket = Some("datagram:/run/{id}/net".parse().unwrap());
            case.config.network.address = "10.0.2.15/24".parse().unwrap();
            case.config.network.gateway = "10.0.2.2".parse().unwrap();
            case
        };
        let plan = with(case(Some(json!({ "type": "network" })))).plan();
        let uplink = plan.uplink.unwrap();
        assert_eq!(
            (plan.network, uplink.socket.to_string().as_str()),
            (Network::New, "datagram:/run/c1/net")
        );
        assert_eq!(
            (uplink.addresses.to_string().as_str(), uplink.gateways.to_string().as_str()),
            ("10.0.2.15/24", "10.0.2.2")
        );
        let error = with(at_path("/run/netns/a")).error();
        assert_eq!(error.path(), "linux.namespaces[5]");
        assert!(error.to_string().contains("network.socket"), "{error}");
        assert_eq!(with(in_pod(at_path("/proc/100/ns/net"))).plan().uplink, None);
        assert_eq!(case(Some(json!({ "type": "network" }))).plan().uplink, None);
    }

    #[test]
    fn the_hosts() {
        for mut case in [case(None), at_path("/run/netns/host")] {
            assert!(case.error().to_string().contains("network"));
            case.config.policy.host_namespaces = Reach::Guest;
            assert_eq!(case.plan().network, Network::Isolated);
        }
    }

    #[test]
    fn of_a_member() {
        assert_eq!(in_pod(at_path("/proc/100/ns/net")).plan().network, Network::Pod);
        assert_eq!(in_pod(at_path("/run/netns/a")).plan().network, Network::Pod);
        assert_eq!(in_pod(at_path("/var/run/netns/a")).plan().network, Network::Pod);
        for path in ["", "/proc/7/ns/net", "/run/netns/b", "/run/netns/c", "/dir"] {
            assert_eq!(in_pod(at_path(path)).error().path(), "linux.namespaces[5]", "{path}");
        }
    }
}
