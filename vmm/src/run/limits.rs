//! The limits of a VM that was started by hand: the options that `run` and `set` share, and what becomes of them.
//!
//! ```text
//! --cpu-share --cpu-cap --mem-limit    cgroup v2            the host's; they need root
//! --rate --peak                        HTB, what it sends   the host's; they need root
//! --disk-... --rx-... --tx-...         token buckets        the monitor's devices
//! --balloon                            virtio-balloon       the monitor's, with the guest's help
//! ```

use std::str::FromStr;

use clap::Args;
use mandoline_api::monitor::{RateLimiter, TokenBucket};
use mandoline_limits::Rate;
use mandoline_limits::cgroup::{CpuMax, CpuShare};

use crate::run::options::parse_size;

/// A limit, or that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound<T> {
    /// No limit.
    None,
    /// This one.
    At(T),
}

impl<T> Bound<T> {
    /// The limit, if it is one.
    pub fn limit(self) -> Option<T> {
        match self {
            Self::None => None,
            Self::At(limit) => Some(limit),
        }
    }

    /// Reads `none`, or what `parse` reads.
    fn read(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            text => parse(text)
                .map(Self::At)
                .map_err(|error| format!("{error}; or none")),
        }
    }
}

fn size(text: &str) -> Result<Bound<u64>, String> {
    Bound::read(text, parse_size)
}

/// Bytes in a second: `10MiB/s`.
fn bandwidth(text: &str) -> Result<Bound<u64>, String> {
    Bound::read(text, |text| {
        let bytes = parse_size(text.strip_suffix("/s").unwrap_or(text))?;
        positive(bytes, "1 byte/s or more")
    })
}

/// Operations in a second.
fn operations(text: &str) -> Result<Bound<u64>, String> {
    Bound::read(text, |text| {
        let digits = text.strip_suffix("/s").unwrap_or(text);
        let number = digits
            .parse()
            .map_err(|_| "allowed: a number of operations a second".to_owned())?;
        positive(number, "1 or more")
    })
}

fn rate(text: &str) -> Result<Bound<Rate>, String> {
    Bound::read(text, |text| {
        Rate::from_str(text).map_err(|error| error.to_string())
    })
}

fn cap(text: &str) -> Result<Bound<CpuMax>, String> {
    Bound::read(text, |text| {
        let thousandths = text
            .parse()
            .map_err(|_| "allowed: thousandths of one CPU, 2 or more".to_owned())?;
        CpuMax::of_one_cpu(thousandths).map_err(|error| error.to_string())
    })
}

fn share(text: &str) -> Result<CpuShare, String> {
    let share = text.parse().map_err(|_| "allowed: 1 to 1000".to_owned())?;
    CpuShare::new(share).map_err(|error| error.to_string())
}

fn positive(number: u64, allowed: &str) -> Result<u64, String> {
    match number {
        0 => Err(format!("allowed: {allowed}")),
        number => Ok(number),
    }
}

/// Limits. All of them can be changed while the VM runs: `mandoline-vmm set NAME ...`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Limits (changed while it runs by `mandoline-vmm set NAME`)")]
pub struct LimitArgs {
    /// Share of the CPU, a weight from 1 to 1000: 10 of 50 active is 20 % (needs root, cgroup v2).
    #[arg(long, value_name = "1-1000", value_parser = share)]
    pub cpu_share: Option<CpuShare>,
    /// Cap on CPU time in thousandths of one CPU, however idle the host: 10 is 1 % (needs root, cgroup v2); or `none`.
    #[arg(long, value_name = "N", value_parser = cap)]
    pub cpu_cap: Option<Bound<CpuMax>>,
    /// Most memory for guest and monitor together, memory.max (needs root, cgroup v2); or `none`.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub mem_limit: Option<Bound<u64>>,
    /// Bandwidth that the guest may send, as 10Mbit/s: the guarantee (base rate) and, without --peak, the ceiling.
    #[arg(long, alias = "base-rate", value_name = "RATE")]
    pub rate: Option<Rate>,
    /// Ceiling (burst rate) of what it sends while others leave some.
    #[arg(long, alias = "burst-rate", value_name = "RATE")]
    pub peak: Option<Rate>,

