//! A descriptor chain, checked as a whole before anything of it is used.
//!
//! `virtio_queue::DescriptorChain` ends silently at whatever is wrong (an index out of the table, a loop, a
//! nested indirect table, memory that is not there). Here such a chain is an error that says what it was, and a
//! device sees only chains of which every byte is RAM, readable buffers first, then writable ones.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::memory::Memory;

/// Most buffers in a chain, through an indirect table too: `UIO_MAXIOV`, the most that one system call takes.
pub const MAX_BUFFERS: usize = 1024;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It goes on where it cannot: an index outside the table, a loop, a bad indirect table, 4 GiB and more.
    #[error(
        "chain {head}: ends in the middle (an index outside the table, a loop, a bad indirect table, or over 4 GiB)"
    )]
    CutShort {
        /// The chain's head.
        head: u16,
    },
    /// A buffer is not all RAM.
    #[error("chain {head}: buffer {address:#x}, {length} bytes, is not all guest memory")]
    OutsideMemory {
        /// The chain's head.
        head: u16,
        /// Where the buffer begins.
        address: u64,
        /// Its length.
        length: u32,
    },
    /// A buffer of no bytes.
    #[error("chain {head}: a buffer of zero bytes")]
    Empty {
        /// The chain's head.
        head: u16,
    },
    /// A readable buffer after a writable one, or one that the device has no use for.
    #[error("chain {head}: a buffer in the wrong direction")]
    Direction {
        /// The chain's head.
        head: u16,
    },
    /// More than [`MAX_BUFFERS`].
    #[error("chain {head}: more than {MAX_BUFFERS} buffers")]
    TooMany {
        /// The chain's head.
        head: u16,
    },
    /// Not enough bytes for what the device needs, or more than it can take.
    #[error("chain {head}: {what} of {length} bytes, allowed {least} to {most}")]
    Length {
        /// The chain's head.
        head: u16,
        /// Which part.
        what: &'static str,
        /// What it has.
        length: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
}

/// A list of buffers in guest memory, as system calls take it.
#[derive(Debug, Default)]
pub struct Buffers {
    pieces: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: the pointers go to guest memory, which is mapped for the life of the process and belongs to no thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Empties the list; its room stays for another.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.bytes = 0;
    }

    fn push(&mut self, base: *mut u8, length: usize) {
        self.pieces.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: length,
        });
        self.bytes += length as u64;
    }

    /// All bytes of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// For a vectored system call.
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// The same as pieces of guest memory.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        let pieces = self.pieces.iter();
        pieces.map(|piece| volatile(piece.iov_base.cast(), piece.iov_len))
    }

    /// Takes `into.len()` bytes off the front into `into`; false (and nothing taken) if there are fewer.
    pub fn take_front(&mut self, into: &mut [u8]) -> bool {
        if self.bytes < into.len() as u64 {
            return false;
        }
        let mut done = 0;
        while done < into.len() {
            let piece = &self.pieces[0];
            let now = piece.iov_len.min(into.len() - done);
            volatile(piece.iov_base.cast(), now).copy_to(&mut into[done..done + now]);
            done += now;
            self.skip_front(now);
        }
        true
    }

    /// Writes `from` to the front and takes that many bytes off; what does not fit is left out.
    pub fn put_front(&mut self, from: &[u8]) -> usize {
        let total = (from.len() as u64).min(self.bytes) as usize;
        let mut done = 0;
        while done < total {
            let piece = &self.pieces[0];
            let now = piece.iov_len.min(total - done);
            volatile(piece.iov_base.cast(), now).copy_from(&from[done..done + now]);
            done += now;
            self.skip_front(now);
        }
        total
    }

    /// Drops bytes off the front; at most [`Buffers::bytes`].
    pub fn skip_front(&mut self, mut bytes: usize) {
        let mut gone = 0;
        for piece in &mut self.pieces {
            let now = bytes.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(now).cast();
            piece.iov_len -= now;
            self.bytes -= now as u64;
            bytes -= now;
            if piece.iov_len != 0 {
                break;
            }
            gone += 1;
        }
        self.pieces.drain(..gone);
    }

    /// A list of the first `bytes` of this one.
    pub fn clone_front(&self, bytes: u64) -> Buffers {
        let mut front = Buffers {
            pieces: Vec::with_capacity(1),
            bytes: 0,
        };
        for piece in &self.pieces {
            let left = bytes - front.bytes;
            if left == 0 {
                break;
            }
            front.push(piece.iov_base.cast(), piece.iov_len.min(left as usize));
        }
        front
    }

    /// Cuts the list to its first `bytes`.
    pub fn truncate(&mut self, bytes: u64) {
        while self.bytes > bytes {
            let Some(last) = self.pieces.last_mut() else {
                return;
            };
            let surplus = (self.bytes - bytes).min(last.iov_len as u64);
            last.iov_len -= surplus as usize;
            self.bytes -= surplus;
            if last.iov_len == 0 {
                self.pieces.pop();
            }
        }
    }

    /// Where the two bytes at offset `at` lie; `None` if there are fewer.
    pub fn place_of_u16(&self, at: usize) -> Option<PlaceU16> {
        Some(PlaceU16(self.byte_at(at)?, self.byte_at(at + 1)?))
    }

    fn byte_at(&self, mut at: usize) -> Option<*mut u8> {
        for piece in &self.pieces {
            if at < piece.iov_len {
                return Some(piece.iov_base.cast::<u8>().wrapping_add(at));
            }
            at -= piece.iov_len;
        }
        None
    }

    /// Takes the last byte off the list: where it lies, for a status that is written at the end.
    pub fn take_last_byte(&mut self) -> Option<StatusByte> {
        let last = self.pieces.last_mut()?;
        last.iov_len -= 1;
        self.bytes -= 1;
        let byte = StatusByte(last.iov_base.cast::<u8>().wrapping_add(last.iov_len));
        if last.iov_len == 0 {
            self.pieces.pop();
        }
        Some(byte)
    }
}

