//! One block request: header, data, status.
//!
//! What a driver may get wrong in *content* (a sector beyond the end, an unknown type, a write to a read-only
//! disk) is answered by a status, as the specification has it. What is wrong in *form* (no room for a status,
//! data in the wrong direction) is an error: the device breaks.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::devices::blk::metrics::Metrics;
use crate::devices::blk::{ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use crate::devices::virtio::chain::{Buffers, Chain, ChainError};

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const RANGE_UNMAP: u32 = 1;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Ok,
    Error,
    Unsupported,
}

/// What executes requests.
pub(super) struct Engine {
    pub(super) file: File,
    pub(super) sectors: u64,
    pub(super) id: [u8; ID_BYTES],
    pub(super) features: u64,
    pub(super) read_only: bool,
    pub(super) metrics: Metrics,
}

impl Engine {
    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Executes one request; returns the bytes written to the chain, with the status.
    pub(super) fn execute(&mut self, chain: &mut Chain) -> Result<u32, ChainError> {
        let mut header = [0u8; HEADER_BYTES];
        let readable = chain.readable.bytes();
        if !chain.readable.take_front(&mut header) {
            return Err(chain.wrong_length("header", readable, HEADER_BYTES as u64, u64::MAX));
        }
        // Copied once: what the guest does to its header from here on concerns nobody.
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let Some(status_byte) = chain.writable.take_last_byte() else {
            return Err(chain.wrong_length("status", 0, 1, 1));
        };

        let wanted = chain.readable.bytes() + chain.writable.bytes();
        let (status, written) = match kind {
            VIRTIO_BLK_T_IN => {
                self.nothing_to_read(chain)?;
                let bytes = chain.writable.bytes();
                (self.transfer(&mut chain.writable, sector, libc::preadv), bytes)
            }
            VIRTIO_BLK_T_OUT => {
                self.nothing_to_write(chain)?;
                // Whatever the driver agreed to.
                if self.read_only {
                    (Status::Error, 0)
                } else {
                    (self.transfer(&mut chain.readable, sector, libc::pwritev), 0)
                }
            }
            VIRTIO_BLK_T_FLUSH if self.has(VIRTIO_BLK_F_FLUSH) => {
                self.nothing_to_write(chain)?;
                (outcome(self.file.sync_data()), 0)
            }
            VIRTIO_BLK_T_GET_ID => {
                self.nothing_to_read(chain)?;
                (Status::Ok, chain.writable.put_front(&self.id) as u64)
            }
            VIRTIO_BLK_T_DISCARD if self.has(VIRTIO_BLK_F_DISCARD) => {
                self.nothing_to_write(chain)?;
                (self.ranges(chain, false), 0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.nothing_to_write(chain)?;
                (self.ranges(chain, true), 0)
            }
            _ => (Status::Unsupported, 0),
        };
        status_byte.set(match status {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::Error => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        } as u8);
        self.count(kind, status, wanted);
        let written = if status == Status::Ok { written } else { 0 };
        // A chain is under 4 GiB in all, so data and status fit.
        Ok(u32::try_from(written).unwrap_or(u32::MAX - 1) + 1)
    }

    fn count(&mut self, kind: u32, status: Status, bytes: u64) {
        let metrics = &mut self.metrics;
        match (status, kind) {
            (Status::Error | Status::Unsupported, _) => metrics.execute_fails += 1,
            (Status::Ok, VIRTIO_BLK_T_IN) => {
                metrics.read_count += 1;
                metrics.read_bytes += bytes;
            }
            (Status::Ok, VIRTIO_BLK_T_OUT) => {
                metrics.write_count += 1;
                metrics.write_bytes += bytes;
            }
            (Status::Ok, VIRTIO_BLK_T_FLUSH) => metrics.flush_count += 1,
            (Status::Ok, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => metrics.discard_count += 1,
            (Status::Ok, _) => {}
        }
    }

    fn nothing_to_read(&self, chain: &Chain) -> Result<(), ChainError> {
        if chain.readable.bytes() == 0 {
            Ok(())
        } else {
            Err(ChainError::Direction { head: chain.head })
        }
    }

    fn nothing_to_write(&self, chain: &Chain) -> Result<(), ChainError> {
        if chain.writable.bytes() == 0 {
            Ok(())
        } else {
            Err(ChainError::Direction { head: chain.head })
        }
    }

    /// Whether `bytes` at `sector` are whole sectors of the disk; then where they begin.
    fn place(&self, sector: u64, bytes: u64) -> Option<i64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        if !bytes.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        i64::try_from(sector * SECTOR).ok()
    }

    /// Moves all of `buffers` from or to the file.
    fn transfer(
        &self,
        buffers: &mut Buffers,
        sector: u64,
        call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> Status {
        let Some(mut offset) = self.place(sector, buffers.bytes()) else {
            return Status::Error;
        };
        while buffers.bytes() > 0 {
            let pieces = buffers.pieces();
            // SAFETY: the pieces are guest memory (see `Buffers`) and at most UIO_MAXIOV of them.
            let done = unsafe {
                call(
                    self.file.as_raw_fd(),
                    pieces.as_ptr(),
                    pieces.len() as libc::c_int,
                    offset,
                )
            };
            match done {
                1.. => {
                    buffers.skip_front(done as usize);
                    offset += done as i64;
                }
                // The file became shorter than the disk.
                0 => return Status::Error,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => return Status::Error,
            }
        }
        Status::Ok
    }

    /// Discard and write zeroes: a list of ranges.
    fn ranges(&self, chain: &mut Chain, zeroes: bool) -> Status {
        let bytes = chain.readable.bytes();
        if bytes == 0
            || !bytes.is_multiple_of(RANGE_BYTES as u64)
            || bytes / RANGE_BYTES as u64 > u64::from(MAX_RANGES)
        {
            return Status::Error;
        }
        let mut range = [0u8; RANGE_BYTES];
        while chain.readable.take_front(&mut range) {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            // Unmap says nothing in a discard, and no other flag exists (5.2.6.2).
            let allowed = if zeroes { RANGE_UNMAP } else { 0 };
            if flags & !allowed != 0 {
                return Status::Unsupported;
            }
            if sectors > MAX_RANGE_SECTORS {
                return Status::Error;
            }
            let length = u64::from(sectors) * SECTOR;
            let Some(offset) = self.place(sector, length) else {
                return Status::Error;
            };
            let status = if zeroes && flags & RANGE_UNMAP == 0 {
                self.zero(offset, length as i64)
            } else {
                outcome(self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, length as i64))
            };
            if status != Status::Ok {
                return status;
            }
        }
        Status::Ok
    }

    /// Zeroes that keep their space, or where the file system cannot do that, a hole: it reads the same.
    fn zero(&self, offset: i64, length: i64) -> Status {
        match self.allocate(libc::FALLOC_FL_ZERO_RANGE, offset, length) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                outcome(self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, length))
            }
            result => outcome(result),
        }
    }

    fn allocate(&self, mode: libc::c_int, offset: i64, length: i64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn outcome(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
        Err(_) => Status::Error,
    }
}
