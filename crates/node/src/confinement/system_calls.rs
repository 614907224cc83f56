//! The system calls of the network process: an allow-list ([decision 17]).
//!
//! What is not listed answers as on a kernel that lacks it, so that libraries fall back. Not listed on purpose are all that
//! start a program or a process, look into or act on another process, mount, enter or make namespaces, load code into the
//! kernel, reach files by other ways than their names, and io_uring, which would go around every filter.
//!
//! [decision 17]: ../../../../docs/decisions/0017-network-process-system-calls.md

use std::collections::BTreeMap;

use libc::{AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, SOCK_STREAM, c_int, c_long};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// Files by name and by descriptor, within what Landlock allows.
const FILES: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    libc::SYS_getcwd,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_memfd_create,
];
/// Memory.
const MEMORY: &[c_long] = &[
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_membarrier,
];
/// Threads, waiting and time.
const THREADS: &[c_long] = &[
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getrlimit,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
];
/// Sockets that are there already.
const SOCKETS: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];
/// The older forms that this architecture still has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_readlink,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_create,
    libc::SYS_eventfd,
    libc::SYS_time,
    libc::SYS_arch_prctl,
    libc::SYS_getdents,
    libc::SYS_utimes,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// `prctl`: names of threads and of memory; nothing that changes rights.
const NAMES: [c_int; 3] = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA];
/// `ioctl`: how sockets and terminals are.
const SOCKET_CONTROLS: [u64; 6] =
    [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::FIONCLEX, libc::TCGETS, libc::TIOCGWINSZ];
/// `socketpair` in whatever way it is to be opened.
const KIND: u64 = 0xf;

/// Filters the system calls of the calling thread and of those that it will start.
pub(super) fn filter() -> Result<(), Error> {
    apply_filter(&program()?)
}

fn program() -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    for call in [FILES, MEMORY, THREADS, SOCKETS, OLDER].concat() {
        rules.insert(call, Vec::new());
    }
    rules.insert(libc::SYS_prctl, NAMES.iter().map(|name| rule([number(0, *name)])).collect::<Result<_, _>>()?);
    let control = |control: &u64| rule([SeccompCondition::new(1, SeccompCmpArgLen::Dword, Eq, *control)]);
    rules.insert(libc::SYS_ioctl, SOCKET_CONTROLS.iter().map(control).collect::<Result<_, _>>()?);
    rules.insert(
        libc::SYS_socket,
        vec![
            rule([number(0, AF_INET)])?,
            rule([number(0, AF_INET6)])?,
            // The kernel's list of this machine's addresses.
            rule([number(0, AF_NETLINK), number(2, libc::NETLINK_ROUTE)])?,
        ],
    );
    // A pair is connected from its birth and cannot be connected to anything else; one of datagrams could.
    rules.insert(libc::SYS_socketpair, vec![rule([number(0, AF_UNIX), masked(1, KIND, SOCK_STREAM)])?]);
    // Threads, and no processes. `clone3` hides its flags: libraries fall back to `clone`.
    rules.insert(libc::SYS_clone, vec![rule([masked(0, widened(libc::CLONE_THREAD), libc::CLONE_THREAD)])?]);
    let own = own_process();
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, vec![rule([number(0, own)])?]);
    }
    let unknown = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap_or(1));
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, unknown, SeccompAction::Allow, architecture)?;
    Ok(filter.try_into()?)
}

fn own_process() -> c_int {
    rustix::process::getpid().as_raw_nonzero().get()
}

fn widened(value: c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

type Condition = Result<SeccompCondition, BackendError>;

fn number(argument: u8, value: c_int) -> Condition {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, Eq, widened(value))
}

fn masked(argument: u8, mask: u64, value: c_int) -> Condition {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, MaskedEq(mask), widened(value))
}

fn rule<const COUNT: usize>(conditions: [Condition; COUNT]) -> Result<SeccompRule, Error> {
    let conditions = conditions.into_iter().collect::<Result<_, _>>()?;
    Ok(SeccompRule::new(conditions)?)
}
