//! How people and slivers talk to a node's manager: XML-RPC, sensors and metrics on the node and from inside a
//! sliver, a service of the node over vsock, and `mandoline node`.

use mandoline_lab::{Lab, Node, NodeSpec};
use serde_json::{Value, json};

type Tested = Result<(), Box<dyn std::error::Error>>;

const SLICE: &str = "plc.princeton_iface";
const OWNER: &str = "/run/mandoline/owner.sock";
const BIN: &str = "/usr/lib/mandoline/bin";

/// What the sliver finds out from inside; it says so on its serial port, where the node's console shows it.
const INSIDE: &str = r#"#!/bin/sh
exec > /dev/ttyS0 2>&1
echo "uptime=$(curl -sS http://localhost:33080/uptime | grep -c '^[0-9][0-9]*$')"
echo "nodes=$(curl -sS http://localhost:33080/nodes/ip/name)"
echo "head=$(curl -sSI http://127.0.0.1:33080/load | head -n 1 | cut -d' ' -f2)"
echo "foreign=$(curl -sS -o /dev/null -w '%{http_code}' -H 'Origin: http://x' http://localhost:33080/load)"
echo "mode=$(stat -c %a /run/mandoline/nm.sock)"
python3 - <<'END'
import http.client, socket, xmlrpc.client

class Unix(xmlrpc.client.Transport):
    def make_connection(self, host):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect("/run/mandoline/nm.sock")
        return connection

nm = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=Unix())
print("guarantee=%d" % nm.get_rspec(nm.get_rcap())["cpu_guarantee"])
print("record=" + nm.GetRecord()["slice"])
try:
    nm.create_root_pool({"cpu_guarantee": 1}, "pl_conf")
except xmlrpc.client.Fault as fault:
    print("fault=%d" % fault.faultCode)

def service(name):
    stream = socket.socket(socket.AF_VSOCK)
    stream.connect((2, 1025))
    stream.sendall(b"CONNECT %s\nfrom inside\n" % name)
    stream.shutdown(socket.SHUT_WR)
    answer = b""
    while part := stream.recv(4096):
        answer += part
    return answer.decode().strip()

print("service=" + service(b"princeton_sink"))
print("nobody=" + service(b"princeton_nobody"))
END
echo "all=said"
"#;

/// A call over XML-RPC; the arguments are XML.
fn xml_rpc(node: &Node, method: &str, arguments: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
    let params: String = arguments
        .iter()
        .map(|value| format!("<param><value>{value}</value></param>"))
        .collect();
    let call = format!("<methodCall><methodName>{method}</methodName><params>{params}</params></methodCall>");
    let argv = [
        "curl",
        "-sS",
        "--unix-socket",
        OWNER,
        "-H",
        "Content-Type: text/xml",
        "--data-binary",
        "@-",
        "http://nm/RPC2",
    ];
    let output = node.exec_with_input(&argv, call.as_bytes())?;
    let text = String::from_utf8(output.stdout)?;
    match text.contains("<fault>") {
        true => Err(text.into()),
        false => Ok(text),
    }
}

fn first_string(answer: &str) -> Option<&str> {
    answer.split("<string>").nth(1)?.split("</string>").next()
}

fn command(node: &Node, arguments: &str) -> Result<String, Box<dyn std::error::Error>> {
    Ok(node.shell(&format!("{BIN}/mandoline {arguments}"))?)
}

