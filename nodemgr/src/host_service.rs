//! The `host-service` backend: a packaged service of the owner's, as a process of the host under its own user and in
//! its own cgroup, with a pool's limits. The smallest of the backends: no kernel, disk or network of its own. This is
//! how `bind(rcap5, pl_conf)` gives the slice creation service its 5 % (architecture paper, section 5.2.3).
//!
//! ```text
//!   start ── prepare (as root) ── exec, as its user, in its cgroup ──► reachable ── ends, however ──► backoff, start
//! ```
//!
//! Which services there are, the owner's configuration says: `[services.<slice>]` with a `command`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_api::nodemgr::{VmId, VmTypeInfo};
use mandoline_rspec::SliceId;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::cgroup::{Limits, Tree};
use crate::vm_type::{
    Exit, Failure, Report, Reports, Resized, SliverSpec, Stats, VmType, Work, blocking, watch,
};

/// The name in `vm_type`.
pub const HOST_SERVICE: &str = "host-service";

/// How long a killed service may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// Processes and threads of a service.
const PIDS_MAX: u32 = 512;
/// Where a service looks for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What can be done to a service.
const CAPABILITIES: [&str; 6] = [
    "resize:cpu_share",
    "resize:cpu_guarantee",
    "resize:cpu_capped",
    "resize:mem_limit",
    "resize:mem_reserve",
    "stats",
];

/// A service as the owner has configured it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The program with its arguments.
    pub command: Vec<String>,
    /// What root runs before each start; empty: nothing.
    pub prepare: Vec<String>,
    /// The user that it runs as; never root.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What a later node manager has to know of a service's process: its number, and when it was started, in ticks since
/// boot (proc(5), `stat` field 22), since numbers are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Handover {
    pid: i32,
    started: u64,
}

/// The backend.
pub struct HostServices {
    programs: BTreeMap<SliceId, Program>,
    tree: Arc<Tree>,
    run: PathBuf,
    logs: PathBuf,
    running: Mutex<BTreeMap<VmId, Service>>,
}

/// A service that runs.
struct Service {
    pidfd: Arc<AsyncFd<OwnedFd>>,
    watch: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl HostServices {
    /// The backend for these services.
    pub fn new(
        programs: BTreeMap<SliceId, Program>,
        tree: Arc<Tree>,
        run_dir: &Path,
        log_dir: &Path,
    ) -> Self {
        Self {
            programs,
            tree,
            run: run_dir.join("slivers"),
            logs: log_dir.join("slivers"),
            running: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Service>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handover(&self, vm_id: VmId) -> PathBuf {
        self.run.join(vm_id.to_string()).join("handover.json")
    }

    fn program(&self, slice: &SliceId) -> Result<&Program, Failure> {
        self.programs.get(slice).ok_or_else(|| {
            let names: Vec<String> = self.programs.keys().map(ToString::to_string).collect();
            Failure::fatal(format!(
                "slice {slice} is no service of this node; allowed: those with a command in the configuration's \
                 [services], which are: {}",
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            ))
        })
    }

    /// Reports the end of a service's process.
    fn watch(&self, vm_id: VmId, pidfd: OwnedFd, reports: &Reports) -> Result<(), Failure> {
        let pidfd =
            watch(pidfd).map_err(|e| Failure::retryable(format!("the service cannot be watched: {e}")))?;
        let pidfd = Arc::new(pidfd);
        let (watched, reports) = (Arc::clone(&pidfd), reports.clone());
        reports.tell(Report::Up);
        // A service has no agent to ask: as soon as it runs, its users can reach it as far as it lets them.
        reports.tell(Report::Reachable(Vec::new()));
        let watch = tokio::spawn(async move {
            let how = end_of(&watched).await;
            reports.tell(Report::Exited(Exit::Died(how)));
        });
        self.lock().insert(vm_id, Service { pidfd, watch });
        Ok(())
    }

    async fn clear(&self, vm_id: VmId) -> Result<(), Failure> {
        let service = self.lock().remove(&vm_id);
        let (tree, run) = (Arc::clone(&self.tree), self.run.join(vm_id.to_string()));
        blocking(move || {
            tree.remove(vm_id, KILL_TIMEOUT)?;
            remove_dir(&run)
        })
        .await?;
        if let Some(service) = service {
            reap(service.pidfd.get_ref());
        }
        Ok(())
    }
}

impl VmType for HostServices {
    fn name(&self) -> &'static str {
        HOST_SERVICE
    }

    fn info(&self) -> VmTypeInfo {
        let detail = match self.programs.is_empty() {
            true => Some("no service of [services] in the configuration has a command".to_owned()),
            false => self.tree.check().err(),
        };
        VmTypeInfo {
            name: HOST_SERVICE.to_owned(),
            available: detail.is_none(),
            detail,
            capabilities: CAPABILITIES.map(str::to_owned).into(),
        }
    }

    /// Its addresses are the node's.
    fn address(&self, _: &SliverSpec) -> Option<IpAddr> {
        None
    }

    /// The node's own services are not given up: without them nobody could help.
    fn gives_up(&self) -> bool {
        false
    }

    fn create<'a>(&'a self, sliver: &'a SliverSpec, _: &'a Reports) -> Work<'a, ()> {
        Box::pin(std::future::ready(self.program(&sliver.slice).map(drop)))
    }

