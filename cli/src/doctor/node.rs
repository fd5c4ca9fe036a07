//! Whether this machine can be a node: what the node manager needs of its kernel, programs, disks and clock.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Check;
use super::checks::find_program;

/// Controllers that slivers' limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Space for slivers' disks below which a node should not begin, bytes.
const SPACE: u64 = 10 << 30;
/// What keeps a node's clock right, by the name of the process.
const CLOCKS: [&str; 6] = [
    "chronyd",
    "systemd-timesyn",
    "ntpd",
    "ntpd-rs",
    "openntpd",
    "phc2sys",
];

/// All checks of a node.
pub(super) fn checks() -> Vec<Check> {
    vec![
        kvm(),
        controllers(&read("/sys/fs/cgroup/cgroup.controllers")),
        program("nft", "nftables", "the packet filter is loaded with it"),
        device("tun", "/dev/net/tun", "modprobe tun"),
        conntrack(),
        module("sch_htb", "bandwidth is shared by HTB"),
        module("ifb", "the tree of all slivers' bandwidth is on an IFB device"),
        images(),
        disk(Path::new("/var/lib/mandoline")),
        clock(),
        manager(),
    ]
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn kvm() -> Check {
    const NAME: &str = "/dev/kvm";
    match fs::OpenOptions::new().read(true).write(true).open(NAME) {
        Ok(_) => Check::ok(NAME, "opens"),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Check::note(
            NAME,
            error.to_string(),
            "run the doctor as root, as the node manager runs",
        ),
        Err(error) => Check::missing(
            NAME,
            error.to_string(),
            "modprobe kvm-intel or kvm-amd; VT-x or AMD-V must be on in the firmware, or nested virtualisation in the cloud",
        ),
    }
}

fn controllers(text: &str) -> Check {
    const NAME: &str = "cgroup v2";
    let has = |name: &&str| text.split_ascii_whitespace().any(|word| word == *name);
    let lacking: Vec<_> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    match (text.is_empty(), lacking.is_empty()) {
        (true, _) => Check::missing(
            NAME,
            "not mounted at /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 -o favordynmods cgroup2 /sys/fs/cgroup",
        ),
        (_, false) => Check::missing(
            NAME,
            format!("without the controllers {}", lacking.join(", ")),
            "boot without cgroup_disable=, and with no cgroup v1 mounted",
        ),
        _ => Check::ok(NAME, text.trim().to_owned()),
    }
}

fn program(name: &'static str, package: &str, why: &str) -> Check {
    let found = find_program(name).or_else(|| {
        let path = Path::new("/usr/sbin").join(name);
        path.is_file().then_some(path)
    });
    match found {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::missing(
            name,
            "not installed",
            format!("{why}; install it: apt-get install {package}"),
        ),
    }
}

fn device(name: &'static str, path: &str, advice: &str) -> Check {
    match fs::metadata(path) {
        Ok(_) => Check::ok(name, path),
        Err(error) => Check::missing(name, format!("{path}: {error}"), advice),
    }
}

fn conntrack() -> Check {
    const NAME: &str = "conntrack";
    let value = |name: &str| read(&format!("/proc/sys/net/netfilter/{name}")).trim().to_owned();
    let (most, now) = (value("nf_conntrack_max"), value("nf_conntrack_count"));
    match (most.parse::<u64>(), value("nf_conntrack_acct").as_str()) {
        (Err(_), _) => Check::note(
            NAME,
            "connection tracking is not loaded yet",
            "the node manager loads it with its packet filter; if it cannot: modprobe nf_conntrack",
        ),
        (Ok(_), "1") => Check::ok(NAME, format!("{now} of {most} flows, counted")),
        (Ok(_), _) => Check::note(
            NAME,
            format!("{now} of {most} flows, bytes are not counted"),
            "the node manager switches that on at its start: net.netfilter.nf_conntrack_acct=1",
        ),
    }
}

/// A module that is loaded, built in, or there to be loaded.
fn module(name: &'static str, why: &str) -> Check {
    let loaded = Path::new("/sys/module").join(name).exists();
    let release = read("/proc/sys/kernel/osrelease");
    let known = ["modules.dep", "modules.builtin"].iter().any(|list| {
        let text = read(&format!("/lib/modules/{}/{list}", release.trim()));
        text.lines().any(|line| line.contains(&format!("/{name}.ko")))
    });
    match (loaded, known) {
        (true, _) => Check::ok(name, "loaded"),
        (_, true) => Check::ok(name, "there to be loaded"),
        _ => Check::note(
            name,
            "neither loaded nor found",
            format!("{why}; a kernel with it is needed (Debian's has it) unless it is built in"),
        ),
    }
}

fn images() -> Check {
    const NAME: &str = "sliver images";
    let directory = Path::new("/usr/share/mandoline/images");
    let lacking: Vec<_> = ["vmlinux-up", "root.erofs"]
        .into_iter()
        .filter(|name| !directory.join(name).is_file())
        .collect();
    match lacking.is_empty() {
        true => Check::ok(NAME, directory.display().to_string()),
        false => Check::missing(
            NAME,
            format!("{} not in {}", lacking.join(", "), directory.display()),
            "make images, then guest-image/node/images, or set kernel and root in [kvm] of nodemgr.toml",
        ),
    }
}

fn disk(path: &Path) -> Check {
    const NAME: &str = "slivers' disks";
    let fs = match rustix::fs::statvfs(path) {
        Ok(fs) => fs,
        Err(error) => {
            let advice = "the node manager makes it at its start; give it a file system of its own";
            return Check::note(NAME, format!("{}: {error}", path.display()), advice);
        }
    };
    let free = fs.f_bavail.saturating_mul(fs.f_frsize);
    let found = format!("{} GiB free at {}", free >> 30, path.display());
    match free >= SPACE {
        true => Check::ok(NAME, found),
        false => Check::note(
            NAME,
            found,
            "slivers wait when it is full: make room, or lower disk_quota in [capacity]",
        ),
    }
}

/// Audit and time bounds need a clock that is right. What keeps it so is looked for among the processes.
fn clock() -> Check {
    const NAME: &str = "clock";
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut names = processes.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    let keeper = names.find(|name| CLOCKS.contains(&name.trim()));
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let image = fs::metadata("/usr/share/mandoline/images/vmlinux-up").and_then(|meta| meta.modified());
    let image = image
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| since.as_secs());
    match keeper {
        _ if now < image => Check::missing(
            NAME,
            "it is earlier than the sliver images were made",
            "set it: chronyc makestep, or date -s",
        ),
        Some(name) => Check::ok(NAME, format!("kept by {}", name.trim())),
        None => Check::note(
            NAME,
            "nothing seems to keep it",
            "audit needs the right time: apt-get install chrony, unless the hypervisor keeps it",
        ),
    }
}

fn manager() -> Check {
    const NAME: &str = "node manager";
    match std::os::unix::net::UnixStream::connect(mandoline_api::nodemgr::SERVICE_SOCKET) {
        Ok(_) => Check::ok(NAME, "listens"),
        Err(error) => Check::note(
            NAME,
            format!("{}: {error}", mandoline_api::nodemgr::SERVICE_SOCKET),
            "start it: systemctl start mandoline-nodemgr, or sv start mandoline-nodemgr; `mandoline-nodemgr --check` reads its configuration",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn controllers_are_whole_words_and_missing_ones_are_named() {
        assert_eq!(controllers("cpuset cpu io memory pids\n").state, State::Ok);
        let check = controllers("cpuset io pids\n");
        assert_eq!(check.state, State::Missing);
        assert!(check.found.contains("cpu, memory"), "{}", check.found);
        assert!(
            controllers("")
                .advice
                .is_some_and(|advice| advice.contains("cgroup2"))
        );
    }

    #[test]
    fn every_check_that_is_not_well_says_what_to_do() {
        for check in checks() {
            assert!(
                check.state == State::Ok || check.advice.is_some(),
                "{}",
                check.name
            );
        }
    }
}
