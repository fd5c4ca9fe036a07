//! The system calls that each thread role may make, and what happens when it tries another.
//!
//! A forbidden call traps: the handler writes one line that names the thread's role and the call to the log, and the
//! process ends with [`EXIT_SECCOMP`]. A guest that has taken over a thread gets no second try.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};

use mandoline_api::monitor::EXIT_SECCOMP;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use crate::devices::net::tap::TUNSETOFFLOAD;
use crate::devices::net::vhost::kernel::{ACTIVATE_IOCTLS, PAUSE_IOCTLS};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU.
    Vcpu,
    /// The event loop: devices, signals, the end.
    Devices,
    /// The same where streams of the guest go to sockets by path, as no node manager has it: it may make
    /// sockets and connect them. In an empty root it finds none.
    DevicesByPath,
    /// The control socket.
    Api,
    /// The same where the monitor stands in no empty root: it may open what a request names.
    ApiByPath,
}

/// A filter could not be put up.
#[derive(Debug, thiserror::Error)]
#[error("seccomp filter of the {role:?} thread: {source}")]
pub struct Error {
    role: Role,
    source: seccompiler::Error,
}

const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const FIONBIO: u64 = 0x5421;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_SET_MSRS: u64 = 0x4008_ae89;
const KVM_SET_FPU: u64 = 0x41a0_ae8d;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_SET_LAPIC: u64 = 0x4400_ae8f;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_SET_MP_STATE: u64 = 0x4004_ae99;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_aea0;
const KVM_SET_DEBUGREGS: u64 = 0x4080_aea2;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_SET_XCRS: u64 = 0x4188_aea7;
const KVM_SET_IRQCHIP: u64 = 0x8208_ae63;

/// What every thread needs.
const COMMON: &[libc::c_long] = &[
    libc::SYS_read,  // eventfds, taps, sockets
    libc::SYS_write, // the same; the log
    libc::SYS_close, // streams that end
    libc::SYS_futex, // locks
    // The allocator.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_munmap,
    libc::SYS_mremap,
    // Time, where the vDSO has none (emulated clock sources).
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    // Hash tables' seeds; virtio-rng.
    libc::SYS_getrandom,
    // Signals' way back and ends of threads.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The event loop's.
const DEVICES: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    // blk
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    // Rate limiters of every device.
    libc::SYS_timerfd_settime,
    // A guest that reboots: its kernel is loaded anew. The state file starts anew when it is long.
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    // blk by io_uring, whose rings allow few operations (devices::blk::engine::ring); no way to make another ring.
    libc::SYS_io_uring_enter,
    // blk, when a file is replaced: which one it is. (Its size: lseek, above.)
    libc::SYS_fstat,
    // A VM that is parked: its memory goes to a file, and out of the host's cache.
    libc::SYS_pwrite64,
    libc::SYS_fadvise64,
    // net, vsock
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_socketpair,
    libc::SYS_shutdown,
    // Interrupting vCPUs.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
];

/// The control socket's.
const API: &[libc::c_long] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_recvmsg, // with descriptors
    libc::SYS_sendto,
    libc::SYS_dup3, // another file for the log
];

/// The requests that a role may make by `ioctl`.
fn ioctls(role: Role) -> Vec<u64> {
    let (own, vhost): (&[u64], &[u64]) = match role {
        // A driver that becomes ready or resets its device does so in a vCPU's thread.
        Role::Vcpu => (
            &[
                KVM_RUN,
                KVM_GET_REGS,
                KVM_GET_SREGS,
                KVM_KVMCLOCK_CTRL,
                TUNSETOFFLOAD,
                // A guest that reboots: registers as at power-on.
                KVM_SET_REGS,
                KVM_SET_SREGS,
                KVM_SET_MSRS,
                KVM_SET_FPU,
                KVM_SET_XCRS,
                KVM_SET_DEBUGREGS,
                KVM_SET_LAPIC,
                KVM_SET_VCPU_EVENTS,
                KVM_SET_MP_STATE,
                // Whether it sleeps, and until when.
                KVM_GET_MP_STATE,
                KVM_GET_VCPU_EVENTS,
                KVM_GET_LAPIC,
                KVM_GET_MSRS,
                KVM_GET_TSC_KHZ,
            ],
            &ACTIVATE_IOCTLS,
        ),
        // Interrupt controllers as at power-on.
        Role::Devices | Role::DevicesByPath => (&[FIONBIO, KVM_SET_IRQCHIP], &PAUSE_IOCTLS),
        Role::Api | Role::ApiByPath => (&[FIONBIO], &[]),
    };
    [own, vhost].concat()
}

