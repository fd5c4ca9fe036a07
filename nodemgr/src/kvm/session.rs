//! One run of one VM as the backend sees it: from the monitor's start, or its adoption, to its end.
//!
//! ```text
//!  started ── guest opens port 1024, Event::Up ──┐
//!                                                ├─► up ── join ──► reachable ── events: boot script, stopping
//!  adopted ── hello answers "up" ────────────────┘                     ▲
//!     └────── hello answers "joined" ──────────────────────────────────┘        │
//!                                                ▲                              │
//!                                                └── Event::Up: it rebooted ────┘
//!
//!  at any point: the monitor ends ──► Exited · no answer in time ──► Failed
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::agent::{
    self, Bytes, Cidr, Event, GrowDiskReply, HelloReply, Initscript, Interface, Join, JoinReply, Request,
    StatusReply,
};
use mandoline_api::nodemgr;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, sleep_until};

use super::agent::{Door, Frames, ask};
use super::outward::Outward;
use super::{disk, monitor};
use crate::core::unix_ns;
use crate::net::SliverNet;
use crate::vm_type::{Failure, Report, Reports};

/// How often an adopted guest that does not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How often a failed join is repeated.
const JOINS: u32 = 3;
/// Bytes of entropy that a guest gets: twice its generator's state.
const ENTROPY: usize = 64;

/// What a guest becomes by its join.
pub(super) struct Identity {
    pub(super) slice: String,
    pub(super) hostname: String,
    pub(super) net: SliverNet,
    pub(super) gateway: Ipv4Addr,
    pub(super) mtu: u32,
    pub(super) dns: Vec<IpAddr>,
    pub(super) keys: Vec<String>,
    pub(super) initscript: Option<String>,
}

/// One run of one VM.
pub(super) struct Session {
    pub(super) door: Door,
    /// Whether what the guest says of its end is written down here: QEMU does not tell a shutdown from a reset.
    pub(super) notes_end: bool,
    pub(super) state: PathBuf,
    pub(super) disk: PathBuf,
    pub(super) join: Identity,
    pub(super) pidfd: Arc<AsyncFd<OwnedFd>>,
    pub(super) outward: Option<Outward>,
    pub(super) adopted: bool,
    pub(super) boot_timeout: Duration,
    pub(super) join_timeout: Duration,
    pub(super) reports: Reports,
}

impl Session {
    /// Runs until the monitor ends or the guest is given up.
    pub(super) async fn run(self) {
        let report = tokio::select! {
            exit = monitor::wait(&self.pidfd, &self.state) => Report::Exited(exit),
            failure = self.live() => Report::Failed(failure),
        };
        self.reports.tell(report);
    }

    /// The guest's life. Returns only when it has to be given up.
    async fn live(&self) -> Failure {
        let deadline = Instant::now() + self.boot_timeout;
        let first = tokio::select! {
            up = self.wait_for_up() => up,
            phase = self.ask_adopted(), if self.adopted => phase.map(|phase| (phase, None)),
            () = sleep_until(deadline) => {
                let seconds = self.boot_timeout.as_secs();
                return Failure::retryable(format!("its agent did not answer within {seconds} s of its start"));
            }
        };
        let (phase, stream) = match first {
            Ok(first) => first,
            Err(failure) => return failure,
        };
        self.report_phases();
        let (mut phase, mut stream) = (phase, stream);
        loop {
            let joined = match phase {
                agent::Phase::Joined => self.rejoin().await,
                _ => {
                    self.reports.phase("agent_up");
                    self.reports.tell(Report::Up);
                    self.join().await
                }
            };
            if let Err(failure) = joined {
                return failure;
            }
            // The monitor starts a guest that reboots anew; the guest that comes back has no identity.
            let rebooted = self.listen(stream).await;
            match rebooted {
                Ok(frames) => (phase, stream) = (agent::Phase::Up, Some(frames)),
                Err(failure) => return failure,
            }
        }
    }

