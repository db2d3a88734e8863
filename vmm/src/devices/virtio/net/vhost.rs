//! vhost-net: the host's kernel serves a queue pair by itself, between guest RAM and a tap, without this process.
//!
//! The descriptor, of `/dev/vhost-net`, comes with that of the tap, as a process in its jail could not open it. Whoever has
//! the queues hands them over for a time, and has them back where the kernel has come to: while the machine stands still, the
//! kernel does too, so that nothing of it has to be known to go on elsewhere. It writes to guest RAM as this process would,
//! through the same mapping.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::super::signals::Silently;
use super::super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Signals, VirtQueue};
use super::{F_MRG_RXBUF, PAIRS_MAX};
use crate::event::Event;
use crate::memory::GuestRam;

/// Where the kernel gives it.
pub const PATH: &str = "/dev/vhost-net";
/// What of a driver's features the kernel has to know: how rings and headers look. The rest is the tap's.
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_MRG_RXBUF;
/// Of a pair, by the kernel's numbers.
const RX: usize = 0;
const TX: usize = 1;

/// One for each of `queues` queues of a tap.
pub fn open(queues: usize) -> io::Result<Vec<OwnedFd>> {
    let one = |_| std::fs::File::options().read(true).write(true).open(PATH).map(OwnedFd::from);
    (0..queues.min(PAIRS_MAX)).map(one).collect()
}

/// The kernel does not serve the queues: why not. They are as they were.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Interrupts are not made by an eventfd.
    #[error("its interrupt is no eventfd")]
    Interrupt,
    /// It does not know all that was agreed upon.
    #[error("the kernel lacks the features {0:#x}")]
    Features(u64),
    /// A queue, or RAM, is where it would not be found.
    #[error("a queue is not in one piece of RAM that this process has")]
    Scattered,
    /// Nobody knows where the kernel has come to.
    #[error("the kernel has a queue and does not give it back: {0}")]
    Lost(vhost::Error),
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        source: vhost::Error,
    },
    /// The host gave no descriptor.
    #[error("cannot make an eventfd: {0}")]
    Host(#[from] io::Error),
}

fn to(call: &'static str) -> impl Fn(vhost::Error) -> Error {
    move |source| Error::Call { call, source }
}

/// The device of the kernel, and the RAM for which it works.
struct Device<'a> {
    fd: BorrowedFd<'a>,
    ram: Arc<GuestRam>,
}

impl AsRawFd for Device<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Device<'_> {
    type AS = Arc<GuestRam>;

    fn mem(&self) -> &Self::AS {
        &self.ram
    }
}

