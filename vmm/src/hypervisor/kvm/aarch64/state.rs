//! All that there is of a processor and of a machine, and in which order KVM wants to take it.

use kvm_bindings::{kvm_mp_state, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::super::super::Error;
use super::super::vm::unfit;
use super::super::{KvmVcpu, KvmVm};
use super::gic::Gic;
use super::registers::{Registers, TIMER_CNT};
use super::{FEATURES, get};

/// A processor, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What it was made with. SVE would be among them, and then the vector length would have to be set and sealed
    /// before anything else.
    features: u32,
    mp_state: u32,
    registers: Registers,
    /// CNTVCT_EL0.
    count: u64,
    /// Where KVM tells of them.
    events: Option<Events>,
}

/// `struct kvm_vcpu_events`; names are those of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Events {
    serror_pending: u8,
    serror_has_esr: u8,
    ext_dabt_pending: u8,
    serror_esr: u64,
}

impl VcpuState {
    pub(in super::super) fn save(vcpu: &KvmVcpu) -> Result<Self, Error> {
        let events = vcpu
            .vm
            .fd
            .check_extension(Cap::VcpuEvents)
            .then(|| vcpu.call("KVM_GET_VCPU_EVENTS", vcpu.fd().get_vcpu_events()))
            .transpose()?;
        Ok(Self {
            features: FEATURES,
            registers: Registers::save(vcpu)?,
            count: get(vcpu, TIMER_CNT)?,
            mp_state: vcpu.call("KVM_GET_MP_STATE", vcpu.fd().get_mp_state())?.mp_state,
            events: events.map(|events| Events {
                serror_pending: events.exception.serror_pending,
                serror_has_esr: events.exception.serror_has_esr,
                ext_dabt_pending: events.exception.ext_dabt_pending,
                serror_esr: events.exception.serror_esr,
            }),
        })
    }

    pub(in super::super) fn restore(&self, vcpu: &KvmVcpu) -> Result<(), Error> {
        if self.features != FEATURES {
            return Err(vcpu.unfit(format!(
                "it was made with features {:#x}, those of this machine are made with {FEATURES:#x}",
                self.features
            )));
        }
        self.registers.restore(vcpu)?;
        vcpu.vm.arch.counter.resume(vcpu, self.count)?;
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        vcpu.call("KVM_SET_MP_STATE", vcpu.fd().set_mp_state(mp_state))?;
        if let Some(Events { serror_pending, serror_has_esr, ext_dabt_pending, serror_esr }) = self.events {
            let exception = kvm_vcpu_events__bindgen_ty_1 {
                serror_pending,
                serror_has_esr,
                ext_dabt_pending,
                serror_esr,
                ..kvm_vcpu_events__bindgen_ty_1::default()
            };
            let events = kvm_vcpu_events { exception, ..kvm_vcpu_events::default() };
            vcpu.call("KVM_SET_VCPU_EVENTS", vcpu.fd().set_vcpu_events(&events))?;
        }
        Ok(())
    }
}

/// All that there is of a machine beside its processors. Its counter is in their states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Where there is one.
    gic: Option<Gic>,
}

impl VmState {
    pub(in super::super) fn save(vm: &KvmVm) -> Result<Self, Error> {
        let gic = vm.plan().interrupt_controller.then(|| Gic::save(vm)).transpose()?;
        Ok(Self { gic })
    }

    pub(in super::super) fn restore(&self, vm: &KvmVm) -> Result<(), Error> {
        vm.shared().counter.settle(vm)?;
        match (&self.gic, vm.plan().interrupt_controller) {
            (Some(gic), true) => gic.restore(vm),
            (None, false) => Ok(()),
            (Some(_), false) => Err(unfit("it has a GIC, and this machine has none")),
            (None, true) => Err(unfit("it has no GIC, and this machine has one")),
        }
    }
}

#[cfg(test)]
mod tests;
