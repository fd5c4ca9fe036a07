//! One bare node: it has what Mandoline needs of a node, and the lab's ways in and out work.
//! `cargo test -p mandoline-lab -- --ignored` runs these; they need the node image, which is built when missing.

use mandoline_lab::{Images, Lab, LabError, Node, NodeSpec};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

type Tested = Result<(), Box<dyn std::error::Error>>;

#[test]
#[ignore = "lab"]
fn a_node_has_what_slivers_need() -> Tested {
    let mut lab = Lab::new()?;
    let node = lab.start(NodeSpec::named("tested").with_mandoline()?)?;
    eprintln!(
        "node up after {} ms by {}: {:?}",
        node.info().boot_ms,
        node.info().accel_words,
        node.info().phases
    );

    // A virtual machine of its own runs inside: /dev/kvm is the real thing.
    node.copy_in(
        Path::new(env!("CARGO_BIN_EXE_mandoline-lab")),
        "/run/mandoline-lab",
    )?;
    assert_eq!(node.shell("/run/mandoline-lab tiny-vm 40 2")?.trim(), "42");
    assert_eq!(
        node.shell("cat /sys/module/kvm_*/parameters/n?t | head -n 1")?
            .trim()
            .to_uppercase(),
        "Y"
    );

    // cgroup v2 with favordynmods and every controller that limits need, down to where slivers live.
    let mounts = node.shell("grep ' /sys/fs/cgroup ' /proc/mounts")?;
    assert!(
        mounts.contains("cgroup2") && mounts.contains("favordynmods"),
        "{mounts}"
    );
    let controllers = node.shell("cat /sys/fs/cgroup/mandoline/cgroup.subtree_control")?;
    for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
        assert!(
            controllers.split_whitespace().any(|c| c == controller),
            "{controller} not in {controllers}"
        );
    }

    // The network's tools: taps, HTB, IFB, and tables with NAT and counted connections.
    let script = "set -e
        ip tuntap add dev mtap0 mode tap
        tc qdisc add dev mtap0 root handle 1: htb default 1
        tc class add dev mtap0 parent 1: classid 1:1 htb rate 1mbit ceil 2mbit
        ip link add ifb7 type ifb
        tc qdisc add dev mtap0 clsact
        tc filter add dev mtap0 ingress matchall action mirred egress redirect dev ifb7
        nft add table inet t
        nft add chain inet t post '{ type nat hook postrouting priority srcnat; }'
        nft add rule inet t post oifname eth0 meta l4proto udp masquerade to :1000-2000
        nft add rule inet t post ct mark set 7 ct state invalid,untracked counter drop
        sysctl -n net.netfilter.nf_conntrack_acct net.netfilter.nf_conntrack_events net.ipv4.ip_forward
        test -c /dev/net/tun && test -c /dev/vhost-net";
    let values = node.shell(script)?;
    assert!(values.split_whitespace().all(|v| v != "0"), "{values}");

    limits_by_hand(&node)?;

    // The base is read-only, the state disk is not, and services' users are there.
    assert!(node.shell("grep ' / ' /proc/mounts")?.contains("overlay"));
    assert!(
        node.shell("touch /var/lib/mandoline/x && grep /var/lib/mandoline /proc/mounts")?
            .contains("ext4")
    );
    assert_eq!(node.shell("id -u pl_conf; hostname")?, "700\ntested\n");
    // An account that only extrausers knows.
    node.shell("echo 'plc_x:x:20001:20001::/:/usr/sbin/nologin' > /var/lib/extrausers/passwd && id plc_x")?;
    node.power_off()?;
    Ok(())
}

