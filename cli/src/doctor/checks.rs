//! What the machine is: CPU, /dev/kvm, memory, disk, programs, cgroups.

use std::fs;
use std::path::{Path, PathBuf};

use super::Check;
use crate::config::base_dir;

/// Memory that a lab node of 4 GiB and the builds beside it want, bytes.
const MEMORY: u64 = 5 << 30;
/// Space for compiled programs and images, bytes.
const SPACE_TO_BUILD: u64 = 12 << 30;
/// Space for one run when everything is built, bytes.
const SPACE_TO_RUN: u64 = 2 << 30;

/// Whether slivers run at the CPU's own speed.
pub(super) fn virtualisation() -> Check {
    const NAME: &str = "virtualisation";
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag = cpu_flag(&flags);
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match (flag, device) {
        (Some(flag), Ok(_)) => Check::ok(
            NAME,
            format!("CPU has {flag}, /dev/kvm opens: the lab runs accelerated"),
        ),
        (Some(flag), Err(error)) => Check::note(
            NAME,
            format!("CPU has {flag}, but /dev/kvm: {error}; the lab will run by emulation, much slower"),
            match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "join the group kvm: adduser $USER kvm, then log in again"
                }
                _ => "load the module: modprobe kvm-intel, or modprobe kvm-amd (needs root)",
            },
        ),
        (None, Ok(_)) => Check::note(
            NAME,
            "CPU has neither vmx nor svm; /dev/kvm is there but runs small payloads only",
            "nothing to do: the lab emulates a CPU with svm (QEMU's TCG), in which /dev/kvm is real, only slower. \
             In a cloud, machine types with nested virtualisation are faster",
        ),
        (None, Err(_)) => Check::note(
            NAME,
            "CPU has neither vmx nor svm, no /dev/kvm",
            "nothing to do: the lab emulates a CPU with svm (QEMU's TCG), in which /dev/kvm is real, only slower",
        ),
    }
}

/// `vmx` or `svm`, as a whole word of the flags.
pub(crate) fn cpu_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"]
        .into_iter()
        .find(|flag| flags.split_ascii_whitespace().any(|word| word == *flag))
}

/// Memory for a node.
pub(super) fn memory() -> Check {
    const NAME: &str = "memory";
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_memory(&text) {
        None => Check::note(NAME, "/proc/meminfo does not say", "a lab node wants 4 GiB"),
        Some(bytes) if bytes >= MEMORY => Check::ok(NAME, format!("{} available", gib(bytes))),
        Some(bytes) => Check::note(
            NAME,
            format!("{} available; wanted {}", gib(bytes), gib(MEMORY)),
            "end other programs; a lab node may take up to 4 GiB",
        ),
    }
}

fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Space where images are cached.
pub(super) fn disk() -> Check {
    const NAME: &str = "disk space";
    let Some(cache) = cache_dir() else {
        return Check::missing(NAME, "neither MANDOLINE_CACHE nor HOME is set", "set HOME");
    };
    // The directory may not exist yet: ask where it would be made.
    let existing = cache
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    let want = if cache.join("node").is_dir() {
        SPACE_TO_RUN
    } else {
        SPACE_TO_BUILD
    };
    match rustix::fs::statvfs(existing) {
        Err(error) => Check::note(
            NAME,
            format!("{}: {error}", existing.display()),
            "see what is wrong there",
        ),
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let found = format!("{} free at {}", gib(free), existing.display());
            match free >= want {
                true => Check::ok(NAME, found),
                false => Check::missing(
                    NAME,
                    format!("{found}; needed {}", gib(want)),
                    "make room, or set MANDOLINE_CACHE to a directory with more",
                ),
            }
        }
    }
}

/// Where the image builders keep what they build.
pub(super) fn cache_dir() -> Option<PathBuf> {
    match std::env::var_os("MANDOLINE_CACHE").filter(|dir| !dir.is_empty()) {
        Some(dir) => Some(dir.into()),
        None => base_dir("XDG_CACHE_HOME", ".cache")
            .ok()
            .map(|dir| dir.join("mandoline")),
    }
}

/// A program on the path.
pub(super) fn program(name: &'static str, package: &str, why: &str) -> Check {
    match find_program(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::missing(
            name,
            "not on the path",
            format!("{why}; install it: apt-get install {package}"),
        ),
    }
}

/// Looks a program up as a shell does.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| {
            use std::os::unix::fs::PermissionsExt;
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// cgroup v2: only where this machine itself is to be a node.
pub(super) fn cgroup() -> Check {
    const NAME: &str = "cgroup v2";
    const WANTED: [&str; 3] = ["cpu", "memory", "io"];
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(text) => {
            let lacking: Vec<_> = WANTED
                .into_iter()
                .filter(|name| !text.split_ascii_whitespace().any(|word| word == *name))
                .collect();
            match lacking.is_empty() {
                true => Check::ok(NAME, text.trim().to_owned()),
                false => Check::note(
                    NAME,
                    format!("without the controllers {}", lacking.join(", ")),
                    "this machine itself cannot be a node; lab nodes bring their own kernel and can",
                ),
            }
        }
        Err(_) => Check::note(
            NAME,
            "not mounted at /sys/fs/cgroup",
            "this machine itself cannot be a node (boot with systemd.unified_cgroup_hierarchy=1); lab nodes can",
        ),
    }
}

fn gib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 30;
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(cpu_flag("model name: x\nflags\t\t: fpu vmx sse\n"), Some("vmx"));
        assert_eq!(cpu_flag("flags\t\t: fpu svm_lock vmx_x\n"), None);
        assert_eq!(cpu_flag(""), None);
    }

    #[test]
    fn memory_is_read() {
        assert_eq!(
            available_memory("MemTotal: 1 kB\nMemAvailable:    2048 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(available_memory("MemTotal: 1 kB\n"), None);
    }
}
