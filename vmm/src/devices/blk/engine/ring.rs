//! Steps by io_uring.
//!
//! ```text
//!  created disabled -> file registered -> restricted -> enabled      before the jail, see `Ring::new`
//!  push ... push -> submit -> (host) -> completed                    in it: io_uring_enter and shared memory only
//! ```
//!
//! A ring is a second door to the kernel, past the system call filters. So it is nailed shut but for what a drive
//! needs: six operations, on the one file that was registered, and no later change of any of this.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use crate::devices::blk::request::Step;

/// The drive's file among the registered ones.
const FILE: types::Fixed = types::Fixed(0);
/// `IORING_ENTER_GETEVENTS`.
const GET_EVENTS: u32 = 1;
/// How often in a row the host may lack the memory to take steps.
const MAX_RETRIES: u32 = 100;

/// A ring could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(in super::super) struct SetupError {
    what: &'static str,
    source: io::Error,
}

/// See the module.
pub(in super::super) struct Ring {
    ring: IoUring,
    /// Pushed and not completed.
    in_flight: usize,
}

impl Ring {
    /// A ring for at most `depth` steps at once on `file`.
    pub(super) fn new(file: &File, depth: u32) -> Result<Self, SetupError> {
        let failed = |what| move |source| SetupError { what, source };
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(depth)
            .map_err(failed("io_uring_setup"))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&[file.as_raw_fd()])
            .map_err(failed("registering the file"))?;
        let operations = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut restrictions: Vec<Restriction> = operations.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
        submitter
            .register_restrictions(&mut restrictions)
            .map_err(failed("restricting"))?;
        submitter.register_enable_rings().map_err(failed("enabling"))?;
        Ok(Self { ring, in_flight: 0 })
    }

    /// Readable while completions wait.
    pub(super) fn descriptor(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Steps pushed and not completed.
    pub(in super::super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts a step in line; false when the line is full. What the step points to must live until it is completed, or
    /// until [`Ring::quiesce`].
    pub(in super::super) fn push(&mut self, step: Step<'_>, token: u16) -> bool {
        let entry = match step {
            // One buffer needs no list of its own in the kernel.
            Step::Read([piece], offset) => {
                opcode::Read::new(FILE, piece.iov_base.cast(), length(piece.iov_len))
                    .offset(offset as u64)
                    .build()
            }
            Step::Write([piece], offset) => {
                opcode::Write::new(FILE, piece.iov_base.cast(), length(piece.iov_len))
                    .offset(offset as u64)
                    .build()
            }
            Step::Read(pieces, offset) => opcode::Readv::new(FILE, pieces.as_ptr(), pieces.len() as u32)
                .offset(offset as u64)
                .build(),
            Step::Write(pieces, offset) => opcode::Writev::new(FILE, pieces.as_ptr(), pieces.len() as u32)
                .offset(offset as u64)
                .build(),
            Step::Sync => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Step::Allocate { mode, offset, length } => opcode::Fallocate::new(FILE, length as u64)
                .offset(offset as u64)
                .mode(mode)
                .build(),
        };
        let entry = entry.user_data(u64::from(token));
        // SAFETY: the pieces are guest memory, mapped for the life of the process; their list is in a request which its
        // drive keeps until the step is completed or the ring is quiet.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.in_flight += usize::from(pushed);
        pushed
    }

    /// Hands what was pushed to the host.
    pub(in super::super) fn submit(&mut self) -> io::Result<()> {
        let mut retries = 0;
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has no memory for a request just now.
                Err(error)
                    if retries < MAX_RETRIES
                        && matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) =>
                {
                    retries += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the next completed step: its token and its result.
    pub(in super::super) fn completed(&mut self) -> Option<(u16, i32)> {
        let entry = self.ring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        // It is a token that was pushed: the kernel alone writes completions.
        Some((entry.user_data() as u16, entry.result()))
    }

    /// Waits for a completion. In a vCPU's thread too (a driver resets its device there), so it never submits.
    pub(in super::super) fn wait(&self) {
        // SAFETY: no argument points anywhere.
        let result = unsafe {
            self.ring
                .submitter()
                .enter(0, 1, GET_EVENTS, None::<&libc::sigset_t>)
        };
        if result.is_err() {
            // Interrupted, or short of memory: completions come all the same.
            std::thread::yield_now();
        }
    }

    /// Drops what is in flight: waits until the host is done with it. False when some could not be submitted: the ring must
    /// not be used again.
    pub(super) fn quiesce(&mut self) -> bool {
        let unsubmitted = self.ring.submission().len();
        while self.in_flight > unsubmitted {
            if self.completed().is_none() {
                self.wait();
            }
        }
        self.in_flight = 0;
        unsubmitted == 0
    }
}

/// A buffer's length; a longer one (there is none: a chain is under 4 GiB) would be a short transfer, which is continued.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `None` where the host forbids io_uring (`kernel.io_uring_disabled`, a container's filter): then there is nothing
    /// to be tested.
    fn ring() -> Option<Ring> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        match Ring::new(&file, 8) {
            Ok(ring) => Some(ring),
            Err(error) => {
                let number = error.source.raw_os_error();
                assert!(matches!(number, Some(libc::ENOSYS | libc::EPERM)), "{error}");
                None
            }
        }
    }

    fn result(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
        // SAFETY: the entries of this test point to nothing that is used.
        unsafe { ring.ring.submission().push(entry) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn nothing_but_the_drives_operations_on_the_drives_file() {
        let Some(mut ring) = ring() else { return };
        let fine = opcode::Fsync::new(FILE).build();
        assert_eq!(result(&mut ring, &fine), 0);
        let other = tempfile::tempfile().unwrap();
        let by_number = types::Fd(other.as_raw_fd());
        for (what, entry) in [
            ("another file", opcode::Fsync::new(by_number).build()),
            ("nop", opcode::Nop::new().build()),
            (
                "open",
                opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build(),
            ),
            (
                "socket",
                opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            ),
            ("another flag", fine.clone().flags(squeue::Flags::ASYNC)),
        ] {
            assert_eq!(result(&mut ring, &entry), -libc::EACCES, "{what}");
        }
    }

    #[test]
    fn an_enabled_ring_cannot_be_changed() {
        let Some(ring) = ring() else { return };
        let submitter = ring.ring.submitter();
        let file = tempfile::tempfile().unwrap();
        for (what, result) in [
            (
                "files",
                submitter.register_files_update(0, &[file.as_raw_fd()]).map(drop),
            ),
            ("eventfd", submitter.register_eventfd(file.as_raw_fd())),
            (
                "restrictions",
                submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Nop::CODE)]),
            ),
        ] {
            assert!(result.is_err(), "{what}");
        }
    }
}
