//! What a processor is asked for while it stands still.
//!
//! Its state can be had, or replaced, by its own thread only. So whoever wants that leaves an order and wakes the thread,
//! which looks for one whenever it parks, and answers.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Go, Member};
use crate::arch::native::Registers;
use crate::hypervisor::{Error, Vcpu};

#[derive(Debug)]
enum Order<S> {
    Save(Sender<Result<S, Error>>),
    Restore(Box<S>, Sender<Result<(), Error>>),
    Look(Sender<Result<Registers, Error>>),
}

/// Where orders for one processor are left.
#[derive(Debug)]
pub struct Desk<S> {
    order: Mutex<Option<Order<S>>>,
}

impl<S> Default for Desk<S> {
    fn default() -> Self {
        Self { order: Mutex::new(None) }
    }
}

impl<S> Desk<S> {
    fn order(&self) -> MutexGuard<'_, Option<Order<S>>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the processor's state. The caller nudges the [epoch](super::Epoch) afterwards. The answer comes
    /// when the processor parks, or never, when its thread ends or another one asks.
    pub fn ask(&self) -> Receiver<Result<S, Error>> {
        let (answer, answers) = channel();
        *self.order() = Some(Order::Save(answer));
        answers
    }

    /// Has the processor become what another one was. The same holds as for [`Desk::ask`].
    pub fn put(&self, state: Box<S>) -> Receiver<Result<(), Error>> {
        let (answer, answers) = channel();
        *self.order() = Some(Order::Restore(state, answer));
        answers
    }

    /// Asks for the processor's registers, for people. The same holds as for [`Desk::ask`].
    pub fn look(&self) -> Receiver<Result<Registers, Error>> {
        let (answer, answers) = channel();
        *self.order() = Some(Order::Look(answer));
        answers
    }

    /// Whether there is an order.
    pub(super) fn is_waiting(&self) -> bool {
        self.order().is_some()
    }

    fn take(&self) -> Option<Order<S>> {
        self.order().take()
    }
}

/// Waits until the word says run and `ready` says so too, and does what is ordered meanwhile.
pub(super) fn wait<V: Vcpu>(
    vcpu: &mut V,
    desk: &Desk<V::State>,
    member: &Member,
    mut ready: impl FnMut() -> bool,
) -> Go {
    loop {
        match member.wait(&mut ready, || desk.is_waiting()) {
            Go::On => return Go::On,
            Go::Away => match desk.take() {
                // Nobody may be waiting for the answer any more.
                Some(Order::Save(answer)) => drop(answer.send(vcpu.save())),
                Some(Order::Restore(state, answer)) => drop(answer.send(vcpu.restore(&state))),
                Some(Order::Look(answer)) => drop(answer.send(vcpu.registers())),
                None => return Go::Away,
            },
        }
    }
}
