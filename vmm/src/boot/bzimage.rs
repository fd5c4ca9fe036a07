//! `bzImage`: the setup header of the Linux/x86 boot protocol (`Documentation/arch/x86/boot.rst`) and the
//! packed kernel behind it.
//!
//! ```text
//!   file   | boot sector, real-mode code (not used) | packed kernel with its unpacker ... |
//!          0            0x1f1: setup header         (setup_sects + 1) * 512
//!   memory                                          pref_address ... + init_size
//!                                                   + 0x200: 64-bit entry
//! ```

use std::fs::File;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use crate::boot::image::{self, Entry, Error, Image, Segment, read_at};
use crate::boot::layout::HIGH_RAM;

/// Where the setup header begins in the file, and in the zero page.
const HEADER_AT: u64 = 0x1f1;
/// Where `jump`'s operand is counted from: header's end = this + the operand.
const HEADER_COUNTED_FROM: usize = 0x202;
/// Where the magic stands.
const MAGIC_AT: u64 = 0x202;
/// `HdrS`
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The last two bytes of a boot sector.
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// The first protocol with `xloadflags`, so with a 64-bit entry.
const FIRST_64_BIT: u16 = 0x20c;
const SECTOR: u64 = 512;
/// What 0 in `setup_sects` means.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// The unit of `syssize`.
const PARAGRAPH: u64 = 16;
/// The 64-bit entry, counted from where the kernel is loaded.
const ENTRY_64: u64 = 0x200;

/// Whether the file has the setup header's magic.
pub fn is_one(file: &File) -> bool {
    let mut magic = [0u8; 4];
    read_at(file, &mut magic, MAGIC_AT).is_ok() && u32::from_le_bytes(magic) == MAGIC
}

/// Reads the setup header.
pub fn read(file: &File) -> Result<Image, Error> {
    let mut header = setup_header::default();
    read_at(file, header.as_mut_slice(), HEADER_AT)?;
    // What lies behind the header's own end is code, and an older protocol's header is shorter.
    let [_, operand] = { header.jump }.to_le_bytes();
    let end = HEADER_COUNTED_FROM + usize::from(operand) - HEADER_AT as usize;
    if let Some(code) = header.as_mut_slice().get_mut(end..) {
        code.fill(0);
    }

    let range = |what, value| Error::Range { what, value };
    let (version, flags) = (header.version, header.xloadflags);
    if { header.boot_flag } != BOOT_FLAG {
        return Err(range("boot flag", u64::from(header.boot_flag)));
    }
    if version < FIRST_64_BIT || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry { version, flags });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(range("loadflags", u64::from(header.loadflags)));
    }
    let alignment = u64::from(header.kernel_alignment);
    if !alignment.is_power_of_two() {
        return Err(range("kernel_alignment", alignment));
    }

    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    let offset = (u64::from(sectors) + 1) * SECTOR;
    // Behind the kernel there may be a signature; the last paragraph may be cut short.
    let announced = u64::from(header.syssize) * PARAGRAPH;
    let there = image::length(file)?.saturating_sub(offset);
    let file_bytes = announced.min(there);
    if file_bytes <= ENTRY_64 || announced - file_bytes >= PARAGRAPH {
        return Err(range("syssize", u64::from(header.syssize)));
    }

    // An unpacker that may run elsewhere moves itself up to `pref_address` and to its alignment all the same, so
    // nothing below is of use to it; one that may not must be there.
    let mut address = header.pref_address;
    if header.relocatable_kernel != 0 {
        address = address
            .max(HIGH_RAM)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| range("pref_address", address))?;
    }
    let segment = Segment {
        offset,
        address,
        file_bytes,
        // The room that unpacking needs.
        memory_bytes: file_bytes.max(u64::from(header.init_size)),
    };
    let segment = segment.checked()?;
    Ok(Image {
        segments: vec![segment],
        entry: Entry::Linux64 {
            rip: segment.address + ENTRY_64,
        },
        header: Some(header),
    })
}