/// A 16-bit number in guest memory, which may lie across two buffers, for what is known at the end only.
#[derive(Debug)]
pub struct PlaceU16(*mut u8, *mut u8);

impl PlaceU16 {
    /// Writes it, little-endian.
    pub fn set(&self, value: u16) {
        let [low, high] = value.to_le_bytes();
        volatile(self.0, 1).copy_from(&[low]);
        volatile(self.1, 1).copy_from(&[high]);
    }
}

/// One byte of guest memory.
#[derive(Debug)]
pub struct StatusByte(*mut u8);

// SAFETY: the pointer goes to guest memory, which is mapped for the life of the process and belongs to no thread.
unsafe impl Send for StatusByte {}

impl StatusByte {
    /// Writes it.
    pub fn set(self, value: u8) {
        volatile(self.0, 1).copy_from(&[value]);
    }
}

/// Guest memory as the volatile thing that it is.
fn volatile<'a>(base: *mut u8, length: usize) -> VolatileSlice<'a> {
    // SAFETY: every pointer in this module comes from `Memory::get_slice` for at least this length, and guest
    // memory is mapped for the life of the process.
    unsafe { VolatileSlice::new(base, length) }
}

/// A checked chain. It is reused from request to request, so that requests allocate nothing.
#[derive(Debug, Default)]
pub struct Chain {
    /// The chain's head: what goes to the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

impl Chain {
    /// Takes a chain apart.
    pub fn load(&mut self, memory: &Memory, mut chain: DescriptorChain<&Memory>) -> Result<(), ChainError> {
        let head = chain.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut count = 0;
        loop {
            // The iterator also returns nothing when a chain is malformed, so the flag of the last one decides.
            let Some(descriptor) = chain.next() else {
                return Err(ChainError::CutShort { head });
            };
            count += 1;
            if count > MAX_BUFFERS {
                return Err(ChainError::TooMany { head });
            }
            let (address, length) = (descriptor.addr(), descriptor.len());
            if length == 0 {
                return Err(ChainError::Empty { head });
            }
            let slice =
                memory
                    .get_slice(address, length as usize)
                    .map_err(|_| ChainError::OutsideMemory {
                        head,
                        address: address.0,
                        length,
                    })?;
            let base = slice.ptr_guard_mut().as_ptr();
            if descriptor.is_write_only() {
                self.writable.push(base, length as usize);
            } else if self.writable.pieces.is_empty() {
                self.readable.push(base, length as usize);
            } else {
                return Err(ChainError::Direction { head });
            }
            if !descriptor.has_next() {
                return Ok(());
            }
        }
    }

    /// An error about a part's length.
    pub fn wrong_length(&self, what: &'static str, length: u64, least: u64, most: u64) -> ChainError {
        ChainError::Length {
            head: self.head,
            what,
            length,
            least,
            most,
        }
    }

    /// The chain must have nothing to write.
    pub fn only_readable(&self) -> Result<(), ChainError> {
        if self.writable.bytes == 0 {
            Ok(())
        } else {
            Err(ChainError::Direction { head: self.head })
        }
    }

    /// The chain must have nothing to read.
    pub fn only_writable(&self) -> Result<(), ChainError> {
        if self.readable.bytes == 0 {
            Ok(())
        } else {
            Err(ChainError::Direction { head: self.head })
        }
    }
}
