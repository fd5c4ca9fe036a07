//! Limits, read back from the node's kernel: not what was asked for, but what is in force.

use mandoline_api::authority::{RspecObject, Sliver};
use mandoline_rspec::{Rspec, format_bytes, format_rate};
use serde::Serialize;

use super::node::LabNode;
use crate::error::{About, Error, Result};

/// `cpu.weight` for each `cpu_share`: so a share of 10 weighs what the kernel gives a cgroup that nobody configured.
const WEIGHT_PER_SHARE: u64 = 10;
/// What a monitor may need beside its guest's memory at most, bytes.
const MONITOR: u64 = 64 << 20;

/// Prints the CPU weight of the sliver's cgroup, its memory bound and what it uses, then every class of every
/// link as `tc` words it (its JSON leaves classes out in Debian 12). Fails when no process is in the cgroup: then its limits bound nothing.
const SCRIPT: &str = r#"
grep -q . "$dir/cgroup.procs" || { echo "no process is in $dir" >&2; exit 1; }
echo "cgroup $dir $(cat "$dir/cpu.weight") $(cat "$dir/memory.max") $(cat "$dir/memory.current")"
for link in /sys/class/net/*; do
    tc class show dev "${link##*/}" | sed "s|^|classes ${link##*/} |"
done
"#;

/// What is in force.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Limits {
    /// The sliver's cgroup.
    pub(super) cgroup: String,
    /// `cpu.weight`.
    pub(super) cpu_weight: u64,
    /// `memory.max`, bytes.
    pub(super) memory_max: u64,
    /// `memory.current`, bytes.
    pub(super) memory_current: u64,
    /// The link whose class bounds what the sliver sends.
    pub(super) link: String,
    /// The class.
    pub(super) class: String,
    /// Its guaranteed rate, bit/s.
    pub(super) rate: u64,
    /// Its ceiling, bit/s.
    pub(super) ceil: u64,
    /// What was asked for.
    pub(super) asked: Asked,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Asked {
    /// `cpu_share`.
    pub(super) cpu_share: u64,
    /// `mem_limit`, bytes.
    pub(super) mem_limit: u64,
    /// `burst_rate`, bit/s.
    pub(super) burst_rate: u64,
}

/// One class; rates in bit/s.
#[derive(Debug)]
struct Class {
    handle: String,
    rate: u64,
    ceil: u64,
}

impl Class {
    /// From `class htb 1:100 parent 1:1 leaf 8001: prio 0 rate 1Kbit ceil 8Mbit burst …`.
    fn parse(line: &str) -> Option<Class> {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let after = |name: &str| words.iter().skip_while(|word| **word != name).nth(1).copied();
        Some(Class {
            handle: after("htb")?.to_owned(),
            rate: tc_rate(after("rate")?)?,
            ceil: tc_rate(after("ceil")?)?,
        })
    }
}

/// `tc`'s way to write a rate: `125bit`, `8Mbit`.
fn tc_rate(text: &str) -> Option<u64> {
    let text = text.strip_suffix("bit")?;
    let (digits, factor) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        None => (text, 1),
        Some(digits) if text.ends_with('K') => (digits, 1_000),
        Some(digits) if text.ends_with('M') => (digits, 1_000_000),
        Some(digits) if text.ends_with('G') => (digits, 1_000_000_000),
        Some(digits) => (digits, 1_000_000_000_000),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// Asks the node's kernel.
pub(super) async fn read_back(node: &LabNode, sliver: &Sliver, rspec: &RspecObject) -> Result<Limits> {
    let vm_id: u32 = sliver
        .vm_id
        .as_deref()
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| {
            Error::failure(format!(
                "the node gives {:?} as the id of the virtual machine",
                sliver.vm_id
            ))
        })?;
    let rspec = Rspec::from_map(rspec).about("rspec")?;
    let number = |name: &str| {
        rspec
            .number(name)
            .ok_or_else(|| Error::failure(format!("{name} was not asked for")))
    };
    let asked = Asked {
        cpu_share: number("cpu_share")?,
        mem_limit: number("mem_limit")?,
        burst_rate: number("burst_rate")?,
    };
    // Slivers without a guarantee are below best-effort.
    let script = format!(
        "dir=$(ls -d /sys/fs/cgroup/mandoline/slivers/{vm_id} /sys/fs/cgroup/mandoline/slivers/*/{vm_id} 2>/dev/null){SCRIPT}"
    );
    parse(&node.run(&script).await?, asked)
}

fn parse(text: &str, asked: Asked) -> Result<Limits> {
    let cgroup = text
        .lines()
        .find_map(|line| line.strip_prefix("cgroup "))
        .ok_or_else(|| Error::failure("the node's kernel says nothing of the sliver's cgroup"))?;
    let words: Vec<_> = cgroup.split_ascii_whitespace().collect();
    let &[path, weight, max, current] = words.as_slice() else {
        return Err(Error::failure(format!(
            "the node's kernel says {cgroup:?} of the sliver's cgroup"
        )));
    };
    let number = |name: &str, text: &str| {
        text.parse::<u64>()
            .about(format_args!("{path}/{name} is {text:?}"))
    };
    let mut best: Option<(String, Class)> = None;
    for line in text.lines().filter_map(|line| line.strip_prefix("classes ")) {
        let Some((link, class)) = line.split_once(' ') else {
            continue;
        };
        let Some(class) = Class::parse(class) else {
            continue;
        };
        let off = |class: &Class| class.ceil.abs_diff(asked.burst_rate);
        if class.ceil > 0 && best.as_ref().is_none_or(|(_, old)| off(&class) < off(old)) {
            best = Some((link.to_owned(), class));
        }
    }
    let (link, class) = best.ok_or_else(|| {
        Error::failure(format!(
            "no link of the node has a class that bounds a rate; tc says:\n{}",
            super::children::tail(text)
        ))
    })?;
    Ok(Limits {
        cgroup: path.to_owned(),
        cpu_weight: number("cpu.weight", weight)?,
        memory_max: number("memory.max", max)?,
        memory_current: number("memory.current", current)?,
        link,
        class: class.handle,
        rate: class.rate,
        ceil: class.ceil,
        asked,
    })
}

impl Limits {
    /// An error that names the first limit that does not hold.
    pub(super) fn check(&self) -> Result<()> {
        let Asked {
            mem_limit,
            burst_rate,
            ..
        } = self.asked;
        let memory_ok = self.memory_max >= mem_limit && self.memory_max <= mem_limit.saturating_add(MONITOR);
        if !memory_ok {
            return Err(Error::failure(format!(
                "{}/memory.max is {}; {} was asked for",
                self.cgroup,
                format_bytes(self.memory_max),
                format_bytes(mem_limit)
            )));
        }
        if self.cpu_weight != self.asked.cpu_share.saturating_mul(WEIGHT_PER_SHARE) {
            return Err(Error::failure(format!(
                "{}/cpu.weight is {}; for cpu_share {} it should be {}",
                self.cgroup,
                self.cpu_weight,
                self.asked.cpu_share,
                self.asked.cpu_share.saturating_mul(WEIGHT_PER_SHARE)
            )));
        }
        // The kernel counts bytes, and `tc` rounds large rates that are no multiple of its unit.
        if self.ceil.abs_diff(burst_rate) > 8 + burst_rate / 1000 {
            return Err(Error::failure(format!(
                "no class has the ceiling that was asked for ({}); the nearest is {} of {} with {}",
                format_rate(burst_rate),
                self.class,
                self.link,
                format_rate(self.ceil)
            )));
        }
        Ok(())
    }

    /// Rows of a table: what, asked, in force, where.
    pub(super) fn rows(&self) -> [[String; 4]; 3] {
        [
            [
                "CPU".into(),
                format!("cpu_share {}", self.asked.cpu_share),
                format!("weight {}", self.cpu_weight),
                format!("{}/cpu.weight", self.cgroup),
            ],
            [
                "memory".into(),
                format!("mem_limit {}", format_bytes(self.asked.mem_limit)),
                format!(
                    "max {} (in use {})",
                    format_bytes(self.memory_max),
                    format_bytes(self.memory_current)
                ),
                format!("{}/memory.max", self.cgroup),
            ],
            [
                "bandwidth".into(),
                format!("burst_rate {}", format_rate(self.asked.burst_rate)),
                format!("ceil {}, rate {}", format_rate(self.ceil), format_rate(self.rate)),
                format!("HTB class {} of {}", self.class, self.link),
            ],
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked {
        cpu_share: 20,
        mem_limit: 128 << 20,
        burst_rate: 10_000_000,
    };
    const TEXT: &str = "cgroup /sys/fs/cgroup/mandoline/slivers/1 200 150994944 50000000\n\
        classes mifb class htb 1:1 root rate 100Mbit ceil 100Mbit burst 1600b cburst 1600b \n\
        classes mifb class htb 1:10 parent 1:1 leaf 8002: prio 0 rate 1Kbit ceil 10Mbit burst 1600b cburst 1600b \n";

    #[test]
    fn the_kernels_words_are_read_and_checked() {
        let limits = parse(TEXT, ASKED).unwrap();
        assert_eq!((limits.cpu_weight, limits.memory_max), (200, 144 << 20));
        assert_eq!(
            (limits.link.as_str(), limits.class.as_str(), limits.ceil),
            ("mifb", "1:10", 10_000_000)
        );
        limits.check().unwrap();
    }

    #[test]
    fn limits_that_do_not_hold_are_errors() {
        for (from, to, part) in [
            ("150994944", "1073741824", "memory.max"),
            ("150994944", "67108864", "memory.max"),
            (" 200 ", " 100 ", "cpu.weight"),
            ("ceil 10Mbit", "ceil 12Mbit", "10 Mbit/s"),
        ] {
            let message = parse(&TEXT.replace(from, to), ASKED)
                .unwrap()
                .check()
                .unwrap_err()
                .to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert!(parse("classes lo \n", ASKED).is_err());
        assert!(parse(TEXT.split("classes mifb").next().unwrap(), ASKED).is_err());
        assert!(parse(&TEXT.replace("150994944", "max"), ASKED).is_err());
    }
}