/// The filter of a role.
pub fn program(role: Role) -> Result<BpfProgram, Error> {
    let failed = |error: seccompiler::BackendError| Error {
        role,
        source: error.into(),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let own = match role {
        Role::Vcpu => &[],
        Role::Devices | Role::DevicesByPath => DEVICES,
        Role::Api | Role::ApiByPath => API,
    };
    for call in COMMON.iter().chain(own) {
        rules.insert(*call, Vec::new());
    }
    let condition = |argument, length, operator, value| {
        SeccompCondition::new(argument, length, operator, value).map_err(failed)
    };
    let rule = |conditions| SeccompRule::new(conditions).map_err(failed);
    let mut requests = Vec::new();
    for request in ioctls(role) {
        requests.push(rule(vec![condition(
            1,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            request,
        )?])?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    if role == Role::DevicesByPath {
        let unix = condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
        rules.insert(libc::SYS_socket, vec![rule(vec![unix])?]);
        rules.insert(libc::SYS_connect, Vec::new());
    }
    match role {
        // A driver that resets its disk waits for what is in flight; it submits nothing.
        Role::Vcpu => {
            let none = condition(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0)?;
            rules.insert(libc::SYS_io_uring_enter, vec![rule(vec![none])?]);
        }
        // How a disk's new file was opened; and what debug builds ask about each descriptor that they close.
        Role::Devices | Role::DevicesByPath => {
            let mut rules_of_fcntl = Vec::new();
            for command in [libc::F_GETFL, libc::F_GETFD] {
                let only = condition(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command as u64)?;
                rules_of_fcntl.push(rule(vec![only])?);
            }
            rules.insert(libc::SYS_fcntl, rules_of_fcntl);
        }
        Role::Api | Role::ApiByPath => {
            let only = condition(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
            if cfg!(debug_assertions) {
                rules.insert(libc::SYS_fcntl, vec![rule(vec![only])?]);
            }
        }
    }
    if role == Role::ApiByPath {
        rules.insert(libc::SYS_openat, Vec::new());
    }
    // Memory for the allocator, never executable.
    let no_exec = condition(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64),
        0,
    )?;
    rules.insert(libc::SYS_mmap, vec![rule(vec![no_exec.clone()])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(vec![no_exec])?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    filter.map_err(failed)?.try_into().map_err(failed)
}

/// Puts the calling thread under the filter of `role`, for good.
pub fn confine(role: Role) -> Result<(), Error> {
    apply_filter(&program(role)?).map_err(|source| Error { role, source })
}

/// Where the handler writes.
static LOG_FD: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

/// Makes a forbidden call end the process with a line in the log (`log`: its descriptor).
pub fn install_handler(log: libc::c_int) -> std::io::Result<()> {
    LOG_FD.store(log, Ordering::Relaxed);
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction =
            handler as unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Runs in a signal: numbers are written by hand, nothing is locked or allocated.
unsafe extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Where `si_syscall` stands in the x86-64 kernel's siginfo: after signo, errno, code, padding and the
    /// address of the call.
    const SYSCALL_AT: usize = 24;
    // SAFETY: the kernel gives SIGSYS handlers a full siginfo_t.
    let call = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read_unaligned() };
    let mut line = [0u8; 96];
    let mut length = 0;
    let mut put = |bytes: &[u8]| {
        for byte in bytes {
            if length < line.len() {
                line[length] = *byte;
                length += 1;
            }
        }
    };
    put(b"seccomp: forbidden system call ");
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = call.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    put(&digits[at..]);
    put(b" (");
    put(name(i64::from(call)).as_bytes());
    put(b"): the monitor ends\n");
    // SAFETY: write and _exit are async-signal-safe, and both are allowed by every filter.
    unsafe {
        libc::write(LOG_FD.load(Ordering::Relaxed), line.as_ptr().cast(), length);
        libc::_exit(libc::c_int::from(EXIT_SECCOMP));
    }
}

/// Names of the calls that are likeliest to be tried, for the log.
fn name(call: i64) -> &'static str {
    match call {
        libc::SYS_open => "open",
        libc::SYS_openat => "openat",
        libc::SYS_socket => "socket",
        libc::SYS_connect => "connect",
        libc::SYS_bind => "bind",
        libc::SYS_execve => "execve",
        libc::SYS_execveat => "execveat",
        libc::SYS_clone => "clone",
        libc::SYS_clone3 => "clone3",
        libc::SYS_fork => "fork",
        libc::SYS_ptrace => "ptrace",
        libc::SYS_ioctl => "ioctl",
        libc::SYS_mmap => "mmap, executable",
        libc::SYS_mprotect => "mprotect, executable",
        libc::SYS_kill => "kill",
        libc::SYS_tgkill => "tgkill",
        libc::SYS_getpid => "getpid",
        libc::SYS_gettid => "gettid",
        libc::SYS_fcntl => "fcntl",
        libc::SYS_nanosleep => "nanosleep",
        libc::SYS_clock_nanosleep => "clock_nanosleep",
        libc::SYS_writev => "writev",
        libc::SYS_statx => "statx",
        libc::SYS_prctl => "prctl",
        _ => "see the kernel's syscall_64.tbl",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_a_filter() {
        for role in [
            Role::Vcpu,
            Role::Devices,
            Role::DevicesByPath,
            Role::Api,
            Role::ApiByPath,
        ] {
            assert!(program(role).unwrap().len() > 30, "{role:?}");
        }
    }

    /// Forks, confines the child, lets it try a call; returns its exit status and what it wrote.
    fn try_call(role: Role, call: impl FnOnce()) -> (i32, String) {
        use std::io::{Read, Seek};
        use std::os::fd::AsRawFd;
        let mut log = tempfile::tempfile().unwrap();
        let program = program(role).unwrap();
        // SAFETY: the child makes only system calls (prctl, seccomp, the call to be tried, _exit).
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let confined = install_handler(log.as_raw_fd()).is_ok() && apply_filter(&program).is_ok();
            if confined {
                call();
            }
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if confined { 0 } else { 99 }) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        log.rewind().unwrap();
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        (libc::WEXITSTATUS(status), text)
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        for role in [Role::Vcpu, Role::Devices, Role::Api] {
            // SAFETY: opens a file that is there.
            let open = || unsafe {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
            };
            let (status, text) = try_call(role, open);
            assert_eq!(status, i32::from(EXIT_SECCOMP), "{role:?}");
            assert!(text.contains("(openat)"), "{text}");
        }
        // SAFETY: maps anonymous memory.
        let exec = || unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                flags,
                -1,
                0,
            );
        };
        let (status, text) = try_call(Role::Devices, exec);
        assert_eq!((status, text.contains("mmap")), (i32::from(EXIT_SECCOMP), true));
    }

    #[test]
    fn only_a_monitor_with_paths_may_make_sockets_and_unix_ones_only() {
        // SAFETY: makes a socket that ends with the child.
        let socket = |family| unsafe {
            libc::socket(family, libc::SOCK_STREAM, 0);
        };
        let killed = i32::from(EXIT_SECCOMP);
        assert_eq!(try_call(Role::Devices, || socket(libc::AF_UNIX)).0, killed);
        assert_eq!(try_call(Role::DevicesByPath, || socket(libc::AF_UNIX)).0, 0);
        assert_eq!(try_call(Role::DevicesByPath, || socket(libc::AF_INET)).0, killed);
    }

    #[test]
    fn a_vcpu_may_wait_for_a_ring_and_not_submit_to_it() {
        // SAFETY: the descriptor is none, so nothing happens.
        let enter = |submit: u32| unsafe {
            libc::syscall(libc::SYS_io_uring_enter, -1, submit, 1, 1, 0, 0);
        };
        let killed = i32::from(EXIT_SECCOMP);
        assert_eq!(try_call(Role::Vcpu, || enter(0)).0, 0);
        assert_eq!(try_call(Role::Vcpu, || enter(1)).0, killed);
        assert_eq!(try_call(Role::Devices, || enter(1)).0, 0);
        assert_eq!(try_call(Role::Api, || enter(0)).0, killed);
        // SAFETY: the parameters are none.
        let setup = || unsafe {
            libc::syscall(libc::SYS_io_uring_setup, 1, 0);
        };
        assert_eq!(try_call(Role::Devices, setup).0, killed);
    }

    #[test]
    fn allowed_calls_pass() {
        // SAFETY: maps anonymous memory, asks for the time.
        let fine = || unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            libc::sched_yield();
        };
        assert_eq!(try_call(Role::Vcpu, fine).0, 0);
    }
}
