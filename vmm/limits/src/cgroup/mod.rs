//! cgroup v2 by its files: make, limit, freeze, kill, remove.
//!
//! The root is a parameter everywhere: a node has its tree at `/sys/fs/cgroup`, a test has a
//! directory of ordinary files, a hybrid machine has v2 elsewhere.
//!
//! ```text
//!            create              limits, processes in            kill
//!  (absent) ────────▶ empty ───────────────────────▶ populated ───────▶ empty ──▶ (absent)
//!                       ▲                              │    ▲            remove
//!                       └──── last process exits ──────┘    └── freeze / thaw
//! ```

mod stats;
mod values;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};

pub use self::stats::{CpuStats, Events, MemoryEvents};
pub use self::values::{CpuMax, CpuShare, MemoryLimits};
use crate::error::{Error, Result};

/// Controllers that a VM's limits use.
pub const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// How long the processes of a killed cgroup may take to be gone, by default.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// One cgroup: a directory, held open, so that a later rename or mount cannot change what is meant.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    /// Makes `name` (a path of plain components below `root`, for instance `mandoline/slivers/17`)
    /// and sees that [`CONTROLLERS`] are enabled all the way down. One that exists is opened.
    pub fn create(root: &Path, name: &Path) -> Result<Self> {
        check_below(name)?;
        if !root.join("cgroup.controllers").exists() {
            return Err(Error::NotCgroup2 {
                path: root.to_owned(),
            });
        }
        let mut path = root.to_owned();
        for component in name.components() {
            enable_controllers(&path)?;
            path.push(component);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::file("make cgroup", &path)(error));
                }
                _ => {}
            }
        }
        Self::open(&path)
    }

    /// Opens a cgroup that exists.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| Error::file("open cgroup", path)(e.into()))?;
        Ok(Self {
            path: path.to_owned(),
            dir,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory, for `clone3` with `CLONE_INTO_CGROUP`: a process started so is limited from
    /// its first instruction.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Moves a process (all its threads) in. Slower than starting it inside: see [`Cgroup::fd`].
    pub fn add_process(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Ids of the processes in it.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let text = self.read("cgroup.procs")?;
        text.lines()
            .map(|line| {
                line.parse()
                    .map_err(|_| self.format("cgroup.procs", format!("\"{line}\" is no process id")))
            })
            .collect()
    }

    /// Whether `root` is a cgroup v2 tree with every controller that limits need ([`CONTROLLERS`]).
    pub fn available(root: &Path) -> bool {
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        CONTROLLERS
            .iter()
            .all(|wanted| controllers.split_whitespace().any(|there| there == *wanted))
    }

    /// Sets the share of the processor among siblings that want it.
    pub fn set_cpu_share(&self, share: CpuShare) -> Result<()> {
        self.write("cpu.weight", &share.weight().to_string())
    }

    /// Sets `cpu.weight` itself, 1 to 10000 (for parents that divide what is left over).
    pub fn set_cpu_weight(&self, weight: u32) -> Result<()> {
        if !(1..=10_000).contains(&weight) {
            return Err(Error::out_of_range("cpu.weight", weight, "1 to 10000"));
        }
        self.write("cpu.weight", &weight.to_string())
    }

    /// Caps processor time; `None` takes the cap away.
    pub fn set_cpu_max(&self, max: Option<CpuMax>) -> Result<()> {
        self.write(
            "cpu.max",
            &max.map_or_else(|| "max".to_owned(), |m| m.to_string()),
        )
    }

    /// Sets the memory files that `limits` names and leaves the others alone.
    ///
    /// When `memory.max` is lowered below what is in use the kernel reclaims and, where that is
    /// not enough, kills.
    pub fn set_memory(&self, limits: &MemoryLimits) -> Result<()> {
        limits.check()?;
        for (file, value) in limits.files() {
            self.write(file, &value)?;
        }
        Ok(())
    }

    /// Bounds the number of processes and threads.
    pub fn set_pids_max(&self, max: u32) -> Result<()> {
        if max == 0 {
            return Err(Error::out_of_range("pids.max", max, "1 or more"));
        }
        self.write("pids.max", &max.to_string())
    }

    /// Stops (or continues) every process in it and waits until the kernel says that it is so.
    pub fn freeze(&self, frozen: bool, timeout: Duration) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        self.wait(timeout, |events| events.frozen == frozen).map(drop)
    }

    /// Kills every process in it, descendants too, and waits until they are gone.
    pub fn kill(&self, timeout: Duration) -> Result<()> {
        self.write("cgroup.kill", "1")?;
        self.wait_empty(timeout)
    }

    /// Waits until no process is in it or below it.
    pub fn wait_empty(&self, timeout: Duration) -> Result<()> {
        self.wait(timeout, |events| !events.populated).map(drop)
    }

    /// Kills what is inside and removes the cgroup with the cgroups below it.
    pub fn remove(self, timeout: Duration) -> Result<()> {
        if self.events()?.populated {
            self.kill(timeout)?;
        }
        remove_tree(&self.path)
    }

    /// `cgroup.events`: whether processes are in it, whether it is frozen.
    pub fn events(&self) -> Result<Events> {
        Events::parse(&self.read("cgroup.events")?).map_err(|detail| self.format("cgroup.events", detail))
    }

    /// A file that polls with `POLLPRI` whenever `cgroup.events` changes; read it with
    /// [`Cgroup::events`]. This is how the end of a process that is not our child is noticed.
    pub fn events_file(&self) -> Result<File> {
        self.open_file("cgroup.events", OFlags::RDONLY)
    }

    /// `cpu.stat`.
    pub fn cpu_stats(&self) -> Result<CpuStats> {
        CpuStats::parse(&self.read("cpu.stat")?).map_err(|detail| self.format("cpu.stat", detail))
    }

    /// `memory.current`, in bytes.
    pub fn memory_current(&self) -> Result<u64> {
        self.read_number("memory.current")
    }

    /// `memory.events`.
    pub fn memory_events(&self) -> Result<MemoryEvents> {
        MemoryEvents::parse(&self.read("memory.events")?)
            .map_err(|detail| self.format("memory.events", detail))
    }

    /// Reads a limit back as the kernel holds it: `cpu.weight`, `cpu.max`, `memory.max` …
    pub fn read(&self, file: &str) -> Result<String> {
        let mut text = String::new();
        self.open_file(file, OFlags::RDONLY)?
            .read_to_string(&mut text)
            .map_err(Error::file("read", self.path.join(file)))?;
        Ok(text)
    }

    fn read_number(&self, file: &str) -> Result<u64> {
        let text = self.read(file)?;
        text.trim()
            .parse()
            .map_err(|_| self.format(file, format!("\"{}\" is no number", text.trim())))
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        // One write call: the kernel reads a value per call.
        self.open_file(file, OFlags::WRONLY | OFlags::TRUNC)
            .and_then(|mut f| {
                f.write_all(value.as_bytes())
                    .map_err(Error::file("write", self.path.join(file)))
            })
    }

    fn open_file(&self, file: &str, flags: OFlags) -> Result<File> {
        rustix::fs::openat(
            &self.dir,
            file,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .map(File::from)
        .map_err(|e| Error::file("open", self.path.join(file))(e.into()))
    }

    fn format(&self, file: &str, detail: String) -> Error {
        Error::Format {
            path: self.path.join(file),
            detail,
        }
    }

    /// Waits for `cgroup.events` to satisfy `done`; the kernel announces each change by POLLPRI.
    fn wait(&self, timeout: Duration, done: impl Fn(&Events) -> bool) -> Result<Events> {
        let start = Instant::now();
        let path = self.path.join("cgroup.events");
        let mut file = self.events_file()?;
        loop {
            let mut text = String::new();
            file.rewind()
                .and_then(|()| file.read_to_string(&mut text))
                .map_err(Error::file("read", &path))?;
            let events = Events::parse(&text).map_err(|detail| self.format("cgroup.events", detail))?;
            if done(&events) {
                return Ok(events);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(Error::StillPopulated {
                    path: self.path.clone(),
                    waited_ms: timeout.as_millis(),
                });
            }
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            let left = rustix::time::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::file("wait on", &path)(error.into())),
            }
        }
    }
}

