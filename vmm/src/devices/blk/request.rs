//! One block request: header, data, status; and what of it is still to be done.
//!
//! ```text
//!            parse                    step / advance                        finish
//!  (chain) ---------> Request: [answered] or a next step --+--> answered ----------> status byte, used ring
//!                                ^      ^                  |
//!                                +------+-- Again, Wait ---+
//! ```
//!
//! What a driver may get wrong in *content* (a sector beyond the end, an unknown type, a write to a read-only
//! disk) is answered by a status, as the specification has it. What is wrong in *form* (no room for a status,
//! data in the wrong direction) is an error: the device breaks. A request makes no system call itself: engines
//! execute its steps, one at a time, so that all of them treat it alike.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::devices::blk::metrics::Metrics;
use crate::devices::blk::{ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, OnFull, SECTOR};
use crate::devices::virtio::chain::{Buffers, Chain, ChainError, StatusByte};

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const RANGE_UNMAP: u32 = 1;
/// How often in a row the host may say "again" before that is an error.
const MAX_RETRIES: u8 = 100;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Error,
    Unsupported,
}

/// What the guest was told of its disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) sectors: u64,
    pub(super) id: [u8; ID_BYTES],
    /// The features that both sides agreed on.
    pub(super) features: u64,
    pub(super) read_only: bool,
}

impl Disk {
    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Whether `bytes` at `sector` are whole sectors of the disk; then where they begin.
    fn place(&self, sector: u64, bytes: u64) -> Option<i64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        if !bytes.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        i64::try_from(sector * SECTOR).ok()
    }
}

/// The next system call for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// From the file at this offset into guest memory.
    Read(&'a [libc::iovec], i64),
    /// From guest memory to the file at this offset.
    Write(&'a [libc::iovec], i64),
    /// Data to stable storage.
    Sync,
    /// `fallocate`.
    Allocate { mode: i32, offset: i64, length: i64 },
}

/// What a step's result means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Go on with [`Request::step`], which may be none any more.
    On,
    /// The host's disk is full: the same step again later.
    Full,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    offset: i64,
    length: i64,
    unmap: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    kind: u32,
    status_byte: StatusByte,
    /// Data that has not been moved yet.
    buffers: Buffers,
    /// Where in the file it goes or comes from.
    offset: i64,
    /// Data in all: what a rate limiter counts.
    bytes: u64,
    /// Bytes written to the chain if all goes well, without the status.
    written: u64,
    /// What is left to discard or zero, the next one last.
    ranges: Vec<Range>,
    /// The next range is tried the second way.
    second_way: bool,
    retries: u8,
    status: Option<Status>,
}

