//! Slivers under the node manager: the limits that the kernel holds, and what changes while a sliver runs.

mod support;

use mandoline_lab::{Lab, NodeSpec};
use serde_json::json;
use support::{Manager, Tested, start};

const SLIVERS: &str = "/sys/fs/cgroup/mandoline/slivers";

#[test]
#[ignore = "lab"]
fn limits_are_the_kernels_and_change_while_slivers_run() -> Tested {
    let mut lab = Lab::new()?;
    let node = start(&mut lab, NodeSpec::named("limits"))?;
    let nm = Manager(&node);
    let small = |more: serde_json::Value| {
        let mut rspec = json!({"vm_type": "kvm-microvm", "mem_limit": "96 MiB", "disk_quota": "1 GB"});
        for (name, value) in more.as_object().into_iter().flatten() {
            rspec[name] = value.clone();
        }
        rspec
    };
    let guaranteed = nm.sliver("plc.x_guaranteed", &small(json!({"cpu_guarantee": 300})))?;
    let plain = nm.sliver("plc.x_plain", &small(json!({"cpu_share": 20})))?;
    // It wants all of a processor, and is allowed 5 % of the node.
    let spin = "#!/bin/sh\nwhile :; do :; done\n";
    let capped = json!({"cpu_guarantee": 50, "cpu_capped": true, "initscript": spin});
    let capped = nm.sliver("plc.x_capped", &small(capped))?;
    for made in [&guaranteed, &plain, &capped] {
        nm.wait_state(made.vm_id, "reachable")?;
    }
    let (a, b, c) = (guaranteed.vm_id, plain.vm_id, capped.vm_id);

    // 1000 = 100 for the host + 350 guaranteed + 550 left, of which each has its part by share: 1, 20 and 1 of 22.
    let weight = |place: &str| nm.read(&format!("{SLIVERS}/{place}/cpu.weight"));
    assert_eq!(weight(&a.to_string())?, (3000 + 5500 / 22).to_string());
    assert_eq!(weight(&c.to_string())?, (500 + 5500 / 22).to_string());
    assert_eq!(weight("best-effort")?, (5500 - 2 * (5500 / 22)).to_string());
    assert_eq!(weight(&format!("best-effort/{b}"))?, "200");
    // Two levels of the tree, together 90 % against a group of the kernel's default weight at each.
    let above: f64 = nm.read("/sys/fs/cgroup/mandoline/cpu.weight")?.parse()?;
    assert!((above / (above + 100.0)).powi(2) >= 0.9, "{above}");
    // 50 of 1000 of two processors, and the kernel holds the spinner back.
    assert_eq!(nm.read(&format!("{SLIVERS}/{c}/cpu.max"))?, "10000 100000");
    nm.wait_file(&format!("{SLIVERS}/{c}/cpu.stat"), |stat| {
        stat.lines()
            .any(|line| line.starts_with("nr_throttled ") && line != "nr_throttled 0")
    })?;

    // A guarantee lent to a sliver that runs (architecture paper, section 6.4): it moves, and goes on.
    let home = |vm_id: u64| nm.read(&format!("{SLIVERS}/{vm_id}/cgroup.procs"));
    let lowly = |vm_id: u64| nm.read(&format!("{SLIVERS}/best-effort/{vm_id}/cgroup.procs"));
    let monitor = lowly(b)?;
    assert!(!monitor.is_empty());
    let boost = nm.root_pool("plc.x_plain", &json!({"cpu_guarantee": 200, "cpu_share": 5}))?;
    nm.call("bind", &json!({"rcap": boost, "slice_name": "plc.x_plain"}))?;
    nm.wait_file(&format!("{SLIVERS}/{b}/cgroup.procs"), |procs| procs == monitor)?;
    nm.wait_file(&format!("{SLIVERS}/{b}/cpu.weight"), |w| {
        w == (2000 + 3500 * 25 / 27).to_string()
    })?;
    assert_eq!(lowly(b)?, "");
    // What it had touched is charged where it was; both bounds together are that of one.
    let number = |file: String| -> Tested<u64> { Ok(nm.read(&file)?.parse()?) };
    let most = (96 + 48) << 20;
    let held = number(format!("{SLIVERS}/best-effort/{b}/memory.current"))?;
    let bound = number(format!("{SLIVERS}/{b}/memory.max"))?;
    assert!(
        held > 1 << 20 && bound + held <= most + (4 << 20),
        "{held} + {bound}"
    );

    // Taken back, it is one of many again.
    nm.call("release", &json!({"rcap": boost}))?;
    nm.wait_file(&format!("{SLIVERS}/best-effort/{b}/cgroup.procs"), |procs| {
        procs == monitor
    })?;
    assert_eq!(home(b)?, "");
    assert_eq!(nm.find(b)?.map(|s| s["state"].clone()), Some("reachable".into()));

    // The last ones leave nothing to hold a guarantee against.
    for made in [&guaranteed, &plain, &capped] {
        nm.call("destroy", &json!({"rcap": made.rcap}))?;
    }
    for made in [&guaranteed, &plain, &capped] {
        nm.wait_state(made.vm_id, "gone")?;
    }
    let left = node.shell(&format!(
        "ls -d {SLIVERS}/[0-9]* {SLIVERS}/best-effort/[0-9]* 2>/dev/null || true"
    ))?;
    assert_eq!(left, "");
    node.power_off()?;
    Ok(())
}

