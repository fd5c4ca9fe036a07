//! What a forbidden call ends in: one line in the log, and the end of the process.
//!
//! It runs in a signal handler: numbers are written by hand, nothing is locked or allocated.

use std::cell::Cell;
use std::sync::atomic::{AtomicI32, Ordering};

use mandoline_api::monitor::EXIT_SECCOMP;
use syscalls::Sysno;

use super::Role;

/// Where the handler writes.
static LOG_FD: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    /// The role of this thread. Constant at first and without a destructor: reading it makes no call and takes no lock.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Says what the calling thread is for.
pub(super) fn set_role(role: Role) {
    ROLE.set(Some(role));
}

/// Makes a forbidden call end the process with a line in the log (`log`: its descriptor).
pub fn install_handler(log: libc::c_int) -> std::io::Result<()> {
    LOG_FD.store(log, Ordering::Relaxed);
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction =
            handle as unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

unsafe extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// Where `si_syscall` stands in the x86-64 kernel's siginfo: after signo, errno, code, padding and the
    /// address of the call.
    const SYSCALL_AT: usize = 24;
    // SAFETY: the kernel gives SIGSYS handlers a full siginfo_t.
    let call = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read_unaligned() };
    // SAFETY: the kernel gives SA_SIGINFO handlers the ucontext_t of the thread as it was.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut line = Line::default();
    line.put(b"seccomp: the ");
    line.put(ROLE.get().map_or("unconfined", Role::name).as_bytes());
    line.put(b" thread tried a forbidden system call: ");
    line.number(u64::from(call.unsigned_abs()), 10);
    line.put(b" (");
    let known = usize::try_from(call).ok().and_then(Sysno::new);
    line.put(known.as_ref().map_or("unknown", Sysno::name).as_bytes());
    line.put(b"), arguments");
    for register in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX] {
        line.put(b" 0x");
        line.number(registers[register as usize].cast_unsigned(), 16);
    }
    line.put(b": the monitor ends\n");
    // SAFETY: write and _exit are async-signal-safe, and both are allowed by every filter.
    unsafe {
        libc::write(
            LOG_FD.load(Ordering::Relaxed),
            line.bytes.as_ptr().cast(),
            line.length,
        );
        libc::_exit(libc::c_int::from(EXIT_SECCOMP));
    }
}

/// A line of text in a fixed place; what does not fit is left out.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            length: 0,
        }
    }
}

impl Line {
    fn put(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    /// Writes `number` to the base of `radix`, at most 16.
    fn number(&mut self, mut number: u64, radix: u64) {
        let mut digits = [0u8; 20];
        let mut count = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b"0123456789abcdef"[(number % radix) as usize];
            number /= radix;
            count += 1;
            if number == 0 {
                break;
            }
        }
        let (_, written) = digits.split_at(digits.len() - count);
        self.put(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_numbers_whole() {
        let mut line = Line::default();
        line.number(u64::MAX, 10);
        line.put(b" ");
        line.number(0, 10);
        line.put(b" ");
        line.number(u64::MAX, 16);
        assert_eq!(
            &line.bytes[..line.length],
            b"18446744073709551615 0 ffffffffffffffff"
        );
        line.put(&[b'x'; 300]);
        assert_eq!((line.length, line.bytes.last()), (256, Some(&b'x')));
    }
}
