//! What each thread role may ask of the kernel, and why: the filters are made of these lists and of nothing else.
//!
//! ```text
//! vcpu      = COMMON + VCPU
//! devices   = COMMON + DEVICES  (+ DEVICES_BY_PATH where streams of the guest go to sockets by path)
//! api       = COMMON + API      (+ API_BY_PATH where the monitor stands in no empty root)
//! ```
//!
//! A call stands once in the lists of a role. `mandoline-vmm filters` prints them.

use syscalls::Sysno;

use super::Role;
use super::ioctl::{
    FIONBIO, KVM_GET_LAPIC, KVM_GET_MP_STATE, KVM_GET_MSRS, KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_TSC_KHZ,
    KVM_GET_VCPU_EVENTS, KVM_KVMCLOCK_CTRL, KVM_RUN, KVM_SET_DEBUGREGS, KVM_SET_FPU, KVM_SET_IRQCHIP,
    KVM_SET_LAPIC, KVM_SET_MP_STATE, KVM_SET_MSRS, KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_VCPU_EVENTS,
    KVM_SET_XCRS, TUNSETOFFLOAD, VHOST_GET_VRING_BASE, VHOST_NET_SET_BACKEND, VHOST_SET_FEATURES,
    VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR,
    VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM,
};

/// A number with the name that the kernel's headers give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    /// Its name.
    pub name: &'static str,
    /// The number; 32 bits of it are compared.
    pub number: u64,
}

/// What the arguments of an allowed call must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Anything.
    Free,
    /// This argument (the first is 0) is one of these.
    OneOf(u8, &'static [Value]),
    /// The bits of this argument that stay when these are taken away are one of those.
    OneOfBeside(u8, Value, &'static [Value]),
    /// This argument has none of these bits.
    Without(u8, Value),
    /// This argument is the process's own id.
    OwnProcess(u8),
}

/// One allowed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The call.
    pub call: Sysno,
    /// With which arguments.
    pub limit: Limit,
    /// What needs it.
    pub why: &'static str,
}

const fn free(call: Sysno, why: &'static str) -> Rule {
    only(call, Limit::Free, why)
}

const fn only(call: Sysno, limit: Limit, why: &'static str) -> Rule {
    Rule { call, limit, why }
}

macro_rules! value {
    ($name:ident) => {
        Value {
            name: stringify!($name),
            number: libc::$name as u64,
        }
    };
}

