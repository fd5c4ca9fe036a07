//! The options of `run`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mandoline_api::agent::Cidr;
use mandoline_api::monitor::{Hardware, IoEngine};

use crate::cli::{OnReboot, Switch};
use crate::run::limits::LimitArgs;

/// How the guest reaches its root image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RootAs {
    /// virtio-blk.
    Disk,
    /// virtio-pmem.
    Pmem,
}

/// How disk requests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// One by one.
    Sync,
    /// Many at once, by io_uring.
    Async,
}

impl From<Engine> for IoEngine {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Sync => Self::Sync,
            Engine::Async => Self::Async,
        }
    }
}

/// How the guest is told of its hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HardwareArg {
    /// MP table and command line: the fastest start.
    MpTable,
    /// ACPI tables.
    Acpi,
}

impl From<HardwareArg> for Hardware {
    fn from(hardware: HardwareArg) -> Self {
        match hardware {
            HardwareArg::MpTable => Self::MpTable,
            HardwareArg::Acpi => Self::Acpi,
        }
    }
}

/// Boots a sliver by hand, with its console on this terminal.
///
/// With nothing but a kernel and a root image it needs only access to /dev/kvm. Limits, a tap and the jail
/// need root. Ctrl-C asks the guest to shut down; a second Ctrl-C ends it.
///
/// Example, on a node:
///
///   mandoline-vmm run --kernel /usr/share/mandoline/images/vmlinux-up
///     --root /usr/share/mandoline/images/root.erofs --disk my.ext4 --mem 256MiB
///     --tap mtap0 --address 10.128.9.2/24 --key ~/.ssh/id_ed25519.pub
///     --cpu-share 10 --mem-limit 320MiB --rate 10Mbit/s --disk-bandwidth 50MiB/s --balloon 0
///
/// and then, from another terminal:
///
///   ssh root@10.128.9.2
///   mandoline-vmm set sliver --cpu-share 20 --rate 5Mbit/s --peak 20Mbit/s --balloon 64MiB
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct RunArgs {
    /// Kernel: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Root image, shared and read-only (vda).
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
    /// The sliver's own disk, writable (vdb); made by guest-image/root/make-disk.
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// Guest memory: 256MiB, 1GiB, or a number of bytes.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub mem: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u8,
    /// Replaces the kernel's command line.
    #[arg(long, value_name = "TEXT")]
    pub command_line: Option<String>,
    /// Words to append to the kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub append: String,

    /// Name of the VM, for `mandoline-vmm set NAME`, and of its cgroup (mandoline-run/NAME).
    #[arg(long, default_value = "sliver")]
    pub name: String,
    /// Host name of the guest.
    #[arg(long, default_value = "sliver")]
    pub hostname: String,
    /// Name of the slice that the guest is told.
    #[arg(long, default_value = "local_run")]
    pub slice: String,
    /// A file of public ssh keys that may log in as root; several times for several.
    #[arg(long = "key", value_name = "FILE")]
    pub keys: Vec<PathBuf>,
    /// Only boot: leave the guest without identity, network and disk.
    #[arg(long)]
    pub no_join: bool,

    /// Tap to make for the guest (needs root); it goes when the guest ends.
    #[arg(long, value_name = "NAME", requires = "address")]
    pub tap: Option<String>,
    /// The guest's address, as 10.128.9.2/24.
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub address: Option<Cidr>,
    /// The host's address on the tap, the guest's gateway [default: the first of the guest's network].
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// A name server for the guest; several times for several.
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<IpAddr>,

    /// How the guest reaches its root image: a disk, or persistent memory that it maps (DAX): no copy of its own.
    #[arg(long, value_enum, default_value = "disk")]
    pub root_as: RootAs,
    /// How disk requests are executed [default: what the benchmarks favour].
    #[arg(long, value_enum)]
    pub io_engine: Option<Engine>,
    /// Let the host's kernel move the frames (/dev/vhost-net); not together with --rx-... and --tx-...
    #[arg(
        long,
        requires = "tap",
        conflicts_with_all = ["rx_bandwidth", "rx_ops", "tx_bandwidth", "tx_ops"]
    )]
    pub vhost: bool,
    /// How the guest is told of its hardware.
    #[arg(long, value_enum, default_value = "mp-table")]
    pub hardware: HardwareArg,
    /// What happens when the guest reboots.
    #[arg(long, value_enum, default_value = "restart")]
    pub on_reboot: OnReboot,
    /// File that takes the memory of the parked guest: made for nobody else to read. Without it, it is never parked.
    #[arg(long, value_name = "FILE")]
    pub park: Option<PathBuf>,
    /// Park by itself after it was idle for so many ms [default: only when asked on the control socket].
    #[arg(long, value_name = "MS", requires = "park")]
    pub park_idle: Option<u64>,

    /// Limits.
    #[command(flatten)]
    pub limits: LimitArgs,

    /// Unix socket through which the guest is reached (`CONNECT <port>`); kept private without it.
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Control socket [default: a private one, for `mandoline-vmm set`].
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Where the console's output goes instead of this terminal.
    #[arg(long, value_name = "FILE")]
    pub serial: Option<PathBuf>,
    /// Where the monitor's log goes instead of standard error.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Where states and phases go, a JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub state_file: Option<PathBuf>,
    /// User that the monitor becomes, when run as root [default: one of its own, from its process id].
    #[arg(long, value_name = "UID")]
    pub jail_uid: Option<u32>,
    /// System call filters, and Landlock beside them. `off` is for debugging only.
    #[arg(long, value_enum, default_value = "on")]
    pub seccomp: Switch,
}

/// A size: a number of bytes, or one with KiB, MiB, GiB (or K, M, G, the same).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
    let factor: u64 = match trimmed[digits.len()..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return Err("allowed: a number of bytes, or one with KiB, MiB or GiB".to_owned()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "allowed: a number of bytes, or one with KiB, MiB or GiB".to_owned())
}

impl RunArgs {
    /// The guest's MAC address: locally administered, with its IPv4 address in it.
    pub fn mac(&self) -> Option<String> {
        let Cidr {
            address: IpAddr::V4(address),
            ..
        } = self.address?
        else {
            return None;
        };
        let [a, b, c, d] = address.octets();
        Some(format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}"))
    }

    /// The guest's name for its own disk: the second, where the root image is the first.
    pub fn disk_device(&self) -> Option<&'static str> {
        let after_root = self.root.is_some() && self.root_as == RootAs::Disk;
        self.disk
            .as_ref()
            .map(|_| if after_root { "/dev/vdb" } else { "/dev/vda" })
    }

    /// The host's address on the tap: the gateway, or the first address of the guest's network.
    pub fn host_address(&self) -> Option<(Ipv4Addr, u8)> {
        let Cidr {
            address: IpAddr::V4(address),
            prefix,
        } = self.address?
        else {
            return None;
        };
        let first = || {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            Ipv4Addr::from_bits((address.to_bits() & mask) | 1)
        };
        let host = self.gateway.unwrap_or_else(first);
        Some((host, prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        assert_eq!(parse_size("1 G"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for text in ["", "MiB", "-1", "1.5GiB", "1TB", "99999999999GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
