//! Mounts: the kernel's file systems in *up*, the sliver's own disk over the shared root in *join*.
//!
//! ```text
//!   up                                  joined
//!   /            erofs, read-only       /                    overlay: lower = erofs, upper = the disk
//!   /dev /proc /sys /run                /dev /proc /sys /run moved along
//!                                       /run/mandoline/disk  the disk itself, root only
//! ```

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use mandoline_api::agent::GrowDiskReply;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, mount_remount, unmount};

use crate::error::{Context as _, Error};
use crate::log::warning;

/// Where the sliver's disk is mounted once it has joined.
pub(crate) const DISK: &str = "/run/mandoline/disk";

/// The agent's own directory, on memory, root only.
pub(crate) const RUN: &str = "/run/mandoline";

/// An existing empty directory of the read-only root, to build the new root on.
const WORKSHOP: &str = "/mnt";

/// What ext4 is told: nothing is written while nothing changes (`noinit_itable`: no thread that zeroes inode
/// tables for minutes; a commit each 30 s only when there is something to commit), and blocks that are freed
/// go back to the node's sparse file where the device can do it.
const DISK_OPTIONS: &std::ffi::CStr = c"commit=30,errors=remount-ro,noinit_itable,discard";

/// Mounts what every program expects of the kernel. A mount that fails is logged: an agent that can be asked
/// is worth more than none. (One that is there already, as devtmpfs may be, is no failure.)
pub(crate) fn mount_kernel() {
    use MountFlags as F;
    let quiet = F::NOSUID | F::NOEXEC | F::NODEV;
    let mounts: [(&str, &str, MountFlags, &std::ffi::CStr); 6] = [
        ("proc", "/proc", quiet, c""),
        ("sysfs", "/sys", quiet, c""),
        (
            "devpts",
            "/dev/pts",
            F::NOSUID | F::NOEXEC,
            c"mode=0620,gid=5,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", F::NOSUID | F::NODEV, c"mode=1777"),
        ("tmpfs", "/run", F::NOSUID | F::NODEV, c"mode=0755,size=20%"),
        ("cgroup2", "/sys/fs/cgroup", quiet, c"nsdelegate"),
    ];
    for (kind, target, flags, options) in mounts {
        if matches!(target, "/dev/pts" | "/dev/shm") {
            let _ = fs::create_dir(target);
        }
        match mount(kind, target, kind, flags, options) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(e) => warning!("mounting {kind} on {target}: {e}"),
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, link);
    }
    if let Err(e) = fs::DirBuilder::new().mode(0o700).create(RUN)
        && e.kind() != io::ErrorKind::AlreadyExists
    {
        warning!("making {RUN}: {e}");
    }
    let _ = fs::create_dir("/run/lock");
    let _ = fs::set_permissions("/run/lock", fs::Permissions::from_mode(0o1777));
}

/// Puts the sliver's disk (or memory, without one) over the read-only root and moves everything onto it.
/// When it fails, the guest is as it was.
pub(crate) fn enter(disk: Option<&str>) -> Result<(), Error> {
    match disk {
        Some(device) => {
            if !Path::new(device).exists() {
                return Err(Error::NotFound(format!("disk {device} is not there")));
            }
            mount(device, WORKSHOP, "ext4", MountFlags::NOATIME, DISK_OPTIONS)
                .context(|| format!("mounting ext4 of {device}"))?;
        }
        None => mount(
            "tmpfs",
            WORKSHOP,
            "tmpfs",
            MountFlags::NOATIME,
            c"mode=0755,size=50%",
        )
        .context(|| "mounting memory for changes".to_owned())?,
    }
    let done = overlay_and_pivot();
    if done.is_err() {
        // Before the pivot nothing lives there but what was just mounted; after it, /mnt is another /mnt.
        let _ = unmount(WORKSHOP, UnmountFlags::DETACH);
    }
    done
}

