//! What the monitor counts, and the file that it goes to: one JSON object a line, at `FlushMetrics`, every
//! minute, and at the end.
//!
//! Who counts owns its counters: devices theirs, each vCPU its own cache line. Nothing is added up before
//! somebody asks.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_api::monitor::{InstanceState, Phase};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use serde_json::{Map, Value, json};

use crate::devices::virtio::Slot;
use crate::monitor::sleep;
use crate::state::{Phases, realtime_ns};
use crate::{log, state};

/// Time between two lines, in s.
const INTERVAL_S: i64 = 60;

/// Exits of one vCPU by kind. Only its thread writes them.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct VcpuExits {
    /// Port reads.
    pub io_in: Counter,
    /// Port writes.
    pub io_out: Counter,
    /// Reads of device registers.
    pub mmio_read: Counter,
    /// Writes to device registers; kicks are none, KVM takes them.
    pub mmio_write: Counter,
    /// Interrupted by the monitor.
    pub interrupted: Counter,
    /// What ends the VM.
    pub fatal: Counter,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn count(&self) {
        // One writer: no locked instruction is needed.
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of `count` vCPUs.
pub fn vcpu_exits(count: u8) -> Arc<[VcpuExits]> {
    (0..count).map(|_| VcpuExits::default()).collect()
}

/// Requests on the control socket; its thread counts.
#[derive(Debug, Default)]
pub struct ApiCounts {
    get: Counter,
    put: Counter,
    patch: Counter,
    refused: Counter,
}

impl ApiCounts {
    /// One more request, and how it was answered.
    pub fn count(&self, method: &str, status: u16) {
        match method {
            "GET" => self.get.count(),
            "PUT" => self.put.count(),
            "PATCH" => self.patch.count(),
            _ => {}
        }
        if status >= 400 {
            self.refused.count();
        }
    }
}

/// How long the process took until it could take a configuration.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Startup {
    /// Since the caller began, in us; 0 if it did not say when.
    pub us: u64,
    /// CPU time of this process, and of its parent if that said so, in us.
    pub cpu_us: u64,
}

/// What the recorder is told when the VM starts.
#[derive(Debug, Default)]
pub struct Options {
    /// What `--id` said.
    pub id: String,
    /// Where lines go; non-blocking, or a regular file.
    pub file: Option<File>,
    /// Whether threads are under their filters.
    pub filters: bool,
    /// The control socket's.
    pub api: Arc<ApiCounts>,
    /// See there.
    pub startup: Startup,
}

/// What the event loop sees besides.
pub struct Seen<'a> {
    /// Whether the vCPUs run.
    pub state: InstanceState,
    /// The devices.
    pub slots: &'a [Arc<Slot>],
    /// Bytes of console output that were lost.
    pub console_lost: u64,
    /// What parking did.
    pub sleep: Option<sleep::Counters>,
}

/// Puts together what was counted.
pub struct Recorder {
    options: Options,
    exits: Arc<[VcpuExits]>,
    phases: Arc<Phases>,
    sink: Option<Sink>,
}

impl Recorder {
    /// A recorder of the VM whose vCPUs count in `exits`. Fails when the host has no timer to give.
    pub fn new(mut options: Options, exits: Arc<[VcpuExits]>, phases: Arc<Phases>) -> io::Result<Self> {
        let sink = options.file.take().map(Sink::new).transpose()?;
        Ok(Self {
            options,
            exits,
            phases,
            sink,
        })
    }

    /// Readable when a line is due; `None` if lines go nowhere.
    pub fn timer(&self) -> Option<&(impl AsFd + std::os::fd::AsRawFd + use<>)> {
        self.sink.as_ref().map(|sink| &sink.timer)
    }

    /// Everything that was counted, by names that stay.
    pub fn report(&self, seen: &Seen<'_>) -> Value {
        let at = |phase| self.phases.reached(phase);
        let between = |from, to| Some(at(to)?.saturating_sub(at(from)?) / 1000);
        let sum =
            |of: fn(&VcpuExits) -> &Counter| -> u64 { self.exits.iter().map(|vcpu| of(vcpu).get()).sum() };
        let api = &self.options.api;
        let mut report = Map::new();
        let mut put = |name: &str, value: Value| {
            report.insert(name.to_owned(), value);
        };
        put("utc_timestamp_ms", json!(realtime_ns() / 1_000_000));
        put("id", json!(self.options.id));
        put("state", json!(seen.state));
        put(
            "start",
            json!({
                "process_startup_time_us": self.options.startup.us,
                "process_startup_time_cpu_us": self.options.startup.cpu_us,
                "set_up_us": between(Phase::Main, Phase::FirstRun),
                "first_serial_byte_us": between(Phase::Main, Phase::FirstSerialByte),
                "boot_timer_us": between(Phase::Main, Phase::BootTimer),
            }),
        );
        put(
            "vcpu",
            json!({
                "exit_io_in": sum(|exits| &exits.io_in),
                "exit_io_out": sum(|exits| &exits.io_out),
                "exit_mmio_read": sum(|exits| &exits.mmio_read),
                "exit_mmio_write": sum(|exits| &exits.mmio_write),
                "interrupted": sum(|exits| &exits.interrupted),
                "failures": sum(|exits| &exits.fatal),
            }),
        );
        put(
            "api_server",
            json!({
                "get_count": api.get.get(),
                "put_count": api.put.get(),
                "patch_count": api.patch.get(),
                "refused_count": api.refused.get(),
            }),
        );
        put("seccomp", json!({"filters": self.options.filters}));
        put("serial", json!({"lost_bytes": seen.console_lost}));
        put("logger", json!({"lost_lines": log::lost()}));
        let lost = self.sink.as_ref().map_or(0, |sink| sink.lost);
        put("metrics", json!({"lost_lines": lost}));
        if let Some(sleep) = &seen.sleep {
            put("park", json!(sleep));
        }
        for slot in seen.slots {
            put(&group(&slot.name), slot.metrics());
        }
        Value::Object(report)
    }

