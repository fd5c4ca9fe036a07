//! Numbers with units: memory in IEC units, rates in SI, both exact in integers.
//!
//! `"1.5 Mbit/s"` is 1 500 000 bit/s; a value that does not come out whole is refused rather than rounded.

/// Why a text is not a quantity; the caller adds the attribute's name and what it allows.
pub(crate) type Problem = &'static str;

const BYTE_UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
];

const RATE_UNITS: [(&str, u64); 13] = [
    ("", 1),
    ("bit/s", 1),
    ("kbit/s", 1_000),
    ("mbit/s", 1_000_000),
    ("gbit/s", 1_000_000_000),
    ("bps", 1),
    ("kbps", 1_000),
    ("mbps", 1_000_000),
    ("gbps", 1_000_000_000),
    ("bit", 1),
    ("kbit", 1_000),
    ("mbit", 1_000_000),
    ("gbit", 1_000_000_000),
];

/// Reads bytes: `268435456`, `"256 MiB"`, `"5 GB"`. `K`, `M`, `G`, `T` alone are IEC, as everybody means
/// them for memory.
pub fn parse_bytes(text: &str) -> Result<u64, &'static str> {
    parse(text, &BYTE_UNITS)
}

/// Reads bits a second: `1500000`, `"1.5 Mbit/s"`, and as the papers write it, `"10Mbps"`.
pub fn parse_rate(text: &str) -> Result<u64, &'static str> {
    parse(text, &RATE_UNITS)
}

fn parse(text: &str, units: &[(&str, u64)]) -> Result<u64, Problem> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err("negative");
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = units
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, f)| *f)
        .ok_or("in no unit that is known")?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (fraction.is_empty() && number.contains('.')) || fraction.contains('.') {
        return Err("not a number");
    }
    if fraction.len() > 12 {
        return Err("of too many digits");
    }
    let whole: u64 = whole.parse().map_err(|_| "too large")?;
    let whole = whole.checked_mul(factor).ok_or("too large")?;
    if fraction.is_empty() {
        return Ok(whole);
    }
    // At most 12 digits and 40 bits of unit: far inside 128 bits.
    let scale = 10u128.pow(fraction.len() as u32);
    let part = fraction.parse::<u128>().map_err(|_| "not a number")? * u128::from(factor);
    if part % scale != 0 {
        return Err("not a whole number of the base unit");
    }
    let part = u64::try_from(part / scale).map_err(|_| "too large")?;
    whole.checked_add(part).ok_or("too large")
}

/// Bytes for people, in the largest unit in which they come out whole: IEC where that fits, else SI.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 8] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("TB", 1_000_000_000_000),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("KiB", 1 << 10),
        ("kB", 1_000),
    ];
    format_with(bytes, &UNITS, "B")
}

/// Bits a second for people, in SI.
pub fn format_rate(rate: u64) -> String {
    const UNITS: [(&str, u64); 3] = [
        ("Gbit/s", 1_000_000_000),
        ("Mbit/s", 1_000_000),
        ("kbit/s", 1_000),
    ];
    for (name, factor) in UNITS {
        // One decimal is exact for what people set: 1.5 Mbit/s.
        if rate >= factor && rate.is_multiple_of(factor / 10) {
            let tenths = rate / (factor / 10);
            return match tenths % 10 {
                0 => format!("{} {name}", tenths / 10),
                tenth => format!("{}.{tenth} {name}", tenths / 10),
            };
        }
    }
    format!("{rate} bit/s")
}

fn format_with(amount: u64, units: &[(&str, u64)], base: &str) -> String {
    for (name, factor) in units {
        if amount >= *factor && amount.is_multiple_of(*factor) {
            return format!("{} {name}", amount / factor);
        }
    }
    format!("{amount} {base}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_papers_spellings() {
        assert_eq!(parse_rate("1.5Mbps"), Ok(1_500_000));
        assert_eq!(parse_rate("1.5 Mbit/s"), Ok(1_500_000));
        assert_eq!(parse_rate("1Kbps"), Ok(1_000));
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_bytes("256 MiB"), Ok(268_435_456));
        assert_eq!(parse_bytes("0.5GiB"), Ok(1 << 29));
    }

    #[test]
    fn what_is_refused_and_why() {
        for (text, problem) in [
            ("-1", "negative"),
            ("1 parsec", "in no unit that is known"),
            ("", "not a number"),
            (".5 GB", "not a number"),
            ("1. GB", "not a number"),
            ("1.2.3", "not a number"),
            ("0.3", "not a whole number of the base unit"),
            ("99999999999999999999", "too large"),
            ("99999999 TiB", "too large"),
            ("18446744073709551615.5 kB", "too large"),
        ] {
            assert_eq!(parse_bytes(text), Err(problem), "{text}");
        }
    }

    proptest! {
        #[test]
        fn formatted_text_reads_back_exactly(amount: u64) {
            prop_assert_eq!(parse_bytes(&format_bytes(amount)), Ok(amount));
            prop_assert_eq!(parse_rate(&format_rate(amount)), Ok(amount));
        }

        #[test]
        fn round_amounts_read_back_too(amount in 0u64..100_000, shift in 0u32..4) {
            let bytes = amount << (10 * shift);
            let rate = amount * 1000u64.pow(shift);
            prop_assert_eq!(parse_bytes(&format_bytes(bytes)), Ok(bytes));
            prop_assert_eq!(parse_rate(&format_rate(rate)), Ok(rate));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = parse_bytes(&text);
            let _ = parse_rate(&text);
        }
    }
}