/// Enables [`CONTROLLERS`] for the children of `path`, and says which one cannot be had.
fn enable_controllers(path: &Path) -> Result<()> {
    let read = |file: &str| fs::read_to_string(path.join(file)).map_err(Error::file("read", path.join(file)));
    let available = read("cgroup.controllers")?;
    let enabled = read("cgroup.subtree_control")?;
    for controller in CONTROLLERS {
        if enabled.split_whitespace().any(|c| c == controller) {
            continue;
        }
        if !available.split_whitespace().any(|c| c == controller) {
            return Err(Error::NoController {
                controller: controller.to_owned(),
                path: path.to_owned(),
                available: available.trim().to_owned(),
            });
        }
        let file = path.join("cgroup.subtree_control");
        OpenOptions::new()
            .write(true)
            .open(&file)
            .and_then(|mut f| f.write_all(format!("+{controller}").as_bytes()))
            .map_err(Error::file("enable a controller in", &file))?;
    }
    Ok(())
}

/// Only plain components: what is made or removed must lie below the root.
fn check_below(name: &Path) -> Result<()> {
    let plain = name
        .components()
        .all(|c| matches!(c, std::path::Component::Normal(_)));
    if plain && name.components().next().is_some() {
        Ok(())
    } else {
        Err(Error::out_of_range(
            "cgroup name",
            format!("\"{}\"", name.display()),
            "a relative path without . or ..",
        ))
    }
}

/// Removes a cgroup directory bottom up. Its files are the kernel's and go with it.
fn remove_tree(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::file("list", path))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::file("list", path))?;
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove cgroup", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
