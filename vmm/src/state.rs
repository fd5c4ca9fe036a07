//! What the monitor tells the world of itself: phases of the start, and the state file.
//!
//! A phase is one atomic store where it happens; lines are written by the event loop when the guest already
//! runs, so that telling the time costs the start nothing.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_api::monitor::{ExitReason, Phase, PhaseMark, RunState, StateChange};

/// Every phase, in the order of [`Phase`]'s declaration.
const PHASES: [Phase; 10] = [
    Phase::ProcessStart,
    Phase::Main,
    Phase::ConfigRead,
    Phase::MemoryReady,
    Phase::KernelLoaded,
    Phase::VcpuCreated,
    Phase::Jailed,
    Phase::FirstRun,
    Phase::FirstSerialByte,
    Phase::BootTimer,
];

/// Size at which the state file starts anew.
const MAX_STATE_BYTES: u64 = 64 << 10;

/// The times at which phases were reached; the first mark of each counts.
#[derive(Debug)]
pub struct Phases {
    /// `CLOCK_MONOTONIC` in ns; 0 is "not yet".
    reached: [AtomicU64; PHASES.len()],
    written: Mutex<[bool; PHASES.len()]>,
}

impl Default for Phases {
    fn default() -> Self {
        Self {
            reached: [const { AtomicU64::new(0) }; PHASES.len()],
            written: Mutex::default(),
        }
    }
}

impl Phases {
    /// Marks a phase as reached now; true the first time.
    pub fn mark(&self, phase: Phase) -> bool {
        // The common case on the serial port's path: already marked, no clock is read.
        self.reached(phase).is_none() && self.mark_at(phase, monotonic_ns())
    }

    /// Marks a phase as reached at a time given by `CLOCK_MONOTONIC`; true the first time.
    pub fn mark_at(&self, phase: Phase, monotonic_ns: u64) -> bool {
        self.reached[phase as usize]
            .compare_exchange(0, monotonic_ns, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    /// Forgets what the guest reached, for its next start.
    pub fn guest_restarts(&self) {
        let mut written = self
            .written
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        for phase in [Phase::FirstRun, Phase::FirstSerialByte, Phase::BootTimer] {
            self.reached[phase as usize].store(0, Ordering::Relaxed);
            written[phase as usize] = false;
        }
    }

    /// The phases before a VM is built, for an attempt to build one.
    pub fn anew(&self) -> Self {
        let phases = Self::default();
        for phase in [Phase::ProcessStart, Phase::Main] {
            if let Some(ns) = self.reached(phase) {
                phases.mark_at(phase, ns);
            }
        }
        phases
    }

    /// When a phase was reached.
    pub fn reached(&self, phase: Phase) -> Option<u64> {
        match self.reached[phase as usize].load(Ordering::Relaxed) {
            0 => None,
            ns => Some(ns),
        }
    }

    /// The phases that were reached and not yet taken.
    pub fn take_new(&self) -> Vec<PhaseMark> {
        let mut written = self
            .written
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let offset = realtime_ns().saturating_sub(monotonic_ns());
        let mut marks = Vec::new();
        for (phase, written) in PHASES.into_iter().zip(written.iter_mut()) {
            if let (false, Some(monotonic_ns)) = (*written, self.reached(phase)) {
                *written = true;
                marks.push(PhaseMark {
                    phase,
                    monotonic_ns,
                    unix_ns: monotonic_ns + offset,
                });
            }
        }
        marks
    }
}

/// The state file: one JSON object a line, each in one `write`, so that a reader never sees half of one.
#[derive(Debug, Default)]
pub struct StateFile {
    file: Option<File>,
    /// Bytes written since it was last empty.
    bytes: u64,
}

impl StateFile {
    /// Writes to `file`, or nowhere.
    pub fn new(file: Option<File>) -> Self {
        Self { file, bytes: 0 }
    }

    /// Appends the phases reached since the last call.
    pub fn phases(&mut self, phases: &Phases) {
        for mark in phases.take_new() {
            self.line(&mark);
        }
    }

    /// Appends a state.
    pub fn state(&mut self, state: RunState, reason: Option<ExitReason>, detail: Option<String>) {
        self.line(&StateChange {
            state,
            reason,
            detail,
            unix_ns: realtime_ns(),
        });
    }

    fn line(&mut self, value: &impl serde::Serialize) {
        let Some(file) = &mut self.file else { return };
        // A guest that reboots for ever, or sleeps and wakes, must not fill the node's disk. Only the last lines matter;
        // what is no regular file has no length to set.
        if self.bytes > MAX_STATE_BYTES && file.set_len(0).is_ok() {
            self.bytes = 0;
        }
        let Ok(mut text) = serde_json::to_vec(value) else {
            return;
        };
        text.push(b'\n');
        self.bytes += text.len() as u64;
        // A full disk must not end a VM; the log says it, since the file cannot.
        if let Err(error) = file.write_all(&text) {
            tracing::warn!(%error, "state file: a line is lost");
        }
    }
}

/// `CLOCK_MONOTONIC` in ns.
pub fn monotonic_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic))
}

/// CPU time of this process in ns.
pub fn cpu_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime))
}

/// Since when something counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Since {
    /// `CLOCK_MONOTONIC` in ns.
    pub monotonic_ns: u64,
    /// CPU time of this process in ns.
    pub cpu_ns: u64,
}

impl Since {
    /// Since now.
    pub fn now() -> Self {
        Self {
            monotonic_ns: monotonic_ns(),
            cpu_ns: cpu_ns(),
        }
    }
}

/// `CLOCK_REALTIME` in ns since 1970.
pub fn realtime_ns() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Realtime))
}

fn nanoseconds(time: rustix::time::Timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use mandoline_api::monitor::StateLine;

    use super::*;

    #[test]
    fn the_table_of_phases_follows_the_declaration() {
        for (index, phase) in PHASES.into_iter().enumerate() {
            assert_eq!(phase as usize, index);
        }
    }

    #[test]
    fn the_file_stays_small_and_ends_with_the_last_state() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let append = File::options().append(true).open(file.path()).unwrap();
        let mut state = StateFile::new(Some(append));
        for _ in 0..5_000 {
            state.state(RunState::Rebooting, None, None);
        }
        state.state(RunState::Running, None, None);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert!((text.len() as u64) < 2 * MAX_STATE_BYTES, "{}", text.len());
        assert!(text.lines().last().unwrap().contains("running"));
        assert!(text.starts_with('{'), "no hole at the front");
    }

    #[test]
    fn the_first_mark_counts_and_each_is_written_once() {
        let mut file = tempfile::tempfile().unwrap();
        let mut state = StateFile::new(Some(file.try_clone().unwrap()));
        let phases = Phases::default();
        assert!(phases.mark(Phase::FirstRun));
        let first = phases.reached(Phase::FirstRun);
        assert!(!phases.mark(Phase::FirstRun));
        assert_eq!(phases.reached(Phase::FirstRun), first);
        state.phases(&phases);
        state.phases(&phases);
        state.state(
            RunState::Exited,
            Some(ExitReason::Panic),
            Some("at line\n2".into()),
        );
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let lines: Vec<StateLine> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert!(matches!(&lines[0], StateLine::Phase(mark) if mark.phase == Phase::FirstRun));
        assert!(matches!(&lines[1], StateLine::State(change) if change.reason == Some(ExitReason::Panic)));
    }
}
