//! Getting a vCPU out of KVM_RUN.
//!
//! Two things are needed. `kvm_run.immediate_exit` makes the *next* KVM_RUN finish the pending
//! access and return EINTR; a signal makes the *current* one return. The byte is set first, so
//! whichever side of the entry the vCPU is on, it comes out.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;

use super::super::{Error, Kick};

/// The signal that interrupts KVM_RUN. Its handler does nothing; being delivered is the effect.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn interrupted(_: libc::c_int) {}

/// Makes sure that the signal interrupts instead of killing. Idempotent.
pub(super) fn install_handler() -> Result<(), Error> {
    // SAFETY: sigaction is a plain C struct for which all-zero is a value (default handler, no
    // flags, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = interrupted as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialised, its handler touches nothing and so may run at any point of any
    // thread; the old action is not asked for.
    let done = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(failed("sigaction")) }
}

fn failed(call: &'static str) -> Error {
    Error::Call { call, object: "the signal that stops vCPUs".into(), source: io::Error::last_os_error() }
}

/// A second mapping of the first page of a vCPU's `kvm_run`, and the thread that runs it.
///
/// The mapping is its own, not the vCPU's: it stays valid for as long as somebody may kick, also
/// when the vCPU is gone.
#[derive(Debug)]
pub(super) struct Kicker {
    page: NonNull<u8>,
    len: usize,
    thread: AtomicI32,
}

// SAFETY: the page is only ever accessed through `immediate_exit`, which is atomic.
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// For the vCPU behind `fd`, which the calling thread is going to run.
    pub(super) fn new(fd: &impl AsRawFd) -> Result<Self, Error> {
        // SAFETY: sysconf takes no pointer.
        let len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let len = usize::try_from(len).map_err(|_| failed("sysconf"))?;
        // SAFETY: a new mapping at an address of the kernel's choice overlays nothing.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(failed("mmap of kvm_run"));
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| failed("mmap of kvm_run"))?;
        let kicker = Self { page, len, thread: AtomicI32::new(0) };
        unblock_signal()?;
        // SAFETY: gettid takes no argument and cannot fail.
        kicker.thread.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        Ok(kicker)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        const OFFSET: usize = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte is inside the page that `self` has mapped (the struct's head is far
        // smaller than any page), is aligned as any byte is, and while user space and the kernel
        // both use it, this process does so only by way of this atomic.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(OFFSET)) }
    }

    /// To be called on the vCPU's thread after it came out, before it looks for what it was kicked for.
    pub(super) fn acknowledge(&self) {
        // The later reads of the reasons must not move before this: a kick in between would be lost.
        self.immediate_exit().swap(0, Ordering::SeqCst);
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Relaxed);
        // SAFETY: tgkill takes numbers only. Should the thread be gone and its number be used again,
        // then by a thread of this same process, where the signal does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.len) };
    }
}

fn unblock_signal() -> Result<(), Error> {
    // SAFETY: `set` is initialised by sigemptyset before it is read, and both pointers are to it.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(failed("pthread_sigmask")) }
}
