//! What an interface has by its lease.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rtnl::{Hop, Netlink, Prefix, Route, UNICAST};
use tokio::task::spawn_blocking;

use super::message::Lease;

/// RT_TABLE_MAIN.
const MAIN: u32 = 254;
/// What the kernel says that is not there when it is to be removed: it went with its interface, or somebody took it.
const GONE: [i32; 3] = [libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENODEV];

/// One interface.
#[derive(Clone)]
pub struct Place {
    index: u32,
    has: Arc<Mutex<Has>>,
}

#[derive(Default)]
struct Has {
    address: Option<Prefix>,
    route: Option<Route>,
    is_closed: bool,
}

impl Place {
    /// The interface with this number, which has nothing.
    pub fn new(index: u32) -> Self {
        Self { index, has: Arc::default() }
    }

    /// It has what a lease says, and nothing of another.
    pub async fn take(&self, lease: Lease) -> Result<()> {
        let index = self.index;
        self.change(move |has, netlink| {
            if has.is_closed {
                return Ok(());
            }
            let address = Prefix { address: lease.address.into(), length: lease.length };
            let route = lease.router.map(|router| by(router, &lease, index));
            if has.address.is_some_and(|before| before != address) {
                has.remove(index, netlink)?;
            }
            if let Some(mtu) = lease.mtu {
                netlink.set_mtu(index, mtu.into()).with_context(|| format!("its MTU of {mtu}"))?;
            }
            has.address = Some(address);
            netlink.add_address(index, address).with_context(|| format!("its address {address}"))?;
            if let Some(old) = has.route.take_if(|old| Some(&*old) != route.as_ref()) {
                unless_gone(netlink.remove_route(&old)).context("removing its route")?;
            }
            if let Some(route) = route {
                has.route = Some(route.clone());
                netlink.add_route(&route).with_context(|| format!("its route by {:?}", route.hops))?;
            }
            Ok(())
        })
        .await
    }

    /// It has nothing any more.
    pub async fn leave(&self) -> Result<()> {
        let index = self.index;
        self.change(move |has, netlink| has.remove(index, netlink)).await
    }

    /// It has nothing any more, and gets nothing.
    pub async fn close(&self) -> Result<()> {
        let index = self.index;
        self.change(move |has, netlink| {
            has.is_closed = true;
            has.remove(index, netlink)
        })
        .await
    }

    async fn change(
        &self,
        work: impl FnOnce(&mut Has, &mut Netlink) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let has = Arc::clone(&self.has);
        let changing = move || {
            let mut has = has.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut has, &mut Netlink::open().context("opening netlink")?)
        };
        spawn_blocking(changing).await?
    }
}

impl Has {
    fn remove(&mut self, index: u32, netlink: &mut Netlink) -> Result<()> {
        if let Some(route) = self.route.take() {
            unless_gone(netlink.remove_route(&route)).context("removing its route")?;
        }
        if let Some(address) = self.address.take() {
            let removed = unless_gone(netlink.remove_address(index, address));
            removed.with_context(|| format!("removing the address {address}"))?;
        }
        Ok(())
    }
}

fn unless_gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| GONE.contains(&code)) => Ok(()),
        other => other,
    }
}

/// Everything else, by `router`, which may be in no network of the interface's own.
fn by(router: Ipv4Addr, lease: &Lease, interface: u32) -> Route {
    let network =
        |address: Ipv4Addr| u32::from(address).checked_shr(32 - u32::from(lease.length)).unwrap_or(0);
    Route {
        table: MAIN,
        kind: UNICAST,
        destination: Prefix { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), length: 0 },
        hops: vec![Hop {
            gateway: Some(router.into()),
            interface,
            is_onlink: network(router) != network(lease.address),
            weight: 0,
        }],
        source: None,
        scope: 0,
        metric: 0,
        mtu: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_router_elsewhere_is_on_the_link_all_the_same() {
        for (length, router, onlink) in [
            (24, [10, 0, 2, 2], false),
            (24, [10, 0, 3, 2], true),
            (32, [10, 0, 2, 2], true),
            (1, [1, 2, 3, 4], false),
        ] {
            let (address, server) = ([10, 0, 2, 15].into(), [10, 0, 2, 2].into());
            let lease = Lease { address, length, router: None, mtu: None, server, times: None };
            assert_eq!(by(router.into(), &lease, 3).hops[0].is_onlink, onlink, "{length} {router:?}");
        }
    }
}
