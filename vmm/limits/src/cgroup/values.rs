//! The values of a cgroup's limits: their ranges and how they map to what the kernel takes.

use std::fmt;

use crate::error::{Error, Result};

/// A share of the processor, 1 to 1000, relative to the other slivers that want it.
///
/// The kernel's `cpu.weight` is 1 to 10000 with 100 as its own default, so a share is ten
/// weights: ratios stay exact (10 among 50 active shares is 20 %), and a share of 10 weighs as
/// much as a cgroup that nobody configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuShare(u32);

impl CpuShare {
    /// A share, 1 to 1000.
    pub fn new(share: u32) -> Result<Self> {
        if (1..=1000).contains(&share) {
            Ok(Self(share))
        } else {
            Err(Error::out_of_range("cpu share", share, "1 to 1000"))
        }
    }

    /// The share.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// `cpu.weight` for it.
    pub const fn weight(self) -> u32 {
        self.0 * 10
    }
}

/// A cap on processor time, as quota and period in microseconds (`cpu.max`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMax {
    quota_us: u64,
    period_us: u64,
}

impl CpuMax {
    /// The shortest quota allowed: below about two milliseconds the kernel's slices (1 to 4 ms)
    /// make a cap coarser than what it caps.
    pub const MIN_QUOTA_US: u64 = 2_000;
    /// The kernel's longest period.
    pub const MAX_PERIOD_US: u64 = 1_000_000;
    /// The kernel's default period, used wherever the quota in it is long enough.
    pub const DEFAULT_PERIOD_US: u64 = 100_000;

    /// A cap of `thousandths` of one processor (1500 = one and a half). The period is 100 ms, or
    /// longer where the quota would be below [`CpuMax::MIN_QUOTA_US`]; so the smallest cap is
    /// 2 thousandths, at the kernel's longest period.
    pub fn of_one_cpu(thousandths: u32) -> Result<Self> {
        let share = u64::from(thousandths);
        let least = (Self::MIN_QUOTA_US * 1000).div_ceil(Self::MAX_PERIOD_US);
        if share < least {
            return Err(Error::out_of_range(
                "cpu cap",
                format!("{thousandths}/1000 of a processor"),
                format!("{least}/1000 or more: the quota must be 2 ms or more in a period of at most 1 s"),
            ));
        }
        let period_us = (Self::MIN_QUOTA_US * 1000)
            .div_ceil(share)
            .clamp(Self::DEFAULT_PERIOD_US, Self::MAX_PERIOD_US);
        Self::new(share * period_us / 1000, period_us)
    }

    /// A quota in each period, both in microseconds.
    pub fn new(quota_us: u64, period_us: u64) -> Result<Self> {
        if !(1_000..=Self::MAX_PERIOD_US).contains(&period_us) {
            return Err(Error::out_of_range(
                "cpu.max period",
                format!("{period_us} us"),
                "1000 to 1000000 us",
            ));
        }
        if quota_us < Self::MIN_QUOTA_US {
            return Err(Error::out_of_range(
                "cpu.max quota",
                format!("{quota_us} us"),
                format!("{} us or more", Self::MIN_QUOTA_US),
            ));
        }
        Ok(Self { quota_us, period_us })
    }

    /// Microseconds of processor time in each period.
    pub const fn quota_us(self) -> u64 {
        self.quota_us
    }

    /// Length of the period in microseconds.
    pub const fn period_us(self) -> u64 {
        self.period_us
    }
}

impl fmt::Display for CpuMax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.quota_us, self.period_us)
    }
}

/// Memory of a cgroup, in bytes. `None` leaves a file as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryLimits {
    /// `memory.max`: never more; beyond it the kernel reclaims, then kills.
    pub max: Option<u64>,
    /// `memory.high`: from here on the kernel slows it down and reclaims.
    pub high: Option<u64>,
    /// `memory.min`: never reclaimed below this.
    pub min: Option<u64>,
    /// `memory.swap.max`; absent in kernels without swap accounting.
    pub swap_max: Option<u64>,
    /// `memory.oom.group`: when one of its processes is killed for memory, all are.
    pub oom_group: Option<bool>,
}

impl MemoryLimits {
    /// One page: the kernel rounds to pages, and zero would kill at once.
    const LEAST: u64 = 4096;

    pub(super) fn check(&self) -> Result<()> {
        for (what, value) in [("memory.max", self.max), ("memory.high", self.high)] {
            if value.is_some_and(|v| v < Self::LEAST) {
                return Err(Error::out_of_range(
                    what,
                    format!("{} bytes", value.unwrap_or(0)),
                    "4096 bytes or more",
                ));
            }
        }
        match (self.min, self.max) {
            (Some(min), Some(max)) if min > max => Err(Error::out_of_range(
                "memory.min",
                format!("{min} bytes"),
                format!("at most memory.max, {max} bytes"),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, String)> {
        let numbers = [
            ("memory.max", self.max),
            ("memory.high", self.high),
            ("memory.min", self.min),
            ("memory.swap.max", self.swap_max),
        ];
        let group = self
            .oom_group
            .map(|on| ("memory.oom.group", u8::from(on).to_string()));
        numbers
            .into_iter()
            .filter_map(|(file, v)| v.map(|v| (file, v.to_string())))
            .chain(group)
    }
}