#[test]
#[ignore = "lab"]
fn people_and_slivers_talk_to_the_node_manager() -> Tested {
    let mut lab = Lab::new()?;
    let node = lab.start(NodeSpec::named("iface").with_mandoline()?)?;
    // A service of the node that slivers may call, and the node manager.
    node.shell(
        "printf '[services.princeton_sink]\\nsocket = \"/run/sink.sock\"\\n' >> /etc/mandoline/nodemgr.toml
         setsid nc -lU /run/sink.sock < /dev/null > /run/sink.out 2>&1 &
         setsid sh /etc/sv/mandoline-nodemgr/run > /run/nodemgr.log 2>&1 < /dev/null &
         until curl -sf --unix-socket /run/mandoline/owner.sock http://nm/v1/node > /dev/null; do
             test $((tries = tries + 1)) -lt 300 || { cat /run/nodemgr.log >&2; exit 1; }
             sleep 0.1
         done
         printf 'ip,name\\n192.0.2.1,n1.example.org\\n' | curl -sSf --unix-socket /run/mandoline/owner.sock -T - -H 'Content-Type: text/plain' http://nm/v1/sensors/nodes",
    )?;

    // A sliver, by the papers' operations over XML-RPC; and a pool of its slice that it finds from inside.
    let rspec = |members: &[(&str, &str)]| {
        let members: String = members
            .iter()
            .map(|(name, value)| format!("<member><name>{name}</name><value>{value}</value></member>"))
            .collect();
        format!("<struct>{members}</struct>")
    };
    let script = format!(
        "<string>{}</string>",
        INSIDE.replace('&', "&amp;").replace('<', "&lt;")
    );
    let want = [
        ("vm_type", "<string>kvm-microvm</string>"),
        ("mem_limit", "<string>192 MiB</string>"),
        ("cpu_share", "<int>10</int>"),
        ("initscript", script.as_str()),
    ];
    let slice = format!("<string>{SLICE}</string>");
    let own = xml_rpc(&node, "create_root_pool", &[&rspec(&want), &slice])?;
    let own = first_string(&own).ok_or("no rcap")?.to_owned();
    let pool = rspec(&[("cpu_guarantee", "<int>123</int>")]);
    xml_rpc(&node, "create_root_pool", &[&pool, &slice])?;
    let bound = xml_rpc(&node, "bind", &[&format!("<string>{own}</string>"), &slice])?;
    assert!(
        bound.contains("<int>1</int>") || bound.contains("<i4>1</i4>"),
        "{bound}"
    );
    let names = xml_rpc(&node, "system.listMethods", &[])?;
    assert!(
        names.contains("split_pool") && names.contains("GetEffectiveRSpec"),
        "{names}"
    );

    // What it said from inside, as the console has it.
    let console = node.shell(&format!(
        "until {BIN}/mandoline node console princeton_iface --once 2>/dev/null | grep -q '^all=said'; do
             test $((tries = tries + 1)) -lt 400 || {{ {BIN}/mandoline node console princeton_iface --once >&2; tail -n 30 /run/nodemgr.log >&2; exit 1; }}
             sleep 0.2
         done
         {BIN}/mandoline node console princeton_iface --once"
    ))?;
    for line in [
        "uptime=1",
        "nodes=192.0.2.1,n1.example.org",
        "head=200",
        "foreign=403",
        "mode=600",
        "guarantee=123",
        "record=plc.princeton_iface",
        "fault=108",
        "service=OK",
        "nobody=ERR no service \"princeton_nobody\"; allowed: nm, princeton_sink, sensors",
    ] {
        assert!(
            console.lines().any(|said| said.trim_end() == line),
            "{line}: {console}"
        );
    }
    assert_eq!(
        node.shell("cat /run/sink.out")?,
        "PROXY UNKNOWN slice=plc.princeton_iface vm_id=1 service=princeton_sink\r\nfrom inside\n"
    );

    // The same sensors on the node's loopback, a stream among them, and what Prometheus reads.
    let slivers = node.shell("curl -sS http://localhost:33080/slivers")?;
    assert!(
        slivers.starts_with("plc.princeton_iface,1,kvm-microvm,reachable,"),
        "{slivers}"
    );
    let twice = node.shell("curl -sSN 'http://localhost:33080/uptime?every=1' | head -n 2 | wc -l")?;
    assert_eq!(twice.trim(), "2");
    let sent = node.shell("curl -sS http://localhost:33080/bandwidth/princeton_iface")?;
    assert_eq!(sent.trim().split(',').count(), 6, "{sent}");
    let metrics = node.shell("curl -sS http://localhost:33080/metrics")?;
    for line in [
        "mandoline_sliver_mem_limit_bytes{slice=\"plc.princeton_iface\",vm_type=\"kvm-microvm\"} 201326592.0",
        "mandoline_slivers{state=\"reachable\"} 1.0",
        "mandoline_service_streams_total{service=\"princeton_sink\"} 1.0",
        "mandoline_service_refused_streams_total{} 1.0",
    ] {
        assert!(metrics.lines().any(|said| said == line), "{line}: {metrics}");
    }

    operators_view(&node)?;
    node.power_off()?;
    Ok(())
}

/// `mandoline node` and `mandoline doctor`, for people and for programs.
fn operators_view(node: &Node) -> Tested {
    let parsed = |arguments: &str| -> Result<Value, Box<dyn std::error::Error>> {
        Ok(serde_json::from_str(&command(node, arguments)?)?)
    };
    let status = command(node, "node status")?;
    assert!(
        status.contains("kvm-microvm: available") && status.contains("1 reachable"),
        "{status}"
    );
    let pools = command(node, "node pools")?;
    assert!(
        pools.contains("pool 2 of plc.princeton_iface: cpu_guarantee = 123"),
        "{pools}"
    );
    assert!(
        pools.contains("sliver 1 of plc.princeton_iface (kvm-microvm, reachable)"),
        "{pools}"
    );
    let slivers = parsed("node slivers --json")?;
    assert_eq!(slivers[0]["mem_limit"], json!(192 << 20));
    // The kernel's own numbers: a sliver that has booted has used CPU, and its disk has blocks.
    assert!(slivers[0]["cpu_us"].as_u64() > Some(10_000), "{slivers}");
    assert!(
        slivers[0]["memory"].as_u64() > Some(16 << 20) && slivers[0]["disk"].as_u64() > Some(0),
        "{slivers}"
    );
    let top = parsed("node top --count 1 --json")?;
    assert!(top["rates"]["1"]["cpu_percent"].is_number(), "{top}");
    assert!(
        command(node, "node logs 1")?.lines().count() > 0,
        "the monitor has logged nothing"
    );

    let missing = node.exec(&[&format!("{BIN}/mandoline"), "node", "console", "princeton_nobody"])?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert_eq!(missing.status, 3, "{said}");
    assert!(said.contains("it has: princeton_iface"), "{said}");
    let elsewhere = node.exec(&[
        &format!("{BIN}/mandoline"),
        "node",
        "status",
        "--socket",
        "/run/none.sock",
    ])?;
    let said = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    assert_eq!(elsewhere.status, 5, "{said}");
    assert!(said.contains("is this machine a node?"), "{said}");

    let doctor = command(node, "doctor")?;
    assert!(
        doctor.contains("This machine can be a node") && doctor.contains("/dev/kvm"),
        "{doctor}"
    );
    Ok(())
}
