//! The XML-RPC facade, driven by Python's `xmlrpc.client` over the real Unix sockets.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use support::{Node, TestBackend};
use tokio::process::Command;

#[tokio::test]
async fn pythons_client_makes_a_sliver_and_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/xmlrpc_client.py");
    let run = dir.path().join("run");
    let output = Command::new("python3")
        .arg(script)
        .args([run.join("owner.sock"), run.join("nm.sock")])
        .output()
        .await
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    node.stop().await;
}
