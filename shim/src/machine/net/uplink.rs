//! A network behind a unix socket of the host: passt on a stream, gvproxy and its like by datagrams.
//!
//! This process connects to it, which a monitor in its jail could not, and the monitor has the connection as the cable of
//! a network device. A machine that goes on from elsewhere is connected anew, and so is one whose connection was lost, as
//! soon as somebody listens again.

mod line;

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::agent::{Interface, Route, SetNetworkRequest};
use rtnl::Mac;
use runtime_spec::config::{Addresses, Frames};
use runtime_spec::plan;
use sha2::{Digest, Sha256};
use vmm::control::Request;
use vmm::devices::virtio::net::Kind;
use vmm::devices::virtio::net::dial::Address;

use super::super::monitor::Monitor;
use crate::blocking::blocking;
use crate::error::{Attempt, Error, Result};
use crate::{deadlines, time};
use line::Line;

/// What the interface is called in the guest.
const NAME: &str = "eth0";
/// In the machine's directory: where who has the network sends datagrams to.
const OWN: &str = "net";
/// RT_TABLE_MAIN.
const MAIN: u32 = 254;
/// What the kernel gives to v6 routes of which nobody has said it.
const METRIC_V6: u32 = 1024;

/// The network of one machine.
#[derive(Debug)]
pub struct Uplink {
    plan: plan::Uplink,
    own: PathBuf,
    mac: Mac,
    /// Numbers of connections, none of which an agent has heard before.
    next: AtomicU64,
    /// The connection that there is.
    line: Mutex<Option<Arc<Line>>>,
}

impl Uplink {
    /// Of the machine whose things are in `directory`.
    pub fn of(plan: plan::Uplink, directory: &Path) -> Self {
        let next = AtomicU64::new(time::now().unsigned_abs().max(1));
        Self { plan, own: directory.join(OWN), mac: mac_of(directory), next, line: Mutex::default() }
    }

    /// Refuses an interface of the namespace's that would have the same name.
    pub fn check(&self, seen: &rtnl::Network) -> Result<()> {
        if seen.interfaces.iter().any(|interface| interface.name == NAME) {
            return Err(Error::precondition(format!(
                "the network namespace has an interface {NAME}, which is what the network behind {} is called; take one of \
                 both away (network.socket)",
                self.plan.socket
            )));
        }
        Ok(())
    }

    /// Connects a network device with it. Returns the number of the connection.
    pub async fn plug(&self, slot: &str, monitor: &Monitor) -> Result<u64> {
        let (address, own) = (self.address(), self.own.clone());
        let connecting = move || {
            // Of another attempt.
            match fs::remove_file(&own) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).attempt(format_args!("removing {}", own.display()));
                }
                _ => {}
            }
            let connected = address.connect(Some(&own), deadlines::UPLINK);
            let socket = connected.map_err(|error| Error::precondition(error.to_string()))?;
            if address.kind == Kind::Datagram {
                // Who answers may be nobody in particular; from others a socket that is connected takes nothing.
                let everybody = fs::Permissions::from_mode(0o666);
                fs::set_permissions(&own, everybody)
                    .attempt(format_args!("opening {} to all", own.display()))?;
            }
            let line = Line::of(&socket, &address).attempt("watching a connection")?;
            Ok((socket, line))
        };
        self.set(None);
        let (socket, line) = blocking("connecting the network", connecting).await?;
        let request = Request::AttachSocket { slot: slot.to_owned() };
        let attach = move |control: &mut vmm::control::Client| {
            control.call(request, &[socket.as_fd()], deadlines::MONITOR_CALL).map(drop)
        };
        monitor.ask("plugging in a network device", attach).await?;
        self.set(Some(Arc::new(line)));
        Ok(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns, once for each connection, when it is no more, or somebody else listens. Whoever could not connect tries again
    /// without being told.
    pub async fn lost(&self) {
        let line = self.line().clone();
        let Some(lost) = line else { return std::future::pending().await };
        lost.lost().await;
        let mut line = self.line();
        if line.as_ref().is_some_and(|now| Arc::ptr_eq(now, &lost)) {
            *line = None;
        }
    }

    /// Whether there is none.
    pub fn is_lost(&self) -> bool {
        self.line().as_ref().is_none_or(|line| line.is_lost())
    }

    fn line(&self) -> MutexGuard<'_, Option<Arc<Line>>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets who has the network know, as far as this process is concerned, that the machine is no more.
    pub fn leave(&self) {
        self.set(None);
    }

    fn set(&self, line: Option<Arc<Line>>) {
        *self.line() = line;
    }

    fn address(&self) -> Address {
        let kind = match self.plan.socket.frames {
            Frames::Stream => Kind::Stream,
            Frames::Datagram => Kind::Datagram,
        };
        Address { kind, path: PathBuf::from(&self.plan.socket.path) }
    }

    /// What the agent is told of it.
    pub fn tell(&self, request: &mut SetNetworkRequest, device: Mac, connection: u64) {
        let mut interface = Interface {
            mac: device.to_string(),
            name: NAME.to_owned(),
            new_mac: self.mac.to_string(),
            whole: true,
            ..Interface::default()
        };
        match &self.plan.addresses {
            Addresses::Dhcp => interface.lease = connection,
            Addresses::Given(list) => interface.addresses = list.iter().map(ToString::to_string).collect(),
        }
        request.interfaces.push(interface);
        request.routes.extend(self.plan.gateways.0.iter().map(|gateway| {
            let (all, metric) = match gateway {
                IpAddr::V4(_) => ("0.0.0.0/0", 0),
                IpAddr::V6(_) => ("::/0", METRIC_V6),
            };
            Route {
                destination: all.to_owned(),
                gateway: gateway.to_string(),
                interface: NAME.to_owned(),
                metric,
                table: MAIN,
                ..Route::default()
            }
        }));
    }
}