#[test]
#[ignore = "lab"]
fn memory_and_disk_change_while_a_sliver_runs() -> Tested {
    let mut lab = Lab::new()?;
    let node = start(&mut lab, NodeSpec::named("resized"))?;
    let nm = Manager(&node);
    // The boot script says what the sliver has, on its console, whenever it changes.
    let watch = "#!/bin/sh\nwhile :; do
        echo \"has $(df --output=size -B1M / | tail -n1) MiB of disk\"; sleep 1; done > /dev/ttyS0\n";
    let rspec = json!({"vm_type": "kvm-microvm", "mem_limit": "160 MiB", "disk_quota": "200 MB", "initscript": watch});
    let made = nm.sliver("plc.x_resized", &rspec)?;
    nm.wait_state(made.vm_id, "reachable")?;
    let vm_id = made.vm_id;
    let console = format!("/var/log/mandoline/slivers/{vm_id}/console");
    let disk_of = |text: &str| -> u64 {
        let last = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("has "));
        last.and_then(|line| line.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let before = disk_of(&nm.wait_file(&console, |text| disk_of(text) > 0)?);
    assert!(before < 200, "{before}");

    // Half a gigabyte more, bound to the sliver that runs: its file system has it without a new start.
    let monitor = nm.read(&format!("{SLIVERS}/best-effort/{vm_id}/cgroup.procs"))?;
    let more = nm.root_pool(
        "plc.x_resized",
        &json!({"disk_quota": "500 MB", "mem_limit": "40 MiB"}),
    )?;
    nm.call("bind", &json!({"rcap": more, "slice_name": "plc.x_resized"}))?;
    let after = disk_of(&nm.wait_file(&console, |text| disk_of(text) > 500)?);
    assert!(after < 700, "{after}");
    let length = node.shell(&format!("stat -c %s /var/lib/mandoline/disks/{vm_id}.img"))?;
    assert_eq!(length.trim(), (700_000_000u64 / 4096 * 4096).to_string());
    // More memory than it was booted with waits, and the sliver says so.
    let told = nm.wait(vm_id, "told what waits", |sliver| {
        sliver["class"] == "continuable"
    })?;
    let reason = told["reason"].as_str().unwrap_or_default().to_owned();
    assert!(
        reason.contains("mem_limit is 200 MiB") && reason.contains("160 MiB"),
        "{reason}"
    );
    assert_eq!(told["state"], "reachable");

    // Started again, it has the memory; given back, the balloon takes it, and the kernel holds it to that.
    nm.call("restart", &json!({"rcap": made.rcap}))?;
    let max = format!("{SLIVERS}/best-effort/{vm_id}/memory.max");
    nm.wait_file(&max, |max| max == ((200 + 48) << 20).to_string())?;
    nm.wait_file(&format!("{SLIVERS}/best-effort/{vm_id}/cgroup.procs"), |procs| {
        !procs.is_empty() && procs != monitor
    })?;
    nm.wait_state(vm_id, "reachable")?;
    nm.call("release", &json!({"rcap": more}))?;
    nm.wait_file(&max, |max| max == ((160 + 48) << 20).to_string())?;
    // Its disk keeps what it has: a file system in use does not shrink.
    let told = nm.wait(vm_id, "told what stays", |sliver| {
        sliver["class"] == "continuable"
    })?;
    assert!(
        told["reason"]
            .as_str()
            .unwrap_or_default()
            .contains("does not shrink"),
        "{told}"
    );
    assert!(disk_of(&nm.read(&console)?) > 500);
    node.power_off()?;
    Ok(())
}

#[test]
#[ignore = "lab"]
fn qemu_runs_the_same_sliver() -> Tested {
    let mut lab = Lab::new()?;
    let mut spec = NodeSpec::named("qemu");
    spec.peer = Some(mandoline_lab::images::peer()?);
    let node = start(&mut lab, spec)?;
    let nm = Manager(&node);
    node.shell(
        "modprobe vhost_vsock && printf '[qemu]\\nprogram = \"/opt/peer/qemu-system-x86_64\"\\n' >> /etc/mandoline/nodemgr.toml
         sv restart mandoline-nodemgr",
    )?;
    nm.wait_until_it_answers()?;
    let said = node.shell("curl -s --unix-socket /run/mandoline/owner.sock http://nm/v1/node")?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let types = said["vm_types"].as_array().cloned().unwrap_or_default();
    let qemu = types
        .iter()
        .find(|t| t["name"] == "qemu-microvm")
        .cloned()
        .unwrap_or_default();
    assert_eq!(qemu["available"], true, "{qemu}");

    // The boot script says its start and how much disk there is; then it does what a file on the disk says.
    let script = "#!/bin/sh\nn=$(cat /var/starts 2>/dev/null || echo 0); n=$((n + 1)); echo $n > /var/starts; sync\n\
        echo \"start $n with $(df --output=size -B1M / | tail -n1) MiB\" > /dev/ttyS0\n\
        [ $n = 1 ] && reboot\n";
    let rspec = json!({"vm_type": "qemu-microvm", "mem_limit": "128 MiB", "disk_quota": "200 MB", "cpu_guarantee": 100,
        "initscript": script});
    let made = nm.sliver("plc.x_qemu", &rspec)?;
    let vm_id = made.vm_id;
    let console = format!("/var/log/mandoline/slivers/{vm_id}/console");
    // A reboot from inside is told from a shutdown, and starts it again.
    nm.wait_file(&console, |text| text.contains("start 2"))?;
    nm.wait_state(vm_id, "reachable")?;
    // Its own user, its own cgroup, the same limits.
    let pid = nm.read(&format!("{SLIVERS}/{vm_id}/cgroup.procs"))?;
    let status = nm.read(&format!("/proc/{pid}/status"))?;
    assert!(
        status.lines().any(|line| line.starts_with("Uid:\t1000")),
        "{status}"
    );
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
    assert_eq!(
        nm.read(&format!("{SLIVERS}/{vm_id}/memory.max"))?,
        ((128 + 128) << 20).to_string()
    );

    // Adopted by the next node manager, resized by it.
    node.shell("kill -9 $(pidof mandoline-nodemgr)")?;
    nm.wait_until_it_answers()?;
    nm.wait_state(vm_id, "reachable")?;
    assert_eq!(nm.read(&format!("{SLIVERS}/{vm_id}/cgroup.procs"))?, pid);
    let more = nm.root_pool("plc.x_qemu", &json!({"disk_quota": "300 MB"}))?;
    nm.call("bind", &json!({"rcap": more, "slice_name": "plc.x_qemu"}))?;
    let length = (500_000_000u64 / 4096 * 4096).to_string();
    let disk = format!("/var/lib/mandoline/disks/{vm_id}.img");
    for _ in 0..100 {
        if node.shell(&format!("stat -c %s {disk}"))?.trim() == length {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(node.shell(&format!("stat -c %s {disk}"))?.trim(), length);

    // Asked to stop, it shuts itself down; then nothing of it is left but its disk.
    nm.call("stop", &json!({"rcap": made.rcap}))?;
    nm.wait_state(vm_id, "stopped")?;
    assert_eq!(nm.read(&format!("{SLIVERS}/{vm_id}/cgroup.procs"))?, "");
    nm.call("destroy", &json!({"rcap": made.rcap}))?;
    nm.wait_state(vm_id, "gone")?;
    assert_eq!(
        node.shell(&format!("ls {disk} 2>/dev/null || echo gone"))?,
        "gone\n"
    );
    node.power_off()?;
    Ok(())
}

#[test]
#[ignore = "lab"]
fn a_service_of_the_host_runs_with_what_is_bound_to_it() -> Tested {
    let mut lab = Lab::new()?;
    let node = start(&mut lab, NodeSpec::named("service"))?;
    let nm = Manager(&node);
    // A service that root prepares, and that then does nothing for long.
    node.shell(
        "printf '[services.pl_conf]\\nuser = \"pl_conf\"\\ncommand = [\"/bin/sleep\", \"100000\"]\\nprepare = [\"/bin/touch\", \"/run/prepared\"]\\n' \
            >> /etc/mandoline/nodemgr.toml && sv restart mandoline-nodemgr",
    )?;
    nm.wait_until_it_answers()?;
    // 5 % of the node, as the paper's owner gives it.
    let rcap = nm.root_pool(
        "pl_conf",
        &json!({"vm_type": "host-service", "cpu_guarantee": 50, "mem_limit": "128 MiB"}),
    )?;
    let answer = nm.call("bind", &json!({"rcap": rcap, "slice_name": "pl_conf"}))?;
    let vm_id = answer["vm_id"].as_u64().ok_or("bind gave no vm_id")?;
    nm.wait_state(vm_id, "reachable")?;
    let procs = format!("{SLIVERS}/{vm_id}/cgroup.procs");
    let first = nm.wait_file(&procs, |procs| !procs.is_empty())?;
    let status = nm.read(&format!("/proc/{first}/status"))?;
    assert!(
        status.contains("Name:\tsleep") && status.contains("Uid:\t700\t700\t700\t700"),
        "{status}"
    );
    assert!(
        status.contains("NoNewPrivs:\t1") && status.contains("Groups:\t \n"),
        "{status}"
    );
    assert_eq!(
        nm.read(&format!("{SLIVERS}/{vm_id}/memory.max"))?,
        (128u64 << 20).to_string()
    );
    assert_eq!(nm.read(&format!("{SLIVERS}/{vm_id}/cpu.weight"))?, "9000");

    // It outlives the node manager, and what dies is started again.
    node.shell("kill -9 $(pidof mandoline-nodemgr)")?;
    nm.wait_until_it_answers()?;
    nm.wait_state(vm_id, "reachable")?;
    assert_eq!(nm.read(&procs)?, first);
    node.shell(&format!("kill -9 {first}"))?;
    nm.wait_file(&procs, |procs| !procs.is_empty() && procs != first)?;

    // What is no service of the node is refused with those that are.
    let stranger = nm.sliver("plc.x_stranger", &json!({"vm_type": "host-service"}))?;
    let told = nm.wait_state(stranger.vm_id, "failed")?;
    assert!(
        told["class"] == "fatal"
            && told["reason"]
                .as_str()
                .is_some_and(|r| r.ends_with("are: pl_conf")),
        "{told}"
    );
    nm.call("destroy", &json!({"rcap": rcap}))?;
    nm.wait_state(vm_id, "gone")?;
    assert_eq!(
        node.shell("ls /run/prepared; pidof sleep || echo none")?,
        "/run/prepared\nnone\n"
    );
    node.power_off()?;
    Ok(())
}
