//! What the node and its slivers use, as the interface, the sensors and Prometheus see it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use mandoline_api::nodemgr::{ClientError, ErrorKind, SliverState};
use mandoline_api::unix::Client;
use mandoline_nodemgr::sensors;
use mandoline_nodemgr::usage::Meter;
use serde_json::json;
use support::{Node, TestBackend, config, until_state};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One request as it goes over the wire, and the whole answer.
async fn http(address: std::net::SocketAddr, method: &str, target: &str, more: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("{method} {target} HTTP/1.1\r\nHost: localhost:33080\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn body(answer: &str) -> &str {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    answer.split_once("\r\n\r\n").unwrap().1
}

#[tokio::test]
async fn sensors_and_metrics_tell_what_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let mut events = node.scs.events(None).await.unwrap();
    let (_, vm_id) = node
        .sliver(
            &pool,
            "princeton_codeen",
            json!({"mem_limit": "128 MiB", "cpu_guarantee": 7}),
        )
        .await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;

    // The interface: the owner and the pool's holder see it.
    let usage = node.owner.usage().await.unwrap();
    assert!(usage.node.cpus > 0 && usage.node.memory_total > 0 && usage.node.disk_total > 0);
    let of = &usage.slivers[0];
    assert_eq!((of.vm_id, of.mem_limit, of.cpu_guarantee), (vm_id, 128 << 20, 7));
    assert_eq!(of.state, SliverState::Reachable);

    // Sensors, as the papers spell them.
    let meter = Meter::new(Arc::clone(&node.core), &config(dir.path()), None, None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let server = tokio::spawn(sensors::serve(Arc::new(meter), listener));
    for sensor in ["load", "load5", "uptime"] {
        let answer = http(at, "GET", &format!("/{sensor}"), "").await;
        body(&answer).trim().parse::<f64>().unwrap();
    }
    let answer = http(at, "GET", "/meminfo", "").await;
    assert!(
        body(&answer).lines().any(|line| line.starts_with("MemTotal,")),
        "{answer}"
    );
    let answer = http(at, "GET", "/slivers", "").await;
    let fields: Vec<_> = body(&answer).trim().split(',').collect();
    assert_eq!(
        &fields[..4],
        ["plc.princeton_codeen", "1", support::TEST_VM, "reachable"]
    );
    assert_eq!(
        body(&http(at, "GET", "/bandwidth/princeton_codeen", "").await),
        "plc.princeton_codeen,0,0,0,0,0\n"
    );
    let answer = http(at, "HEAD", "/load", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && body(&answer).is_empty(),
        "{answer}"
    );
    for (target, status, word) in [
        ("/bandwidth/princeton_nobody", "404", "no sliver"),
        ("/bandwidth", "404", "bandwidth/<slice>"),
        ("/weather", "404", "meminfo, load"),
        ("/load?every=0", "400", "1 to 3600"),
    ] {
        let answer = http(at, "GET", target, "").await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(word),
            "{answer}"
        );
    }
    let answer = http(at, "GET", "/load", "Origin: http://evil.example.org\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");

    // A stream: the same again, until the reader closes.
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream
        .write_all(b"GET /uptime?every=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut seen = String::new();
    while seen.matches("\n").count() - seen.matches("\r\n").count() < 2 {
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer).await.unwrap();
        assert!(length > 0, "the stream ended: {seen}");
        seen.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    drop(stream);

    // Prometheus' form, on both.
    let text = http(at, "GET", "/metrics", "").await;
    let own = Client::new(dir.path().join("run/owner.sock"))
        .get("/metrics")
        .await
        .unwrap();
    let own = String::from_utf8(own.body).unwrap();
    for line in [
        "mandoline_sliver_mem_limit_bytes{slice=\"plc.princeton_codeen\",vm_type=\"test-vm\"} 134217728.0",
        "mandoline_slivers{state=\"reachable\"} 1.0",
        "mandoline_root_pool_granted{slice=\"pl_conf\",attribute=\"cpu_guarantee\"} 500.0",
        "mandoline_root_pool_left{slice=\"pl_conf\",attribute=\"cpu_guarantee\"} 493.0",
    ] {
        assert!(body(&text).contains(line), "{line} is not in\n{text}");
        assert!(own.contains(line), "{line}");
    }
    assert!(own.ends_with("# EOF\n"), "{own}");
    server.abort();
    node.stop().await;
}

#[tokio::test]
async fn services_publish_and_consoles_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    node.scs
        .publish("nodes", "ip,name,site\n192.0.2.1,n1.example.org,example\n")
        .await
        .unwrap();
    let error = node.scs.publish("load", "x\n").await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::BadRequest), "{error}");

    let meter = Meter::new(Arc::clone(&node.core), &config(dir.path()), None, None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let server = tokio::spawn(sensors::serve(Arc::new(meter), listener));
    assert_eq!(
        body(&http(at, "GET", "/nodes/ip/name", "").await),
        "192.0.2.1,n1.example.org\n"
    );
    assert_eq!(body(&http(at, "GET", "/nodes/site", "").await), "example\n");
    assert!(
        http(at, "GET", "/nodes/port", "")
            .await
            .contains("allowed: ip, name, site")
    );
    assert!(body(&http(at, "GET", "/", "").await).contains("nodes,ip name site,"));
    server.abort();

    let (_, vm_id) = node.sliver(&pool, "princeton_codeen", json!({})).await;
    let logs = dir.path().join("log/slivers").join(vm_id.to_string());
    std::fs::create_dir_all(&logs).unwrap();
    std::fs::write(logs.join("console"), "boots\n").unwrap();
    std::fs::write(logs.join("monitor.log"), "runs\n").unwrap();
    let tail = node.scs.console(vm_id, None).await.unwrap();
    assert_eq!((tail.next, tail.text.as_str()), (6, "boots\n"));
    std::fs::write(logs.join("console"), "boots\nmore\n").unwrap();
    assert_eq!(node.scs.console(vm_id, Some(6)).await.unwrap().text, "more\n");
    // It was cut since.
    assert_eq!(
        node.scs.console(vm_id, Some(4000)).await.unwrap().text,
        "boots\nmore\n"
    );
    assert_eq!(node.owner.log(vm_id, None).await.unwrap().text, "runs\n");
    let kind = |error: ClientError| error.kind();
    assert_eq!(
        kind(node.scs.log(vm_id, None).await.unwrap_err()),
        Some(ErrorKind::Forbidden)
    );
    assert_eq!(
        kind(node.owner.console(99, None).await.unwrap_err()),
        Some(ErrorKind::NotFound)
    );
    node.stop().await;
}
