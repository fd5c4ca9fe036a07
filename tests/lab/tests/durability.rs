//! What must survive: a power cut, and the death of any process at any point.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mandoline_lab::{Lab, NodeSpec};
use serde_json::{Value, json};
use support::{Manager, Tested, start};

#[test]
#[ignore = "lab"]
fn slivers_run_again_after_a_power_cut() -> Tested {
    let mut lab = Lab::new()?;
    let mut node = start(&mut lab, NodeSpec::named("powercut"))?;
    // The boot script counts the starts on the sliver's disk, and tells its console.
    let count = "#!/bin/sh\nn=$(cat /var/starts 2>/dev/null || echo 0); n=$((n + 1)); echo $n > /var/starts; sync\n\
        echo \"start $n\" > /dev/ttyS0\n";
    let small =
        json!({"vm_type": "kvm-microvm", "mem_limit": "96 MiB", "disk_quota": "1 GB", "initscript": count});
    let nm = Manager(&node);
    let runs = nm.sliver("plc.x_runs", &small)?;
    let rests = nm.sliver("plc.x_rests", &small)?;
    let console = format!("/var/log/mandoline/slivers/{}/console", runs.vm_id);
    nm.wait_file(&console, |text| text.contains("start 1"))?;
    nm.wait_state(rests.vm_id, "reachable")?;
    nm.call("stop", &json!({"rcap": rests.rcap}))?;
    nm.wait_state(rests.vm_id, "stopped")?;
    node.shell("sync")?;
    node.cut_power()?;

    // Nobody asks for anything: what should run is started, what should rest is not, under the same ids.
    let nm = Manager(&node);
    nm.wait_until_it_answers()?;
    nm.wait_file(&console, |text| text.contains("start 2"))?;
    nm.wait_state(runs.vm_id, "reachable")?;
    nm.wait_state(rests.vm_id, "stopped")?;
    let listed = nm.call("list", &json!({}))?;
    assert_eq!(
        rcap_of(&listed, runs.vm_id),
        Some(runs.rcap),
        "the rcap is what it was"
    );
    node.power_off()?;
    Ok(())
}

fn rcap_of(list: &Value, vm_id: u64) -> Option<String> {
    let slivers = list["slivers"].as_array()?;
    let sliver = slivers.iter().find(|sliver| sliver["vm_id"] == vm_id)?;
    sliver["rcap"].as_str().map(str::to_owned)
}

/// Numbers that a seed repeats (Marsaglia's xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// `MANDOLINE_ROUNDS` makes it longer (`make soak`), `MANDOLINE_SEED` repeats a run.
#[test]
#[ignore = "lab"]
fn death_at_any_point_leaks_nothing() -> Tested {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("MANDOLINE_ROUNDS").unwrap_or(15);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = number("MANDOLINE_SEED").unwrap_or(clock.as_secs()).max(1);
    eprintln!("MANDOLINE_SEED={seed} MANDOLINE_ROUNDS={rounds}");
    let mut dice = Dice(seed);
    let mut lab = Lab::new()?;
    let node = start(&mut lab, NodeSpec::named("deaths"))?;
    let nm = Manager(&node);
    let at_first = available(&nm)?;
    let before = kernel(&nm)?;

    for round in 0..rounds {
        let list = nm.call("list", &json!({}))?;
        let (operation, body) = choose(&mut dice, &list, round);
        // The request and the deaths race; whichever comes first is right.
        let victims = match dice.roll(4) {
            0 => "mandoline-nodemgr",
            1 => "mandoline-vmm",
            2 => "mandoline-nodemgr mandoline-vmm",
            _ => "",
        };
        let delay = dice.roll(400);
        node.shell(&format!(
            "curl -s -m 20 -o /dev/null --unix-socket /run/mandoline/owner.sock -d '{body}' http://nm/v1/{operation} & request=$!
             sleep {}.{:03}
             for name in {victims}; do kill -9 $(pidof $name | cut -d' ' -f1) 2>/dev/null; done
             wait $request; true",
            delay / 1000,
            delay % 1000
        ))?;
        nm.wait_until_it_answers()?;
    }

    // It comes to rest: each recorded sliver runs, and nothing else does.
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let list = nm.call("list", &json!({}))?;
        let slivers = list["slivers"].as_array().cloned().unwrap_or_default();
        let settled = slivers
            .iter()
            .all(|sliver| matches!(sliver["state"].as_str(), Some("reachable" | "stopped")));
        let recorded: BTreeSet<u64> = slivers.iter().filter_map(|s| s["vm_id"].as_u64()).collect();
        if settled && disks(&nm)? == recorded {
            break;
        }
        if Instant::now() > deadline {
            let log = node.shell("tail -n 60 /var/log/mandoline/mandoline-nodemgr/current")?;
            return Err(format!("not at rest: {list}\n{log}").into());
        }
        std::thread::sleep(Duration::from_millis(500));
    }

    // Everything is given back: the pools add up, and the kernel holds nothing of it.
    let list = nm.call("list", &json!({}))?;
    for sliver in list["slivers"].as_array().into_iter().flatten() {
        nm.call("destroy", &json!({"rcap": sliver["rcap"]}))?;
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let list = nm.call("list", &json!({}))?;
        for pool in list["pools"].as_array().into_iter().flatten() {
            nm.call("release", &json!({"rcap": pool["rcap"]}))?;
        }
        let left = |what: &str| list[what].as_array().map_or(0, Vec::len);
        if left("slivers") + left("pools") == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "not given back: {list}");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(available(&nm)?, at_first);
    assert_eq!(kernel(&nm)?, before);
    node.power_off()?;
    Ok(())
}

