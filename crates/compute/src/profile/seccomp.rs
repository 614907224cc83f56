//! The system calls of a guest: an allow-list of our own, handed to the engine by content, so that neither its version nor
//! its configuration decides what a guest may ask of the kernel.
//!
//! Written from the kernel's manual (section 2 of man-pages) and `syscalls(2)`. What is not named fails with `EPERM`; what
//! programs probe for, and do without, fails with `ENOSYS`. Only the 64-bit calls of the machine's own architecture exist:
//! a 32-bit or x32 call ends the process.

use std::sync::LazyLock;

use serde_json::{Value, json};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

/// `AF_UNIX`, `AF_INET` and `AF_INET6`. Other families reach code of the kernel that no guest needs (packet, netlink, xdp,
/// alg), or another world than its own network namespace (vsock).
const FAMILIES: [u64; 3] = [1, 2, 10];
/// `CLONE_NEWNS`, `NEWCGROUP`, `NEWUTS`, `NEWIPC`, `NEWUSER`, `NEWPID` and `NEWNET`: a namespace of its own, and above all a
/// user namespace, would give a guest all capabilities in it, and most faults of the kernel need one.
const NAMESPACES: u64 = 0x7e02_0000;

/// What is allowed whatever its arguments, by purpose.
const ALLOWED: [(&str, &str); 12] = [
    (
        "open files, and what is done with a descriptor",
        "open openat openat2 creat close close_range read readv pread64 preadv preadv2 write writev pwrite64 \
         pwritev pwritev2 lseek dup dup2 dup3 fcntl ioctl flock fsync fdatasync sync syncfs sync_file_range \
         ftruncate fallocate fadvise64 readahead sendfile copy_file_range splice tee",
    ),
    (
        "names, directories and attributes; rights are decided by the file system, where the guest is an ordinary user",
        "access faccessat faccessat2 stat fstat lstat newfstatat statx statfs fstatfs getdents getdents64 getcwd \
         chdir fchdir mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat \
         readlink readlinkat truncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime \
         utimes futimesat utimensat mknod mknodat getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr \
         setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr inotify_init inotify_init1 \
         inotify_add_watch inotify_rm_watch",
    ),
    (
        "waiting for many things at once, and what can be waited for",
        "poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 pipe \
         pipe2 eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime",
    ),
    (
        "memory of its own; NUMA policies and memory of others are left out",
        "brk mmap munmap mprotect mremap madvise msync mlock mlock2 munlock mlockall munlockall mincore \
         membarrier memfd_create pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack",
    ),
    (
        "processes: start, end, wait; ptrace, process_vm and pidfd_getfd, which reach into others, are left out",
        "fork vfork execve execveat exit exit_group wait4 waitid pidfd_open pidfd_send_signal set_tid_address \
         arch_prctl prctl rseq",
    ),
    (
        "signals",
        "kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigpending rt_sigqueueinfo rt_tgsigqueueinfo \
         rt_sigreturn rt_sigsuspend rt_sigtimedwait sigaltstack pause restart_syscall",
    ),
    (
        "threads and their locks",
        "futex futex_waitv futex_wake futex_wait futex_requeue set_robust_list get_robust_list gettid",
    ),
    (
        "who it is; without a capability it can become nobody else",
        "getpid getppid getpgid getpgrp setpgid getsid setsid getuid geteuid getgid getegid getresuid getresgid \
         getgroups setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capget capset",
    ),
    (
        "its own limits and place in the schedule; it can only lower what it has",
        "getrlimit setrlimit prlimit64 getrusage getpriority setpriority sched_yield sched_getaffinity \
         sched_setaffinity sched_getparam sched_setparam sched_getscheduler sched_setscheduler \
         sched_get_priority_max sched_get_priority_min sched_getattr sched_setattr sched_rr_get_interval \
         ioprio_get ioprio_set getcpu times sysinfo uname getrandom",
    ),
    (
        "time: read and waited for, never set",
        "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time alarm getitimer setitimer \
         timer_create timer_delete timer_settime timer_gettime timer_getoverrun",
    ),
    (
        "sockets, once they are open, and System V and POSIX messages of its own IPC namespace",
        "bind connect listen accept accept4 getsockname getpeername getsockopt setsockopt sendto recvfrom sendmsg \
         recvmsg sendmmsg recvmmsg shutdown shmget shmat shmdt shmctl semget semop semtimedop semctl msgget \
         msgsnd msgrcv msgctl mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    ),
    (
        "locking itself up further: it can only give up more",
        "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    ),
];

/// What programs try first and do without. `clone3` hides its flags from a filter; io_uring and AIO pass every filter by;
/// userfaultfd holds the kernel still at a moment of the guest's choice.
const ABSENT: &str = "clone3 io_uring_setup io_uring_enter io_uring_register io_setup io_submit io_getevents io_pgetevents \
     io_destroy io_cancel userfaultfd memfd_secret";

/// The profile as the engine takes it: JSON of Docker's seccomp format.
pub fn profile() -> &'static str {
    static PROFILE: LazyLock<String> = LazyLock::new(|| document().to_string());
    &PROFILE
}

fn document() -> Value {
    let mut rules: Vec<Value> = ALLOWED
        .iter()
        .map(|(purpose, names)| json!({ "names": words(names), "action": "SCMP_ACT_ALLOW", "comment": purpose }))
        .collect();
    rules.push(json!({ "names": words(ABSENT), "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }));
    rules.push(allowed_if("clone", 0, "SCMP_CMP_MASKED_EQ", NAMESPACES, 0));
    for persona in [0, 0xffff_ffff] {
        // To ask, and to be an ordinary Linux: other personas bring back old faults.
        rules.push(allowed_if("personality", 0, "SCMP_CMP_EQ", persona, 0));
    }
    for family in FAMILIES {
        rules.push(allowed_if("socket", 0, "SCMP_CMP_EQ", family, 0));
    }
    rules.push(allowed_if("socketpair", 0, "SCMP_CMP_EQ", FAMILIES[0], 0));
    // Programs that try a newer family than the internet's go on when they are told that it does not exist.
    let newer = json!({ "index": 0, "value": FAMILIES[2], "op": "SCMP_CMP_GT" });
    rules.push(json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": EAFNOSUPPORT, "args": [newer] }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": [architecture(std::env::consts::ARCH)],
        "syscalls": rules,
    })
}

/// The machine's own architecture alone: no sub-architecture is named, so that the 32-bit entry is closed.
fn architecture(machine: &str) -> &'static str {
    match machine {
        "aarch64" => "SCMP_ARCH_AARCH64",
        _ => "SCMP_ARCH_X86_64",
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn allowed_if(name: &str, index: u32, operator: &str, value: u64, second: u64) -> Value {
    let argument = json!({ "index": index, "value": value, "valueTwo": second, "op": operator });
    json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument] })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Calls that reach the kernel's rarely tested parts, other processes, or other worlds.
    const DANGEROUS: &str = "acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module \
        fanotify_init finit_module fsconfig fsmount fsopen fspick init_module ioperm iopl kcmp kexec_file_load kexec_load \
        keyctl lookup_dcookie mbind migrate_pages modify_ldt mount mount_setattr move_mount move_pages \
        name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root process_madvise \
        process_vm_readv process_vm_writev ptrace quotactl reboot request_key set_mempolicy setdomainname sethostname \
        setns settimeofday swapoff swapon sysfs syslog umount2 unshare uselib userfaultfd ustat vhangup vmsplice";

    #[test]
    fn v4_dangerous_calls_are_not_allowed() {
        let allowed: BTreeSet<_> = ALLOWED.iter().flat_map(|(_, names)| words(names)).collect();
        for name in words(DANGEROUS).into_iter().chain(words(ABSENT)) {
            assert!(!allowed.contains(name), "{name}");
        }
        for filtered in ["clone", "socket", "socketpair", "personality"] {
            assert!(!allowed.contains(filtered), "{filtered} must depend on its arguments");
        }
    }

    #[test]
    fn each_call_is_named_once() {
        let names: Vec<_> = ALLOWED.iter().flat_map(|(_, names)| words(names)).chain(words(ABSENT)).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn everything_else_fails_and_one_architecture_exists() {
        let document: Value = serde_json::from_str(profile()).unwrap_or_default();
        assert_eq!((&document["defaultAction"], &document["defaultErrnoRet"]), (&"SCMP_ACT_ERRNO".into(), &1.into()));
        assert_eq!(document["architectures"].as_array().map(Vec::len), Some(1));
        assert!(document["archMap"].is_null());
        assert_eq!((architecture("x86_64"), architecture("aarch64")), ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"));
    }

    #[test]
    fn v4_what_depends_on_arguments_is_allowed_with_these_alone() {
        let document: Value = serde_json::from_str(profile()).unwrap_or_default();
        let rules = document["syscalls"].as_array().cloned().unwrap_or_default();
        assert!(rules.iter().all(|rule| rule["names"].as_array().is_some_and(|names| !names.is_empty())));
        let conditional: Vec<_> =
            rules.iter().filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && !rule["args"].is_null()).collect();
        let shown: Vec<_> = conditional
            .iter()
            .map(|rule| {
                let argument = &rule["args"][0];
                assert_eq!((rule["names"].as_array().map(Vec::len), &argument["index"]), (Some(1), &0.into()));
                (rule["names"][0].as_str(), argument["op"].as_str(), argument["value"].as_u64(), &argument["valueTwo"])
            })
            .collect();
        let zero = Value::from(0);
        let equal = |name, value| (Some(name), Some("SCMP_CMP_EQ"), Some(value), &zero);
        // Every flag of clone(2) that makes a namespace (that of time is clone3's and unshare's alone); the families UNIX, INET and INET6.
        let clone = (Some("clone"), Some("SCMP_CMP_MASKED_EQ"), Some(0x7e02_0000), &zero);
        let rest = [
            equal("personality", 0),
            equal("personality", 0xffff_ffff),
            equal("socket", 1),
            equal("socket", 2),
            equal("socket", 10),
            equal("socketpair", 1),
        ];
        assert_eq!(shown, [&[clone], &rest[..]].concat());
    }
}
