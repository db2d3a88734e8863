//! A client of DHCP (RFC 2131), for interfaces behind which somebody gives addresses. A lease is asked for before its
//! container is made, renewed as long as it runs, and what came with it goes with it.
//!
//! Nobody is asked whether the address is in use (section 4.4.1): the machine is alone in such a network.

mod message;
mod place;
mod socket;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::time::Duration;

use agent_api::agent::Interface;
use anyhow::{Context, Error, Result, bail, ensure};
use rtnl::{Mac, Netlink};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use message::{Answer, Asker, Lease, Question};
use place::Place;
use socket::{EVERYBODY, PacketSocket};

/// How long a container waits for its first address.
const FIRST: Duration = Duration::from_secs(15);
/// Between two questions, at first; each pause is twice the last.
const PAUSE: Duration = Duration::from_millis(200);
/// And at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// An answer is listened for so long, as all packets of the interface are meanwhile.
const LISTEN: Duration = Duration::from_secs(4);

/// The leases of the machine.
#[derive(Default)]
pub struct Leases(HashMap<Mac, Held>);

struct Held {
    number: u64,
    place: Place,
    /// Who renews it; ends with this.
    renewal: JoinSet<()>,
}

/// An interface that is to have one.
pub struct Wanted {
    /// The address that it came with.
    permanent: Mac,
    /// By which the server knows it.
    mac: Mac,
    name: String,
    number: u64,
}

impl Leases {
    /// The interfaces that are to have one.
    pub fn wanted(interfaces: &[Interface]) -> Result<Vec<Wanted>> {
        let wanted = interfaces.iter().filter(|interface| interface.lease != 0).map(|interface| {
            let permanent = interface.mac.parse().map_err(Error::msg)?;
            let mac = match interface.new_mac.as_str() {
                "" => permanent,
                text => text.parse().map_err(Error::msg)?,
            };
            ensure!(!interface.down, "{} is turned off, and cannot have a lease", interface.name);
            Ok(Wanted { permanent, mac, name: interface.name.clone(), number: interface.lease })
        });
        wanted.collect()
    }

    /// Gives up all others, before their interfaces are changed.
    pub async fn end_others(&mut self, wanted: &[Wanted]) -> Result<()> {
        let stays = |permanent: &Mac, held: &Held| {
            wanted.iter().any(|wanted| wanted.permanent == *permanent && wanted.number == held.number)
        };
        let gone: Vec<_> =
            self.0.iter().filter(|(mac, held)| !stays(mac, held)).map(|(mac, _)| *mac).collect();
        for permanent in gone {
            if let Some(Held { place, renewal, .. }) = self.0.remove(&permanent) {
                drop(renewal);
                place.close().await?;
            }
        }
        Ok(())
    }

    /// Waits for those that are not there yet.
    pub async fn begin(&mut self, wanted: Vec<Wanted>) -> Result<()> {
        for Wanted { permanent, mac, name, number } in wanted {
            if self.0.contains_key(&permanent) {
                continue;
            }
            let index = Netlink::open()?.index_of(&name)?;
            let index = index.with_context(|| format!("there is no interface {name:?}"))?;
            let (client, place) = (Client { index, mac }, Place::new(index));
            let found = client.acquire(Instant::now() + FIRST).await;
            let found = found.with_context(|| format!("asking for an address of {name} by DHCP"))?;
            let Some(first) = found else {
                bail!(
                    "no DHCP server has given an address to {name} within {FIRST:?}; look after who is behind its \
                     socket, or give it one (network.address)"
                );
            };
            place.take(first.lease).await.with_context(|| format!("setting up {name} as DHCP says"))?;
            log::info!(
                "{name} has {}/{} from {}",
                first.lease.address,
                first.lease.length,
                first.lease.server
            );
            let mut renewal = JoinSet::new();
            renewal.spawn(client.keep(first, place.clone(), name));
            self.0.insert(permanent, Held { number, place, renewal });
        }
        Ok(())
    }
}

/// A lease, when it was asked for, and the hardware address of who has given it.
#[derive(Clone, Copy)]
struct Got {
    lease: Lease,
    asked: Instant,
    from: Mac,
}

struct Client {
    index: u32,
    mac: Mac,
}

