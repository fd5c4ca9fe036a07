//! What the backend does on the host: files, sockets, cgroups, processes. All of it blocks, so all of it runs
//! on blocking threads.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::monitor::VmConfig;
use mandoline_api::nodemgr::VmId;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{WaitId, WaitIdOptions};

use super::config::{KvmConfig, Places};
use super::monitor::{self, Booted, Handover, KEPT_FD, Launch, Passed};
use super::{boot, disk};
use crate::cgroup::{Limits, Tree};
use crate::qemu::{self, QemuConfig};
use crate::vm_type::{Failure, Reports, Stats, monotonic_ns};

/// Whether slivers can run here; if not, what is missing.
pub(super) fn check(config: &KvmConfig, qemu: Option<&QemuConfig>, tree: &Tree) -> Result<(), String> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Err(format!(
            "/dev/kvm: {error}. Allowed: a machine with VT-x or AMD-V (or nested virtualisation) and the kvm \
             module loaded"
        ));
    }
    let monitor = qemu.map_or(&config.monitor, |qemu| &qemu.program);
    let files = [
        ("the monitor", monitor),
        ("the slivers' kernel", &config.kernel),
        ("the slivers' root image", &config.root),
        ("the maker of disks", &config.make_disk),
    ];
    for (what, path) in files {
        if let Err(error) = fs::metadata(path) {
            return Err(format!("{what} {}: {error}", path.display()));
        }
    }
    if let Some(qemu) = qemu {
        qemu::check(qemu)?;
    }
    tree.check()
}

/// All that a start needs.
pub(super) struct Start {
    pub(super) config: KvmConfig,
    pub(super) places: Places,
    pub(super) vm: VmConfig,
    pub(super) vm_id: VmId,
    pub(super) booted: Booted,
    pub(super) uid: u32,
    pub(super) limits: Limits,
    /// QEMU in the place of our monitor.
    pub(super) qemu: Option<QemuConfig>,
    pub(super) tree: Arc<Tree>,
    pub(super) tap: OwnedFd,
    pub(super) reports: Reports,
}

impl Start {
    /// Makes the cgroup and the directories, and starts the monitor. Gives its process and, where it is our monitor, our
    /// end of the socket on which the guest's outward streams come.
    pub(super) fn run(self) -> Result<(OwnedFd, Option<OwnedFd>), Failure> {
        let cgroup = self.tree.create(self.vm_id, &self.limits)?;
        self.reports.phase("cgroup");
        make_dir(&self.places.run(self.vm_id))?;
        make_dir(&self.places.logs(self.vm_id))?;
        let started = match &self.qemu {
            Some(qemu) => (self.run_qemu(qemu, cgroup.path())?, None),
            None => {
                let (pidfd, outward) = self.run_monitor(cgroup.path())?;
                (pidfd, Some(outward))
            }
        };
        self.reports.phase("monitor");
        Ok(started)
    }

    /// Written before the start: whoever finds the monitor later finds this.
    fn hand_over(&self, kept_fd: RawFd) -> Result<(), Failure> {
        let handover = Handover {
            kept_fd,
            booted: Some(self.booted),
        };
        let path = self.places.handover(self.vm_id);
        let text = serde_json::to_vec(&handover).map_err(|e| Failure::fatal(e.to_string()))?;
        fs::write(&path, text).map_err(|e| open_error(&path, &e))
    }

    /// Starts QEMU, which opens what it needs by itself; only the tap has no name that it could open.
    fn run_qemu(&self, config: &QemuConfig, cgroup: &Path) -> Result<OwnedFd, Failure> {
        let (vm_id, logs) = (self.vm_id, self.places.logs(self.vm_id));
        self.hand_over(-1)?;
        let log = append(&logs.join("monitor.log"))?;
        let interface = self.vm.network_interfaces.first();
        let machine = qemu::Machine {
            vm_id,
            uid: self.uid,
            vcpus: self.booted.vcpus,
            mem_mib: self.booted.mem_mib,
            kernel: &self.config.kernel,
            boot_args: &self.config.boot_args,
            root: &self.config.root,
            disk: &self.places.disk(vm_id),
            console: &logs.join("console"),
            qmp: &self.places.qmp(vm_id),
            mac: interface.and_then(|i| i.guest_mac.clone()).unwrap_or_default(),
            tap: self.tap.as_raw_fd(),
        };
        monitor::launch(Launch {
            program: &config.program,
            arguments: qemu::arguments(config, &machine).map_err(Failure::fatal)?,
            passed: vec![Passed {
                name: "tap0",
                fd: self.tap.as_fd(),
            }],
            names: false,
            cgroup,
            log,
        })
    }

