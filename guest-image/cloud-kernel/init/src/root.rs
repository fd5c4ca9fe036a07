//! The root: its device, its file system, and the way into it.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use crate::cmdline::CommandLine;
use crate::{Error, c_string};

/// Where the root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/root";

/// How long a device may take to come. Most are there when their driver has loaded; pmem's driver probes on its own.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked for.
const INTERVAL: Duration = Duration::from_millis(5);

/// devtmpfs on `/dev`, which this kernel mounts only where it mounts the root by itself.
pub(crate) fn mount_devices() -> Result<(), Error> {
    fs::create_dir_all("/dev").map_err(Error::system("making /dev"))?;
    mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755")
        .map_err(|e| Error::system("mounting devtmpfs on /dev")(e.into()))
}

/// Mounts the root that the command line names.
pub(crate) fn mount_root(line: &CommandLine) -> Result<(), Error> {
    let device = line.root.as_deref().ok_or(Error::NoRoot)?;
    wait_for(device)?;
    fs::create_dir_all(NEW_ROOT).map_err(Error::system(format!("making {NEW_ROOT}")))?;
    let access = if line.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let options = c_string(&line.flags)?;
    let mut last = io::Error::from(io::ErrorKind::InvalidInput);
    for kind in &line.types {
        match mount(device, NEW_ROOT, kind.as_str(), access, options.as_c_str()) {
            Ok(()) => return Ok(()),
            Err(e) => last = e.into(),
        }
    }
    Err(Error::RootUnknown {
        device: device.to_owned(),
        tried: line.types.join(", "),
        source: last,
    })
}

fn wait_for(device: &str) -> Result<(), Error> {
    let began = Instant::now();
    while !Path::new(device).exists() {
        if began.elapsed() > PATIENCE {
            return Err(Error::RootMissing {
                device: device.to_owned(),
                seconds: PATIENCE.as_secs(),
                present: block_devices(),
            });
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}

/// The names of the block devices in `/dev`, for an error.
fn block_devices() -> String {
    use std::os::unix::fs::FileTypeExt as _;
    let mut names: Vec<String> = fs::read_dir("/dev")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_block_device()))
        .map(|entry| entry.path().display().to_string())
        .collect();
    names.sort();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Makes the mounted root the root of everything, with devtmpfs in it.
pub(crate) fn enter() -> Result<(), Error> {
    // This program's own file, as the modules' files, is memory that nobody needs any more.
    let _ = fs::remove_file("/init");
    let dev = format!("{NEW_ROOT}/dev");
    mount_move("/dev", &dev).map_err(|e| Error::system(format!("moving /dev to {dev}"))(e.into()))?;
    // The first file system of all cannot be pivoted away; the root is moved over it.
    chdir(NEW_ROOT)
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"))
        .map_err(|e| Error::system(format!("moving {NEW_ROOT} to /"))(e.into()))
}

/// Becomes the root's init, with the arguments and the environment that the kernel gave. Comes back when it cannot.
pub(crate) fn exec(init: &str) -> Error {
    let error = Command::new(init).args(std::env::args_os().skip(1)).exec();
    Error::system(format!("starting init={init}"))(error)
}
