//! Which system calls a running machine makes. Any other ends the process at once: it would be a guest's.
//!
//! One filter for all threads, applied when the machine is built and before it first runs. It knows what
//! each part of the monitor needs to run, not what it needed to begin: no program can be executed, no memory
//! become code, no descriptor of another kind than unix sockets and files be made, no namespace, mount, key
//! or process be touched.
//!
//! A filter sees numbers and not what pointers point to, so some of it is coarse: the jail says *which* files
//! and sockets there are.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// The filter was refused by the kernel, or is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not hold together.
    #[error("cannot build the filter of system calls: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("cannot apply the filter of system calls: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Apply(#[from] seccompiler::Error),
}

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// Threads, memory, time and signals: the language's own, and the C library's.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// Descriptors of any kind: the console, sockets, disks, taps, events.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Disks, and the files of shares.
const FILES: &[i64] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_openat2,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statfs,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_utimensat,
];

/// Older names of the above, which the C library still uses there.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_readlink, libc::SYS_unlink];
#[cfg(target_arch = "aarch64")]
const OLDER: &[i64] = &[];

/// The type byte of KVM's ioctls.
const KVMIO: u64 = 0xae;
/// That of vhost's, which are for a descriptor that was handed in.
const VHOST: u64 = 0xaf;
const IOCTL_TYPE: u64 = 0xff00;

/// Other ioctls, each by its number: sockets that do not block, taps, a terminal's console, and what blocks a disk has that
/// is put into a drive.
const IOCTLS: &[u64] = &[
    libc::FIONBIO,
    libc::TUNGETIFF,
    libc::TUNSETOFFLOAD,
    libc::TUNSETQUEUE,
    TUNSETVNETHDRSZ,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TIOCGWINSZ,
    crate::devices::virtio::block::BLKSSZGET,
];
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

/// Names of threads and mappings; and what a thread of the file server looks at before it gives up a
/// capability for one call.
const PRCTLS: [i32; 5] = [
    libc::PR_SET_NAME,
    libc::PR_SET_VMA,
    libc::PR_CAPBSET_READ,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_GET_SECUREBITS,
];

/// Any new namespace, of all flags of clone and unshare.
const NEW_NAMESPACE: u64 = 0x7e02_0080;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;

/// Of which argument, how much of it, what is asked, and compared with what.
type Condition = (u8, Len, Op, u64);

fn rule(conditions: &[Condition]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions: Result<_, _> = conditions
        .iter()
        .map(|(index, len, op, value)| SeccompCondition::new(*index, len.clone(), op.clone(), *value))
        .collect();
    SeccompRule::new(conditions?)
}

/// Calls that are made with some arguments only, each line a way to make one.
fn conditional() -> Vec<(i64, Vec<Condition>)> {
    let unix = libc::AF_UNIX as u64;
    let without = |mask| Op::MaskedEq(mask);
    let exec = libc::PROT_EXEC as u64;
    let pid = u64::from(std::process::id());
    let mut calls = vec![
        // Threads and nothing else.
        (libc::SYS_clone, vec![(0, Len::Qword, without(CLONE_THREAD | NEW_NAMESPACE), CLONE_THREAD)]),
        // A file server's threads have a working directory and a umask of their own.
        (libc::SYS_unshare, vec![(0, Len::Dword, Op::Eq, libc::CLONE_FS as u64)]),
        (libc::SYS_mmap, vec![(2, Len::Dword, without(exec), 0)]),
        (libc::SYS_mprotect, vec![(2, Len::Dword, without(exec), 0)]),
        (libc::SYS_socket, vec![(0, Len::Dword, Op::Eq, unix)]),
        (libc::SYS_socketpair, vec![(0, Len::Dword, Op::Eq, unix)]),
        // To look, as the start of a thread does.
        (libc::SYS_prlimit64, vec![(2, Len::Qword, Op::Eq, 0)]),
        // To itself: a processor is called out of the guest, a panic aborts.
        (libc::SYS_tgkill, vec![(0, Len::Dword, Op::Eq, pid)]),
        (libc::SYS_ioctl, vec![(1, Len::Dword, Op::MaskedEq(IOCTL_TYPE), KVMIO << 8)]),
        (libc::SYS_ioctl, vec![(1, Len::Dword, Op::MaskedEq(IOCTL_TYPE), VHOST << 8)]),
    ];
    calls.extend(IOCTLS.iter().map(|number| (libc::SYS_ioctl, vec![(1, Len::Dword, Op::Eq, *number)])));
    for option in PRCTLS {
        calls.push((libc::SYS_prctl, vec![(0, Len::Dword, Op::Eq, option.unsigned_abs().into())]));
    }
    let ambient = libc::PR_CAP_AMBIENT.unsigned_abs().into();
    let is_set = libc::PR_CAP_AMBIENT_IS_SET.unsigned_abs().into();
    calls.push((libc::SYS_prctl, vec![(0, Len::Dword, Op::Eq, ambient), (1, Len::Dword, Op::Eq, is_set)]));
    calls
}

fn programs() -> Result<[BpfProgram; 2], Error> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in [RUNTIME, DESCRIPTORS, FILES, OLDER].into_iter().flatten() {
        // Without rules: with any arguments.
        calls.insert(*call, Vec::new());
    }
    for (call, conditions) in conditional() {
        calls.entry(call).or_default().push(rule(&conditions)?);
    }
    // Its flags are behind a pointer. The C library then asks by clone, where they can be seen.
    calls.insert(libc::SYS_clone3, Vec::new());
    let allowed = SeccompFilter::new(calls, SeccompAction::KillProcess, SeccompAction::Allow, ARCH)?;
    let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let not_there = SeccompAction::Errno(libc::ENOSYS as u32);
    let absent = SeccompFilter::new(absent, SeccompAction::Allow, not_there, ARCH)?;
    Ok([absent.try_into()?, allowed.try_into()?])
}

/// Holds all threads of this process, and those they start, to what a running machine does. For good.
pub fn apply() -> Result<(), Error> {
    for program in programs()? {
        apply_filter_all_threads(&program)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_can_be_built_and_are_within_the_kernels_limit() {
        for program in programs().unwrap() {
            assert!(!program.is_empty() && program.len() < 4096, "{}", program.len());
        }
    }

    #[test]
    fn no_call_is_both_allowed_and_looked_at() {
        let mut seen = std::collections::BTreeSet::new();
        for call in [RUNTIME, DESCRIPTORS, FILES, OLDER].into_iter().flatten() {
            assert!(seen.insert(*call), "{call} twice");
        }
        for (call, _) in conditional() {
            assert!(!seen.contains(&call), "{call} would need no condition");
        }
    }
}
