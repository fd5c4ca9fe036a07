use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};

use mandoline_api::monitor::EXIT_SECCOMP;
use syscalls::Sysno;

use super::*;

#[test]
fn a_call_stands_once_in_a_role_and_its_names_are_the_kernels() {
    for role in Role::ALL {
        let mut seen = BTreeSet::new();
        for rule in table::rules(role) {
            assert!(seen.insert(rule.call), "{} twice for {role:?}", rule.call);
            assert!(!rule.why.is_empty(), "{} of {role:?}", rule.call);
            if let Limit::OneOf(_, values) | Limit::OneOfBeside(_, _, values) = rule.limit {
                let numbers: BTreeSet<_> = values.iter().map(|value| value.number as u32).collect();
                assert_eq!(numbers.len(), values.len(), "{} of {role:?}", rule.call);
            }
        }
    }
}

#[test]
fn the_description_has_every_role_call_and_limit() {
    let text = describe();
    for words in [
        "vcpu (",
        "devices by path (",
        "api (",
        "ioctl            the guest; its reboot",
        "KVM_RUN, ",
        "without PROT_EXEC in argument 2",
        "with this process as argument 0",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

/// Forks, confines the child, lets it try a call; returns its exit status and what it wrote.
fn try_call(role: Role, call: impl FnOnce()) -> (i32, String) {
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;
    let mut log = tempfile::tempfile().unwrap();
    let program = program(role);
    // SAFETY: the child makes only system calls (prctl, seccomp, the call to be tried, _exit).
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        handler::set_role(role);
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
    for role in [Role::Vcpu, Role::Devices, Role::DevicesByPath, Role::Api] {
        // SAFETY: opens a file that is there.
        let open = || unsafe {
            libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
        };
        let (status, text) = try_call(role, open);
        assert_eq!(status, i32::from(EXIT_SECCOMP), "{role:?}");
        let line = format!(
            "the {} thread tried a forbidden system call: 257 (openat), arguments 0x",
            role.name()
        );
        assert!(text.contains(&line), "{text}");
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

/// Calls that the filter caught, in the child of the test below.
static CAUGHT: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn count(_: libc::c_int) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn whatever_is_not_in_the_table_is_caught() {
    for role in Role::ALL {
        let program = program(role);
        let allowed: BTreeSet<_> = table::rules(role).map(|rule| rule.call).collect();
        // The kernel's own trampolines for uprobes, which no filter sees; called from elsewhere they are SIGILL.
        const UPROBES: std::ops::RangeInclusive<usize> = 335..=336;
        let tried: Vec<_> = (0..512)
            .filter(|number| !UPROBES.contains(number))
            .filter(|number| Sysno::new(*number).is_none_or(|call| !allowed.contains(&call)))
            .collect();
        assert!(tried.len() > 400, "{role:?}");
        // SAFETY: the child makes only system calls: sigaction, the filter's, those to be caught, _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: a zeroed sigaction is valid, the handler adds to a number; the calls are caught before the
            // kernel looks at their arguments, which name no process, descriptor or address there is.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = count as unsafe extern "C" fn(libc::c_int) as usize;
                libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
                if apply_filter(&program).is_err() {
                    libc::_exit(99);
                }
                for number in &tried {
                    let none = 0x7fff_fff0_i64;
                    libc::syscall(*number as i64, none, none, none, none, none, none);
                }
                let all = CAUGHT.load(Ordering::Relaxed) as usize == tried.len();
                libc::_exit(i32::from(!all));
            }
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0, "{role:?}: {status:#x}");
    }
}

#[test]
fn arguments_are_limited() {
    let killed = i32::from(EXIT_SECCOMP);
    let call = |number, first: i64, second: i64, third: i64| {
        move || {
            // SAFETY: descriptors, addresses and lengths are none, so that nothing happens where it is allowed.
            unsafe { libc::syscall(number, first, second, third, 0, 0, 0) };
        }
    };
    let private = i64::from(libc::FUTEX_PRIVATE_FLAG);
    for (role, number, [first, second, third], want) in [
        (
            Role::Vcpu,
            libc::SYS_futex,
            [0, i64::from(libc::FUTEX_WAKE) | private, 0],
            0,
        ),
        (
            Role::Vcpu,
            libc::SYS_futex,
            [0, i64::from(libc::FUTEX_LOCK_PI) | private, 0],
            killed,
        ),
        (
            Role::Api,
            libc::SYS_madvise,
            [0, 0, i64::from(libc::MADV_DONTNEED)],
            0,
        ),
        (
            Role::Api,
            libc::SYS_madvise,
            [0, 0, i64::from(libc::MADV_HWPOISON)],
            killed,
        ),
        (Role::Devices, libc::SYS_fallocate, [-1, 3, 0], 0),
        (Role::Devices, libc::SYS_fallocate, [-1, 0, 0], killed),
        (
            Role::Devices,
            libc::SYS_mprotect,
            [0, 0, i64::from(libc::PROT_READ)],
            0,
        ),
        (
            Role::Devices,
            libc::SYS_mprotect,
            [0, 0, i64::from(libc::PROT_EXEC)],
            killed,
        ),
        (
            Role::Devices,
            libc::SYS_fcntl,
            [-1, i64::from(libc::F_GETFL), 0],
            0,
        ),
        (
            Role::Devices,
            libc::SYS_fcntl,
            [-1, i64::from(libc::F_SETOWN), 0],
            killed,
        ),
        (
            Role::Devices,
            libc::SYS_socketpair,
            [i64::from(libc::AF_INET), 0, 0],
            killed,
        ),
        // The kernel's request of another role; and of none.
        (Role::Devices, libc::SYS_ioctl, [-1, 0xae80, 0], killed),
        (Role::Vcpu, libc::SYS_ioctl, [-1, 0xae80, 0], 0),
        (Role::Vcpu, libc::SYS_ioctl, [-1, 0xae01, 0], killed),
        // The process that the filter was made for is the test; its child is another.
        (
            Role::Devices,
            libc::SYS_tgkill,
            [std::process::id().into(), -1, 0],
            0,
        ),
        (Role::Devices, libc::SYS_tgkill, [1, 1, 0], killed),
    ] {
        let (status, text) = try_call(role, call(number, first, second, third));
        assert_eq!(status, want, "{role:?} {number} {first} {second} {third}: {text}");
    }
}
