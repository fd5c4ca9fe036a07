//! A sliver's disk: a sparse copy of an empty file system that is made once for each size.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::vm_type::Failure;

/// Sizes are multiples of this: the file system's block.
const BLOCK: u64 = 4096;

/// The size of the disk for a quota.
pub(super) fn size_of(quota: u64) -> u64 {
    quota / BLOCK * BLOCK
}

/// The template of a size.
pub(super) fn template(templates: &Path, bytes: u64) -> PathBuf {
    templates.join(format!("disk-{bytes}.ext4"))
}

/// Makes the template of a size unless it is there. The caller sees to it that this happens once at a time.
pub(super) fn make_template(templates: &Path, make_disk: &Path, bytes: u64) -> Result<PathBuf, Failure> {
    let path = template(templates, bytes);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(templates).map_err(|e| failed("make", templates, &e))?;
    // Under another name until it is whole: a half-made template would spoil every disk copied from it.
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let output = Command::new(make_disk)
        .args([temporary.as_os_str(), OsStr::new(&bytes.to_string())])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Failure::fatal(format!("cannot run {}: {e}", make_disk.display())))?;
    if !output.status.success() {
        let _ = fs::remove_file(&temporary);
        let words = String::from_utf8_lossy(&output.stderr);
        let reason = format!(
            "{} failed with {}: {}",
            make_disk.display(),
            output.status,
            last_line(&words)
        );
        return Err(Failure::retryable(reason));
    }
    let length = fs::metadata(&temporary)
        .map_err(|e| failed("read", &temporary, &e))?
        .len();
    if length != bytes {
        let reason = format!(
            "{} made a disk of {length} bytes; wanted: {bytes}",
            make_disk.display()
        );
        return Err(Failure::fatal(reason));
    }
    sync(&temporary).map_err(|e| failed("sync", &temporary, &e))?;
    fs::rename(&temporary, &path).map_err(|e| failed("rename", &temporary, &e))?;
    sync(templates).map_err(|e| failed("sync", templates, &e))?;
    Ok(path)
}

/// Makes a sliver's disk from a template, unless it is there already. Durable when it returns.
pub(super) fn make(template: &Path, disk: &Path) -> Result<(), Failure> {
    if disk.exists() {
        return Ok(());
    }
    let directory = disk.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(|e| failed("make", directory, &e))?;
    let temporary = disk.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let source = File::open(template).map_err(|e| failed("open", template, &e))?;
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(|e| failed("make", &temporary, &e))?;
    let copied = copy(&source, &target).and_then(|()| target.sync_all());
    if let Err(error) = copied {
        let _ = fs::remove_file(&temporary);
        return Err(failed("write", &temporary, &error));
    }
    fs::rename(&temporary, disk).map_err(|e| failed("rename", &temporary, &e))?;
    sync(directory).map_err(|e| failed("sync", directory, &e))
}

/// Whether a disk grew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grown {
    /// It has the wanted length already.
    No,
    /// It had less.
    Yes,
    /// It has more: this many bytes. A file system that is in use does not shrink.
    Longer(u64),
}

/// Lets a disk have `bytes` if it has less; what is added is a hole.
pub(super) fn grow(disk: &Path, bytes: u64) -> Result<(File, Grown), Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(disk)
        .map_err(|e| failed("open", disk, &e))?;
    let length = file.metadata().map_err(|e| failed("read", disk, &e))?.len();
    if length >= bytes {
        let grown = if length > bytes {
            Grown::Longer(length)
        } else {
            Grown::No
        };
        return Ok((file, grown));
    }
    file.set_len(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|e| failed("grow", disk, &e))?;
    Ok((file, Grown::Yes))
}

/// Whether the ext4 on a disk says that it is shorter than the disk (Documentation/filesystems/ext4/super.rst). The
/// guest writes there what it likes: this decides only whether its agent is asked to grow it.
pub(super) fn is_unfilled(disk: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut block = [0; 1024];
    let Ok(file) = File::open(disk) else { return false };
    let Ok(length) = file.metadata().map(|meta| meta.len()) else {
        return false;
    };
    if file.read_exact_at(&mut block, 1024).is_err() {
        return false;
    }
    let number = |at: usize| {
        u64::from(u32::from_le_bytes([
            block[at],
            block[at + 1],
            block[at + 2],
            block[at + 3],
        ]))
    };
    let blocks = number(0x4) | number(0x150) << 32;
    let size = 1024u64.checked_shl(number(0x18).min(6) as u32).unwrap_or(BLOCK);
    let magic = u16::from_le_bytes([block[0x38], block[0x39]]);
    magic == 0xef53 && blocks < length / size
}

/// Removes a disk, and what a copy that was broken off has left.
pub(super) fn remove(disk: &Path) -> Result<(), Failure> {
    for path in [disk.to_owned(), disk.with_extension("new")] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &path, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Bytes that are allocated for a file.
pub(super) fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512))
}

