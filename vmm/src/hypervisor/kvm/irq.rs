//! Wires into the in-kernel interrupt controller, and doorbells out of the guest.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{Error, IrqLine, Trigger};
use super::vm::VmShare;
use super::{KvmVm, arch, vm as kvm_vm};
use crate::event::Event;

pub(super) fn line(vm: &KvmVm, line: u32, trigger: Trigger) -> Result<Arc<dyn IrqLine>, Error> {
    match trigger {
        Trigger::Level => Ok(Arc::new(Level { vm: vm.share(), line })),
        Trigger::Edge => {
            let event = EventFd::new(EFD_NONBLOCK).map_err(|source| Error::Call {
                call: "eventfd",
                object: format!("interrupt line {line}"),
                source,
            })?;
            kvm_vm::call("KVM_IRQFD", vm.fd().register_irqfd(&event, line))?;
            Ok(Arc::new(Edge { event, line }))
        }
    }
}

pub(super) fn doorbell(vm: &KvmVm, addr: u64, value: u32, event: &Event) -> Result<(), Error> {
    let clone = event.as_fd().try_clone_to_owned().map_err(|source| Error::Call {
        call: "dup",
        object: format!("the doorbell at {addr:#x}"),
        source,
    })?;
    // SAFETY: the descriptor was just made and nobody else owns it. The kernel keeps the eventfd
    // itself, so that this one may be closed at the end.
    let clone = unsafe { EventFd::from_raw_fd(clone.into_raw_fd()) };
    let registered = vm.fd().register_ioevent(&clone, &IoEventAddress::Mmio(addr), value);
    kvm_vm::call("KVM_IOEVENTFD", registered)
}

struct Level {
    vm: VmShare,
    line: u32,
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Level({})", self.line)
    }
}

impl IrqLine for Level {
    fn set(&self, high: bool) -> Result<(), Error> {
        self.vm.fd.set_irq_line(arch::irq_number(self.line), high).map_err(|errno| Error::Call {
            call: "KVM_IRQ_LINE",
            object: format!("interrupt line {}", self.line),
            source: errno.into(),
        })
    }
}

#[derive(Debug)]
struct Edge {
    event: EventFd,
    line: u32,
}

impl IrqLine for Edge {
    fn set(&self, high: bool) -> Result<(), Error> {
        if !high {
            return Ok(());
        }
        match self.event.write(1) {
            Ok(()) => Ok(()),
            // The counter is full: the kernel has yet to take 2^64 - 2 earlier interrupts, and one more
            // would not be told from them.
            Err(full) if full.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(source) => {
                Err(Error::Call { call: "write", object: format!("interrupt line {}", self.line), source })
            }
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor is `event`'s, which lives as long as what is borrowed here.
        Some(unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) })
    }
}