/// Several machines may be in one network, and one that is made again is known there.
fn mac_of(directory: &Path) -> Mac {
    let digest = Sha256::digest(directory.as_os_str().as_encoded_bytes());
    // Of one machine's, given by nobody.
    Mac([2, digest[0], digest[1], digest[2], digest[3], digest[4]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(addresses: &str, gateways: &str) -> Uplink {
        let plan = plan::Uplink {
            socket: "stream:/run/net".parse().unwrap(),
            addresses: addresses.parse().unwrap(),
            gateways: gateways.parse().unwrap_or_default(),
        };
        Uplink::of(plan, Path::new("/run/supermachine/machines/1"))
    }

    #[test]
    fn an_agent_is_told_of_a_lease_or_of_addresses() {
        let device = Mac([2, 0, 0, 0, 0, 1]);
        let mut leased = SetNetworkRequest::default();
        uplink("dhcp", "").tell(&mut leased, device, 7);
        let [interface] = &*leased.interfaces else { panic!("{leased:?}") };
        assert_eq!((interface.name.as_str(), interface.lease, interface.whole), ("eth0", 7, true));
        assert_eq!((interface.addresses.len(), leased.routes.len()), (0, 0));
        assert_eq!(interface.mac, "02:00:00:00:00:01");

        let mut given = SetNetworkRequest::default();
        uplink("10.0.2.15/24,fd00::5/64", "10.0.2.2,fd00::2").tell(&mut given, device, 7);
        let [interface] = &*given.interfaces else { panic!("{given:?}") };
        assert_eq!(
            (interface.lease, &*interface.addresses),
            (0, &["10.0.2.15/24".to_owned(), "fd00::5/64".to_owned()][..])
        );
        let routes: Vec<_> =
            given.routes.iter().map(|route| (route.destination.as_str(), route.gateway.as_str())).collect();
        assert_eq!(routes, [("0.0.0.0/0", "10.0.2.2"), ("::/0", "fd00::2")]);
    }

    #[test]
    fn each_machine_has_a_hardware_address_of_its_own() {
        let [one, other] = ["/run/a", "/run/b"].map(|path| mac_of(Path::new(path)));
        assert_ne!(one, other);
        assert_eq!((one, one.0[0]), (mac_of(Path::new("/run/a")), 2));
    }

    #[test]
    fn its_name_is_nobody_elses() {
        let interface = |name: &str| rtnl::Interface {
            index: 2,
            name: name.to_owned(),
            mac: Mac([2; 6]),
            permanent: None,
            mtu: 1500,
            is_up: true,
            is_port: false,
            addresses: vec![],
        };
        let uplink = uplink("dhcp", "");
        let mut seen = rtnl::Network { interfaces: vec![interface("eth1")], ..rtnl::Network::default() };
        uplink.check(&seen).unwrap();
        seen.interfaces.push(interface("eth0"));
        assert!(uplink.check(&seen).unwrap_err().text.contains("stream:/run/net"));
    }
}