    /// Opens what our monitor gets, and starts it.
    fn run_monitor(&self, cgroup: &Path) -> Result<(OwnedFd, OwnedFd), Failure> {
        let (vm_id, logs) = (self.vm_id, self.places.logs(self.vm_id));
        let disk = self.places.disk(vm_id);
        let read = |path: &Path| File::open(path).map_err(|e| open_error(path, &e));
        let write = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| open_error(path, &e))
        };
        let kvm = write(Path::new("/dev/kvm"))?;
        let kernel = read(&self.config.kernel)?;
        let root = read(&self.config.root)?;
        let disk = write(&disk)?;
        let log = append(&logs.join("monitor.log"))?;
        let serial = append(&logs.join("console"))?;
        let state = append(&self.places.state(vm_id))?;
        let vsock = listen(&self.places.vsock(vm_id))?;
        let api = listen(&self.places.api(vm_id))?;
        let config = boot::sealed(&self.vm)
            .map_err(|e| Failure::retryable(format!("configuration of the monitor: {e}")))?;
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| Failure::retryable(format!("socket for outward streams: {e}")))?;

        self.hand_over(ours.as_raw_fd())?;
        let passed = vec![
            Passed {
                name: "kvm",
                fd: kvm.as_fd(),
            },
            Passed {
                name: "kernel",
                fd: kernel.as_fd(),
            },
            Passed {
                name: "root",
                fd: root.as_fd(),
            },
            Passed {
                name: "disk",
                fd: disk.as_fd(),
            },
            Passed {
                name: "log",
                fd: log.as_fd(),
            },
            Passed {
                name: "serial",
                fd: serial.as_fd(),
            },
            Passed {
                name: "state",
                fd: state.as_fd(),
            },
            Passed {
                name: "vsock",
                fd: vsock.as_fd(),
            },
            Passed {
                name: "api",
                fd: api.as_fd(),
            },
            Passed {
                name: "config",
                fd: config.as_fd(),
            },
            Passed {
                name: "tap0",
                fd: self.tap.as_fd(),
            },
            Passed {
                name: mandoline_api::monitor::VSOCK_OUT_FD,
                fd: theirs.as_fd(),
            },
            Passed {
                name: KEPT_FD,
                fd: ours.as_fd(),
            },
        ];
        let pidfd = monitor::launch(Launch {
            program: &self.config.monitor,
            arguments: boot::arguments(vm_id, self.uid, monotonic_ns()),
            passed,
            names: true,
            cgroup,
            log: log
                .try_clone()
                .map_err(|e| Failure::retryable(format!("log: {e}")))?,
        })?;
        Ok((pidfd, ours))
    }
}

fn append(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    file.map_err(|e| open_error(path, &e))
}

fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|e| open_error(path, &e))?;
    // The directory is root's alone; the mode is a second fence.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(path, mode).map_err(|e| open_error(path, &e))?;
    Ok(listener)
}

fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| open_error(path, &e))
}

fn open_error(path: &Path, error: &io::Error) -> Failure {
    let reason = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Failure::fatal(reason),
        _ => Failure::retryable(reason),
    }
}

/// Kills what runs of a sliver and removes cgroup and run directory. Nothing of it need be there.
pub(super) fn clear(places: &Places, tree: &Tree, vm_id: VmId, timeout: Duration) -> Result<(), Failure> {
    tree.remove(vm_id, timeout)?;
    remove_dir(&places.run(vm_id))
}

/// Removes what outlasts a stop: disk and logs.
pub(super) fn destroy(places: &Places, vm_id: VmId) -> Result<(), Failure> {
    disk::remove(&places.disk(vm_id))?;
    remove_dir(&places.logs(vm_id))
}

