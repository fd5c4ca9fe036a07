//! A sliver by hand: what somebody who has only the monitor does with `mandoline-vmm run`. Files stay, frames arrive
//! whichever way they go, memory comes and goes, a parked sliver loses no packet, and each end is told apart.

use mandoline_lab::{Lab, Node, NodeSpec};
use std::path::Path;

type Tested = Result<(), Box<dyn std::error::Error>>;

/// Words of the tests' shell scripts: `start NAME NUMBER OPTIONS...`, `at NUMBER COMMAND...`, `api NAME METHOD PATH BODY`.
const WORDS: &str = r#"
set -e
cd /run/by-hand
start() {
    name=$1 number=$2
    shift 2
    /usr/lib/mandoline/bin/mandoline-vmm run --name $name --mem 128MiB --key key.pub \
        --kernel /usr/share/mandoline/images/vmlinux-up --root /usr/share/mandoline/images/root.erofs \
        --disk disk.$number --tap mhand$number --address 10.97.$number.2/24 --serial serial.$name --log log.$name \
        --api-sock api.$name --state-file state.$name "$@" </dev/null >out.$name 2>&1 &
    echo $! >pid.$name
    reachable $name $number
}
reachable() {
    tries=0
    until nc -z -w 1 10.97.$2.2 22; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] && kill -0 $(cat pid.$1) || { cat out.$1 log.$1 >&2; exit 1; }
        sleep 0.2
    done
}
at() {
    number=$1
    shift
    ssh -i key -o BatchMode=yes -o LogLevel=ERROR -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@10.97.$number.2 "$@"
}
api() { curl -sS --fail-with-body --unix-socket api.$1 -X $2 http://vm$3 ${4:+-d "$4"}; }
ended() { while kill -0 $(cat pid.$1) 2>/dev/null; do sleep 0.1; done; tail -n 1 state.$1; }
"#;

fn words(node: &Node, script: &str) -> Result<String, Box<dyn std::error::Error>> {
    Ok(node.shell(&format!("{WORDS}{script}"))?)
}

#[test]
#[ignore = "lab"]
fn a_sliver_by_hand() -> Tested {
    let mut lab = Lab::new()?;
    let node = lab.start(NodeSpec::named("by-hand").with_mandoline()?)?;
    node.shell("mkdir /run/by-hand && ssh-keygen -q -t ed25519 -N '' -f /run/by-hand/key")?;
    let make_disk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-image/root/make-disk");
    node.copy_in(&make_disk, "/run/by-hand/make-disk")?;
    words(&node, "for n in 1 2; do sh make-disk disk.$n 67108864; done")?;

    // Logged in over the tap; what is written stays when it starts again, in its place.
    words(&node, "start one 1 --park park.one --balloon 0")?;
    let boot_id = words(
        &node,
        "at 1 'echo kept >/root/kept; sync; cat /proc/sys/kernel/random/boot_id'",
    )?;
    let again = words(
        &node,
        "at 1 reboot || true
        until grep -q rebooting state.one; do kill -0 $(cat pid.one); sleep 0.1; done
        reachable one 1
        at 1 'cat /root/kept /proc/sys/kernel/random/boot_id'",
    )?;
    assert!(
        again.starts_with("kept\n") && !again.contains(boot_id.trim()),
        "{again}"
    );

    // Memory goes to the node and comes back.
    words(
        &node,
        r#"available() { at 1 cat /proc/meminfo | sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p'; }
        # until_available -lt|-gt KIB
        until_available() {
            for try in 1 2 3 4 5 6 7 8 9 10; do
                sleep 0.5
                [ "$(available)" $1 $2 ] && return
            done
            echo "$(available) KiB are available, and not $1 $2" >&2
            exit 1
        }
        set_balloon() { /usr/lib/mandoline/bin/mandoline-vmm set one --balloon $1 >/dev/null; }
        whole=$(available)
        set_balloon 32MiB
        until_available -lt $((whole - 28 * 1024))
        set_balloon 0
        # What the guest keeps on its processor's own free lists, up to an eighth of its memory, is not counted.
        until_available -gt $((whole - 17 * 1024))"#,
    )?;

    parked_under_traffic(&node)?;

    // It ends as it was told.
    let last = words(&node, "at 1 poweroff || true; ended one")?;
    assert!(last.contains(r#""reason":"shutdown""#), "{last}");
    let left =
        node.shell("ls -d /sys/fs/cgroup/mandoline-run/one /sys/class/net/mhand1 2>/dev/null || echo gone")?;
    assert_eq!(left, "gone\n");

    // The host's kernel moves the frames: the same bytes arrive, both ways.
    words(&node, "start two 2 --vhost")?;
    let sums = words(
        &node,
        "head -c 4000000 /dev/urandom >sent; at 2 'cat >/root/sent; sha256sum </root/sent' <sent; sha256sum <sent; at 2 cat /root/sent | sha256sum
        api two GET /metrics | grep -o '\"vhost[a-z_]*\":[^,}]*' || true",
    )?;
    let sums: Vec<_> = sums.lines().take(3).collect();
    assert!(
        sums.len() == 3 && sums[0] == sums[1] && sums[1] == sums[2],
        "{sums:?}"
    );
    words(&node, "at 2 poweroff || true; ended two")?;
    node.power_off()?;
    Ok(())
}

/// Packets come at any time: some while it is being parked, some that wake it. Each is answered.
fn parked_under_traffic(node: &Node) -> Tested {
    let pings = words(
        node,
        r#"ping -q -c 40 -i 0.25 -W 20 10.97.1.2 >pings &
        pings=$!
        while kill -0 $pings 2>/dev/null; do
            # Busy when it is: then it is not parked this time.
            api one PATCH /vm '{"state":"Parked"}' >/dev/null || true
            sleep 0.6
        done
        cat pings"#,
    )?;
    assert!(pings.contains(" 40 received"), "{pings}");
    let metrics: serde_json::Value = serde_json::from_str(&words(node, "api one GET /metrics")?)?;
    let park = |name: &str| metrics["park"][name].as_u64().unwrap_or_default();
    assert!(park("parked") >= 3 && park("woken_by_device") >= 3, "{metrics}");
    assert!(park("freed_bytes") > 4 << 20, "{metrics}");

    // With nothing to do it stays parked, whatever wakes it for a moment.
    let state = words(
        node,
        r#"until api one PATCH /vm '{"state":"Parked"}' >/dev/null; do sleep 0.2; done
        for second in 1 2 3 4 5 6 7 8; do sleep 1; api one GET / | grep -o '"state":"[A-Za-z]*"'; done"#,
    )?;
    let parked = state.lines().filter(|line| line.contains("Parked")).count();
    assert!(parked >= 4, "{state}");
    Ok(())
}
