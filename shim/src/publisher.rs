//! Events on their way to containerd: in order, each until containerd has it.
//!
//! A containerd that restarts is away for a while; its socket is where it was when it is back. So an event whose
//! sending failed stays at the head of the queue, and the connection is made anew. Only an answer that refuses the
//! event itself, again and again, gives it up.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use log::warn;
use protobuf::MessageField;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{sleep, timeout};
use ttrpc::context;

use crate::deadlines;
use crate::events::Event;

/// Events that wait at most; beyond them the oldest go, loudly.
const WAITING: usize = 8192;
/// How often an event is offered to a containerd that refuses it.
const OFFERS: u32 = 5;
/// The longest pause between attempts to reach containerd.
const PAUSE: Duration = Duration::from_secs(2);

/// Publishes what comes until all senders are gone and everything is sent.
pub async fn publish(address: String, namespace: String, mut events: UnboundedReceiver<Event>) {
    let mut publisher = Publisher { address, client: None };
    let mut queue: VecDeque<Envelope> = VecDeque::new();
    let mut more = true;
    loop {
        let Some(head) = queue.pop_front() else {
            match events.recv().await {
                Some(event) => enqueue(&mut queue, &event, &namespace),
                None => return,
            }
            continue;
        };
        let mut delivery = pin!(publisher.deliver(head));
        loop {
            tokio::select! {
                () = &mut delivery => break,
                // What comes meanwhile gets the time at which it came.
                event = events.recv(), if more => match event {
                    Some(event) => enqueue(&mut queue, &event, &namespace),
                    None => more = false,
                },
            }
        }
    }
}

fn enqueue(queue: &mut VecDeque<Envelope>, event: &Event, namespace: &str) {
    match event.envelope(namespace) {
        Ok(envelope) => queue.push_back(envelope),
        Err(error) => warn!("an event cannot be written: {error}: {event:?}"),
    }
    if queue.len() > WAITING {
        let lost = queue.pop_front();
        warn!(
            "{WAITING} events wait for containerd; the oldest is given up: {:?}",
            lost.map(|lost| lost.topic)
        );
    }
}

struct Publisher {
    address: String,
    client: Option<EventsClient>,
}

impl Publisher {
    /// Returns when containerd has it, or will never have it.
    async fn deliver(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
        let (mut refusals, mut pause) = (0, Duration::from_millis(20));
        loop {
            match timeout(deadlines::EVENT, self.send(&request)).await {
                Ok(Ok(())) => return,
                Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                    refusals += 1;
                    if refusals == OFFERS {
                        warn!("containerd refuses an event on {topic}: {}", status.message);
                        return;
                    }
                }
                _ => self.client = None,
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE);
        }
    }

    async fn send(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = if let Some(client) = &self.client {
            client
        } else {
            let address = self.address.strip_prefix("unix://").unwrap_or(&self.address);
            let client = Client::connect(&format!("unix://{address}")).await?;
            self.client.insert(EventsClient::new(client))
        };
        let nanoseconds = i64::try_from(deadlines::EVENT.as_nanos()).unwrap_or(i64::MAX);
        client.forward(context::with_timeout(nanoseconds), request).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::TaskStart;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use tokio::sync::mpsc::unbounded_channel;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    #[derive(Clone, Default)]
    struct Containerd(Arc<Mutex<Vec<u32>>>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            use protobuf::Message;
            let event = TaskStart::parse_from_bytes(&request.envelope.event.value).unwrap();
            self.0.lock().unwrap().push(event.pid);
            Ok(Empty::default())
        }
    }

    async fn serve(path: &Path, containerd: &Containerd) -> Server {
        let _ = std::fs::remove_file(path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(containerd.clone())));
        server.start().await.unwrap();
        server
    }

    fn event(pid: u32) -> Event {
        Event::Start(TaskStart { pid, ..TaskStart::default() })
    }

    /// containerd is not there yet, comes, goes, and comes back.
    #[tokio::test]
    async fn none_is_lost_and_all_are_in_order() {
        let path = std::env::temp_dir().join(format!("publisher-{}.sock", std::process::id()));
        let containerd = Containerd::default();
        let (send, receive) = unbounded_channel();
        let publishing = tokio::spawn(publish(path.display().to_string(), "ns".into(), receive));
        for pid in 0..10 {
            send.send(event(pid)).unwrap();
        }
        let mut server = serve(&path, &containerd).await;
        while containerd.0.lock().unwrap().len() < 10 {
            sleep(Duration::from_millis(10)).await;
        }
        server.shutdown().await.unwrap();
        for pid in 10..20 {
            send.send(event(pid)).unwrap();
        }
        sleep(Duration::from_millis(50)).await;
        let _server = serve(&path, &containerd).await;
        drop(send);
        timeout(Duration::from_secs(20), publishing).await.unwrap().unwrap();
        let mut seen = containerd.0.lock().unwrap().clone();
        seen.dedup();
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
        std::fs::remove_file(&path).unwrap();
    }
}