/// `mandoline-vmm run` puts a sliver under its limits, `set` changes them while it runs, and the kernel says so.
fn limits_by_hand(node: &Node) -> Tested {
    let images = "/usr/share/mandoline/images";
    node.shell(&format!(
        "/usr/lib/mandoline/bin/mandoline-vmm run --name byhand --kernel {images}/vmlinux-up --root {images}/root.erofs --mem 64MiB --no-join \
            --tap mrun0 --address 10.98.0.2/24 --serial /run/byhand.serial --log /run/byhand.log \
            --cpu-share 10 --mem-limit 200MiB --rate 1Mbit/s --disk-ops 1000 --balloon 0 \
            < /dev/null > /run/byhand.out 2>&1 &
        until /usr/lib/mandoline/bin/mandoline-vmm set byhand > /dev/null 2>&1; do
            kill -0 $! || {{ cat /run/byhand.out /run/byhand.log >&2; exit 1; }}
            sleep 0.1
        done"
    ))?;
    let kernel = |values: &[(&str, &str)]| -> Tested {
        for (file, want) in values {
            let got = node.shell(&format!("cat /sys/fs/cgroup/mandoline-run/byhand/{file}"))?;
            assert_eq!(got.trim(), *want, "{file}");
        }
        Ok(())
    };
    let class = || node.shell("tc class show dev mrun-ifb | grep 'htb 1:1000 '");
    kernel(&[
        ("cpu.weight", "100"),
        ("cpu.max", "max 100000"),
        ("memory.max", "209715200"),
    ])?;
    let words = class()?;
    assert!(words.contains("rate 1Mbit ceil 1Mbit"), "{words}");
    // The monitor is in its cgroup, and its supervisor is not.
    let pid = node.shell("cat /sys/fs/cgroup/mandoline-run/byhand/cgroup.procs")?;
    let name = node.shell(&format!("cat /proc/{}/cmdline | tr '\\0' ' '", pid.trim()))?;
    assert!(name.contains(" vm --id byhand "), "{name}");

    let said = node.shell(
        "/usr/lib/mandoline/bin/mandoline-vmm set byhand --cpu-share 25 --cpu-cap 500 --mem-limit 220MiB --rate 2Mbit/s --peak 4Mbit/s \
            --disk-ops 50 --balloon 8MiB --tx-bandwidth 8Mbit/s",
    )?;
    kernel(&[
        ("cpu.weight", "250"),
        ("cpu.max", "50000 100000"),
        ("memory.max", "230686720"),
    ])?;
    let words = class()?;
    assert!(words.contains("rate 2Mbit ceil 4Mbit"), "{words}");
    for line in [
        "cpu.weight: 250",
        "disk root ops: 50 operations in 1000 ms",
        "eth0 tx bandwidth: 1000000 bytes in 1000 ms",
        "balloon: 8 MiB",
    ] {
        assert!(said.lines().any(|said| said == line), "{line}: {said}");
    }
    node.shell("/usr/lib/mandoline/bin/mandoline-vmm set byhand --cpu-cap none --mem-limit none")?;
    kernel(&[("cpu.max", "max 100000"), ("memory.max", "max")])?;
    // Nothing of it stays.
    let left = node.shell(&format!(
        "run=$(sed -n 's/PPid:.//p' /proc/{0}/status); kill {0}; while kill -0 $run 2>/dev/null; do sleep 0.1; done
        ls -d /sys/fs/cgroup/mandoline-run/byhand /run/mandoline-run/byhand /sys/class/net/mrun0 2>/dev/null || echo gone",
        pid.trim()
    ))?;
    assert_eq!(left, "gone\n");
    Ok(())
}