    fn start<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()> {
        Box::pin(async move {
            let program = self.program(&sliver.slice)?.clone();
            self.clear(sliver.vm_id).await?;
            let limits = Limits::of(&sliver.rspec, 0, PIDS_MAX)?;
            let (tree, vm_id) = (Arc::clone(&self.tree), sliver.vm_id);
            let logs = self.logs.join(vm_id.to_string());
            let handover = self.handover(vm_id);
            let pidfd = blocking(move || {
                prepare(&program)?;
                let cgroup = tree.create(vm_id, &limits)?;
                make_dir(&logs)?;
                make_dir(handover.parent().unwrap_or(Path::new("/")))?;
                launch(&program, cgroup.path(), &logs.join("console"), &handover)
            })
            .await?;
            reports.phase("service");
            self.watch(vm_id, pidfd, reports)
        })
    }

    fn adopt<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, bool> {
        Box::pin(async move {
            let handover = self.handover(sliver.vm_id);
            let home = self.tree.home(sliver.vm_id);
            match blocking(move || Ok(find(home.as_deref(), &handover))).await? {
                Some(pidfd) => self.watch(sliver.vm_id, pidfd, reports).map(|()| true),
                None => Ok(false),
            }
        })
    }

    fn stop(&self, sliver: &SliverSpec, grace: Duration) -> Work<'_, ()> {
        let vm_id = sliver.vm_id;
        Box::pin(async move {
            let pidfd = self.lock().get(&vm_id).map(|service| Arc::clone(&service.pidfd));
            if let Some(pidfd) = pidfd.filter(|_| !grace.is_zero()) {
                match rustix::process::pidfd_send_signal(pidfd.get_ref(), Signal::TERM) {
                    Ok(()) => drop(tokio::time::timeout(grace, end_of(&pidfd)).await),
                    Err(error) => tracing::info!(vm_id, %error, "no orderly stop"),
                }
            }
            self.clear(vm_id).await
        })
    }

    fn pause(&self, vm_id: VmId) -> Work<'_, ()> {
        Box::pin(std::future::ready(Err(cannot(vm_id, "pause"))))
    }

    /// Nothing is ever paused.
    fn resume(&self, _: VmId) -> Work<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn resize<'a>(&'a self, sliver: &'a SliverSpec) -> Work<'a, Resized> {
        Box::pin(async move {
            let limits = Limits::of(&sliver.rspec, 0, PIDS_MAX)?;
            let (tree, vm_id) = (Arc::clone(&self.tree), sliver.vm_id);
            blocking(move || tree.change(vm_id, &limits)).await?;
            Ok(Resized::default())
        })
    }

    fn stats(&self, vm_id: VmId) -> Work<'_, Stats> {
        let tree = Arc::clone(&self.tree);
        Box::pin(blocking(move || {
            let used = tree.used(vm_id)?.unwrap_or_default();
            Ok(Stats {
                cpu_us: used.cpu_us,
                memory: used.memory,
                disk: 0,
            })
        }))
    }

    fn snapshot<'a>(&'a self, vm_id: VmId, _: &'a Path) -> Work<'a, ()> {
        Box::pin(std::future::ready(Err(cannot(vm_id, "snapshot"))))
    }

    fn destroy(&self, vm_id: VmId, _: Option<u16>) -> Work<'_, ()> {
        Box::pin(async move {
            self.clear(vm_id).await?;
            let logs = self.logs.join(vm_id.to_string());
            blocking(move || remove_dir(&logs)).await
        })
    }

    fn channel(&self, vm_id: VmId, _: u32) -> Work<'_, UnixStream> {
        Box::pin(std::future::ready(Err(cannot(vm_id, "channel"))))
    }

    fn present(&self) -> Work<'_, BTreeSet<VmId>> {
        let tree = Arc::clone(&self.tree);
        Box::pin(blocking(move || Ok(tree.present())))
    }
}

