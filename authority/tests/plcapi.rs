//! PLCAPI from Python's `xmlrpc.client`, on each database (the tests are in `test_plcapi.py`).

#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

fn python(database: Option<&str>) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/test_plcapi.py");
    let mut command = Command::new("python3");
    command.arg(script).env(
        "MANDOLINE_AUTHORITY_BIN",
        env!("CARGO_BIN_EXE_mandoline-authority"),
    );
    match database {
        Some(url) => command.env("MANDOLINE_TEST_DATABASE", url),
        None => command.env_remove("MANDOLINE_TEST_DATABASE"),
    };
    let output = command
        .env_remove("MANDOLINE_DATABASE")
        .output()
        .expect("python3 is needed (Debian package python3)");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

#[test]
fn on_sqlite() {
    python(None);
}

#[tokio::test]
async fn on_postgresql() {
    match common::Postgres::find() {
        Ok(server) => python(Some(&server.database("plcapi").await)),
        Err(why) => eprintln!("SKIPPED on PostgreSQL: {why}"),
    }
}
