//! Just enough ELF for a kernel: the loadable segments of a 64-bit x86 executable and its entry, which is that of
//! the PVH note where there is one.

use std::fs::File;

use crate::boot::image::{Entry, Error, Image, Segment, read_at};

/// What an ELF file begins with.
pub const MAGIC: [u8; 4] = *b"\x7fELF";
const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// A kernel has about five; more than this is not a kernel.
const MAX_SEGMENTS: u16 = 64;
/// A kernel's notes are under 1 KiB.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry point that PVH starts at.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Reads the headers of an ELF kernel.
pub fn read(file: &File) -> Result<Image, Error> {
    let mut header = [0u8; HEADER_BYTES];
    read_at(file, &mut header, 0)?;
    expect(
        "magic",
        u64::from(u32_at(&header, 0)),
        u64::from(u32::from_le_bytes(MAGIC)),
    )?;
    expect("class", u64::from(header[4]), 2)?;
    expect("byte order", u64::from(header[5]), 1)?;
    expect(
        "machine",
        u64::from(u16_at(&header, 18)),
        u64::from(MACHINE_X86_64),
    )?;
    expect(
        "program header size",
        u64::from(u16_at(&header, 54)),
        SEGMENT_BYTES as u64,
    )?;
    let table = u64_at(&header, 32);
    let count = u16_at(&header, 56);
    if count == 0 || count > MAX_SEGMENTS {
        return Err(Error::Range {
            what: "number of segments",
            value: u64::from(count),
        });
    }
    let mut headers = vec![0u8; usize::from(count) * SEGMENT_BYTES];
    read_at(file, &mut headers, table)?;

    let mut segments = Vec::new();
    let mut pvh = None;
    for header in headers.chunks_exact(SEGMENT_BYTES) {
        let segment = Segment {
            offset: u64_at(header, 8),
            address: u64_at(header, 24),
            file_bytes: u64_at(header, 32),
            memory_bytes: u64_at(header, 40),
        };
        match u32_at(header, 0) {
            SEGMENT_LOAD if segment.memory_bytes != 0 => segments.push(segment.checked()?),
            SEGMENT_NOTE => pvh = pvh.or(pvh_entry(file, &segment)?),
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(Error::Range {
            what: "number of loadable segments",
            value: 0,
        });
    }
    let (what, rip, entry) = match pvh {
        Some(rip) => ("PVH entry", rip, Entry::Pvh { rip }),
        // A kernel's own entry is a physical address, and code for long mode.
        None => {
            let rip = u64_at(&header, 24);
            ("entry", rip, Entry::Linux64 { rip })
        }
    };
    if !segments.iter().any(|s| (s.address..s.end()).contains(&rip)) {
        return Err(Error::Range { what, value: rip });
    }
    Ok(Image {
        segments,
        entry,
        header: None,
    })
}

fn pvh_entry(file: &File, segment: &Segment) -> Result<Option<u64>, Error> {
    if segment.file_bytes > MAX_NOTES {
        return Err(Error::Range {
            what: "size of the notes",
            value: segment.file_bytes,
        });
    }
    let mut notes = vec![0u8; segment.file_bytes as usize];
    read_at(file, &mut notes, segment.offset)?;
    let mut rest = notes.as_slice();
    // Each note: name length, descriptor length, type, then name and descriptor padded to 4 bytes.
    while rest.len() >= 12 {
        let name_bytes = u32_at(rest, 0) as usize;
        let data_bytes = u32_at(rest, 4) as usize;
        let kind = u32_at(rest, 8);
        let data_at = name_bytes
            .checked_next_multiple_of(4)
            .and_then(|n| n.checked_add(12));
        let next = data_at.and_then(|at| at.checked_add(data_bytes.checked_next_multiple_of(4)?));
        let (Some(data_at), Some(next)) = (data_at, next) else {
            return Err(Error::Range {
                what: "size of a note",
                value: data_bytes as u64,
            });
        };
        if kind == NOTE_PHYS32_ENTRY && rest.get(12..16) == Some(b"Xen\0") && name_bytes == 4 {
            return match (data_bytes, rest.get(data_at..data_at + data_bytes.min(8))) {
                (4, Some(data)) => Ok(Some(u64::from(u32_at(data, 0)))),
                (8, Some(data)) => Ok(Some(u64_at(data, 0))),
                _ => Err(Error::Range {
                    what: "size of the PVH note",
                    value: data_bytes as u64,
                }),
            };
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

fn expect(what: &'static str, value: u64, wanted: u64) -> Result<(), Error> {
    if value == wanted {
        Ok(())
    } else {
        Err(Error::NotX86_64 { what, value, wanted })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A small kernel image with one segment and a PVH note, for tests.
pub fn tiny(code: &[u8], address: u64) -> Vec<u8> {
    const CODE_AT: usize = 0x1000;
    let mut image = vec![0u8; CODE_AT];
    image[..4].copy_from_slice(&MAGIC);
    (image[4], image[5], image[6]) = (2, 1, 1);
    image[16..18].copy_from_slice(&2u16.to_le_bytes());
    image[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
    image[32..40].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
    image[54..56].copy_from_slice(&(SEGMENT_BYTES as u16).to_le_bytes());
    image[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut put = |at: usize, kind: u32, offset: u64, address: u64, bytes: u64| {
        image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        image[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        image[at + 24..at + 32].copy_from_slice(&address.to_le_bytes());
        image[at + 32..at + 40].copy_from_slice(&bytes.to_le_bytes());
        image[at + 40..at + 48].copy_from_slice(&bytes.to_le_bytes());
    };
    put(
        HEADER_BYTES,
        SEGMENT_LOAD,
        CODE_AT as u64,
        address,
        code.len() as u64,
    );
    put(HEADER_BYTES + SEGMENT_BYTES, SEGMENT_NOTE, 0x200, 0, 20);
    let note: Vec<u8> = [4u32, 4, NOTE_PHYS32_ENTRY]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    image[0x200..0x20c].copy_from_slice(&note);
    image[0x20c..0x210].copy_from_slice(b"Xen\0");
    image[0x210..0x214].copy_from_slice(&(address as u32).to_le_bytes());
    image.extend(code);
    image
}

/// The same without the note: it starts by the 64-bit Linux boot protocol.
pub fn tiny_linux64(code: &[u8], address: u64) -> Vec<u8> {
    let mut image = tiny(code, address);
    image[24..32].copy_from_slice(&address.to_le_bytes());
    image[HEADER_BYTES + SEGMENT_BYTES..][..4].fill(0);
    image
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_small_image_is_read() {
        let image = read(&file(&tiny(&[0xf4; 100], 0x10_0000))).unwrap();
        assert_eq!(image.entry, Entry::Pvh { rip: 0x10_0000 });
        let segment = Segment {
            offset: 0x1000,
            address: 0x10_0000,
            file_bytes: 100,
            memory_bytes: 100,
        };
        assert_eq!(image.segments, [segment]);
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        assert!(matches!(read(&file(b"short")), Err(Error::Read { .. })));
        let mut other = tiny(&[0xf4], 0x10_0000);
        other[18] = 40;
        let message = read(&file(&other)).unwrap_err().to_string();
        assert!(message.contains("machine is 0x28, not 0x3e"), "{message}");
        // Another note than PVH's, and an entry that is nowhere.
        let mut bare = tiny(&[0xf4], 0x10_0000);
        bare[0x208] = 17;
        assert!(matches!(
            read(&file(&bare)),
            Err(Error::Range {
                what: "entry",
                value: 0
            })
        ));
        let mut overflow = tiny(&[0xf4], 0x10_0000);
        overflow[64 + 40..64 + 48].fill(0xff);
        assert!(matches!(
            read(&file(&overflow)),
            Err(Error::Range {
                what: "size of a segment",
                ..
            })
        ));
    }
}
