//! Small files of the system, replaced whole or not at all, and only when they change: an idle sliver, and
//! one that starts again, writes nothing to its disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Makes `path` hold `content` with `mode`; answers whether it was otherwise before.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    if let Ok(metadata) = fs::symlink_metadata(path) {
        let same = metadata.is_file()
            && metadata.permissions().mode() & 0o7777 == mode
            && metadata.len() == content.len() as u64
            && fs::read(path)? == content;
        if same {
            return Ok(false);
        }
    }
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".mandoline-new");
    let new = path.with_file_name(name);
    let written = write_new(&new, content, mode).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.map(|()| true)
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    // What an interrupted attempt left behind; create_new below then never follows a link put there.
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    // The umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_only_when_it_changes() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("hosts");
        assert!(replace(&path, b"one", 0o644).expect("written"));
        assert!(!replace(&path, b"one", 0o644).expect("unchanged"));
        assert!(replace(&path, b"two", 0o644).expect("written"));
        assert!(replace(&path, b"two", 0o600).expect("mode changed"));
        assert_eq!(fs::read(&path).expect("readable"), b"two");
        assert_eq!(
            fs::metadata(&path).expect("is there").permissions().mode() & 0o7777,
            0o600
        );
        assert_eq!(
            fs::read_dir(dir.path()).expect("listed").count(),
            1,
            "nothing half-made is left"
        );
    }

    #[test]
    fn a_link_is_replaced_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::write(&target, "theirs").expect("written");
        std::os::unix::fs::symlink(&target, &link).expect("linked");
        assert!(replace(&link, b"ours", 0o644).expect("written"));
        assert_eq!(fs::read(&target).expect("readable"), b"theirs");
        assert!(fs::symlink_metadata(&link).expect("is there").is_file());
    }
}