    /// Writes a line, if lines go anywhere.
    pub fn flush(&mut self, seen: &Seen<'_>) {
        if self.sink.is_none() {
            return;
        }
        let report = self.report(seen);
        if let (Some(sink), Ok(mut line)) = (&mut self.sink, serde_json::to_vec(&report)) {
            line.push(b'\n');
            sink.heard();
            sink.line(line);
        }
    }
}

/// The group of a device: `block_rootfs` for `blk rootfs`.
fn group(slot: &str) -> String {
    match slot.split_once(' ') {
        Some(("blk", name)) => format!("block_{name}"),
        Some((kind, name)) => format!("{kind}_{name}"),
        None if slot == "rng" => "entropy".to_owned(),
        None => slot.to_owned(),
    }
}

/// The metrics' file and its minute. A reader that does not read loses whole lines, never parts.
struct Sink {
    file: File,
    timer: std::os::fd::OwnedFd,
    /// What is left of a line that was taken in part.
    rest: Vec<u8>,
    /// Lines that were not taken.
    lost: u64,
}

impl Sink {
    fn new(file: File) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let minute = Timespec {
            tv_sec: INTERVAL_S,
            tv_nsec: 0,
        };
        let every = Itimerspec {
            it_interval: minute,
            it_value: minute,
        };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every)?;
        Ok(Self {
            file,
            timer,
            rest: Vec::new(),
            lost: 0,
        })
    }

    /// Sets the timer's descriptor back; it goes on by itself.
    fn heard(&self) {
        // Never blocks; nothing to read means that it did not fire.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
    }

    fn line(&mut self, line: Vec<u8>) {
        if !self.write_rest() {
            self.lost += 1;
            return;
        }
        let length = line.len();
        self.rest = line;
        if !self.write_rest() && self.rest.len() == length {
            // Nothing of it was taken: the next has newer numbers anyway.
            self.rest.clear();
            self.lost += 1;
        }
    }

    /// Whether nothing is left.
    fn write_rest(&mut self) -> bool {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return false,
                Ok(taken) => drop(self.rest.drain(..taken)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}

/// How long the process took until now. All as the caller gave it: when it began (`CLOCK_MONOTONIC`, ns), CPU time of this
/// process that does not count and of its parent that does (us).
pub fn startup(started_ns: Option<u64>, start_cpu_us: Option<u64>, parent_cpu_us: Option<u64>) -> Startup {
    Startup {
        us: started_ns.map_or(0, |ns| state::monotonic_ns().saturating_sub(ns) / 1000),
        cpu_us: (state::cpu_ns() / 1000)
            .saturating_sub(start_cpu_us.unwrap_or(0))
            .saturating_add(parent_cpu_us.unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn recorder(file: File) -> Recorder {
        let exits = vcpu_exits(2);
        exits[0].io_out.count();
        exits[1].io_out.count();
        let options = Options {
            id: "vm1".into(),
            file: Some(file),
            ..Options::default()
        };
        options.api.count("PUT", 204);
        options.api.count("PATCH", 400);
        Recorder::new(options, exits, Arc::default()).unwrap()
    }

    fn seen() -> Seen<'static> {
        Seen {
            state: InstanceState::Running,
            slots: &[],
            console_lost: 7,
            sleep: None,
        }
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        (reader.into(), writer.into())
    }

    #[test]
    fn counts_of_all_vcpus_are_added_up() {
        let report = recorder(tempfile::tempfile().unwrap()).report(&seen());
        assert_eq!(report["vcpu"]["exit_io_out"], 2);
        assert_eq!(report["api_server"]["patch_count"], 1);
        assert_eq!(report["api_server"]["refused_count"], 1);
        assert_eq!(report["serial"]["lost_bytes"], 7);
        assert_eq!(
            (group("blk a b"), group("rng")),
            ("block_a b".into(), "entropy".into())
        );
    }

    #[test]
    fn a_reader_that_stops_loses_whole_lines_and_is_told_how_many() {
        let (mut reader, writer) = pipe();
        let mut recorder = recorder(writer);
        let lost = |recorder: &Recorder| recorder.sink.as_ref().unwrap().lost;
        let mut flushed = 0u64;
        while lost(&recorder) < 3 {
            recorder.flush(&seen());
            flushed += 1;
        }
        let missed = lost(&recorder);
        let mut text = Vec::new();
        let _ = reader.read_to_end(&mut text);
        // The rest of a line that was taken in part comes first.
        recorder.flush(&seen());
        let _ = reader.read_to_end(&mut text);
        let lines: Vec<Value> = String::from_utf8(text)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len() as u64, flushed + 1 - missed);
        assert_eq!(lines.last().unwrap()["metrics"]["lost_lines"], missed);
    }
}