/// An operation on what there is.
fn choose(dice: &mut Dice, list: &Value, round: u64) -> (&'static str, Value) {
    let (none, none_too) = (Vec::new(), Vec::new());
    let slivers = list["slivers"].as_array().unwrap_or(&none);
    let pools = list["pools"].as_array().unwrap_or(&none_too);
    let one = |dice: &mut Dice, of: &[Value]| of.get(dice.roll(of.len().max(1) as u64) as usize).cloned();
    let slice = format!("plc.x_s{}", dice.roll(6));
    match dice.roll(10) {
        // Few at a time: an emulated node boots them slowly.
        0..=3 if slivers.len() < 5 => {
            let rspec = json!({"vm_type": "kvm-microvm", "mem_limit": "64 MiB", "disk_quota": "1 GB", "cpu_guarantee": round % 7});
            ("create_root_pool", json!({"slice_name": slice, "rspec": rspec}))
        }
        4..=6 if !pools.is_empty() => match one(dice, pools) {
            Some(pool) => (
                "bind",
                json!({"rcap": pool["rcap"], "slice_name": pool["holder"]}),
            ),
            None => ("list", json!({})),
        },
        7 => {
            let rspec = json!({"cpu_guarantee": 5, "disk_quota": "100 MB"});
            ("create_root_pool", json!({"slice_name": slice, "rspec": rspec}))
        }
        _ => match one(dice, slivers) {
            Some(sliver) => {
                let operation = ["destroy", "restart", "stop", "start"][dice.roll(4) as usize];
                (operation, json!({"rcap": sliver["rcap"]}))
            }
            None => ("list", json!({})),
        },
    }
}

/// What is left of the node beside the root pools.
fn available(nm: &Manager<'_>) -> Tested<Value> {
    let text =
        nm.0.shell("curl -s -m 20 --unix-socket /run/mandoline/owner.sock http://nm/v1/node")?;
    let node: Value = serde_json::from_str(&text)?;
    let mut available = node["available"].clone();
    // Free space of the disk is what it is.
    if let Some(available) = available.as_object_mut() {
        available.retain(|name, _| !name.starts_with("disk_"));
    }
    Ok(available)
}

/// Ids of all disks.
fn disks(nm: &Manager<'_>) -> Tested<BTreeSet<u64>> {
    let names = nm.0.shell("ls /var/lib/mandoline/disks 2>/dev/null || true")?;
    let ids = names.lines().map(|name| name.trim_end_matches(".img").parse());
    Ok(ids.collect::<Result<_, _>>()?)
}

/// All that the node has of slivers, by kind: processes, cgroups, taps, classes, rules, files.
fn kernel(nm: &Manager<'_>) -> Tested<String> {
    let text = nm.0.shell(
        "echo processes $(pidof mandoline-vmm)
         echo cgroups $(cd /sys/fs/cgroup/mandoline/slivers 2>/dev/null && ls -d [0-9]* best-effort/[0-9]* 2>/dev/null)
         echo taps $(ls /sys/class/net | grep ^mtap)
         echo classes $(tc class show dev mifb | sed 's/^class htb \\([^ ]*\\) .*/\\1/' | sort)
         echo routes $(ip route show | grep -c mtap)
         echo elements $(nft list ruleset | grep -c mtap)
         echo files $(cd /var/lib/mandoline/disks 2>/dev/null && ls) $(cd /run/mandoline/slivers 2>/dev/null && ls)
         echo logs $(cd /var/log/mandoline/slivers 2>/dev/null && ls)",
    )?;
    Ok(text)
}