/// A small image with `code` at its 64-bit entry, for tests.
pub fn tiny(code: &[u8], address: u64) -> Vec<u8> {
    const SETUP_SECTORS: u8 = 7;
    let mut kernel = vec![0u8; ENTRY_64 as usize];
    kernel.extend(code);
    kernel.resize(kernel.len().next_multiple_of(PARAGRAPH as usize), 0xf4);
    let header = setup_header {
        setup_sects: SETUP_SECTORS,
        syssize: (kernel.len() as u64 / PARAGRAPH) as u32,
        boot_flag: BOOT_FLAG,
        // jmp over the header: its second byte says where the header ends
        jump: u16::from_le_bytes([0xeb, 0x6a]),
        header: MAGIC,
        version: 0x20f,
        loadflags: LOADED_HIGH,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x10_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        pref_address: address,
        init_size: 0x10_0000,
        ..Default::default()
    };
    let mut image = vec![0u8; HEADER_AT as usize];
    image.extend(header.as_slice());
    image.resize((usize::from(SETUP_SECTORS) + 1) * SECTOR as usize, 0);
    image.extend(kernel);
    image
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(change: impl FnOnce(&mut Vec<u8>)) -> Result<Image, Error> {
        let mut bytes = tiny(&[0xf4; 100], 0x100_0000);
        change(&mut bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        read(&file)
    }

    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    #[test]
    fn the_setup_header_says_where_and_how_much() {
        let read = image(|_| ()).unwrap();
        let segment = Segment {
            offset: 8 * 512,
            address: 0x100_0000,
            file_bytes: 0x200 + 112,
            memory_bytes: 0x10_0000,
        };
        assert_eq!(read.segments, [segment]);
        assert_eq!(read.entry, Entry::Linux64 { rip: 0x100_0200 });
        // A signature behind the kernel is left out; a lacking end of the last paragraph is not missed.
        assert_eq!(
            image(|b| b.extend([9; 3000])).unwrap().segments[0].file_bytes,
            0x270
        );
        assert_eq!(
            image(|b| b.truncate(b.len() - 15)).unwrap().segments[0].file_bytes,
            0x261
        );
        // 0 setup sectors means 4, whatever is there.
        assert_eq!(image(|b| b[0x1f1] = 0).unwrap().segments[0].offset, 5 * 512);
    }

    #[test]
    fn the_kernel_is_put_where_it_would_move_itself() {
        let at = |address: u64, relocatable: u8| {
            let change = |b: &mut Vec<u8>| {
                put(b, 0x258, &address.to_le_bytes());
                b[0x234] = relocatable;
            };
            image(change).unwrap().segments[0].address
        };
        assert_eq!(at(0x100_0000, 1), 0x100_0000);
        assert_eq!(at(0x100_0001, 1), 0x110_0000);
        assert_eq!(at(0, 1), 0x10_0000);
        assert_eq!(at(0x123_4567, 0), 0x123_4567);
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let refused = |at: usize, value: &[u8]| {
            image(|b| put(b, at, value))
                .expect_err("a damaged header was taken")
                .to_string()
        };
        assert!(refused(0x1fe, &[0, 0]).contains("boot flag 0x0"));
        assert!(refused(0x206, &[0x0b, 2]).contains("boot protocol 0x20b"));
        assert!(refused(0x236, &[2, 0]).contains("xloadflags 0x2"));
        assert!(refused(0x211, &[0]).contains("loadflags"));
        assert!(refused(0x230, &[0; 4]).contains("kernel_alignment 0x0"));
        assert!(refused(0x230, &[3, 0, 0, 0]).contains("kernel_alignment 0x3"));
        assert!(refused(0x1f4, &[0; 4]).contains("syssize 0x0"));
        assert!(refused(0x1f4, &[0xff; 4]).contains("syssize 0xffffffff"));
        assert!(refused(0x258, &[0xff; 8]).contains("pref_address"));
        let cut = image(|b| b.truncate(b.len() - 16));
        assert!(matches!(cut, Err(Error::Range { what: "syssize", .. })));
    }

    #[test]
    fn what_lies_behind_a_short_header_is_not_believed() {
        // A header that ends before `pref_address` and `init_size`.
        let short = image(|b| b[0x201] = 0x56).unwrap();
        let header = short.header.unwrap();
        assert_eq!(
            ({ header.pref_address }, { header.init_size }, {
                header.cmdline_size
            }),
            (0, 0, 2047)
        );
        assert_eq!(short.segments[0].address, HIGH_RAM);
    }
}