    /// Bytes a second of each disk, as 10MiB/s; or `none`.
    #[arg(long, value_name = "SIZE/s", value_parser = bandwidth)]
    pub disk_bandwidth: Option<Bound<u64>>,
    /// Bytes that may go at once after a rest [default: a second's worth].
    #[arg(long, value_name = "SIZE", requires = "disk_bandwidth", value_parser = parse_size)]
    pub disk_burst: Option<u64>,
    /// Requests a second of each disk; or `none`.
    #[arg(long, value_name = "N", value_parser = operations)]
    pub disk_ops: Option<Bound<u64>>,
    /// What comes to the guest's network device, as 10Mbit/s; or `none`.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub rx_bandwidth: Option<Bound<Rate>>,
    /// Bytes that may come at once after a rest [default: a second's worth].
    #[arg(long, value_name = "SIZE", requires = "rx_bandwidth", value_parser = parse_size)]
    pub rx_burst: Option<u64>,
    /// Packets a second that come to it; or `none`.
    #[arg(long, value_name = "N", value_parser = operations)]
    pub rx_ops: Option<Bound<u64>>,
    /// What the guest's network device sends, as 10Mbit/s; or `none`. Beside --rate, and without root.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub tx_bandwidth: Option<Bound<Rate>>,
    /// Bytes that may go at once after a rest [default: a second's worth].
    #[arg(long, value_name = "SIZE", requires = "tx_bandwidth", value_parser = parse_size)]
    pub tx_burst: Option<u64>,
    /// Packets a second that it sends; or `none`.
    #[arg(long, value_name = "N", value_parser = operations)]
    pub tx_ops: Option<Bound<u64>>,
    /// Memory that the guest gives back (whole MiB). 0 only offers the balloon, for later.
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub balloon: Option<u32>,
}

/// A size in whole MiB.
fn mebibytes(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text)?;
    match u32::try_from(bytes >> 20) {
        Ok(mib) if bytes % (1 << 20) == 0 => Ok(mib),
        _ => Err("allowed: whole MiB".to_owned()),
    }
}

/// A burst that its rate would fill in less than the buckets' unit of time.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {burst} bytes is refused: allowed is {least} bytes (a millisecond of the bandwidth) or more")]
pub struct BurstError {
    what: &'static str,
    burst: u64,
    least: u64,
}

impl LimitArgs {
    /// Whether any of them needs a cgroup.
    pub fn needs_cgroup(&self) -> bool {
        self.cpu_share.is_some() || self.cpu_cap.is_some() || self.mem_limit.is_some()
    }

    /// What changes at each disk.
    pub fn disk(&self) -> Result<Option<RateLimiter>, BurstError> {
        limiter(
            "--disk-burst",
            self.disk_bandwidth,
            self.disk_burst,
            self.disk_ops,
        )
    }

    /// What changes for what comes to the network device.
    pub fn rx(&self) -> Result<Option<RateLimiter>, BurstError> {
        limiter("--rx-burst", bytes(self.rx_bandwidth), self.rx_burst, self.rx_ops)
    }

    /// What changes for what the network device sends.
    pub fn tx(&self) -> Result<Option<RateLimiter>, BurstError> {
        limiter("--tx-burst", bytes(self.tx_bandwidth), self.tx_burst, self.tx_ops)
    }
}

fn bytes(rate: Option<Bound<Rate>>) -> Option<Bound<u64>> {
    rate.map(|rate| match rate {
        Bound::None => Bound::None,
        Bound::At(rate) => Bound::At(rate.bytes_per_second()),
    })
}

