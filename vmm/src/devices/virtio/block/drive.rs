//! How a disk gets into a device, and out of it.
//!
//! A driver asks once, when it begins, what kind of disk it has. So a disk comes and goes only while no driver is at
//! work, and whoever puts one in has the guest's driver begin afterwards.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::medium::Medium;
#[cfg(target_os = "linux")]
use super::uring::Uring;

/// A disk was not put in, or not taken out. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unplaced {
    /// There is one.
    #[error("there is a disk in it: take that out first")]
    Full,
    /// A driver is at work.
    #[error(
        "its guest uses it: have the guest let go of it first (/sys/bus/virtio/drivers/virtio_blk/unbind)"
    )]
    Used,
}

/// Where a device has its disk.
#[derive(Debug)]
pub(super) struct Bay {
    /// It takes others than it was made with.
    drive: bool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    medium: Option<Medium>,
    /// It was put in after the device was made.
    later: bool,
    /// A driver is at work, with what there was when it began.
    used: bool,
}

impl Bay {
    pub(super) fn fixed(medium: Medium) -> Self {
        let inner = Inner { medium: Some(medium), ..Inner::default() };
        Self { drive: false, inner: Mutex::new(inner) }
    }

    pub(super) fn drive(medium: Option<Medium>) -> Self {
        Self { drive: true, inner: Mutex::new(Inner { medium, ..Inner::default() }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_drive(&self) -> bool {
        self.drive
    }

    /// What is in it.
    pub(super) fn look<T>(&self, at: impl FnOnce(Option<&Medium>) -> T) -> T {
        at(self.inner().medium.as_ref())
    }

    /// A driver begins with what is in it.
    pub(super) fn take_up<T>(&self, with: impl FnOnce(Option<&Medium>) -> T) -> T {
        let mut inner = self.inner();
        inner.used = true;
        with(inner.medium.as_ref())
    }

    /// No driver is at work.
    pub(super) fn let_go(&self) {
        self.inner().used = false;
    }

    /// What was put in later is not there any more.
    pub(super) fn without_later(&self) {
        let mut inner = self.inner();
        if inner.later {
            *inner = Inner::default();
        }
    }
}

/// What disks are put into and taken out of. It stays valid when the device is gone, and does nothing then.
#[derive(Debug, Clone)]
pub struct Drive(Arc<Bay>);

impl Drive {
    pub(super) fn of(bay: &Arc<Bay>) -> Option<Self> {
        bay.drive.then(|| Self(Arc::clone(bay)))
    }

    /// Puts a disk in. The guest sees it when its driver begins.
    pub fn insert(&self, medium: Medium) -> Result<(), Unplaced> {
        let mut inner = self.0.inner();
        if inner.medium.is_some() {
            return Err(Unplaced::Full);
        }
        if inner.used {
            return Err(Unplaced::Used);
        }
        *inner = Inner { medium: Some(medium), later: true, used: false };
        Ok(())
    }

    /// Takes the disk out, if there is one; says whether there was.
    pub fn eject(&self) -> Result<bool, Unplaced> {
        let mut inner = self.0.inner();
        if inner.medium.is_some() && inner.used {
            return Err(Unplaced::Used);
        }
        Ok(inner.medium.take().is_some())
    }
}

/// Rings of io_uring that disks use while they are at work. They are made before a process gives up the right to.
#[derive(Debug, Clone, Default)]
pub struct Rings {
    #[cfg(target_os = "linux")]
    free: Arc<Mutex<Vec<Uring>>>,
}

impl Rings {
    /// So many, or fewer where the host does not want that: disks do without then.
    pub fn new(count: usize) -> Self {
        #[cfg(target_os = "linux")]
        {
            let made = (0..count).map_while(|_| {
                Uring::new().inspect_err(|error| log::debug!("no io_uring for disks: {error}")).ok()
            });
            Self { free: Arc::new(Mutex::new(made.collect())) }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = count;
            Self::default()
        }
    }

    #[cfg(target_os = "linux")]
    fn free(&self) -> MutexGuard<'_, Vec<Uring>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(target_os = "linux")]
    pub(super) fn take(&self) -> Option<Uring> {
        self.free().pop()
    }

    #[cfg(target_os = "linux")]
    pub(super) fn give_back(&self, ring: Uring) {
        self.free().push(ring);
    }
}
