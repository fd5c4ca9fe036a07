//! What the kernel says of a process: CPU time and memory.

use anyhow::{Context, Result, anyhow};

/// CPU time that a process has used, all threads, in ns: the kernel's exact sum.
pub(crate) fn cpu_ns(pid: u32) -> Result<u64> {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let pid = libc::pid_t::try_from(pid)?;
    // SAFETY: both calls write one value each, to variables of their types.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid, &mut clock) != 0 || libc::clock_gettime(clock, &mut time) != 0
    };
    if failed {
        return Err(anyhow!("process {pid} has no CPU clock any more"));
    }
    Ok(u64::try_from(time.tv_sec)? * 1_000_000_000 + u64::try_from(time.tv_nsec)?)
}

/// What user programs and the kernel had of it, in ticks of the accounting clock: rough.
pub(crate) fn user_and_system_ticks(pid: u32) -> Result<(u64, u64)> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name, in parentheses, may hold anything; utime and stime are the 12th and 13th fields after it.
    let (_, rest) = text.rsplit_once(')').with_context(|| format!("{path}: {text}"))?;
    let mut fields = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    match (fields.next(), fields.next()) {
        (Some(Ok(user)), Some(Ok(system))) => Ok((user, system)),
        _ => Err(anyhow!("{path}: {text}")),
    }
}

/// One mapping of a process, from `/proc/<pid>/smaps`; sizes in KiB.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub size: u64,
    pub path: String,
    /// Executable.
    pub text: bool,
    pub private: u64,
    pub shared: u64,
    pub rss: u64,
    /// Mapped without reserve: guest memory of our monitor.
    pub no_reserve: bool,
}

/// Every mapping of a process.
pub(crate) fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        match first.strip_suffix(':') {
            None => {
                let permissions = words.next().unwrap_or_default();
                mappings.push(Mapping {
                    text: permissions.contains('x'),
                    path: words.nth(3).unwrap_or_default().to_owned(),
                    ..Mapping::default()
                });
            }
            Some(name) => {
                let Some(mapping) = mappings.last_mut() else {
                    continue;
                };
                if name == "VmFlags" {
                    mapping.no_reserve = words.any(|flag| flag == "nr");
                    continue;
                }
                let value = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                match name {
                    "Size" => mapping.size = value,
                    "Rss" => mapping.rss = value,
                    "Private_Clean" | "Private_Dirty" => mapping.private += value,
                    "Shared_Clean" | "Shared_Dirty" => mapping.shared += value,
                    _ => {}
                }
            }
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_are_read() {
        let text = "55d0-55e0 r-xp 00001000 08:01 12 /usr/bin/x\nSize:  64 kB\nRss: 60 kB\nShared_Clean: 40 kB\n\
                    Private_Clean: 12 kB\nPrivate_Dirty: 8 kB\nVmFlags: rd ex mr\n\
                    7f00-8f00 rw-p 00000000 00:00 0 \nSize: 131072 kB\nRss: 4 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd wr nr\n";
        let mappings = parse(text);
        assert_eq!(mappings.len(), 2);
        assert_eq!(mappings[0].path, "/usr/bin/x");
        assert_eq!(
            (mappings[0].private, mappings[0].shared, mappings[0].text),
            (20, 40, true)
        );
        assert_eq!(
            (mappings[1].size, mappings[1].no_reserve, mappings[1].rss),
            (131_072, true, 4)
        );
    }

    #[test]
    fn this_process_has_used_cpu_time() {
        let pid = std::process::id();
        assert!(cpu_ns(pid).unwrap() > 0);
        user_and_system_ticks(pid).unwrap();
        assert!(
            mappings(pid)
                .unwrap()
                .iter()
                .any(|mapping| mapping.text && mapping.rss > 0)
        );
    }
}
