//! What a machine's process gives back to the host.

/// So much or more is mapped by itself, and gone when it is freed: a stream's backlog for one.
const APART: i32 = 64 << 10;

/// Has the allocator give back what is large as soon as it is freed. By itself it keeps more and more, so that a guest that had a
/// lot kept for it once would cost its host as much for ever.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call sets a number of the allocator's and takes nothing of ours.
    let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, APART) } == 1;
    #[cfg(not(target_env = "gnu"))]
    let is_set = true;
    if !is_set {
        log::debug!("the allocator keeps what is less than it likes, not {APART} bytes");
    }
}
