//! The node's side of REST, as a node sees it: registering, signatures, what to run, reports and events; on
//! each database, over the network.

#![allow(clippy::unwrap_used)]

mod common;

use std::future::Future;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::world::{KEY, SECRET, World, http, open, report, rspec};
use mandoline_api::authority::{
    ErrorKind, NewKey, NewNode, NewPerson, NewSlice, NodeAuthAlgorithm, NodeRegistered, NodeStatus, Person,
    Slice, SliceChange, Sliver, SliverState,
};
use mandoline_authority::db::Db;
use mandoline_authority::domain::Caller;
use mandoline_authority::{in_read, in_write};
use serde_json::{Value as Json, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

async fn signatures(world: &World) {
    use NodeAuthAlgorithm::{Ed25519, HmacSha256};
    let node = world.node("sig.example.org").await;
    let before = node.call("GET", "/v1/node/slivers", &()).await;
    assert_eq!(
        (before.0, before.kind()),
        (401, ErrorKind::Unauthenticated),
        "not registered"
    );

    let registered = node.register(&["kvm-microvm"]).await;
    assert_eq!(registered.0, 200, "{}", String::from_utf8_lossy(&registered.1));
    let registered: NodeRegistered = registered.json();
    assert_eq!(
        (registered.node_id, registered.boot_state.as_str()),
        (node.id, "boot"),
        "it leaves reinstall"
    );

    let path = "/v1/node/slivers";
    let good = node.sign(Ed25519, "GET", path, b"", 0);
    assert_eq!(node.send(&good, "GET", path, b"").await.0, 200);
    assert_eq!(node.send(&good, "GET", path, b"").await.0, 401, "replayed");

    // Whatever is altered, the signature is for something else.
    let fresh = || node.sign(Ed25519, "GET", path, b"", 0);
    assert_eq!(node.send(&fresh(), "GET", path, b"x").await.0, 401, "body");
    assert_eq!(
        node.send(&fresh(), "GET", "/v1/node/slivers?x=1", b"").await.0,
        401,
        "query"
    );
    assert_eq!(
        node.send(&fresh(), "POST", "/v1/node/status", b"").await.0,
        401,
        "method and path"
    );
    let mut later = fresh();
    later.timestamp += 1;
    assert_eq!(node.send(&later, "GET", path, b"").await.0, 401, "time");
    let mut other = fresh();
    other.nonce = "00".repeat(16);
    assert_eq!(node.send(&other, "GET", path, b"").await.0, 401, "nonce");
    let mut nobody = fresh();
    nobody.node_id += 1000;
    assert_eq!(node.send(&nobody, "GET", path, b"").await.0, 401, "node");
    let old = node.sign(Ed25519, "GET", path, b"", 400);
    assert_eq!(
        node.send(&old, "GET", path, b"").await.0,
        401,
        "outside the window"
    );
    let hmac = node.sign(HmacSha256, "GET", path, b"", 0);
    assert_eq!(
        node.send(&hmac, "GET", path, b"").await.0,
        401,
        "the node key registers and no more"
    );
    let body = serde_json::to_vec(&node.registration(&[])).unwrap();
    let ed = node.sign(Ed25519, "POST", "/v1/node/register", &body, 0);
    assert_eq!(
        node.send(&ed, "POST", "/v1/node/register", &body).await.0,
        401,
        "and only it registers"
    );
    assert_eq!(world.call("GET", path, &()).await.0, 401, "a person is no node");

    // A new NODE_KEY ends what was registered under the old one.
    let headers = [("content-type", "text/xml".to_owned())];
    let xml = format!(
        "<methodCall><methodName>UpdateNode</methodName><params><param><value><struct>\
         <member><name>AuthMethod</name><value>session</value></member>\
         <member><name>session</name><value>{}</value></member></struct></value></param>\
         <param><value><int>{}</int></value></param><param><value><struct><member><name>key</name>\
         <value>a-new-node-key-0123456789</value></member></struct></value></param></params></methodCall>",
        world.token, node.id
    );
    let changed = http(world.addr, "POST", "/PLCAPI/", &headers, xml.as_bytes()).await;
    assert!(
        String::from_utf8_lossy(&changed.1).contains("<i4>1</i4>"),
        "{}",
        String::from_utf8_lossy(&changed.1)
    );
    assert_eq!(node.call("GET", path, &()).await.0, 401);
    assert_eq!(node.register(&["kvm-microvm"]).await.0, 401);
}

async fn announcements(world: &World) {
    let node = world.node("announce.example.org").await;
    let mut bad = node.registration(&["kvm-microvm"]);
    bad.ed25519_public_key = STANDARD.encode([0u8; 32]);
    assert_eq!(
        node.call("POST", "/v1/node/register", &bad).await.0,
        400,
        "a weak key"
    );
    let mut bad = node.registration(&["no such NAME"]);
    assert_eq!(
        node.call("POST", "/v1/node/register", &bad).await.0,
        400,
        "a name that no rspec can ask for"
    );
    bad = node.registration(&[]);
    bad.ssh_host_keys = vec![format!("{KEY}\n@cert-authority * {KEY}")];
    assert_eq!(
        node.call("POST", "/v1/node/register", &bad).await.0,
        400,
        "a second line"
    );
    assert_eq!(node.register(&["kvm-microvm"]).await.0, 200);

    // vm_type is checked against what the node announces: when nodes are chosen ...
    let slice = |name: &str, vm_type: &str, nodes: &[&str]| NewSlice {
        name: name.into(),
        rspec: rspec(json!({ "vm_type": vm_type })),
        nodes: nodes.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    };
    let refused = world
        .call(
            "POST",
            "/v1/slices",
            &slice("example_xen", "xen-domain", &["announce.example.org"]),
        )
        .await;
    assert_eq!(refused.0, 400);
    let error = refused.json::<mandoline_api::authority::ErrorBody>().error;
    assert_eq!(error.attribute.as_deref(), Some("vm_type"));
    assert_eq!(error.value.as_deref(), Some("xen-domain"));
    assert_eq!(error.allowed.as_deref(), Some("kvm-microvm"));
    assert_eq!(error.node.as_deref(), Some("announce.example.org"));
    // ... when the rspec changes ...
    let made = world
        .call(
            "POST",
            "/v1/slices",
            &slice("example_kvm", "kvm-microvm", &["announce.example.org"]),
        )
        .await;
    assert_eq!(made.0, 201);
    let change = SliceChange {
        rspec: Some(rspec(json!({"vm_type": "xen-domain"}))),
        ..Default::default()
    };
    assert_eq!(
        world.call("PATCH", "/v1/slices/example_kvm", &change).await.0,
        400
    );
    // ... and when a node that was chosen before it had registered says what it has.
    let later = world.node("later.example.org").await;
    let made = world
        .call(
            "POST",
            "/v1/slices",
            &slice("example_xen", "xen-domain", &["later.example.org"]),
        )
        .await;
    assert_eq!(made.0, 201);
    assert_eq!(later.register(&["kvm-microvm"]).await.0, 200);
    assert_eq!(later.desired().await.slivers, vec![]);
    let sliver = &world.slivers("example_xen").await[0];
    assert_eq!(sliver.state, SliverState::Failed);
    assert!(
        sliver.reason.as_ref().unwrap().contains("kvm-microvm"),
        "{sliver:?}"
    );
    for name in ["example_xen", "example_kvm"] {
        assert_eq!(
            world.call("DELETE", &format!("/v1/slices/{name}"), &()).await.0,
            204
        );
    }
}

async fn slivers(world: &World) {
    let node = world.node("run.example.org").await;
    assert_eq!(node.register(&["kvm-microvm"]).await.0, 200);
    let empty = node.desired().await;
    assert_eq!(empty.slivers, vec![]);

    let person = NewPerson {
        email: "user@example.org".into(),
        first_name: "U".into(),
        last_name: "S".into(),
        password: Some(SECRET.into()),
        sites: vec!["example".into()],
        roles: vec!["user".into()],
        enabled: true,
    };
    assert_eq!(
        world
            .call("POST", "/v1/persons", &person)
            .await
            .json::<Person>()
            .roles,
        ["user"]
    );
    let user = world.sign_in("user@example.org").await;
    let key = NewKey {
        key: format!("{KEY} me@home"),
        email: None,
    };
    assert_eq!(world.call_as(&user, "POST", "/v1/keys", &key).await.0, 201);
    let slice = NewSlice {
        name: "example_run".into(),
        rspec: rspec(json!({"mem_limit": "128 MiB", "initscript": "#!/bin/sh\ntrue\n"})),
        nodes: vec!["run.example.org".into()],
        persons: vec!["user@example.org".into()],
        ..Default::default()
    };
    let made: Slice = world.call("POST", "/v1/slices", &slice).await.json();

    let wanted = node.desired().await;
    assert_ne!(wanted.revision, empty.revision);
    let sliver = &wanted.slivers[0];
    assert_eq!(
        (sliver.slice.as_str(), sliver.slice_id.as_str()),
        ("example_run", made.uuid.as_str())
    );
    assert_eq!(
        sliver.rspec,
        rspec(json!({"mem_limit": 134_217_728, "vm_type": "kvm-microvm"}))
    );
    assert_eq!(sliver.initscript.as_deref(), Some("#!/bin/sh\ntrue\n"));
    assert_eq!(sliver.keys, [format!("{KEY} me@home")]);
    assert!(sliver.enabled);

    // Unchanged: 304 for the revision that is known.
    let authorization = node.sign(NodeAuthAlgorithm::Ed25519, "GET", "/v1/node/slivers", b"", 0);
    let headers = [
        ("authorization", authorization.to_string()),
        ("if-none-match", format!("\"{}\"", wanted.revision)),
    ];
    assert_eq!(
        http(world.addr, "GET", "/v1/node/slivers", &headers, b"").await.0,
        304
    );

    // States come back; late ones and those of another slice are not taken for news.
    let uuid = made.uuid.as_str();
    let mut up = report("example_run", Some(uuid), 5, SliverState::Reachable);
    up.address = Some("10.128.0.2".into());
    up.ssh_host_keys = Some(vec![format!("{KEY} root@sliver")]);
    up.phases_us = [("boot".to_owned(), 1_500_000)].into();
    let status = |slivers| NodeStatus { slivers };
    assert_eq!(
        node.call("POST", "/v1/node/status", &status(vec![up])).await.0,
        204
    );
    let late = report("example_run", Some(uuid), 4, SliverState::Starting);
    let foreign = report(
        "example_run",
        Some("0192d1a0-0000-7000-8000-000000000000"),
        9,
        SliverState::Failed,
    );
    let unknown = report("example_none", None, 9, SliverState::Failed);
    assert_eq!(
        node.call("POST", "/v1/node/status", &status(vec![late, foreign, unknown]))
            .await
            .0,
        204
    );
    let slivers: Vec<Sliver> = world
        .call_as(&user, "GET", "/v1/slices/example_run/slivers", &())
        .await
        .json();
    let sliver = &slivers[0];
    assert_eq!(
        (sliver.state, sliver.address.as_deref()),
        (SliverState::Reachable, Some("10.128.0.2"))
    );
    assert_eq!(sliver.ssh_host_keys, [format!("{KEY} root@sliver")]);
    assert_eq!(sliver.node_host_keys, [format!("{KEY} root@node")]);
    assert_eq!(
        (sliver.vm_id.as_deref(), sliver.phases_us["boot"]),
        (Some("vm-1"), 1_500_000)
    );
    let login = sliver.ssh_endpoint.as_ref().unwrap();
    assert_eq!(
        (login.host.as_str(), login.port, login.user.as_str()),
        ("127.0.0.1", 2222, "example_run")
    );
    // What one report does not mention stays from the one before.
    let failed = report("example_run", Some(uuid), 6, SliverState::Failed);
    assert_eq!(
        node.call("POST", "/v1/node/status", &status(vec![failed]))
            .await
            .0,
        204
    );
    let sliver = &world.slivers("example_run").await[0];
    assert_eq!(
        (sliver.state, sliver.address.as_deref()),
        (SliverState::Failed, Some("10.128.0.2"))
    );

    // Another node cannot speak for this one.
    let stranger = world.node("stranger.example.org").await;
    assert_eq!(stranger.register(&["kvm-microvm"]).await.0, 200);
    let lie = report("example_run", Some(uuid), 99, SliverState::Gone);
    assert_eq!(
        stranger
            .call("POST", "/v1/node/status", &status(vec![lie]))
            .await
            .0,
        204
    );
    assert_eq!(world.slivers("example_run").await[0].state, SliverState::Failed);

    // Deleted and made again under its name it is another slice, of which nothing is known yet.
    assert_eq!(world.call("DELETE", "/v1/slices/example_run", &()).await.0, 204);
    assert_eq!(node.desired().await.slivers, vec![]);
    let again: Slice = world.call("POST", "/v1/slices", &slice).await.json();
    assert_ne!(again.uuid, made.uuid);
    assert_eq!(world.slivers("example_run").await[0].state, SliverState::Pending);
    let late = report("example_run", Some(uuid), 100, SliverState::Reachable);
    assert_eq!(
        node.call("POST", "/v1/node/status", &status(vec![late])).await.0,
        204
    );
    assert_eq!(world.slivers("example_run").await[0].state, SliverState::Pending);
}

/// Reads a stream until a text has come so many times.
async fn until(stream: &mut TcpStream, seen: &mut String, text: &str, times: usize) {
    let reading = async {
        let mut buffer = [0u8; 4096];
        while seen.matches(text).count() < times {
            let n = stream.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the stream ended: {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reading)
        .await
        .expect("no event");
}

async fn events(world: &World, url: &str) {
    let node = world.node("events.example.org").await;
    assert_eq!(node.register(&["kvm-microvm"]).await.0, 200);
    let path = "/v1/node/events";
    let authorization = node.sign(NodeAuthAlgorithm::Ed25519, "GET", path, b"", 0);
    let mut stream = open(
        world.addr,
        "GET",
        path,
        &[("authorization", authorization.to_string())],
        b"",
        "keep-alive",
    )
    .await;
    let mut seen = String::new();
    until(&mut stream, &mut seen, "event: slivers", 1).await;
    let slice = NewSlice {
        name: "example_told".into(),
        nodes: vec!["events.example.org".into()],
        ..Default::default()
    };
    assert_eq!(world.call("POST", "/v1/slices", &slice).await.0, 201);
    until(&mut stream, &mut seen, "event: slivers", 2).await;
    // Of a change that another process commits the poll tells.
    let other = Db::open(url).await.unwrap();
    in_write!(other, |c| {
        let change = mandoline_authority::domain::slices::SliceChange {
            enabled: Some(false),
            ..Default::default()
        };
        mandoline_authority::domain::slices::update(c, &Caller::authority(), &"example_told".into(), &change)
            .await
    })
    .unwrap();
    until(&mut stream, &mut seen, "event: slivers", 3).await;
    other.close().await;

    // Persons: from where they were, and live.
    let headers = [("authorization", format!("Bearer {}", world.token))];
    let mut stream = open(
        world.addr,
        "GET",
        "/v1/events?since=0",
        &headers,
        b"",
        "keep-alive",
    )
    .await;
    let mut seen = String::new();
    until(&mut stream, &mut seen, "event: node_registered", 1).await;
    assert_eq!(world.call("DELETE", "/v1/slices/example_told", &()).await.0, 204);
    until(&mut stream, &mut seen, "\"slice\":\"example_told\"", 4).await;
    assert!(seen.contains("event: slice_deleted"));
    assert!(!seen.contains(&node.node_key), "no secrets in events");
}

async fn expiry(world: &World) {
    let slice = NewSlice {
        name: "example_short".into(),
        ..Default::default()
    };
    assert_eq!(world.call("POST", "/v1/slices", &slice).await.0, 201);
    in_write!(world.db, |c| {
        sqlx::query("UPDATE slices SET expires = 1 WHERE name = 'example_short'")
            .execute(&mut *c)
            .await?;
        mandoline_authority::domain::slices::expire(c).await
    })
    .unwrap();
    assert_eq!(world.call("GET", "/v1/slices/example_short", &()).await.0, 404);
    let kept: i64 = in_write!(world.db, |c| {
        Ok(
            sqlx::query_scalar("SELECT COUNT(*) FROM slices WHERE name = 'example_short' AND deleted = 1")
                .fetch_one(c)
                .await?,
        )
    })
    .unwrap();
    assert_eq!(kept, 1, "kept for audit");
}

/// Callers that go away in the middle of a look leave no transaction open for the next.
async fn hanging_up(db: &Db) {
    let count = async || {
        in_read!(db, |c| Ok(sqlx::query_scalar::<_, i64>(
            "SELECT COUNT(*) FROM nodes"
        )
        .fetch_one(c)
        .await?))
    };
    for polls in 0..60 {
        let mut looking = Box::pin(count());
        for _ in 0..polls % 12 {
            let once = std::future::poll_fn(|cx| Poll::Ready(looking.as_mut().poll(cx).is_ready()));
            if once.await {
                break;
            }
            // The database answers meanwhile, and nobody reads it: that is where a connection can be lost.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(looking);
        in_write!(db, |c| mandoline_authority::db::next_id(c, "test").await).unwrap();
    }
    assert_eq!(
        in_write!(db, |c| mandoline_authority::db::next_id(c, "test").await).unwrap(),
        61
    );
}

/// Many writers at once: nothing is lost, nobody sees an error of the database.
async fn concurrency(world: &World) {
    let world = Arc::new((world.addr, world.token.clone()));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let world = Arc::clone(&world);
        tasks.spawn(async move {
            for i in 0..5 {
                let node = NewNode {
                    hostname: format!("n{task}-{i}.many.org"),
                    site: "example".into(),
                    boot_state: None,
                };
                let headers = [("authorization", format!("Bearer {}", world.1))];
                let answer = http(
                    world.0,
                    "POST",
                    "/v1/nodes",
                    &headers,
                    &serde_json::to_vec(&node).unwrap(),
                )
                .await;
                assert_eq!(answer.0, 201, "{}", String::from_utf8_lossy(&answer.1));
            }
        });
    }
    tasks.join_all().await;
    let headers = [("authorization", format!("Bearer {}", world.1))];
    let nodes: Vec<Json> = http(world.0, "GET", "/v1/nodes", &headers, b"").await.json();
    let many = nodes
        .iter()
        .filter(|node| node["hostname"].as_str().unwrap().ends_with(".many.org"))
        .count();
    assert_eq!(many, 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nodes_side() {
    let databases = common::databases("node_side").await;
    for (name, url) in &databases.urls {
        eprintln!("on {name}");
        let world = World::new(url).await;
        signatures(&world).await;
        announcements(&world).await;
        slivers(&world).await;
        events(&world, url).await;
        expiry(&world).await;
        concurrency(&world).await;
        hanging_up(&world.db).await;
        world.stop.send(true).unwrap();
        world.db.close().await;
    }
}