fn overlay_and_pivot() -> Result<(), Error> {
    for name in ["upper", "work", "root"] {
        let path = format!("{WORKSHOP}/{name}");
        match fs::DirBuilder::new().mode(0o755).create(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).context(|| format!("making {path} on the disk")),
        }
    }
    let new_root = format!("{WORKSHOP}/root");
    // redirect_dir: directories of the shared root can be renamed, as on any other file system.
    let options = format!("lowerdir=/,upperdir={WORKSHOP}/upper,workdir={WORKSHOP}/work,redirect_dir=on");
    let options = std::ffi::CString::new(options).map_err(|_| Error::BadRequest("overlay options".into()))?;
    mount(
        "overlay",
        &new_root,
        "overlay",
        MountFlags::NOATIME,
        options.as_c_str(),
    )
    .context(|| "mounting the overlay".to_owned())?;

    let moved = ["/dev", "/proc", "/sys", "/run"];
    for (done, from) in moved.iter().enumerate() {
        let to = format!("{new_root}{from}");
        if let Err(e) = mount_move(*from, &to) {
            for back in moved.iter().take(done) {
                let _ = mount_move(format!("{new_root}{back}"), *back);
            }
            return Err(e).context(|| format!("moving {from} to the new root"));
        }
    }
    let old = format!("{new_root}{WORKSHOP}");
    let pivoted = rustix::process::chdir(&new_root)
        .and_then(|()| rustix::process::pivot_root(&new_root, &old))
        .and_then(|()| rustix::process::chdir("/"));
    if let Err(e) = pivoted {
        let _ = rustix::process::chdir("/");
        for back in moved {
            let _ = mount_move(format!("{new_root}{back}"), back);
        }
        return Err(e).context(|| "pivot_root".to_owned());
    }

    // From here on the new root is in use: what fails is told in the log and lived with.
    let kept = fs::create_dir_all(DISK).and_then(|()| Ok(mount_move(format!("{WORKSHOP}{WORKSHOP}"), DISK)?));
    if let Err(e) = kept {
        warning!("keeping the disk at {DISK}: {e}");
    }
    // The old root stays alive below the overlay; only its place in the tree goes.
    if let Err(e) = unmount(WORKSHOP, UnmountFlags::DETACH) {
        warning!("letting go of the old root: {e}");
    }
    Ok(())
}

/// `EXT4_IOC_RESIZE_FS` (Documentation/admin-guide/ext4.rst): the new length in blocks.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;

/// Lets the disk's file system fill its device, mounted as it is. The device may have grown; it never shrinks.
pub(crate) fn grow(device: &str) -> Result<GrowDiskReply, Error> {
    let name = device.rsplit('/').next().unwrap_or_default();
    let path = format!("/sys/class/block/{name}/size");
    let sectors = fs::read_to_string(&path).context(|| format!("reading {path}"))?;
    let sectors: u64 = sectors
        .trim()
        .parse()
        .map_err(|_| Error::NotFound(format!("{path} is {sectors:?}, no number of sectors")))?;
    let disk = fs::File::open(DISK).context(|| format!("opening {DISK}"))?;
    let before = rustix::fs::fstatvfs(&disk).context(|| format!("asking for the size of {DISK}"))?;
    let blocks = sectors * 512 / before.f_frsize.max(512);
    // SAFETY: the descriptor is open, and the kernel reads one u64 from where the pointer leads.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if done != 0 {
        return Err(io::Error::last_os_error()).context(|| format!("growing {DISK} to {blocks} blocks"));
    }
    let after = rustix::fs::fstatvfs(&disk).context(|| format!("asking for the size of {DISK}"))?;
    Ok(GrowDiskReply {
        bytes: sectors * 512,
        grown: after.f_blocks > before.f_blocks,
    })
}

/// Writes everything out and makes the file systems read-only, once no process is left that writes.
pub(crate) fn settle() {
    rustix::fs::sync();
    for target in ["/", DISK] {
        if Path::new(target).exists()
            && let Err(e) = mount_remount(target, MountFlags::RDONLY, c"")
        {
            // In `up` the root is read-only and there is no disk: nothing to settle.
            if e != rustix::io::Errno::INVAL {
                warning!("making {target} read-only: {e}");
            }
        }
    }
    rustix::fs::sync();
}
