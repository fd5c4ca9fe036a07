//! `mandoline-vmm set`: other limits for a VM that runs.
//!
//! ```text
//! set NAME --cpu-share 20 ...      run (outside the limits)              monitor (jailed)
//!   checks the words      ------->   checks them again
//!                                    cgroup, HTB: by its own privileges
//!                                    disks, network, balloon  -------->   PATCH on the control socket
//!   prints what is in force <-----   reads all of it back     <--------   GET
//! ```
//!
//! The words travel as they were typed, so that both sides read them by the same rules.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use clap::{Args, Parser};
use mandoline_api::monitor::{
    BalloonPatch, DrivePatch, NetworkInterfacePatch, RateLimiter, TokenBucket, VmConfig,
};
use mandoline_limits::cgroup::MemoryLimits;
use mandoline_limits::shaper::Bandwidth;
use mandoline_limits::vm::Guard;
use serde::{Deserialize, Serialize};

use crate::run::control;
use crate::run::limits::{BurstError, LimitArgs};
use crate::run::place;

/// Longest request, in bytes.
const MAX_REQUEST: u64 = 16 << 10;
/// How long the other side may take over one line.
const PATIENCE: Duration = Duration::from_secs(10);

/// Changes the limits of a VM that `run` started, while it runs, and prints what is in force.
///
/// Limits that are not named stay as they are; without any, it only prints. For example:
///
///   mandoline-vmm set sliver --cpu-share 20 --rate 5Mbit/s --disk-bandwidth 20MiB/s --balloon 64MiB
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct SetArgs {
    /// The VM's name, as `run --name` has it.
    #[arg(default_value = "sliver")]
    pub name: String,
    /// What changes.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `set` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such VM.
    #[error("no VM {name:?} of this user's runs here ({}: {source})", socket.display())]
    NotThere {
        /// Its name.
        name: String,
        /// Where it would be.
        socket: std::path::PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The name cannot be.
    #[error(transparent)]
    Name(#[from] crate::run::supervise::Error),
    /// Talking to `run`.
    #[error("talking to the VM's supervisor: {0}")]
    Talk(#[from] io::Error),
    /// What it said.
    #[error("talking to the VM's supervisor: {0}")]
    Words(#[from] serde_json::Error),
    /// It refused; what was named before this may be changed.
    #[error("{0}")]
    Refused(String),
}

/// What `run` answers.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    /// What could not be changed.
    error: Option<String>,
    /// What is in force now: names and values of the kernel's and of the devices'.
    in_force: BTreeMap<String, String>,
}

/// `mandoline-vmm set`. `words`: the options as they were typed.
pub fn set(args: &SetArgs, words: &[String]) -> Result<(), Error> {
    let socket = place::directory(&args.name)?.join("set");
    let mut stream = UnixStream::connect(&socket).map_err(|source| Error::NotThere {
        name: args.name.clone(),
        socket,
        source,
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    serde_json::to_writer(&mut stream, words)?;
    stream.shutdown(Shutdown::Write)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let answer: Answer = serde_json::from_str(&text)?;
    for (name, value) in &answer.in_force {
        println!("{name}: {value}");
    }
    answer.error.map_or(Ok(()), |error| Err(Error::Refused(error)))
}

/// The command line once more, for the words that came.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Line {
    #[command(flatten)]
    args: SetArgs,
}

/// Serves one `set`, in `run`.
pub(super) fn serve(listener: &UnixListener, guard: &mut Guard, control: &Path) {
    let served = listener.accept().and_then(|(stream, _)| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        (&stream).take(MAX_REQUEST).read_to_string(&mut text)?;
        let answer = answer(&text, guard, control);
        (&stream).write_all(serde_json::to_string(&answer)?.as_bytes())
    });
    if let Err(error) = served {
        eprintln!("mandoline-vmm: set: {error}\r");
    }
}

fn answer(text: &str, guard: &mut Guard, control: &Path) -> Answer {
    let words: Result<Vec<String>, _> = serde_json::from_str(text);
    let line = words
        .map_err(|error| error.to_string())
        .and_then(|words| Line::try_parse_from(words).map_err(|error| error.to_string()));
    let changed =
        line.and_then(|line| change(&line.args.limits, guard, control).map_err(|error| error.to_string()));
    let (in_force, unread) = in_force(guard, control);
    Answer {
        error: changed.err().or(unread),
        in_force,
    }
}

#[derive(Debug, thiserror::Error)]
enum ChangeError {
    #[error(transparent)]
    Limits(#[from] mandoline_limits::Error),
    #[error(transparent)]
    Burst(#[from] BurstError),
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error("{0}: this VM has no cgroup: `run` needs root and cgroup v2 for that")]
    NoCgroup(&'static str),
    #[error("--peak: this VM has no --rate yet, which is to be set with it")]
    NoRate,
    #[error("the VM's configuration: {0}")]
    Config(#[from] serde_json::Error),
}

/// Makes `limits` true. What can be found wrong beforehand is, before anything changes.
fn change(limits: &LimitArgs, guard: &mut Guard, control: &Path) -> Result<(), ChangeError> {
    let (disk, rx, tx) = (limits.disk()?, limits.rx()?, limits.tx()?);
    if limits.needs_cgroup() && guard.cgroup().is_none() {
        return Err(ChangeError::NoCgroup("CPU and memory limits"));
    }
    let bandwidth = bandwidth(limits, guard)?;

    if let Some(cgroup) = guard.cgroup() {
        if let Some(share) = limits.cpu_share {
            cgroup.set_cpu_share(share)?;
        }
        if let Some(cap) = limits.cpu_cap {
            cgroup.set_cpu_max(cap.limit())?;
        }
        if let Some(memory) = limits.mem_limit {
            cgroup.set_memory(&MemoryLimits {
                // More than any machine has: the kernel reads it back as `max`.
                max: Some(memory.limit().unwrap_or(u64::MAX)),
                ..Default::default()
            })?;
        }
    }
    if let Some(bandwidth) = bandwidth {
        guard.set_bandwidth(&bandwidth)?;
    }
    if disk.is_some() || rx.is_some() || tx.is_some() {
        let config = config(control)?;
        for drive in config.drives.iter().filter(|_| disk.is_some()) {
            let patch = DrivePatch {
                drive_id: drive.drive_id.clone(),
                path_on_host: None,
                rate_limiter: disk,
            };
            control::ask(
                control,
                "PATCH",
                &format!("/drives/{}", drive.drive_id),
                Some(&patch),
            )?;
        }
        for interface in config
            .network_interfaces
            .iter()
            .filter(|_| rx.is_some() || tx.is_some())
        {
            let patch = NetworkInterfacePatch {
                iface_id: interface.iface_id.clone(),
                rx_rate_limiter: rx,
                tx_rate_limiter: tx,
            };
            control::ask(
                control,
                "PATCH",
                &format!("/network-interfaces/{}", interface.iface_id),
                Some(&patch),
            )?;
        }
    }
    if let Some(amount_mib) = limits.balloon {
        control::ask(control, "PATCH", "/balloon", Some(&BalloonPatch { amount_mib }))?;
    }
    Ok(())
}

/// What `--rate` and `--peak` come to: what is not named stays, and a peak below the rate is the rate.
fn bandwidth(limits: &LimitArgs, guard: &Guard) -> Result<Option<Bandwidth>, ChangeError> {
    if limits.rate.is_none() && limits.peak.is_none() {
        return Ok(None);
    }
    let now = guard.class()?.map(|class| class.parameters);
    let guarantee = limits
        .rate
        .or(now.map(|now| now.rate))
        .ok_or(ChangeError::NoRate)?;
    let peak = match (limits.peak, now) {
        (Some(peak), _) => peak,
        // Without --peak the rate is the ceiling, as long as nobody set them apart.
        (None, Some(now)) if now.ceil != now.rate => now.ceil.max(guarantee),
        (None, _) => guarantee,
    };
    Ok(Some(Bandwidth {
        guarantee,
        peak: Some(peak),
    }))
}

fn config(control: &Path) -> Result<VmConfig, ChangeError> {
    let said = control::ask(control, "GET", "/vm/config", None::<&()>)?;
    Ok(serde_json::from_value(said)?)
}

/// What the kernel and the monitor say is in force, and what could not be read.
fn in_force(guard: &Guard, control: &Path) -> (BTreeMap<String, String>, Option<String>) {
    let mut all = BTreeMap::new();
    let mut unread = None;
    if let Some(cgroup) = guard.cgroup() {
        for file in ["cpu.weight", "cpu.max", "memory.max"] {
            match cgroup.read(file) {
                Ok(value) => drop(all.insert(file.to_owned(), value.trim().to_owned())),
                Err(error) => unread = Some(error.to_string()),
            }
        }
    }
    match guard.class() {
        Ok(Some(class)) => {
            all.insert("rate".to_owned(), class.parameters.rate.to_string());
            all.insert("peak".to_owned(), class.parameters.ceil.to_string());
        }
        Ok(None) => {}
        Err(error) => unread = Some(error.to_string()),
    }
    match config(control) {
        Ok(config) => {
            for drive in &config.drives {
                limiter(&mut all, &format!("disk {}", drive.drive_id), drive.rate_limiter);
            }
            for interface in &config.network_interfaces {
                limiter(
                    &mut all,
                    &format!("{} rx", interface.iface_id),
                    interface.rx_rate_limiter,
                );
                limiter(
                    &mut all,
                    &format!("{} tx", interface.iface_id),
                    interface.tx_rate_limiter,
                );
            }
            if let Some(balloon) = config.balloon {
                all.insert("balloon".to_owned(), format!("{} MiB", balloon.amount_mib));
            }
        }
        Err(error) => unread = Some(error.to_string()),
    }
    (all, unread)
}

fn limiter(all: &mut BTreeMap<String, String>, of: &str, limiter: Option<RateLimiter>) {
    let Some(RateLimiter { bandwidth, ops }) = limiter else {
        return;
    };
    let mut add = |what: &str, unit: &str, bucket: Option<TokenBucket>| {
        if let Some(TokenBucket {
            size, refill_time, ..
        }) = bucket.filter(|bucket| bucket.size > 0)
        {
            all.insert(
                format!("{of} {what}"),
                format!("{size} {unit} in {refill_time} ms"),
            );
        }
    };
    add("bandwidth", "bytes", bandwidth);
    add("ops", "operations", ops);
}