impl Request {
    /// Takes a chain apart. Its data buffers go to the request, and `spare` takes their place.
    pub(super) fn parse(
        disk: &Disk,
        chain: &mut Chain,
        spare: impl FnOnce() -> Buffers,
    ) -> Result<Self, ChainError> {
        let mut header = [0u8; HEADER_BYTES];
        let readable = chain.readable.bytes();
        if !chain.readable.take_front(&mut header) {
            return Err(chain.wrong_length("header", readable, HEADER_BYTES as u64, u64::MAX));
        }
        // Copied once: what the guest does to its header from here on concerns nobody.
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let Some(status_byte) = chain.writable.take_last_byte() else {
            return Err(chain.wrong_length("status", 0, 1, 1));
        };
        let mut request = Self {
            head: chain.head,
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            status_byte,
            buffers: Buffers::default(),
            offset: 0,
            bytes: 0,
            written: 0,
            ranges: Vec::new(),
            second_way: false,
            retries: 0,
            status: None,
        };
        match request.kind {
            VIRTIO_BLK_T_IN => {
                chain.only_writable()?;
                request.written = chain.writable.bytes();
                request.transfer(disk, sector, std::mem::replace(&mut chain.writable, spare()));
            }
            VIRTIO_BLK_T_OUT => {
                chain.only_readable()?;
                request.transfer(disk, sector, std::mem::replace(&mut chain.readable, spare()));
                // Whatever the driver agreed to.
                if disk.read_only {
                    request.status = Some(Status::Error);
                }
            }
            VIRTIO_BLK_T_FLUSH if disk.has(VIRTIO_BLK_F_FLUSH) => chain.only_readable()?,
            VIRTIO_BLK_T_GET_ID => {
                chain.only_writable()?;
                request.written = chain.writable.put_front(&disk.id) as u64;
                request.status = Some(Status::Ok);
            }
            VIRTIO_BLK_T_DISCARD if disk.has(VIRTIO_BLK_F_DISCARD) => {
                chain.only_readable()?;
                request.take_ranges(disk, chain, false);
            }
            VIRTIO_BLK_T_WRITE_ZEROES if disk.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                chain.only_readable()?;
                request.take_ranges(disk, chain, true);
            }
            _ => request.status = Some(Status::Unsupported),
        }
        Ok(request)
    }

    fn transfer(&mut self, disk: &Disk, sector: u64, buffers: Buffers) {
        self.bytes = buffers.bytes();
        self.buffers = buffers;
        match disk.place(sector, self.bytes) {
            Some(offset) => {
                self.offset = offset;
                if self.bytes == 0 {
                    self.status = Some(Status::Ok);
                }
            }
            None => self.status = Some(Status::Error),
        }
    }

    /// Reads the ranges of a discard or a write-zeroes; one that is wrong refuses them all.
    fn take_ranges(&mut self, disk: &Disk, chain: &mut Chain, zeroes: bool) {
        let bytes = chain.readable.bytes();
        let count = bytes / RANGE_BYTES as u64;
        if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES as u64) || count > u64::from(MAX_RANGES) {
            self.status = Some(Status::Error);
            return;
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
                self.status = Some(Status::Unsupported);
                return;
            }
            let length = u64::from(sectors) * SECTOR;
            let place = disk.place(sector, length);
            match place.filter(|_| sectors <= MAX_RANGE_SECTORS) {
                Some(offset) => self.ranges.push(Range {
                    offset,
                    length: length as i64,
                    unmap: !zeroes || flags & RANGE_UNMAP != 0,
                }),
                None => {
                    self.status = Some(Status::Error);
                    return;
                }
            }
        }
        self.ranges.retain(|range| range.length > 0);
        self.ranges.reverse();
        if self.ranges.is_empty() {
            self.status = Some(Status::Ok);
        }
    }

    /// Bytes that a rate limiter counts: those that go to the disk or come from it.
    pub(super) fn bytes(&self) -> u64 {
        if self.status.is_some() { 0 } else { self.bytes }
    }

    /// What to do next; `None`: the request is answered.
    pub(super) fn step(&self) -> Option<Step<'_>> {
        if self.status.is_some() {
            return None;
        }
        match self.kind {
            VIRTIO_BLK_T_IN => Some(Step::Read(self.buffers.pieces(), self.offset)),
            VIRTIO_BLK_T_OUT => Some(Step::Write(self.buffers.pieces(), self.offset)),
            VIRTIO_BLK_T_FLUSH => Some(Step::Sync),
            _ => self.ranges.last().map(|range| {
                // A hole, or zeroes that keep their space. What a file system or a block device lacks of the two, the other
                // stands in for: both read as zeroes.
                let mode = if range.unmap != self.second_way {
                    libc::FALLOC_FL_PUNCH_HOLE
                } else {
                    libc::FALLOC_FL_ZERO_RANGE
                };
                Step::Allocate {
                    mode: mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset: range.offset,
                    length: range.length,
                }
            }),
        }
    }

    /// Takes the result of the step: bytes, or a negative error number, as io_uring has it.
    pub(super) fn advance(&mut self, result: i32, on_full: OnFull) -> Outcome {
        let error = if result < 0 { -result } else { 0 };
        match error {
            libc::EINTR | libc::EAGAIN if self.retries < MAX_RETRIES => {
                self.retries += 1;
                return Outcome::On;
            }
            // After a failed sync the host has forgotten what it could not write: no second try would be honest.
            libc::ENOSPC | libc::EDQUOT if on_full == OnFull::Wait && self.kind != VIRTIO_BLK_T_FLUSH => {
                return Outcome::Full;
            }
            _ => self.retries = 0,
        }
        self.status = match self.kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => match result {
                1.. => {
                    self.buffers.skip_front(result as usize);
                    self.offset += i64::from(result);
                    (self.buffers.bytes() == 0).then_some(Status::Ok)
                }
                // An error, or the file became shorter than the disk.
                _ => Some(Status::Error),
            },
            VIRTIO_BLK_T_FLUSH => Some(ended(error)),
            _ if error == 0 => {
                self.ranges.pop();
                self.second_way = false;
                self.ranges.is_empty().then_some(Status::Ok)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if error == libc::EOPNOTSUPP && !self.second_way => {
                self.second_way = true;
                None
            }
            _ => Some(ended(error)),
        };
        Outcome::On
    }

    /// Writes the status; returns the bytes written to the chain, and the buffers for another request. A request that is
    /// not answered ends with an error.
    pub(super) fn finish(self, metrics: &mut Metrics) -> (u32, Buffers) {
        let status = self.status.unwrap_or(Status::Error);
        self.status_byte.set(match status {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::Error => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        } as u8);
        metrics.count(self.kind, status, self.bytes);
        let written = if status == Status::Ok { self.written } else { 0 };
        // A chain is under 4 GiB in all, so data and status fit.
        let written = u32::try_from(written).unwrap_or(u32::MAX - 1) + 1;
        (written, self.buffers)
    }

    /// The data buffers back, of a request that is put off before it began.
    pub(super) fn into_buffers(self) -> Buffers {
        self.buffers
    }
}

fn ended(error: i32) -> Status {
    match error {
        0 => Status::Ok,
        libc::EOPNOTSUPP => Status::Unsupported,
        _ => Status::Error,
    }
}