#[test]
#[ignore = "lab"]
fn ways_in_and_out() -> Tested {
    // A service of this machine, with an answer that shows which connection it was.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream?;
            let mut request = [0; 1024];
            let n = stream.read(&mut request)?;
            let path = String::from_utf8_lossy(&request[..n])
                .split(' ')
                .nth(1)
                .unwrap_or_default()
                .to_owned();
            write!(
                stream,
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{path}",
                path.len()
            )?;
        }
        Ok::<_, std::io::Error>(())
    });
    let mut lab = Lab::new()?;
    let mut spec = NodeSpec::named("node1").setting("NODE_KEY", "secret words");
    spec.service = Some(address);
    let mut node = lab.start(spec)?;

    // Commands: words arrive as they are, and statuses come back.
    let output = node.exec(&["printf", "%s|", "two words", "it's", "$HOME"])?;
    assert_eq!(output.stdout, b"two words|it's|$HOME|");
    let output = node.exec(&["sh", "-c", "cat; echo oops >&2; exit 7"])?;
    assert_eq!(
        (output.status, output.stderr.as_slice()),
        (7, b"oops\n".as_slice())
    );
    assert!(matches!(
        node.shell("exit 3"),
        Err(LabError::Command { status: 3, .. })
    ));
    let big = vec![b'x'; 1 << 20];
    assert_eq!(node.exec_with_input(&["wc", "-c"], &big)?.stdout, b"1048576\n");

    // Copies keep contents and mode.
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("file");
    std::fs::write(&file, &big)?;
    node.copy_in(&file, "/run/a file")?;
    node.copy_out("/run/a file", &dir.path().join("back"))?;
    assert_eq!(std::fs::read(dir.path().join("back"))?, big);

    // Forwards, made while it runs.
    let port = node.forward(22)?;
    let mut banner = [0; 4];
    TcpStream::connect((Ipv4Addr::LOCALHOST, port))?.read_exact(&mut banner)?;
    assert_eq!(&banner, b"SSH-");

    // The one service outside, over several connections at once, and nothing else of this machine.
    let fetched = node.shell("for i in 1 2 3; do curl -sS -m 20 http://10.0.2.100/$i & done; wait")?;
    let mut digits: Vec<_> = fetched.chars().filter(char::is_ascii_digit).collect();
    digits.sort_unstable();
    assert_eq!(digits, ['1', '2', '3']);
    let refused = node.exec(&[
        "curl",
        "-sS",
        "-m",
        "3",
        &format!("http://10.0.2.2:{}/", address.port()),
    ])?;
    assert_ne!(refused.status, 0);

    // The configuration disk, as the papers have it.
    let config =
        node.shell("cat /etc/mandoline/node/pl_node.txt; stat -c %a /etc/mandoline/node/pl_node.txt")?;
    assert!(
        config.contains("NODE_KEY=\"secret words\"") && config.contains("PLC_URL=\"http://10.0.2.100:80\"")
    );
    assert!(config.ends_with("600\n"), "{config}");
    assert!(node.console().contains("stage 1 done"), "{}", node.console());

    // A power cut loses what was not written, keeps what was, and leaves the ways in as they were.
    node.shell("echo kept > /var/lib/mandoline/kept && sync && echo x > /run/lost")?;
    node.cut_power()?;
    assert_eq!(
        node.shell("cat /var/lib/mandoline/kept; ls /run/lost 2>/dev/null || echo gone")?,
        "kept\ngone\n"
    );
    assert!(node.running());
    node.power_off()?;
    Ok(())
}

#[test]
#[ignore = "lab"]
fn a_node_that_does_not_come_up_says_why() -> Tested {
    let good = Images::find()?;
    let dir = tempfile::tempdir()?;
    for file in ["vmlinux", "initrd"] {
        std::os::unix::fs::symlink(good.node.join(file), dir.path().join(file))?;
    }
    std::fs::write(dir.path().join("node.erofs"), vec![0; 1 << 20])?;
    let mut lab = Lab::with_images(Images {
        node: dir.path().to_owned(),
    })?;
    match lab.start(NodeSpec::named("broken")) {
        Err(LabError::Boot { console, .. }) => {
            assert!(console.contains("cannot mount /dev/vda"), "{console}")
        }
        Err(other) => return Err(other.into()),
        Ok(_) => panic!("a node came up from an empty root"),
    }
    Ok(())
}
