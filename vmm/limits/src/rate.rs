//! Data rates, with their unit in the type: SI prefixes, bits per second.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A data rate in bits per second (SI prefixes: 1 kbit/s = 1000 bit/s).
///
/// The kernel counts in whole bytes per second, so a rate that is not a multiple of 8 bit/s
/// reads back rounded down to one; the smallest that can be enforced is [`Rate::MIN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

impl Rate {
    /// The smallest rate that HTB can hold: one byte per second.
    pub const MIN: Rate = Rate(8);
    /// The largest rate accepted: 10 Tbit/s, so that no sum of a node's rates overflows.
    pub const MAX: Rate = Rate(10_000_000_000_000);

    /// What all slivers of a node may send together, unless its owner says otherwise: 100 Mbit/s
    /// (PlanetLab, OSDI'04 section 4.2.2).
    pub const NODE_DEFAULT: Rate = Rate(100_000_000);

    /// A rate of this many bits per second, between [`Rate::MIN`] and [`Rate::MAX`].
    pub fn from_bits_per_second(bits: u64) -> Result<Self, Error> {
        if (Self::MIN.0..=Self::MAX.0).contains(&bits) {
            Ok(Self(bits))
        } else {
            Err(Error::out_of_range("rate", format!("{bits} bit/s"), allowed()))
        }
    }

    /// Bits per second.
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// Bytes per second, as the kernel counts.
    pub const fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }

    /// The rate of this many bytes per second, as the kernel reports it.
    pub(crate) const fn from_kernel_bytes(bytes: u64) -> Self {
        Self(bytes.saturating_mul(8))
    }
}

fn allowed() -> String {
    format!("{} to {}", Rate::MIN, Rate::MAX)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [
            (1_000_000_000_000, "Tbit/s"),
            (1_000_000_000, "Gbit/s"),
            (1_000_000, "Mbit/s"),
            (1_000, "kbit/s"),
        ];
        for (size, name) in units {
            // Three decimals at most, and only where nothing is lost by them.
            if self.0 >= size && self.0.is_multiple_of(size / 1000) {
                let (whole, part) = (self.0 / size, self.0 % size / (size / 1000));
                return if part == 0 {
                    write!(f, "{whole} {name}")
                } else {
                    write!(f, "{whole}.{} {name}", format!("{part:03}").trim_end_matches('0'))
                };
            }
        }
        write!(f, "{} bit/s", self.0)
    }
}

/// `1.5 Mbit/s`, `100Mbit`, `64kbit/s`, or a bare number of bits per second. Letter case is
/// free except that bytes are never accepted: bandwidth is in bits here, everywhere.
impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = || {
            Error::out_of_range(
                "rate",
                format!("\"{text}\""),
                format!(
                    "a number with bit/s, kbit/s, Mbit/s, Gbit/s or Tbit/s, {}",
                    allowed()
                ),
            )
        };
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let scale: u64 = match unit.strip_suffix("/s").unwrap_or(&unit) {
            "" | "bit" => 1,
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            "tbit" => 1_000_000_000_000,
            _ => return Err(refuse()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty()
            || fraction.len() > 12
            || (number.contains('.') && fraction.is_empty())
            || fraction.contains('.')
        {
            return Err(refuse());
        }
        let whole: u64 = whole.parse().map_err(|_| refuse())?;
        let part = if fraction.is_empty() {
            0
        } else {
            let digits: u64 = fraction.parse().map_err(|_| refuse())?;
            // Both factors are at most 10^12, so 128 bits hold the product.
            let ten = 10u128.pow(fraction.len() as u32);
            (u128::from(digits) * u128::from(scale) / ten) as u64
        };
        let bits = whole
            .checked_mul(scale)
            .and_then(|b| b.checked_add(part))
            .ok_or_else(refuse)?;
        Self::from_bits_per_second(bits).map_err(|_| refuse())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bits) in [
            ("1.5 Mbit/s", 1_500_000),
            ("100Mbit", 100_000_000),
            ("64 kbit/s", 64_000),
            ("8", 8),
            ("2Gbit/s", 2_000_000_000),
        ] {
            assert_eq!(text.parse::<Rate>().unwrap().bits_per_second(), bits, "{text}");
        }
    }

    #[test]
    fn refuses_with_the_value_and_what_is_allowed() {
        for text in [
            "",
            "7",
            "0",
            "-1",
            "1 MB/s",
            "1.",
            ".5 Mbit",
            "1.2.3",
            "99999999999999999999",
            "20 Tbit/s",
            "10 furlongs",
        ] {
            let error = text.parse::<Rate>().unwrap_err().to_string();
            assert!(
                error.contains(text) && error.contains("Mbit/s"),
                "{text}: {error}"
            );
        }
    }

    proptest! {
        #[test]
        fn display_reads_back(bits in 8u64..=10_000_000_000_000) {
            let rate = Rate::from_bits_per_second(bits).unwrap();
            prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
        }
    }
}
