//! The memory of a machine: what it boots with, what it may be given later, and what is beside them.

use std::sync::Arc;

use vm_memory::GuestAddress;

use super::Error;
use super::shell::{Ahead, Pages};
use crate::arch::native::layout;
use crate::devices::virtio::mem::{BLOCK, Handle, Mem};
use crate::memory::{self, GuestRam};
use crate::snapshot::{self, Shape, Snapshot};

/// Linux adds memory in sections of this size or of a multiple; a part of one would be no use to it.
const SECTION: u64 = 128 << 20;

/// All memory of a machine, in the hands of the hypervisor and of the devices from the start.
pub(super) struct Ram {
    pub(super) all: Arc<GuestRam>,
    /// Of it, what the kernel is loaded into and told of.
    pub(super) boot: Arc<GuestRam>,
    /// Of it, where memory can be plugged, as (address, length).
    pluggable: Option<(u64, u64)>,
    /// Of it, what a guest that goes on will use at once.
    ahead: Vec<Pages>,
}

impl Ram {
    /// For a guest that boots.
    pub(super) fn new(shape: &Shape) -> Result<Self, Error> {
        let Layout { regions, others, pluggable } = Layout::of(shape);
        let all = memory::anonymous(&regions)?;
        let boot = others.iter().try_fold(all.clone(), |ram, (addr, len)| {
            ram.remove_region(GuestAddress(*addr), *len).map(|(ram, _)| ram)
        });
        let boot = boot.map_err(|error| Error::Tables(format!("cannot lay out guest RAM: {error}")))?;
        Ok(Self { all: Arc::new(all), boot: Arc::new(boot), pluggable, ahead: Vec::new() })
    }

    /// Of a snapshot, which must have what a machine of its shape has.
    pub(super) fn restored(snapshot: &Snapshot) -> Result<Self, Error> {
        let Layout { regions, pluggable, .. } = Layout::of(&snapshot.state.shape);
        let found: Vec<_> = snapshot.state.ram.iter().map(|region| (region.addr, region.len)).collect();
        if found != regions {
            let why = format!("its RAM is at {found:#x?}, and that of such a machine at {regions:#x?}");
            return Err(snapshot.damaged(why).into());
        }
        let all = Arc::new(snapshot::restore_memory(&snapshot.memory, &snapshot.state.ram)?);
        let hint = snapshot.ahead.clone().unwrap_or_default();
        let regions = &snapshot.state.ram;
        let places = |extents: &[snapshot::Extent], written| {
            let within: Vec<_> = snapshot::in_regions(regions, extents.iter().copied()).collect();
            within.into_iter().map(move |(addr, extent)| Pages { addr, len: extent.len, written })
        };
        let ahead = places(&hint.writes, true).chain(places(&hint.reads, false)).collect();
        if !hint.writes.is_empty() {
            snapshot::write_ahead(&all, regions, hint.writes);
        }
        Ok(Self { boot: Arc::clone(&all), all, pluggable, ahead })
    }

    /// What each of so many processors is to bring before it runs: as much as any other.
    pub(super) fn ahead(&self, processors: usize) -> impl Iterator<Item = Ahead> + use<> {
        let mut shares = vec![(0, Vec::new()); processors];
        for pages in &self.ahead {
            if let Some((bytes, share)) = shares.iter_mut().min_by_key(|(bytes, _)| *bytes) {
                *bytes += pages.len;
                share.push(*pages);
            }
        }
        let ram = Arc::clone(&self.all);
        shares.into_iter().map(move |(_, pages)| Ahead { ram: Arc::clone(&ram), pages })
    }

    /// The device that plugs memory, where there is some to plug.
    pub(super) fn device(&self) -> Option<Mem> {
        self.pluggable.map(|(addr, len)| Mem::new(addr, len))
    }
}

/// Where the memory of a machine is, as (address, length).
struct Layout {
    /// All of it, by address.
    regions: Vec<(u64, u64)>,
    /// Of it, what the kernel is not told of at its boot.
    others: Vec<(u64, u64)>,
    pluggable: Option<(u64, u64)>,
}

impl Layout {
    fn of(shape: &Shape) -> Self {
        let more = shape.memory_max.map_or(0, |max| max.saturating_sub(shape.memory));
        let pluggable = (more > 0).then(|| (layout::pluggable(shape.memory), more.next_multiple_of(SECTION)));
        let others: Vec<_> = layout::BESIDE_RAM.iter().copied().chain(pluggable).collect();
        let boot = layout::ram(shape.memory);
        let mut regions: Vec<_> = boot.into_iter().chain(others.iter().copied()).collect();
        regions.sort_unstable();
        Self { regions, others, pluggable }
    }
}

/// What a machine's memory is and can be, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryStatus {
    /// What it booted with, which is the least.
    pub boot: u64,
    /// What it can be asked to use at most.
    pub max: u64,
    /// What it was asked to use.
    pub requested: u64,
    /// What it uses.
    pub actual: u64,
}