    /// Waits until the guest opens its event stream and says that it is up.
    async fn wait_for_up(&self) -> Result<(agent::Phase, Option<Frames>), Failure> {
        let Some(outward) = &self.outward else {
            return std::future::pending().await;
        };
        loop {
            let stream = outward.next_event_stream().await?;
            let mut frames = Frames::new(stream);
            match frames.next().await {
                Ok(Some(body)) => match serde_json::from_slice(&body) {
                    Ok(Event::Up(hello)) => {
                        check_version(&hello)?;
                        return Ok((hello.phase, Some(frames)));
                    }
                    _ => tracing::warn!(
                        slice = self.join.slice,
                        "first event of a guest is not `up`; ignored"
                    ),
                },
                Ok(None) => {}
                Err(error) => tracing::warn!(slice = self.join.slice, %error, "event stream of a guest"),
            }
        }
    }

    /// Asks an adopted guest how far it is: it may have said so while nobody listened.
    async fn ask_adopted(&self) -> Result<agent::Phase, Failure> {
        loop {
            match ask::<HelloReply>(&self.door, &Request::Hello).await {
                Ok(hello) => {
                    check_version(&hello)?;
                    return Ok(hello.phase);
                }
                Err(error) => {
                    tracing::debug!(slice = self.join.slice, %error, "adopted guest does not answer yet")
                }
            }
            sleep(ASK_AGAIN).await;
        }
    }

    async fn join(&self) -> Result<(), Failure> {
        let mut last = String::new();
        for _ in 0..JOINS {
            let request = Request::Join(Box::new(self.join_request()?));
            let asked = ask::<JoinReply>(&self.door, &request);
            match tokio::time::timeout(self.join_timeout, asked).await {
                Ok(Ok(reply)) => {
                    self.joined(reply);
                    self.fill_disk().await;
                    return Ok(());
                }
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("no answer within {} s", self.join_timeout.as_secs()),
            }
            tracing::warn!(slice = self.join.slice, error = last, "join failed");
        }
        Err(Failure::retryable(format!("its agent could not join: {last}")))
    }

    /// A disk that grew while no agent could be asked.
    async fn fill_disk(&self) {
        let path = self.disk.clone();
        let unfilled = tokio::task::spawn_blocking(move || disk::is_unfilled(&path)).await;
        if !unfilled.unwrap_or(false) {
            return;
        }
        match ask::<GrowDiskReply>(&self.door, &Request::GrowDisk).await {
            Ok(reply) => tracing::info!(slice = self.join.slice, ?reply, "disk grown"),
            Err(error) => {
                let reason = format!("disk_quota: the file system did not grow: {error}");
                self.reports.tell(Report::Lacks(reason));
            }
        }
    }

    /// A guest that has joined answers the same join with the same answer.
    async fn rejoin(&self) -> Result<(), Failure> {
        self.join().await?;
        if self.join.initscript.is_some()
            && let Ok(status) = ask::<StatusReply>(&self.door, &Request::Status).await
        {
            self.reports
                .tell(Report::Initscript(initscript(&status.initscript)));
        }
        Ok(())
    }

