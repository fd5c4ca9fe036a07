//! What is in a file, as far as the kernel's command line must know: whether it can be mounted with DAX.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Where the magic numbers of file systems stand that know DAX, little-endian as on the disk: erofs
/// (`EROFS_SUPER_MAGIC_V1`), ext4 (`EXT4_SUPER_MAGIC`), XFS (`XFS_SB_MAGIC`).
const MAGICS: [(u64, &[u8]); 3] = [
    (1024, &0xe0f5_e1e2u32.to_le_bytes()),
    (1024 + 56, &0xef53u16.to_le_bytes()),
    (0, b"XFSB"),
];

/// Whether the file holds a file system that the guest can mount with DAX. One that cannot be read has none.
pub fn knows_dax(file: &File) -> bool {
    MAGICS.iter().any(|(offset, magic)| {
        let mut found = [0; 4];
        let found = &mut found[..magic.len()];
        file.read_exact_at(found, *offset).is_ok() && found == *magic
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_magic() {
        let with = |offset, magic: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            file.write_all_at(magic, offset).unwrap();
            knows_dax(&file)
        };
        assert!(with(1024, &[0xe2, 0xe1, 0xf5, 0xe0]));
        assert!(with(1080, &[0x53, 0xef]));
        assert!(with(0, b"XFSB"));
        assert!(!with(0, b"hsqs"));
        assert!(!knows_dax(&tempfile::tempfile().unwrap()));
    }
}