/// Changes how much memory a machine uses.
#[derive(Debug)]
pub(super) struct Extent {
    boot: u64,
    max: u64,
    mem: Option<Handle>,
}

impl Extent {
    pub(super) fn new(shape: &Shape, mem: Option<Handle>) -> Self {
        Self { boot: shape.memory, max: shape.memory_max.unwrap_or(shape.memory), mem }
    }

    pub(super) fn resize(&self, bytes: u64) -> Result<(), Error> {
        let refused = |why| Err(Error::Memory { bytes, why });
        if bytes < self.boot {
            return refused("less than the machine has booted with; use the balloon for that");
        }
        if bytes > self.max {
            return refused("more than the machine was built for; build it with a larger memory_max");
        }
        match &self.mem {
            None => Ok(()),
            Some(mem) => mem
                .request(bytes - self.boot)
                .or_else(|_| refused("it must differ from the memory at boot by a multiple of 2 MiB")),
        }
    }

    pub(super) fn status(&self) -> MemoryStatus {
        let (requested, plugged) = self.mem.as_ref().map_or((0, 0), |mem| (mem.requested(), mem.plugged()));
        MemoryStatus {
            boot: self.boot,
            max: self.max,
            requested: self.boot + requested,
            actual: self.boot + plugged,
        }
    }
}

/// Whether a machine can have `memory` and grow to `max`.
pub(super) fn check_max(memory: u64, max: u64) -> Result<(), &'static str> {
    match max.checked_sub(memory) {
        None => Err("what a machine can grow to must not be less than what it has"),
        Some(more) if !more.is_multiple_of(BLOCK) => {
            Err("what a machine can grow to must be more than what it has by a multiple of 2 MiB")
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::PsciBy;

    const MIB: u64 = 1 << 20;

    fn extent(max: u64) -> Extent {
        let mem = (max > 256).then(|| Mem::new(1 << 32, (max - 256) * MIB).handle());
        Extent { boot: 256 * MIB, max: max * MIB, mem }
    }

    #[test]
    fn what_is_used_first_is_brought_by_all_processors_alike() {
        let all = Arc::new(memory::anonymous(&[(0, 16 * MIB)]).unwrap());
        let pages = |index: u64| Pages {
            addr: index * MIB,
            len: (1 + index % 2) * MIB / 2,
            written: index.is_multiple_of(3),
        };
        let ahead = (0..12).map(pages).collect();
        let ram = Ram { boot: Arc::clone(&all), all, pluggable: None, ahead };
        for processors in [1, 2, 4, 32] {
            let shares: Vec<_> = ram.ahead(processors).map(|share| share.pages).collect();
            let bytes: Vec<u64> =
                shares.iter().map(|share| share.iter().map(|pages| pages.len).sum()).collect();
            assert_eq!((shares.len(), bytes.iter().sum::<u64>()), (processors, 9 * MIB));
            let uneven = bytes.iter().max().unwrap() - bytes.iter().min().unwrap();
            assert!(uneven <= MIB, "{bytes:?}");
            let mut brought: Vec<_> = shares.iter().flatten().map(|pages| pages.addr).collect();
            brought.sort_unstable();
            assert_eq!(brought, (0..12).map(|index| index * MIB).collect::<Vec<_>>());
        }
    }

    #[test]
    fn memory_grows_and_shrinks_between_its_bounds() {
        for (max, bytes, word) in [
            (256, 256 * MIB, None),
            (256, 258 * MIB, Some("memory_max")),
            (256, 254 * MIB, Some("balloon")),
            (1024, 1024 * MIB, None),
            (1024, 256 * MIB, None),
            (1024, 258 * MIB, None),
            (1024, 257 * MIB, Some("multiple")),
            (1024, 1026 * MIB, Some("memory_max")),
            (1024, 0, Some("balloon")),
            (1024, u64::MAX, Some("memory_max")),
        ] {
            let extent = extent(max);
            match (extent.resize(bytes), word) {
                (Ok(()), None) => {
                    let status = extent.status();
                    assert_eq!((status.requested, status.actual), (bytes, 256 * MIB));
                }
                (Err(error), Some(word)) => assert!(error.to_string().contains(word), "{error}"),
                (result, word) => panic!("{bytes}: {result:?}, expected {word:?}"),
            }
        }
    }

    #[test]
    fn the_kernel_is_told_of_nothing_but_what_it_boots_with() {
        for memory in [128 * MIB, 4096 * MIB] {
            for memory_max in [None, Some(memory), Some(memory + 2 * MIB), Some(memory + 1024 * MIB)] {
                let shape = Shape { vcpus: 1, memory, memory_max, psci: PsciBy::default() };
                let ram = Ram::new(&shape).unwrap();
                assert_eq!(memory::size(&ram.boot), memory);
                let more = memory_max.map_or(0, |max| (max - memory).next_multiple_of(SECTION));
                let beside: u64 = layout::BESIDE_RAM.iter().map(|(_, len)| len).sum();
                assert_eq!(memory::size(&ram.all), memory + more + beside);
                assert_eq!(ram.device().is_some(), more > 0);
            }
        }
    }
}
