//! What a kernel image is, whatever its format: where its bytes go and how its first instruction is reached.
//!
//! ```text
//!   ELF vmlinux with a PVH note ------> Entry::Pvh      32-bit protected mode
//!   ELF vmlinux without --------------> Entry::Linux64  64-bit long mode, "zero page"
//!   bzImage (boot protocol 2.12) -----> Entry::Linux64  its own 64-bit entry, which unpacks the rest
//! ```
//!
//! The format is told by content, never by name. A kernel image is data of somebody else: every number in it is
//! checked before it is used.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;

use crate::boot::{bzimage, elf};

/// The image is not a kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("reading {bytes} bytes of the kernel image at {offset}: {source}")]
    Read {
        /// Where in the file.
        offset: u64,
        /// How much.
        bytes: usize,
        /// What the host said.
        source: std::io::Error,
    },
    /// How long the file is cannot be had.
    #[error("finding the end of the kernel image: {0}")]
    Length(std::io::Error),
    /// No format that is known.
    #[error("kernel image begins with {0:02x?}: it is neither an ELF `vmlinux` nor a `bzImage`")]
    Format([u8; 4]),
    /// Not for x86-64.
    #[error("kernel image: {what} is {value:#x}, not {wanted:#x}: a kernel for 64-bit x86 is needed")]
    NotX86_64 {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be.
        wanted: u64,
    },
    /// A number in the file makes no sense.
    #[error("kernel image: {what} {value:#x} is outside what is possible")]
    Range {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A `bzImage` from before the 64-bit entry.
    #[error(
        "bzImage: boot protocol {version:#x}, xloadflags {flags:#x}: protocol 0x20c or later with a 64-bit entry (xloadflags bit 0) is needed"
    )]
    No64BitEntry {
        /// The protocol's version.
        version: u16,
        /// Its 64-bit flags.
        flags: u16,
    },
}

/// Where and how the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, EBX the address of `hvm_start_info`.
    Pvh {
        /// Guest-physical address of the first instruction.
        rip: u64,
    },
    /// The 64-bit Linux boot protocol: long mode, RSI the address of `boot_params`, the "zero page".
    Linux64 {
        /// Guest-physical address of the first instruction.
        rip: u64,
    },
}

/// One piece of the image that is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes in the file.
    pub file_bytes: u64,
    /// Bytes in memory; what is not in the file is zero.
    pub memory_bytes: u64,
}

impl Segment {
    /// First address after the segment.
    pub fn end(&self) -> u64 {
        self.address + self.memory_bytes
    }

    /// The segment, if its ends can be computed: in the file and in memory.
    pub(super) fn checked(self) -> Result<Self, Error> {
        let range = |what, value| Error::Range { what, value };
        if self.file_bytes > self.memory_bytes {
            return Err(range("size of a segment in the file", self.file_bytes));
        }
        self.address
            .checked_add(self.memory_bytes)
            .ok_or_else(|| range("size of a segment", self.memory_bytes))?;
        self.offset
            .checked_add(self.file_bytes)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| range("offset of a segment", self.offset))?;
        Ok(self)
    }
}

/// What a kernel image says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// The loadable segments.
    pub segments: Vec<Segment>,
    /// Where it starts.
    pub entry: Entry,
    /// The setup header of a `bzImage`.
    pub header: Option<setup_header>,
}

/// Reads the headers of a kernel image.
pub fn read(file: &File) -> Result<Image, Error> {
    let mut magic = [0u8; 4];
    read_at(file, &mut magic, 0)?;
    if magic == elf::MAGIC {
        elf::read(file)
    } else if bzimage::is_one(file) {
        bzimage::read(file)
    } else {
        Err(Error::Format(magic))
    }
}

pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
    file.read_exact_at(buffer, offset).map_err(|source| Error::Read {
        offset,
        bytes: buffer.len(),
        source,
    })
}

/// Length of the file, by seeking: that a jailed monitor may still do when its guest reboots.
pub(super) fn length(mut file: &File) -> Result<u64, Error> {
    file.seek(SeekFrom::End(0)).map_err(Error::Length)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_format_is_told_by_content() {
        let pvh = read(&file(&elf::tiny(&[0xf4; 8], 0x10_0000))).unwrap();
        assert_eq!(pvh.entry, Entry::Pvh { rip: 0x10_0000 });
        let elf = read(&file(&elf::tiny_linux64(&[0xf4; 8], 0x10_0000))).unwrap();
        assert_eq!(elf.entry, Entry::Linux64 { rip: 0x10_0000 });
        let bzimage = read(&file(&bzimage::tiny(&[0xf4; 8], 0x20_0000))).unwrap();
        assert_eq!(bzimage.entry, Entry::Linux64 { rip: 0x20_0200 });
        let error = read(&file(&[7; 4096])).unwrap_err().to_string();
        assert!(error.contains("[07, 07, 07, 07]"), "{error}");
        assert!(matches!(read(&file(b"MZ")), Err(Error::Read { .. })));
    }

    /// Images with some of their bytes changed; the changes aim at the headers.
    fn damaged() -> impl Strategy<Value = Vec<u8>> {
        let whole = prop_oneof![
            Just(elf::tiny(&[0xf4; 700], 0x10_0000)),
            Just(elf::tiny_linux64(&[0xf4; 700], 0x10_0000)),
            Just(bzimage::tiny(&[0xf4; 700], 0x10_0000)),
        ];
        let changes = proptest::collection::vec((0usize..0x300, any::<u8>()), 0..6);
        (whole, changes, 0usize..0x2000).prop_map(|(mut image, changes, cut)| {
            for (at, value) in changes {
                image[at] = value;
            }
            image.truncate(0x1fff - cut);
            image
        })
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_nothing_is_out_of_bounds(image in damaged()) {
            if let Ok(image) = read(&file(&image)) {
                let (Entry::Pvh { rip } | Entry::Linux64 { rip }) = image.entry;
                prop_assert!(image.segments.iter().any(|s| (s.address..s.end()).contains(&rip)));
                for segment in &image.segments {
                    prop_assert!(segment.address.checked_add(segment.memory_bytes).is_some());
                    prop_assert!(segment.file_bytes <= segment.memory_bytes);
                }
            }
        }

        #[test]
        fn noise_is_no_kernel(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(read(&file(&bytes)).is_err());
        }
    }
}