/// Copies a sparse file: by sharing its blocks where the file system can, else piece by piece of what is not
/// a hole.
fn copy(source: &File, target: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            // A file system that knows no holes: all of it is data.
            Err(Errno::INVAL) => position,
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(source, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL) => length,
            Err(error) => return Err(error.into()),
        };
        copy_range(source, target, start, end)?;
        position = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let length = usize::try_from(end - from).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not on these file systems: through memory then.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                return copy_through_memory(source, target, from, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 18];
    let mut position = start;
    while position < end {
        let want = usize::try_from(end - position)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        source.read_exact_at(&mut buffer[..want], position)?;
        target.write_all_at(&buffer[..want], position)?;
        position += want as u64;
    }
    Ok(())
}

fn sync(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::fsync(File::open(path)?.as_fd())?)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    let reason = format!("cannot {what} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Failure::fatal(reason),
        _ => Failure::retryable(reason),
    }
}

fn last_line(text: &str) -> &str {
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message")
        .trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    fn script(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn copies_are_exact_and_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let (template, disk) = (dir.path().join("template"), dir.path().join("disks/1.img"));
        let source = File::create(&template).unwrap();
        source.set_len(1 << 30).unwrap();
        source.write_all_at(b"superblock", 1024).unwrap();
        source.write_all_at(&[7; 70_000], 500 << 20).unwrap();
        source.write_all_at(b"end", (1 << 30) - 3).unwrap();
        make(&template, &disk).unwrap();
        let copy = File::open(&disk).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 1 << 30);
        assert!(
            allocated(&disk) < 1 << 20,
            "{} bytes are allocated",
            allocated(&disk)
        );
        for (at, length) in [(0, 4096), (500 << 20, 80_000), ((1 << 30) - 4096, 4096)] {
            let (mut a, mut b) = (vec![0; length], vec![0; length]);
            source_read(&template, &mut a, at);
            copy.read_exact_at(&mut b, at).unwrap();
            assert_eq!(a, b);
        }
        // A disk that is there stays as it is.
        OpenOptions::new()
            .write(true)
            .open(&disk)
            .unwrap()
            .write_all_at(b"mine", 0)
            .unwrap();
        make(&template, &disk).unwrap();
        assert_eq!(&fs::read(&disk).unwrap()[..4], b"mine");
        remove(&disk).unwrap();
        remove(&disk).unwrap();
        assert!(!disk.exists());
    }

    fn source_read(path: &Path, buffer: &mut [u8], at: u64) {
        File::open(path).unwrap().read_exact_at(buffer, at).unwrap();
    }

    #[test]
    fn disks_grow_and_never_shrink() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("1.img");
        let file = File::create(&disk).unwrap();
        file.set_len(64 << 20).unwrap();
        let mut superblock = [0; 1024];
        superblock[0x4..0x8].copy_from_slice(&(16u32 << 10).to_le_bytes());
        superblock[0x18] = 2;
        superblock[0x38..0x3a].copy_from_slice(&0xef53u16.to_le_bytes());
        file.write_all_at(&superblock, 1024).unwrap();
        assert!(!is_unfilled(&disk));
        assert_eq!(grow(&disk, 64 << 20).unwrap().1, Grown::No);
        assert_eq!(grow(&disk, 32 << 20).unwrap().1, Grown::Longer(64 << 20));
        assert_eq!(grow(&disk, 80 << 20).unwrap().1, Grown::Yes);
        assert_eq!(fs::metadata(&disk).unwrap().len(), 80 << 20);
        assert!(is_unfilled(&disk));
        // What is no ext4 is left alone.
        file.write_all_at(&[0; 1024], 1024).unwrap();
        assert!(!is_unfilled(&disk));
    }

    #[test]
    fn templates_are_made_once_and_only_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (templates, program) = (dir.path().join("templates"), dir.path().join("make-disk"));
        script(
            &program,
            "#!/bin/sh\necho made >> \"${0%/*}/count\"\ntruncate -s \"$2\" \"$1\"\n",
        );
        let path = make_template(&templates, &program, 8192).unwrap();
        make_template(&templates, &program, 8192).unwrap();
        assert_eq!(fs::metadata(path).unwrap().len(), 8192);
        assert_eq!(fs::read_to_string(dir.path().join("count")).unwrap(), "made\n");

        script(
            &program,
            "#!/bin/sh\necho half > \"$1\"\necho no space >&2\nexit 1\n",
        );
        let failure = make_template(&templates, &program, 4096).unwrap_err();
        assert!(failure.reason.contains("no space"), "{failure}");
        assert_eq!(fs::read_dir(&templates).unwrap().count(), 1);
        assert_eq!(size_of(5_000_000_000) % 4096, 0);
    }
}
