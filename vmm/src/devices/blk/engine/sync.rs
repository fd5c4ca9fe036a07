//! A step by an ordinary system call.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::devices::blk::request::Step;

/// Executes `step`; the result is as io_uring has it: bytes, or a negative error number.
pub(in super::super) fn run(file: &File, step: Step<'_>) -> i32 {
    let fd = file.as_raw_fd();
    let result = match step {
        // SAFETY: the pieces are guest memory (see `Buffers`) and at most UIO_MAXIOV of them.
        Step::Read(pieces, offset) => unsafe {
            libc::preadv(fd, pieces.as_ptr(), pieces.len() as libc::c_int, offset)
        },
        // SAFETY: as above.
        Step::Write(pieces, offset) => unsafe {
            libc::pwritev(fd, pieces.as_ptr(), pieces.len() as libc::c_int, offset)
        },
        // SAFETY: no memory is involved.
        Step::Sync => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: no memory is involved.
        Step::Allocate { mode, offset, length } => unsafe {
            libc::fallocate(fd, mode, offset, length) as isize
        },
    };
    if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        // No call moves more than 2 GiB less a page (read(2)).
        i32::try_from(result).unwrap_or(i32::MAX)
    }
}