fn remove_dir(path: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::retryable(format!(
            "cannot remove {}: {error}",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Reaps a monitor that has ended, if it is our child.
pub(super) fn reap(pidfd: &OwnedFd) {
    // Not our child (adopted), or reaped already: both fine.
    let _ = rustix::process::waitid(
        WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    );
}

/// The monitor that runs in a cgroup, and our end of its outward socket where it can be had; QEMU has none.
pub(super) fn adopt(
    cgroup: &Path,
    handover: &Path,
    is_qemu: bool,
) -> Result<Option<(OwnedFd, Option<OwnedFd>)>, Failure> {
    let found = monitor::find(cgroup)
        .map_err(|e| Failure::retryable(format!("processes of {}: {e}", cgroup.display())))?;
    let Some(pidfd) = found else { return Ok(None) };
    if is_qemu {
        return Ok(Some((pidfd, None)));
    }
    let kept = self::handover(handover)
        .ok_or_else(|| io::Error::other("no handover file"))
        .and_then(|handover| monitor::fetch_kept(pidfd.as_fd(), &handover));
    let outward = match kept {
        Ok(fd) => Some(fd),
        Err(error) => {
            // The sliver goes on; only what it tells by itself is not heard until it is started again.
            tracing::warn!(cgroup = %cgroup.display(), %error, "outward streams of an adopted sliver are lost");
            None
        }
    };
    Ok(Some((pidfd, outward)))
}

/// What an earlier node manager has written down of a monitor.
pub(super) fn handover(path: &Path) -> Option<Handover> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What a sliver uses.
pub(super) fn stats(tree: &Tree, vm_id: VmId, disk: &Path) -> Result<Stats, Failure> {
    let used = tree.used(vm_id)?.unwrap_or_default();
    Ok(Stats {
        cpu_us: used.cpu_us,
        memory: used.memory,
        disk: disk::allocated(disk),
    })
}

/// The ids of all slivers of which there is anything.
pub(super) fn present(places: &Places, tree: &Tree) -> BTreeSet<VmId> {
    let mut found = tree.present();
    for directory in [&places.disks, &places.run, &places.logs] {
        let Ok(entries) = fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let stem = name
                .strip_suffix(".img")
                .or_else(|| name.strip_suffix(".new"))
                .unwrap_or(name);
            found.extend(stem.parse::<VmId>());
        }
    }
    found
}

/// Cuts logs that have grown beyond `most` bytes: their last quarter is kept. The monitors append, so they
/// go on at the new end.
pub(super) fn bound_logs(logs: &Path, most: u64) {
    let Ok(slivers) = fs::read_dir(logs) else { return };
    for sliver in slivers.flatten() {
        let Ok(files) = fs::read_dir(sliver.path()) else {
            continue;
        };
        for file in files.flatten() {
            if file
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.len() > most)
                && let Err(error) = cut(&file.path(), most / 4)
            {
                tracing::warn!(file = %file.path().display(), %error, "log not cut");
            }
        }
    }
}

fn cut(path: &Path, keep: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(keep)))?;
    let mut end = Vec::new();
    Read::by_ref(&mut file).take(keep).read_to_end(&mut end)?;
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"[earlier part cut]\n")?;
    file.write_all(&end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_keep_their_end() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("7")).unwrap();
        let path = dir.path().join("7/console");
        let mut appender = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        appender.write_all(&vec![b'x'; 5000]).unwrap();
        appender.write_all(b"the end").unwrap();
        bound_logs(dir.path(), 4096);
        appender.write_all(b" and on").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.len() < 1100 && text.ends_with("the end and on"),
            "{} bytes",
            text.len()
        );
    }

    #[test]
    fn anything_of_a_sliver_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path(), Path::new("cgroups"), 0);
        let places = Places::new(dir.path(), dir.path(), &dir.path().join("log"));
        for path in [
            places.disk(1),
            places.disk(2).with_extension("new"),
            places.disks.join("README"),
        ] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        fs::create_dir_all(places.run(3)).unwrap();
        fs::create_dir_all(dir.path().join("cgroups/best-effort/4")).unwrap();
        assert_eq!(present(&places, &tree), BTreeSet::from([1, 2, 3, 4]));
        destroy(&places, 2).unwrap();
        assert_eq!(present(&places, &tree), BTreeSet::from([1, 3, 4]));
    }
}