    fn join_request(&self) -> Result<Join, Failure> {
        let mut entropy = vec![0; ENTROPY];
        getrandom::fill(&mut entropy).map_err(|e| Failure::retryable(format!("no entropy: {e}")))?;
        let identity = &self.join;
        let [a, b, c, d, e, f] = identity.net.mac;
        Ok(Join {
            entropy: Bytes(entropy),
            slice: identity.slice.clone(),
            hostname: identity.hostname.clone(),
            time_unix_ns: Some(unix_ns()),
            interface: Some(Interface {
                mac: Some(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")),
                addresses: identity
                    .net
                    .addresses()
                    .map(|address| Cidr {
                        address,
                        prefix: if address.is_ipv4() { 32 } else { 128 },
                    })
                    .collect(),
                gateway: Some(identity.gateway.into()),
                gateway6: identity.net.gateway6(),
                mtu: Some(identity.mtu),
            }),
            dns: identity.dns.clone(),
            disk: Some("/dev/vdb".to_owned()),
            keys: identity.keys.clone(),
            initscript: identity.initscript.clone(),
        })
    }

    fn joined(&self, reply: JoinReply) {
        self.reports.phase("joined");
        let parts = reply.timings_us;
        let parts = [
            ("entropy", parts.entropy),
            ("clock", parts.clock),
            ("disk", parts.disk),
            ("network", parts.network),
            ("keys", parts.keys),
            ("sshd", parts.sshd),
            ("total", parts.total),
        ];
        for (name, us) in parts {
            self.reports.tell(Report::Part(format!("guest_join_{name}"), us));
        }
        self.reports.tell(Report::Reachable(reply.ssh_host_keys));
        if self.join.initscript.is_some() {
            self.reports
                .tell(Report::Initscript(nodemgr::Initscript::Running));
        }
    }

    /// What the monitor has written down of its start. An adopted monitor's start is history.
    fn report_phases(&self) {
        if self.adopted {
            return;
        }
        for mark in monitor::phases(&self.state) {
            use mandoline_api::monitor::Phase;
            let name = match mark.phase {
                Phase::ProcessStart => "monitor_process",
                Phase::Main => "monitor_main",
                Phase::ConfigRead => "monitor_config",
                Phase::MemoryReady => "monitor_memory",
                Phase::KernelLoaded => "monitor_kernel",
                Phase::VcpuCreated => "monitor_vcpu",
                Phase::Jailed => "monitor_jailed",
                Phase::FirstRun => "monitor_first_run",
                Phase::FirstSerialByte => "guest_first_byte",
                Phase::BootTimer => "guest_boot_timer",
            };
            self.reports.tell(Report::PhaseAt(name, mark.monotonic_ns));
        }
    }

    /// Hears what the guest tells by itself, for as long as it lives. Returns when it is up again after a reboot.
    async fn listen(&self, stream: Option<Frames>) -> Result<Frames, Failure> {
        let mut current = stream;
        loop {
            let mut frames = match current.take() {
                Some(frames) => frames,
                None => match &self.outward {
                    None => return std::future::pending().await,
                    Some(outward) => Frames::new(outward.next_event_stream().await?),
                },
            };
            match frames.next().await {
                Ok(Some(body)) => {
                    if let Ok(Event::Up(hello)) = serde_json::from_slice(&body)
                        && hello.phase == agent::Phase::Up
                    {
                        tracing::info!(slice = self.join.slice, "its guest rebooted");
                        check_version(&hello)?;
                        return Ok(frames);
                    }
                    self.hear(&body);
                    current = Some(frames);
                }
                Ok(None) => {}
                Err(error) => tracing::info!(slice = self.join.slice, %error, "event stream of a guest"),
            }
        }
    }

    fn hear(&self, body: &[u8]) {
        match serde_json::from_slice(body) {
            Ok(Event::InitscriptDone { initscript: state }) => {
                self.reports.tell(Report::Initscript(initscript(&state)));
            }
            Ok(Event::Stopping { mode }) => {
                tracing::info!(slice = self.join.slice, ?mode, "shuts down");
                if self.notes_end
                    && let Err(error) = monitor::note_end(&self.state, mode)
                {
                    tracing::warn!(slice = self.join.slice, %error, "its end is not written down");
                }
            }
            Ok(Event::Up(_) | Event::Unknown) => {}
            Err(error) => tracing::warn!(slice = self.join.slice, %error, "event of a guest"),
        }
    }
}

fn initscript(state: &Initscript) -> nodemgr::Initscript {
    match state {
        Initscript::None => nodemgr::Initscript::None,
        Initscript::Running => nodemgr::Initscript::Running,
        Initscript::Ok => nodemgr::Initscript::Ok,
        Initscript::Failed(status) => {
            let by_signal = status.signal.map(|signal| 128 + signal);
            nodemgr::Initscript::Failed(status.code.or(by_signal).unwrap_or(-1))
        }
    }
}

fn check_version(hello: &HelloReply) -> Result<(), Failure> {
    match hello.version == agent::VERSION {
        true => Ok(()),
        false => Err(Failure::fatal(format!(
            "the agent in its image speaks version {} of the protocol; allowed: {}",
            hello.version,
            agent::VERSION
        ))),
    }
}