const ZERO: Value = Value { name: "0", number: 0 };
/// What may be added to any futex operation.
const FUTEX_FLAGS: Value = Value {
    name: "PRIVATE, CLOCK_REALTIME",
    number: (libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME) as u64,
};
const PUNCH_HOLE: Value = Value {
    name: "PUNCH_HOLE | KEEP_SIZE",
    number: (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64,
};
const ZERO_RANGE: Value = Value {
    name: "ZERO_RANGE | KEEP_SIZE",
    number: (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u64,
};
/// What a debug build asks of every descriptor that it closes: whether it is open.
const CLOSE_CHECK: &[Value] = &[value!(F_GETFD)];

/// What every thread needs.
pub const COMMON: &[Rule] = &[
    free(Sysno::read, "eventfds, timers, taps, sockets"),
    free(Sysno::write, "the same; log and state file"),
    free(Sysno::close, "streams and files that end"),
    only(
        Sysno::futex,
        Limit::OneOfBeside(
            1,
            FUTEX_FLAGS,
            &[value!(FUTEX_WAIT), value!(FUTEX_WAKE), value!(FUTEX_WAIT_BITSET)],
        ),
        "locks",
    ),
    free(Sysno::brk, "the allocator"),
    only(
        Sysno::mmap,
        Limit::Without(2, value!(PROT_EXEC)),
        "the allocator; nothing becomes code",
    ),
    only(
        Sysno::mprotect,
        Limit::Without(2, value!(PROT_EXEC)),
        "the allocator's arenas; nothing becomes code",
    ),
    free(Sysno::mremap, "the allocator, where a large block grows"),
    free(Sysno::munmap, "the allocator"),
    only(
        Sysno::madvise,
        Limit::OneOf(2, &[value!(MADV_DONTNEED)]),
        "the allocator gives back; guest memory of the balloon, of a reboot, of a parked VM",
    ),
    free(Sysno::clock_gettime, "time, where the vDSO has none"),
    free(
        Sysno::sched_yield,
        "the channel between threads, under contention",
    ),
    free(Sysno::getrandom, "seeds of hash tables; virtio-rng"),
    free(Sysno::rt_sigreturn, "the way back from a signal"),
    free(Sysno::rt_sigprocmask, "the end of a thread"),
    free(
        Sysno::restart_syscall,
        "a wait that a stop of the process interrupted",
    ),
    free(Sysno::sigaltstack, "the end of a thread: its stack for signals"),
    free(Sysno::exit, "the end of a thread"),
    free(Sysno::exit_group, "the end"),
];

/// A vCPU's.
pub const VCPU: &[Rule] = &[
    only(
        Sysno::ioctl,
        Limit::OneOf(
            1,
            &[
                KVM_RUN,
                KVM_KVMCLOCK_CTRL,
                // How a triple fault looked, for the log.
                KVM_GET_REGS,
                KVM_GET_SREGS,
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
                // A driver that becomes ready or resets its device does so in a vCPU's thread.
                TUNSETOFFLOAD,
                VHOST_SET_FEATURES,
                VHOST_SET_VRING_NUM,
                VHOST_SET_VRING_ADDR,
                VHOST_SET_VRING_BASE,
                VHOST_SET_VRING_KICK,
                VHOST_SET_VRING_CALL,
                VHOST_SET_VRING_ERR,
                VHOST_NET_SET_BACKEND,
            ],
        ),
        "the guest; its reboot, its sleep; drivers that start and stop their devices",
    ),
    only(
        Sysno::io_uring_enter,
        Limit::OneOf(1, &[ZERO]),
        "a driver that resets its disk waits for what is in flight; it submits nothing",
    ),
];

/// The event loop's.
pub const DEVICES: &[Rule] = &[
    free(Sysno::epoll_wait, "the loop"),
    free(Sysno::epoll_pwait, "the loop"),
    free(Sysno::epoll_ctl, "the loop: streams come and go"),
    only(
        Sysno::ioctl,
        Limit::OneOf(
            1,
            &[
                FIONBIO,
                // Interrupt controllers as at power-on.
                KVM_SET_IRQCHIP,
                // A pause of vhost-net, its end, and the end of a faulty device.
                VHOST_GET_VRING_BASE,
                VHOST_NET_SET_BACKEND,
            ],
        ),
        "vsock's streams; a reboot; vhost-net's pause",
    ),
    free(Sysno::preadv, "blk"),
    free(Sysno::pwritev, "blk"),
    free(Sysno::fdatasync, "blk: flush"),
    only(
        Sysno::fallocate,
        Limit::OneOf(1, &[PUNCH_HOLE, ZERO_RANGE]),
        "blk: discard and write zeroes",
    ),
    free(
        Sysno::io_uring_enter,
        "blk by io_uring, whose rings allow few operations (devices::blk::engine::ring); none can be made",
    ),
    free(Sysno::fstat, "blk, when a file is replaced: which one it is"),
    only(
        Sysno::fcntl,
        Limit::OneOf(
            1,
            if cfg!(debug_assertions) {
                &[value!(F_GETFL), value!(F_GETFD)]
            } else {
                &[value!(F_GETFL)]
            },
        ),
        "blk, when a file is replaced: how it was opened",
    ),
    free(
        Sysno::lseek,
        "the kernel of a guest that reboots; a replaced file's size",
    ),
    free(Sysno::pread64, "the kernel of a guest that reboots"),
    free(Sysno::ftruncate, "the state file starts anew when it is long"),
    free(
        Sysno::timerfd_settime,
        "rate limiters; a parked guest's own timer",
    ),
    free(Sysno::pwrite64, "a parked VM's memory goes to its file"),
    free(Sysno::fadvise64, "and out of the host's cache"),
    free(Sysno::readv, "net, vsock"),
    free(Sysno::writev, "net, vsock"),
    free(Sysno::accept4, "vsock: streams from the host"),
    free(Sysno::recvfrom, "vsock"),
    free(Sysno::recvmsg, "vsock"),
    free(Sysno::sendto, "vsock"),
    free(
        Sysno::sendmsg,
        "vsock: a stream of the guest's is handed out as a descriptor",
    ),
    only(
        Sysno::socketpair,
        Limit::OneOf(0, &[value!(AF_UNIX)]),
        "vsock: a stream of the guest's",
    ),
    free(Sysno::shutdown, "vsock: half-closed streams"),
    only(
        Sysno::tgkill,
        Limit::OwnProcess(0),
        "interrupts vCPUs, and can reach no other process",
    ),
    free(Sysno::getpid, "for tgkill"),
    free(Sysno::gettid, "for tgkill"),
];

/// The event loop's, where streams of the guest go to sockets by path.
pub const DEVICES_BY_PATH: &[Rule] = &[
    only(
        Sysno::socket,
        Limit::OneOf(0, &[value!(AF_UNIX)]),
        "vsock: a stream to a path",
    ),
    free(
        Sysno::connect,
        "vsock: a stream to a path; in an empty root there is none",
    ),
];

/// The control socket's.
pub const API: &[Rule] = &[
    free(Sysno::poll, "its connections"),
    free(Sysno::ppoll, "its connections"),
    free(Sysno::accept4, "its connections"),
    free(Sysno::recvmsg, "requests, with descriptors"),
    free(Sysno::sendto, "answers"),
    only(Sysno::ioctl, Limit::OneOf(1, &[FIONBIO]), "its connections"),
    free(Sysno::dup3, "another file for the log"),
];

/// The control socket's, where the monitor stands in no empty root.
pub const API_BY_PATH: &[Rule] = &[free(Sysno::openat, "what a request names")];

/// What a build with debug assertions needs beside these.
const API_IN_DEBUG_BUILDS: &[Rule] = &[only(
    Sysno::fcntl,
    Limit::OneOf(1, CLOSE_CHECK),
    "debug builds: descriptors that are closed were open",
)];

/// The lists of `role`.
pub fn rules(role: Role) -> impl Iterator<Item = &'static Rule> {
    let (own, more): (&[Rule], &[Rule]) = match role {
        Role::Vcpu => (VCPU, &[]),
        Role::Devices => (DEVICES, &[]),
        Role::DevicesByPath => (DEVICES, DEVICES_BY_PATH),
        Role::Api => (API, &[]),
        Role::ApiByPath => (API, API_BY_PATH),
    };
    let debug: &[Rule] = match role {
        Role::Api | Role::ApiByPath if cfg!(debug_assertions) => API_IN_DEBUG_BUILDS,
        _ => &[],
    };
    COMMON.iter().chain(own).chain(more).chain(debug)
}
