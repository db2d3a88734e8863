//! What comes first when a guest goes on elsewhere: its streams are gone, and it has to know that before it hears
//! anything else.
//!
//! The device says so by an event (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, section 5.10.6.7), once, and knows that the
//! driver has done its part when it gives the event's buffer back, since it does that last. Until then nothing goes
//! either way: a packet of ours could be taken for one of a stream that was, and one of the guest's be about it.

use std::io::Write;

use virtio_queue::Writer;

use super::super::{Broken, Signals, VirtQueue};
use crate::memory::RamSlice;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as its buffer has it.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Where the packets of a guest wait.
#[derive(Debug, PartialEq, Eq)]
pub struct Gate {
    state: State,
    /// Packets still to come that the guest sent before it knew.
    stale: u16,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    /// The guest is to be told.
    Due,
    /// It was told when it had offered so many buffers for events.
    Told(u16),
}

impl Gate {
    /// Closed for a driver that had streams elsewhere.
    pub fn new(moved: bool) -> Self {
        Self { state: if moved { State::Due } else { State::Open }, stale: 0 }
    }

    /// Whether packets go through.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether the next packet of the guest is from before it knew.
    pub fn is_stale(&mut self) -> bool {
        let stale = self.stale > 0;
        self.stale = self.stale.saturating_sub(1);
        stale
    }

    /// Goes on with telling the guest, and says whether packets go through.
    pub fn pass(
        &mut self,
        events: &mut VirtQueue,
        tx: &VirtQueue,
        signals: &Signals,
    ) -> Result<bool, Broken> {
        if self.state == State::Due {
            self.state = tell(events, signals)?;
        }
        if let State::Told(offered) = self.state
            && (!events.is_ready() || events.offered()? != offered)
        {
            self.state = State::Open;
            if tx.is_ready() {
                self.stale = tx.waiting()?;
            }
        }
        Ok(self.is_open())
    }
}

fn tell(events: &mut VirtQueue, signals: &Signals) -> Result<State, Broken> {
    // A driver without events has nothing that it could be told by.
    if !events.is_ready() {
        return Ok(State::Told(0));
    }
    let Some(chain) = events.pop()? else {
        events.await_more()?;
        return Ok(State::Due);
    };
    let (head, ram) = (chain.head_index(), chain.memory().clone());
    let mut writer: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
    writer.write_all(&TRANSPORT_RESET).map_err(|error| Broken(format!("a buffer for an event: {error}")))?;
    // Before the driver can give it back.
    let offered = events.await_more()?;
    events.push(head, TRANSPORT_RESET.len() as u32)?;
    events.notify(signals)?;
    Ok(State::Told(offered))
}
