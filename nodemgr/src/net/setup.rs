//! What the network needs of the node before there is a sliver.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use mandoline_limits::netlink::Connection;
use mandoline_limits::sysctl;

use super::plan::Plan;
use super::{NetError, NetworkConfig};

type Result<T> = std::result::Result<T, NetError>;

/// The node's settings for flows and ports. They exist once the ruleset has brought connection
/// tracking in, and must be made before the first flow, which otherwise would never be counted.
pub(super) fn tracking(plan: &Plan) -> Result<()> {
    sysctl::set("netfilter/nf_conntrack_acct", "1")?;
    sysctl::set_if_there("netfilter/nf_conntrack_timestamp", "1")?;
    // The node's own connections stay out of the slivers' blocks and owned ports.
    let (first, last) = plan.ephemeral().into_inner();
    Ok(sysctl::set(
        "ipv4/ip_local_port_range",
        &format!("{first} {last}"),
    )?)
}

/// Lets packets through the node. Last of all: nothing is forwarded before the rules are there.
pub(super) fn forwarding(plan: &Plan, uplinks: &[String]) -> Result<()> {
    sysctl::set("ipv4/ip_forward", "1")?;
    if plan.net6().is_none() {
        return Ok(());
    }
    for uplink in uplinks {
        // A node that forwards stops listening to routers, and would lose its own default route.
        let name = format!("ipv6/conf/{uplink}/accept_ra");
        let heard = std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap_or_default();
        if heard.trim() == "1" {
            sysctl::set(&name, "2")?;
        }
    }
    Ok(sysctl::set("ipv6/conf/all/forwarding", "1")?)
}

/// This boot of the node.
pub(super) fn boot() -> Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(PATH).map_err(|source| mandoline_limits::Error::File {
        action: "read",
        path: PATH.into(),
        source,
    })?;
    Ok(id.trim().to_owned())
}

/// The links to the outside and the address that slivers' flows get there.
pub(super) fn outside(route: &mut Connection, config: &NetworkConfig) -> Result<(Vec<String>, Ipv4Addr)> {
    let mut links = Vec::new();
    if config.uplinks.is_empty() {
        let index = route.default_route()?;
        links.extend(route.links()?.into_iter().filter(|l| Some(l.index) == index));
    }
    for name in &config.uplinks {
        links.push(route.require_link(name)?);
    }
    let Some(first) = links.first() else {
        return Err(NetError::NoUplink {
            what: "there is no default route to find the uplink by".to_owned(),
            setting: "uplinks",
        });
    };
    let address = match config.node_address {
        Some(address) => Some(address),
        None => route.addresses(first.index)?.first().map(|(address, _)| *address),
    };
    let what = || format!("uplink {} has no IPv4 address", first.name);
    let address = address.ok_or_else(|| NetError::NoUplink {
        what: what(),
        setting: "node_address",
    })?;
    Ok((links.into_iter().map(|l| l.name).collect(), address))
}

/// Loads the ruleset: once, at start. From then on all changes go by netlink.
pub(super) fn load(config: &NetworkConfig, text: &str) -> Result<()> {
    let failed = |detail: String| NetError::Ruleset {
        program: config.nft.clone(),
        detail,
    };
    let mut child = Command::new(&config.nft)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(text.as_bytes())
            .map_err(|e| failed(e.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