impl Device<'_> {
    /// Has a queue be served on a tap, or no longer. When this returns the kernel is not at it any more.
    fn set_backend(&self, queue: usize, tap: Option<BorrowedFd<'_>>) -> vhost::Result<()> {
        // There are two.
        let file = vhost_vring_file { index: queue as u32, fd: tap.map_or(-1, |tap| tap.as_raw_fd()) };
        // SAFETY: the call reads one `vhost_vring_file`.
        let set = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) };
        Errno::result(set).map(drop).map_err(|errno| vhost::Error::IoctlError(errno.into()))
    }

    fn ready(&self, features: u64) -> Result<(), Error> {
        match self.set_owner() {
            // It is this process's from before.
            Err(vhost::Error::IoctlError(error)) if error.raw_os_error() == Some(libc::EBUSY) => {}
            other => other.map_err(to("VHOST_SET_OWNER"))?,
        }
        let wanted = features & FEATURES;
        let missing = wanted & !self.get_features().map_err(to("VHOST_GET_FEATURES"))?;
        if missing != 0 {
            return Err(Error::Features(missing));
        }
        self.set_features(wanted).map_err(to("VHOST_SET_FEATURES"))?;
        let region = |region: &<GuestRam as GuestMemory>::R| {
            Some(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.get_host_address(MemoryRegionAddress(0)).ok()? as u64,
                // It is not for another process.
                mmap_offset: 0,
                mmap_handle: -1,
            })
        };
        let regions: Option<Vec<_>> = self.ram.iter().map(region).collect();
        let regions = regions.ok_or(Error::Scattered)?;
        self.set_mem_table(&regions).map_err(to("VHOST_SET_MEM_TABLE"))
    }

    fn set_queue(
        &self,
        index: usize,
        queue: &VirtQueue,
        call: &EventFd,
        trouble: &EventFd,
    ) -> Result<(), Error> {
        let parts = queue.parts().ok_or(Error::Scattered)?;
        let config = VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: parts.descriptors,
            used_ring_addr: parts.used,
            avail_ring_addr: parts.available,
            log_addr: None,
        };
        self.set_vring_num(index, queue.size()).map_err(to("VHOST_SET_VRING_NUM"))?;
        self.set_vring_base(index, queue.taken()).map_err(to("VHOST_SET_VRING_BASE"))?;
        self.set_vring_addr(index, &config).map_err(to("VHOST_SET_VRING_ADDR"))?;
        self.set_vring_call(index, call).map_err(to("VHOST_SET_VRING_CALL"))?;
        self.set_vring_err(index, trouble).map_err(to("VHOST_SET_VRING_ERR"))?;
        self.set_vring_kick(index, &eventfd(queue.doorbell().as_fd())?).map_err(to("VHOST_SET_VRING_KICK"))
    }
}

/// Another descriptor of it, as a type that the calls take.
fn eventfd(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor was just made, and nobody else owns it.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// A pair that the kernel can serve, and does between [`Self::start`] and [`Self::end`], or until this is gone.
pub struct Lent<'a> {
    device: Device<'a>,
    /// Set when the driver has broken the rules.
    trouble: Event,
    _interrupts: Silently,
}

impl<'a> Lent<'a> {
    /// Tells the kernel's device `fd` of a pair's queues. All that was taken from them has been given back.
    pub fn new(
        fd: BorrowedFd<'a>,
        ram: &Arc<GuestRam>,
        [rx, tx]: [&VirtQueue; 2],
        features: u64,
        signals: &Arc<Signals>,
    ) -> Result<Self, Error> {
        let device = Device { fd, ram: Arc::clone(ram) };
        device.ready(features)?;
        let interrupts = signals.silently().ok_or(Error::Interrupt)?;
        let call = eventfd(interrupts.event().ok_or(Error::Interrupt)?)?;
        let trouble = Event::new()?;
        let end = eventfd(trouble.as_fd())?;
        device.set_queue(RX, rx, &call, &end)?;
        device.set_queue(TX, tx, &call, &end)?;
        Ok(Self { device, trouble, _interrupts: interrupts })
    }

    /// Has it serve them on a queue of a tap: nobody else does until [`Self::end`], which has to be asked for where it came
    /// to also when this fails.
    pub fn start(&self, tap: BorrowedFd<'_>) -> Result<(), Error> {
        let start = |queue| self.device.set_backend(queue, Some(tap));
        start(RX).and_then(|()| start(TX)).map_err(to("VHOST_NET_SET_BACKEND"))
    }

    /// Can be read when the driver has broken the rules.
    pub fn trouble(&self) -> BorrowedFd<'_> {
        self.trouble.as_fd()
    }

    /// It serves them no longer. Says how many requests of each were taken, and given back.
    pub fn end(self) -> Result<[u16; 2], Error> {
        let taken = |queue| {
            self.device.set_backend(queue, None)?;
            self.device.get_vring_base(queue)
        };
        let all = taken(RX).and_then(|rx| Ok([rx, taken(TX)?])).map_err(Error::Lost)?;
        // Indices have 16 bits.
        Ok(all.map(|base| base as u16))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        for queue in [RX, TX] {
            if let Err(error) = self.device.set_backend(queue, None) {
                log::error!("net: {error}");
            }
        }
    }
}