impl Client {
    /// A new lease. None when nobody has given one by then.
    async fn acquire(&self, until: Instant) -> Result<Option<Got>> {
        while Instant::now() < until {
            let asker = self.asker()?;
            let offer = |answer| if let Answer::Offer(lease) = answer { Some(lease) } else { None };
            let offered = self.converse(&asker, Question::Discover, None, PAUSE, until, offer).await?;
            let Some((offer, ..)) = offered else { break };
            let request = Question::Request { address: offer.address, server: offer.server };
            // One who has offered answers soon, or somebody else may.
            let soon = until.min(Instant::now() + 2 * LISTEN);
            let answered = self.converse(&asker, request, None, PAUSE, soon, decision(offer.address)).await?;
            if let Some((Some(lease), asked, from)) = answered {
                return Ok(Some(Got { lease, asked, from }));
            }
        }
        Ok(None)
    }

    /// Renews a lease again and again, and asks for another when it has ended.
    async fn keep(self, mut got: Got, place: Place, name: String) {
        loop {
            let Some(times) = got.lease.times else { return std::future::pending().await };
            sleep_until(got.asked + times.renew).await;
            let next = self.renew(&got).await.unwrap_or_else(|error| {
                log::warn!("renewing the lease of {name}: {error:#}");
                None
            });
            got = if let Some(next) = next {
                next
            } else {
                log::warn!("{name} has lost its address {}: its lease was not renewed", got.lease.address);
                if let Err(error) = place.leave().await {
                    log::warn!("taking {} from {name}: {error:#}", got.lease.address);
                }
                self.again().await
            };
            if let Err(error) = place.take(got.lease).await {
                log::warn!("setting up {name} as DHCP says: {error:#}");
            }
        }
    }

    /// None when it is over, after it has ended or as its server says.
    async fn renew(&self, got: &Got) -> Result<Option<Got>> {
        let Some(times) = got.lease.times else { return Ok(None) };
        let (address, asker) = (got.lease.address, self.asker()?);
        let theirs = Some((got.from, got.lease.server));
        for (whom, until) in [(theirs, times.rebind), (None, times.end)] {
            let (until, question) = (got.asked + until, Question::Renew(address));
            let answered = self.converse(&asker, question, whom, LISTEN, until, decision(address)).await?;
            if let Some((lease, asked, from)) = answered {
                return Ok(lease.map(|lease| Got { lease, asked, from }));
            }
        }
        // Nobody has said anything, so it is held as long as it was given.
        sleep_until(got.asked + times.end).await;
        Ok(None)
    }

    /// A new lease, whenever somebody gives one.
    async fn again(&self) -> Got {
        loop {
            let next = Instant::now() + LONGEST_PAUSE;
            match self.acquire(next).await {
                Ok(Some(got)) => return got,
                Ok(None) => {}
                Err(error) => log::debug!("asking for an address: {error:#}"),
            }
            sleep_until(next).await;
        }
    }

    fn asker(&self) -> Result<Asker> {
        let mut xid = [0; 4];
        let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut xid));
        random.context("drawing a number from /dev/urandom")?;
        Ok(Asker { mac: self.mac, xid: u32::from_ne_bytes(xid) })
    }

    /// Asks until somebody has answered what is `wanted`, or it is too late. Says when was asked and who has answered.
    async fn converse<T>(
        &self,
        asker: &Asker,
        question: Question,
        whom: Option<(Mac, Ipv4Addr)>,
        mut pause: Duration,
        until: Instant,
        wanted: impl Fn(Answer) -> Option<T>,
    ) -> io::Result<Option<(T, Instant, Mac)>> {
        let packet = asker.ask(question, whom.map(|(_, address)| address));
        let to = whom.map_or(EVERYBODY, |(mac, _)| mac);
        loop {
            let asked = Instant::now();
            if asked >= until {
                return Ok(None);
            }
            let next = (asked + pause).min(until);
            let socket = PacketSocket::open(self.index)?;
            // A cable that is not in yet, or is out, is no reason to give up.
            if let Err(error) = socket.send(&packet, to) {
                log::debug!("asking by DHCP: {error}");
            }
            let listened = next.min(asked + LISTEN);
            // Whoever sends without end is listened to no longer, either.
            while Instant::now() < listened {
                let Ok(received) = timeout_at(listened, socket.receive()).await else { break };
                // An interface that is turned off says so once.
                let Ok((packet, from)) = received else { break };
                if let Some(found) = asker.hear(&packet).and_then(&wanted) {
                    return Ok(Some((found, asked, from.unwrap_or(EVERYBODY))));
                }
            }
            drop(socket);
            sleep_until(next).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Yes, or no, to one who wants this address.
fn decision(address: Ipv4Addr) -> impl Fn(Answer) -> Option<Option<Lease>> {
    move |answer| match answer {
        Answer::Ack(lease) if lease.address == address => Some(Some(lease)),
        Answer::Nak => Some(None),
        _ => None,
    }
}
