//! The options of `run`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::Args;
use mandoline_api::agent::Cidr;
use mandoline_limits::Rate;

use crate::cli::Switch;

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
///     --cpu-share 10 --mem-limit 320MiB --rate 10Mbit/s
///
/// and then, from another terminal: ssh root@10.128.9.2
#[derive(Debug, Clone, Args)]
#[command(verbatim_doc_comment)]
pub struct RunArgs {
    /// Kernel: an uncompressed ELF vmlinux with a PVH entry.
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

    /// Name of the VM and of its cgroup (mandoline-run/NAME).
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
    /// Let the host's kernel move the tap's frames (/dev/vhost-net): more frames a second for less CPU.
    #[arg(long, requires = "tap")]
    pub vhost: bool,
    /// The guest's address, as 10.128.9.2/24.
    #[arg(long, value_name = "ADDRESS/BITS")]
    pub address: Option<Cidr>,
    /// The host's address on the tap, the guest's gateway [default: the first of the guest's network].
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// A name server for the guest; several times for several.
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<IpAddr>,

    /// Share of the CPU, a weight from 1 to 1000: 10 of 50 active is 20 % (needs root, cgroup v2).
    #[arg(long, value_name = "1-1000")]
    pub cpu_share: Option<u32>,
    /// Cap on CPU time in thousandths of one CPU, however idle the host: 10 is 1 %.
    #[arg(long, value_name = "N")]
    pub cpu_cap: Option<u32>,
    /// Most memory for guest and monitor together (memory.max).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub mem_limit: Option<u64>,
    /// Bandwidth that the guest may send, as 10Mbit/s; it is both guarantee and, without --peak, ceiling.
    #[arg(long, value_name = "RATE", requires = "tap")]
    pub rate: Option<Rate>,
    /// Ceiling of its bandwidth while others leave some.
    #[arg(long, value_name = "RATE", requires = "rate")]
    pub peak: Option<Rate>,

    /// Unix socket through which the guest is reached (`CONNECT <port>`); kept private without it.
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Control socket.
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