fn cannot(vm_id: VmId, what: &str) -> Failure {
    Failure::fatal(format!(
        "sliver {vm_id}: {HOST_SERVICE} cannot {what}; it can: {}",
        CAPABILITIES.join(", ")
    ))
}

/// Runs what the owner wants done before each start.
fn prepare(program: &Program) -> Result<(), Failure> {
    let Some((name, arguments)) = program.prepare.split_first() else {
        return Ok(());
    };
    let output = Command::new(name)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Failure::retryable(format!("cannot run {name}: {e}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Failure::retryable(format!(
            "{name} failed with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

/// Starts a service in its cgroup, as its user, with its output in a log. Returns a descriptor of its process.
fn launch(program: &Program, cgroup: &Path, log: &Path, handover: &Path) -> Result<OwnedFd, Failure> {
    let retry = |what: &str, e: &io::Error| Failure::retryable(format!("{what}: {e}"));
    let Some((name, arguments)) = program.command.split_first() else {
        return Err(Failure::fatal("the service's command is empty"));
    };
    let procs_path = cgroup.join("cgroup.procs");
    let procs = OpenOptions::new()
        .write(true)
        .open(&procs_path)
        .map_err(|e| retry(&procs_path.display().to_string(), &e))?;
    let output = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(log)
        .map_err(|e| retry(&log.display().to_string(), &e))?;
    let errors = output.try_clone().map_err(|e| retry("log", &e))?;
    let (uid, gid, number) = (program.uid, program.gid, procs.as_raw_fd());
    let mut command = Command::new(name);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .current_dir("/");
    let become_service = move || {
        // SAFETY: each of these calls takes numbers, or one byte of static memory; none takes memory of ours.
        let done = unsafe {
            libc::write(number, b"0".as_ptr().cast(), 1) == 1
                && libc::setsid() >= 0
                && libc::setgroups(0, std::ptr::null()) == 0
                && libc::setresgid(gid, gid, gid) == 0
                && libc::setresuid(uid, uid, uid) == 0
                && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        };
        match done {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure makes system calls only: it takes no lock and no memory.
    unsafe { command.pre_exec(become_service) };
    let child = command
        .spawn()
        .map_err(|e| retry(&format!("cannot start {name}"), &e))?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let record = Handover {
        pid,
        started: started(pid).unwrap_or_default(),
    };
    let text = serde_json::to_vec(&record).map_err(|e| Failure::fatal(e.to_string()))?;
    // If this cannot be written the service goes on: a later node manager starts it anew.
    if let Err(error) = fs::write(handover, text) {
        tracing::warn!(file = %handover.display(), %error, "not written");
    }
    // It is our child and nobody has waited for it: the number cannot mean another process.
    let pid = Pid::from_raw(pid).ok_or_else(|| Failure::retryable("the service has no process id"))?;
    rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)
        .map_err(|e| Failure::retryable(format!("cannot watch the service: {e}")))
}

/// When a process was started, in ticks since boot.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything; the fields after it do not.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The service's process that an earlier node manager has started, if it is there still and in its cgroup.
fn find(cgroup: Option<&Path>, handover: &Path) -> Option<OwnedFd> {
    let record: Handover = serde_json::from_slice(&fs::read(handover).ok()?).ok()?;
    let pidfd = rustix::process::pidfd_open(Pid::from_raw(record.pid)?, PidfdFlags::NONBLOCK).ok()?;
    // Looked at after the descriptor is open: if it is the same now, the descriptor is that of this process.
    let procs = fs::read_to_string(cgroup?.join("cgroup.procs")).ok()?;
    let same = procs.lines().any(|line| line == record.pid.to_string())
        && started(record.pid) == Some(record.started);
    same.then_some(pidfd)
}

/// Waits for the end of a process, and says how it came.
async fn end_of(pidfd: &AsyncFd<OwnedFd>) -> String {
    if let Err(error) = pidfd.readable().await {
        return format!("the service cannot be watched: {error}");
    }
    match reap(pidfd.get_ref()) {
        Some(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("the service ended with status {code}"),
            (_, Some(signal)) => format!("the service was killed by signal {signal}"),
            _ => "the service ended".to_owned(),
        },
        None => "the service ended".to_owned(),
    }
}

/// Reaps a process that has ended, if it is our child and still to be reaped.
fn reap(pidfd: &OwnedFd) -> Option<rustix::process::WaitIdStatus> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options)
        .ok()
        .flatten()
}

fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Failure::retryable(format!("cannot make {}: {e}", path.display())))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn program(script: &str) -> Program {
        Program {
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            prepare: Vec::new(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        }
    }

    /// A directory that stands for a cgroup: its `cgroup.procs` is a plain file.
    fn cgroup() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        dir
    }

    #[tokio::test]
    async fn a_service_is_found_again_and_its_end_is_told() {
        if !rustix::process::geteuid().is_root() {
            return; // Only root may change groups.
        }
        let dir = cgroup();
        let (log, handover) = (dir.path().join("console"), dir.path().join("handover.json"));
        let pidfd = launch(
            &program("echo hello; read x < /dev/zero; sleep 600"),
            dir.path(),
            &log,
            &handover,
        )
        .unwrap();
        let record: Handover = serde_json::from_slice(&fs::read(&handover).unwrap()).unwrap();
        // The process is not in this cgroup by the file's word: it is another that has its number.
        assert!(find(Some(dir.path()), &handover).is_none());
        fs::write(dir.path().join("cgroup.procs"), format!("1\n{}\n", record.pid)).unwrap();
        let again = find(Some(dir.path()), &handover).unwrap();
        let wrong = Handover {
            started: record.started + 1,
            ..record
        };
        fs::write(&handover, serde_json::to_vec(&wrong).unwrap()).unwrap();
        assert!(find(Some(dir.path()), &handover).is_none());
        rustix::process::pidfd_send_signal(&again, Signal::TERM).unwrap();
        let pidfd = watch(pidfd).unwrap();
        let how = tokio::time::timeout(Duration::from_secs(20), end_of(&pidfd))
            .await
            .unwrap();
        assert!(how.contains("signal 15"), "{how}");
    }

    #[test]
    fn a_preparation_that_fails_says_why() {
        let mut program = program("true");
        prepare(&program).unwrap();
        program.prepare = ["/bin/sh", "-c", "echo no key >&2; exit 3"]
            .map(str::to_owned)
            .into();
        let failure = prepare(&program).unwrap_err();
        assert!(failure.reason.contains("no key"), "{failure}");
    }
}
