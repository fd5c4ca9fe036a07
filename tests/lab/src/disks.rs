//! The disks of a node, made without root: its configuration, the payload (Mandoline's programs), its state.

use crate::{LabError, Result};
use std::collections::BTreeMap;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Runs a program that makes a disk.
fn run(mut command: Command, program: &'static str, package: &'static str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            LabError::MissingProgram { program, package }
        } else {
            LabError::File {
                what: "run",
                path: program.into(),
                source,
            }
        }
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Program {
        program: program.into(),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Finds a program in PATH or where Debian keeps the administrator's, which an ordinary user's PATH lacks.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn program_or(name: &'static str, package: &'static str) -> Result<PathBuf> {
    program(name).ok_or(LabError::MissingProgram {
        program: name,
        package,
    })
}

/// A read-only image of `from`, in which everything belongs to root whoever made it.
fn erofs(image: &Path, from: &Path) -> Result<()> {
    let mut command = Command::new(program_or("mkfs.erofs", "erofs-utils")?);
    // No extended attributes: those of this machine mean nothing there.
    command.args(["-x", "-1", "--all-root"]).arg(image).arg(from);
    run(command, "mkfs.erofs", "erofs-utils")
}

/// The state disk: a sparse ext4 that takes 4 MB until it is written to.
pub(crate) fn state(image: &Path, bytes: u64) -> Result<()> {
    let file = std::fs::File::create(image).map_err(LabError::file("make", image))?;
    file.set_len(bytes)
        .map_err(LabError::file("set the length of", image))?;
    let mut command = Command::new(program_or("mke2fs", "e2fsprogs")?);
    // The image is not longer-lived than the lab: a small journal, and no zeroing of inode tables in the background.
    // Nobody else may use the reserved blocks, so there are none.
    command
        .args([
            "-q", "-F", "-t", "ext4", "-L", "PLSTATE", "-m", "0", "-i", "65536", "-J", "size=8",
        ])
        .args([
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,discard,root_owner=0:0",
            "-O",
            "^metadata_csum",
        ])
        .args(["-M", "/var/lib/mandoline"])
        .arg(image);
    run(command, "mke2fs", "e2fsprogs")
}

/// The configuration disk, from `files`: name → contents. Written through a private directory, since there are keys.
pub(crate) fn config(image: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let stage = tempfile::tempdir_in(image.parent().unwrap_or(Path::new(".")))
        .map_err(LabError::file("make a directory beside", image))?;
    for (name, contents) in files {
        let path = stage.path().join(name);
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut f| std::io::Write::write_all(&mut f, contents))
            .map_err(LabError::file("write", &path))?;
    }
    erofs(image, stage.path())
}

/// The payload: `bin/` with the programs of `programs` that are there and `extra`, and the node's scripts.
pub(crate) fn payload(image: &Path, programs: &Path, extra: &[PathBuf]) -> Result<()> {
    const PROGRAMS: [&str; 4] = ["mandoline-vmm", "mandoline-nodemgr", "mandoline-scs", "mandoline"];
    let stage = tempfile::tempdir_in(image.parent().unwrap_or(Path::new(".")))
        .map_err(LabError::file("make a directory beside", image))?;
    let bin = stage.path().join("bin");
    std::fs::create_dir(&bin).map_err(LabError::file("make", &bin))?;
    let present = PROGRAMS.iter().map(|p| programs.join(p)).filter(|p| p.is_file());
    for program in present.chain(extra.iter().cloned()) {
        put(&program, &bin)?;
    }
    if let Some(source) = crate::images::source_tree() {
        let scripts = [
            "guest-image/root/make-disk",
            "guest-image/node/payload-files/ssh-keys",
        ];
        for script in scripts.iter().map(|s| source.join(s)).filter(|s| s.is_file()) {
            put(&script, stage.path())?;
        }
    }
    // mkfs keeps the modes that it finds, and the directory that we got is private.
    for directory in [stage.path(), &bin] {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
            .map_err(LabError::file("set the mode of", directory))?;
    }
    erofs(image, stage.path())
}

/// A link where that works (nothing to copy), else a copy, that anybody may run and nobody but root may write.
fn put(file: &Path, directory: &Path) -> Result<()> {
    let name = file.file_name().ok_or_else(|| LabError::Value {
        name: "a program for the payload",
        value: file.display().to_string(),
        allowed: "the path of a file".into(),
    })?;
    let to = directory.join(name);
    let mode = std::fs::metadata(file)
        .map_err(LabError::file("read", file))?
        .permissions()
        .mode();
    // A link shares the mode, so it does only where the mode is right already.
    if mode & 0o777 == 0o755 && std::fs::hard_link(file, &to).is_ok() {
        return Ok(());
    }
    std::fs::copy(file, &to).map_err(LabError::file("copy", file))?;
    std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))
        .map_err(LabError::file("set the mode of", &to))
}

/// Free bytes where `path` is.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| LabError::file("look at", path)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
