//! What a cgroup's flat-keyed files say (Documentation/admin-guide/cgroup-v2.rst).

/// `cgroup.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Events {
    /// Processes are in it or below it.
    pub populated: bool,
    /// All of them are stopped.
    pub frozen: bool,
}

/// `cpu.stat`, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuStats {
    /// Processor time used.
    pub usage_us: u64,
    /// Of it, in user mode (for a monitor: the guest too).
    pub user_us: u64,
    /// Of it, in the kernel.
    pub system_us: u64,
    /// Periods that passed under a cap.
    pub periods: u64,
    /// Periods in which the cap was reached.
    pub throttled: u64,
    /// Time spent held back by the cap.
    pub throttled_us: u64,
}

/// `memory.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryEvents {
    /// Reclaimed although below `memory.min`: the node has promised too much.
    pub low: u64,
    /// Held back by `memory.high`.
    pub high: u64,
    /// `memory.max` was about to be passed.
    pub max: u64,
    /// Reclaim was not enough.
    pub oom: u64,
    /// Processes killed for it.
    pub oom_kill: u64,
}

impl Events {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut events = Self::default();
        let mut seen = false;
        for_each(text, |key, value| match key {
            "populated" => (events.populated, seen) = (value != 0, true),
            "frozen" => events.frozen = value != 0,
            _ => {}
        })?;
        if seen {
            Ok(events)
        } else {
            Err("no line \"populated\"".to_owned())
        }
    }
}

impl CpuStats {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut stats = Self::default();
        for_each(text, |key, value| match key {
            "usage_usec" => stats.usage_us = value,
            "user_usec" => stats.user_us = value,
            "system_usec" => stats.system_us = value,
            "nr_periods" => stats.periods = value,
            "nr_throttled" => stats.throttled = value,
            "throttled_usec" => stats.throttled_us = value,
            _ => {}
        })?;
        Ok(stats)
    }
}

impl MemoryEvents {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut events = Self::default();
        for_each(text, |key, value| match key {
            "low" => events.low = value,
            "high" => events.high = value,
            "max" => events.max = value,
            "oom" => events.oom = value,
            "oom_kill" => events.oom_kill = value,
            _ => {}
        })?;
        Ok(events)
    }
}

/// Calls `take` for every `key value` line; later kernels add keys, so unknown ones are passed too.
fn for_each(text: &str, mut take: impl FnMut(&str, u64)) -> Result<(), String> {
    for line in text.lines() {
        let (key, value) = line
            .split_once(' ')
            .ok_or_else(|| format!("line \"{line}\" has no value"))?;
        take(
            key,
            value
                .trim()
                .parse()
                .map_err(|_| format!("\"{value}\" of {key} is no number"))?,
        );
    }
    Ok(())
}