/// The API's buckets: what is absent stays as it is.
fn limiter(
    what: &'static str,
    bandwidth: Option<Bound<u64>>,
    burst: Option<u64>,
    ops: Option<Bound<u64>>,
) -> Result<Option<RateLimiter>, BurstError> {
    let bandwidth = bandwidth.map(|bound| bucket(what, bound, burst)).transpose()?;
    let ops = ops.map(|bound| bucket(what, bound, None)).transpose()?;
    Ok((bandwidth.is_some() || ops.is_some()).then_some(RateLimiter { bandwidth, ops }))
}

fn bucket(what: &'static str, bound: Bound<u64>, burst: Option<u64>) -> Result<TokenBucket, BurstError> {
    /// A second in the unit of `refill_time`.
    const SECOND_MS: u64 = 1000;
    let (size, refill_time) = match (bound, burst) {
        // Firecracker's way to say that there is no limit.
        (Bound::None, _) => (0, 0),
        (Bound::At(rate), None) => (rate, SECOND_MS),
        (Bound::At(rate), Some(burst)) => {
            let time = u128::from(burst) * u128::from(SECOND_MS) / u128::from(rate);
            let time = u64::try_from(time).unwrap_or(u64::MAX);
            if time == 0 {
                let least = rate.div_ceil(SECOND_MS);
                return Err(BurstError { what, burst, least });
            }
            (burst, time)
        }
    };
    Ok(TokenBucket {
        size,
        one_time_burst: None,
        refill_time,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitArgs,
    }

    fn limits(words: &str) -> Result<LimitArgs, String> {
        Line::try_parse_from(["x"].into_iter().chain(words.split_whitespace()))
            .map(|line| line.limits)
            .map_err(|error| error.to_string())
    }

    fn full(size: u64, refill_time: u64) -> Option<TokenBucket> {
        Some(TokenBucket {
            size,
            one_time_burst: None,
            refill_time,
        })
    }

    #[test]
    fn buckets_hold_a_second_or_what_is_asked_for() {
        let given =
            limits("--disk-bandwidth 10MiB/s --disk-ops 100 --rx-bandwidth 8Mbit/s --rx-burst 500000")
                .unwrap();
        let disk = given.disk().unwrap().unwrap();
        assert_eq!(
            (disk.bandwidth, disk.ops),
            (full(10 << 20, 1000), full(100, 1000))
        );
        let rx = given.rx().unwrap().unwrap();
        assert_eq!((rx.bandwidth, rx.ops), (full(500_000, 500), None));
        assert_eq!(given.tx(), Ok(None));
        let none = limits("--tx-ops none --tx-bandwidth none")
            .unwrap()
            .tx()
            .unwrap()
            .unwrap();
        assert_eq!((none.bandwidth, none.ops), (full(0, 0), full(0, 0)));
    }

    #[test]
    fn errors_name_value_and_bound() {
        for (words, parts) in [
            ("--cpu-share 0", ["0", "1 to 1000"]),
            ("--cpu-share 1001", ["1001", "1 to 1000"]),
            ("--cpu-cap 1", ["1/1000", "2/1000 or more"]),
            ("--mem-limit much", ["much", "MiB or GiB; or none"]),
            ("--disk-bandwidth 0", ["0", "1 byte/s or more; or none"]),
            ("--disk-ops many", ["many", "operations a second; or none"]),
            ("--rx-bandwidth 10MB", ["10MB", "Mbit/s"]),
            ("--balloon 1000", ["1000", "whole MiB"]),
            ("--disk-burst 1MiB", ["--disk-bandwidth", "required"]),
        ] {
            let error = limits(words).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{words}: {error}");
        }
        let error = limits("--disk-bandwidth 10000000 --disk-burst 9999")
            .unwrap()
            .disk()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "--disk-burst 9999 bytes is refused: allowed is 10000 bytes (a millisecond of the bandwidth) or more"
        );
    }
}
