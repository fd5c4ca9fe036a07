//! What the owner of a node decides, on a node as it boots: the script as the papers write it, the owner's own
//! sliver, the node's rate while it runs, a slice that is denied.

mod support;

use mandoline_lab::{Lab, NodeSpec};
use serde_json::json;
use support::{Manager, Tested, start};

/// Architecture paper, section 5.2.3.
const SCRIPT: &str = "\
rcap10 = create_root_pool(rspec10, my_favorite_cdn)
rcap85 = create_root_pool(rspec85, pl.conf)
rcap5 = create_root_pool(rspec5, pl.conf)
bind(rcap5, pl.conf)
";
const CONTACT: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUJZ7iZVz3nMkQWNrqcgzy1UVTDhIuHvV1SP4o8pUyp tech@site";

#[test]
#[ignore = "lab"]
fn the_node_is_its_owners() -> Tested {
    let mut lab = Lab::new()?;
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("owner.json"), SCRIPT)?;
    std::fs::write(dir.path().join("site_admin.keys"), CONTACT)?;
    let mut spec = NodeSpec::named("owner");
    spec.config_dir = Some(dir.path().to_owned());
    let node = start(&mut lab, spec)?;
    let nm = Manager(&node);

    let list = nm.call("list", &json!({}))?;
    let capacity = nm.shell_json("curl -s --unix-socket /run/mandoline/owner.sock http://nm/v1/node")?;
    let shares = capacity["capacity"]["cpu_guarantee"].as_u64().unwrap_or_default();
    let mut pools: Vec<(String, u64)> = Vec::new();
    for pool in list["pools"].as_array().into_iter().flatten() {
        let holder = pool["holder"].as_str().unwrap_or_default().to_owned();
        pools.push((
            holder,
            pool["granted"]["cpu_guarantee"].as_u64().unwrap_or_default(),
        ));
    }
    let part = |percent: u64| shares * percent / 100;
    for (holder, percent) in [("plc.my_favorite_cdn", 10), ("pl_conf", 85), ("pl_conf", 5)] {
        assert!(
            pools.contains(&(holder.to_owned(), part(percent))),
            "{holder} {percent} %: {pools:?}"
        );
    }

    // The owner's own sliver, with the contacts' keys.
    let admin = list["slivers"][0].clone();
    assert_eq!(admin["slice"], "site_admin", "{list}");
    let vm_id = admin["vm_id"].as_u64().unwrap_or_default();
    nm.wait_state(vm_id, "reachable")?;
    let keys =
        node.shell("curl -s --unix-socket /run/mandoline/owner.sock http://nm/v1/ssh_keys/site_admin")?;
    assert!(
        keys.contains("AAAAC3NzaC1lZDI1NTE5AAAAIHUJZ7iZVz3nMkQWNrqcgzy1UVTDhIuHvV1SP4o8pUyp"),
        "{keys}"
    );

    // The node's rate, as the kernel has it; the pools in per cent follow.
    let rate = |rate: &str| {
        node.shell(&format!(
            "for i in $(seq 50); do for link in $(ls /sys/class/net); do
             tc class show dev $link 2>/dev/null | grep -q ' ceil {rate} ' && exit 0; done; sleep 0.1; done
             for link in $(ls /sys/class/net); do tc class show dev $link; done; exit 1"
        ))
    };
    rate("100Mbit")?;
    nm.call("set_node_limit", &json!({"rspec": {"burst_rate": "20 Mbit/s"}}))?;
    rate("20Mbit")?;
    let list = nm.call("list", &json!({}))?;
    let rates: Vec<u64> = list["pools"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pool| pool["granted"]["base_rate"].as_u64())
        .collect();
    assert_eq!(rates.iter().sum::<u64>(), 20_000_000, "{list}");

    // Denied, it stops with the reason; the next node manager knows it, and allowed it runs again.
    nm.call(
        "deny",
        &json!({"slice_name": "site_admin", "reason": "moving the rack"}),
    )?;
    let stopped = nm.wait_state(vm_id, "stopped")?;
    assert!(
        stopped["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("moving the rack")),
        "{stopped}"
    );
    node.shell("kill -9 $(pidof mandoline-nodemgr); for i in $(seq 100); do pidof mandoline-nodemgr && exit 0; sleep 0.1; done; exit 1")?;
    nm.wait_until_it_answers()?;
    let error = nm
        .call("start", &json!({"rcap": admin["rcap"]}))
        .err()
        .map(|error| error.to_string());
    assert!(error.is_some_and(|error| error.contains("moving the rack")));
    rate("20Mbit")?;
    nm.call("allow", &json!({"slice_name": "site_admin"}))?;
    nm.wait_state(vm_id, "reachable")?;
    node.power_off()?;
    Ok(())
}
