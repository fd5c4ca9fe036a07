//! A sliver's network: loopback in *up*; its interface, addresses, routes and name servers in *join*.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use mandoline_api::agent::Interface;

use crate::error::{Context as _, Error};
use crate::files;
use crate::log::warning;
use crate::netlink::Route;

/// Index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// Hardware type of Ethernet in `/sys/class/net/*/type` (`ARPHRD_ETHER`).
const ETHERNET: &str = "1";

/// Sets loopback up.
pub(crate) fn loopback() {
    if let Err(e) = Route::open().and_then(|mut route| route.link_up(LOOPBACK, None)) {
        warning!("setting loopback up: {e}");
    }
}

/// What can be said about an interface before it is touched.
pub(crate) fn check(interface: &Interface) -> Result<(), Error> {
    let bad = |text: String| Err(Error::BadRequest(text));
    if interface.addresses.len() > 16 {
        return bad(format!(
            "interface.addresses has {} entries; at most 16 are allowed",
            interface.addresses.len()
        ));
    }
    if let Some(mtu) = interface.mtu.filter(|mtu| !(576..=65535).contains(mtu)) {
        return bad(format!("interface.mtu is {mtu}; 576 to 65535 is allowed"));
    }
    if let Some(mac) = interface.mac.as_deref().filter(|mac| !is_mac(mac)) {
        return bad(format!(
            "interface.mac is `{mac}`; six octets such as 02:00:0a:80:00:05 are wanted"
        ));
    }
    for gateway in gateways(interface) {
        if !interface
            .addresses
            .iter()
            .any(|cidr| cidr.address.is_ipv4() == gateway.is_ipv4())
        {
            return bad(format!(
                "gateway {gateway} has no address of its family in interface.addresses"
            ));
        }
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    let octets: Vec<&str> = text.split(':').collect();
    octets.len() == 6
        && octets
            .iter()
            .all(|octet| octet.len() == 2 && octet.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn gateways(interface: &Interface) -> impl Iterator<Item = IpAddr> {
    interface
        .gateway
        .into_iter()
        .chain(interface.gateway6.map(IpAddr::V6))
}

/// Brings the interface up with its addresses and routes. Can be repeated.
pub(crate) fn configure(interface: &Interface) -> Result<(), Error> {
    let (name, index) = find(Path::new("/sys/class/net"), interface.mac.as_deref())?;
    // The node routes the sliver's addresses and nobody shares its link: router advertisements and the search
    // for duplicate addresses would only make noise and wait.
    for setting in ["accept_ra", "accept_dad"] {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/{setting}");
        if Path::new(&path).exists()
            && let Err(e) = fs::write(&path, "0")
        {
            warning!("{path}: {e}");
        }
    }
    let mut route = Route::open().context(|| "opening a netlink socket".to_owned())?;
    route
        .link_up(index, interface.mtu)
        .context(|| format!("setting {name} up"))?;
    for cidr in &interface.addresses {
        route
            .add_address(index, *cidr)
            .context(|| format!("adding {cidr} to {name}"))?;
    }
    for gateway in gateways(interface) {
        route
            .add_route(index, gateway, Some(gateway), None)
            .context(|| format!("routing {gateway} to {name}"))?;
        route
            .add_route(index, gateway, None, Some(gateway))
            .context(|| format!("routing everything by {gateway}"))?;
    }
    Ok(())
}

/// The interface with hardware address `mac`, or else the only Ethernet: its name and index.
fn find(class: &Path, mac: Option<&str>) -> Result<(String, u32), Error> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    for entry in fs::read_dir(class)
        .context(|| format!("listing {}", class.display()))?
        .flatten()
    {
        let read = |file: &str| {
            fs::read_to_string(entry.path().join(file))
                .map(|text| text.trim().to_owned())
                .unwrap_or_default()
        };
        if read("type") != ETHERNET {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let address = read("address");
        if mac.is_none_or(|mac| mac.eq_ignore_ascii_case(&address))
            && let Ok(index) = read("ifindex").parse::<u32>()
        {
            found.push((name.clone(), index));
        }
        seen.push(format!("{name} ({address})"));
    }
    let seen = if seen.is_empty() {
        "none".to_owned()
    } else {
        seen.join(", ")
    };
    match (found.pop(), found.is_empty(), mac) {
        (Some(one), true, _) => Ok(one),
        (Some(_), false, _) => Err(Error::BadRequest(format!(
            "interface.mac must say which interface is meant; there are {seen}"
        ))),
        (None, _, Some(mac)) => Err(Error::NotFound(format!(
            "no interface has the address {mac}; there are {seen}"
        ))),
        (None, _, None) => Err(Error::NotFound("this guest has no Ethernet interface".to_owned())),
    }
}

/// Writes `/etc/resolv.conf`, unless there is nothing to put into it.
pub(crate) fn name_servers(servers: &[IpAddr]) -> Result<(), Error> {
    if servers.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    let path = "/etc/resolv.conf";
    files::replace(Path::new(path), text.as_bytes(), 0o644).context(|| format!("writing {path}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(interfaces: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (index, (name, kind, address)) in interfaces.iter().enumerate() {
            let path = dir.path().join(name);
            fs::create_dir(&path).expect("made");
            fs::write(path.join("type"), format!("{kind}\n")).expect("written");
            fs::write(path.join("address"), format!("{address}\n")).expect("written");
            fs::write(path.join("ifindex"), format!("{}\n", index + 1)).expect("written");
        }
        dir
    }

    #[test]
    fn the_interface_is_found_by_address_or_by_being_alone() {
        let one = class(&[
            ("lo", "772", "00:00:00:00:00:00"),
            ("eth0", "1", "02:00:0a:80:00:05"),
        ]);
        assert_eq!(find(one.path(), None).expect("found"), ("eth0".to_owned(), 2));
        assert_eq!(
            find(one.path(), Some("02:00:0A:80:00:05")).expect("found").0,
            "eth0"
        );
        let missing = find(one.path(), Some("02:00:00:00:00:00"))
            .expect_err("not there")
            .to_string();
        assert!(missing.contains("eth0 (02:00:0a:80:00:05)"), "{missing}");
        let two = class(&[
            ("eth0", "1", "02:00:00:00:00:01"),
            ("eth1", "1", "02:00:00:00:00:02"),
        ]);
        assert!(matches!(find(two.path(), None), Err(Error::BadRequest(_))));
        assert_eq!(
            find(two.path(), Some("02:00:00:00:00:02")).expect("found").0,
            "eth1"
        );
        assert!(matches!(find(class(&[]).path(), None), Err(Error::NotFound(_))));
    }

    #[test]
    fn bounds_are_checked_and_named() {
        let good = Interface {
            mac: None,
            addresses: vec!["10.128.0.5/32".parse().expect("valid")],
            gateway: Some("10.128.0.1".parse().expect("valid")),
            gateway6: None,
            mtu: Some(1500),
        };
        assert!(check(&good).is_ok());
        let bad = [
            Interface {
                mtu: Some(10),
                ..good.clone()
            },
            Interface {
                mac: Some("02:00".into()),
                ..good.clone()
            },
            Interface {
                addresses: vec![],
                ..good.clone()
            },
            Interface {
                gateway6: Some("fe80::1".parse().expect("valid")),
                ..good.clone()
            },
        ];
        for interface in bad {
            assert!(check(&interface).is_err(), "{interface:?}");
        }
    }
}
