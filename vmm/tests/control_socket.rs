//! The monitor as its clients see it: a process with a control socket, configured and started there.
//!
//! The order of requests is that of `firecracker-go-sdk` (its `handlers.go`). Parts that start a guest need
//! `/dev/kvm`; without it each says so and passes.

#![allow(clippy::unwrap_used)] // a test ends where it fails

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use mandoline_vmm::boot::elf;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

const ENTRY: u64 = 0x10_0000;

/// A monitor without a guest, and a connection to it.
struct Monitor {
    process: Child,
    dir: tempfile::TempDir,
    client: Client,
}

impl Monitor {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let process = Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"))
            .args(["--id", "vm1", "--api-sock"])
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let client = Client::connect(&socket);
        Self { process, dir, client }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Waits for the process's end: its exit status and what the guest printed.
    fn finish(mut self) -> (Option<i32>, String) {
        let mut output = String::new();
        self.process
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        (self.process.wait().unwrap().code(), output)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One connection that stays open.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path) -> Self {
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Self(stream),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn answer(&mut self) -> (u16, Value) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    fn send(&mut self, method: &str, path: &str, body: &Value, fds: &[(&str, BorrowedFd<'_>)]) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let mut text = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n",
            body.len()
        );
        if !fds.is_empty() {
            let names: Vec<&str> = fds.iter().map(|(name, _)| *name).collect();
            text.push_str(&format!("Mandoline-Fd-Names: {}\r\n", names.join(", ")));
        }
        text.push_str("\r\n");
        text.push_str(&body);
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|(_, fd)| *fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let text = IoSlice::new(text.as_bytes());
        let sent = rustix::net::sendmsg(&self.0, &[text], &mut ancillary, SendFlags::empty()).unwrap();
        assert_eq!(sent, text.len());
    }

    fn call(&mut self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.send(method, path, body, &[]);
        self.answer()
    }

    /// A request that has to succeed.
    fn ok(&mut self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, &body);
        assert!(matches!(status, 200 | 204), "{method} {path}: {status} {answer}");
        answer
    }

    /// A request that is refused: why.
    fn refused(&mut self, method: &str, path: &str, body: Value) -> String {
        let (status, answer) = self.call(method, path, &body);
        assert_eq!(status, 400, "{method} {path}: {answer}");
        answer["fault_message"].as_str().unwrap().to_owned()
    }
}

fn kvm() -> bool {
    let there = mandoline_vmm::machine::open_kvm(None).is_ok();
    if !there {
        eprintln!("skipped in part, since there is no KVM here");
    }
    there
}

/// Prints "Hi" and runs for ever.
fn kernel() -> Vec<u8> {
    let mut code = Vec::new();
    for byte in b"Hi" {
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]);
    }
    code.extend([0xeb, 0xfe]);
    elf::tiny(&code, ENTRY)
}

/// Prints "Hi" and powers off.
fn short_kernel() -> Vec<u8> {
    let mut code = Vec::new();
    for byte in b"Hi" {
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]);
    }
    // mov byte [0xc0000008], 1; l: jmp l
    code.extend([0xc6, 0x05, 0x08, 0x00, 0x00, 0xc0, 0x01, 0xeb, 0xfe]);
    elf::tiny(&code, ENTRY)
}

const NOT_BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const NOT_AFTER: &str = "The requested operation is not supported after starting the microVM.";

#[test]
fn a_vm_is_configured_started_paused_and_looked_at_in_the_order_of_firecrackers_go_client() {
    // Filters are off by that client's default, and have to allow all this when they are on.
    for arguments in [&["--no-seccomp"][..], &[]] {
        configure_start_and_look(Monitor::start(arguments));
    }
}

fn configure_start_and_look(mut monitor: Monitor) {
    let (kernel, disk) = (
        monitor.file("vmlinux", &kernel()),
        monitor.file("disk", &[0; 4096]),
    );
    let log = monitor.file("log", b"");
    let vsock = monitor.dir.path().join("v.sock");
    let client = &mut monitor.client;
    assert_eq!(client.ok("GET", "/machine-config", Value::Null)["vcpu_count"], 1);
    client.ok(
        "PUT",
        "/logger",
        json!({"log_path": log, "level": "Debug", "show_level": true, "show_log_origin": false}),
    );
    client.ok(
        "PUT",
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false}),
    );
    client.ok("PATCH", "/machine-config", json!({"mem_size_mib": 32}));
    assert_eq!(
        client.ok("GET", "/machine-config", Value::Null)["mem_size_mib"],
        32
    );
    let start = json!({"action_type": "InstanceStart"});
    let message = client.refused("PUT", "/actions", start.clone());
    assert_eq!(message, "Cannot start microvm without kernel configuration.");
    client.ok(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": kernel, "boot_args": "quiet"}),
    );
    client.ok(
        "PUT",
        "/drives/1",
        json!({"drive_id": "1", "is_root_device": true, "is_read_only": false, "path_on_host": disk}),
    );
    client.ok(
        "PUT",
        "/vsock",
        json!({"guest_cid": 3, "uds_path": vsock, "vsock_id": "old"}),
    );
    client.ok("PUT", "/entropy", json!({}));
    assert_eq!(
        client.refused("PATCH", "/vm", json!({"state": "Paused"})),
        NOT_BEFORE
    );
    assert_eq!(
        client.refused("PATCH", "/drives/1", json!({"drive_id": "1"})),
        NOT_BEFORE
    );
    let info = client.ok("GET", "/", Value::Null);
    assert_eq!(
        (&info["state"], &info["id"]),
        (&json!("Not started"), &json!("vm1"))
    );
    if !kvm() {
        return;
    }
    client.ok("PUT", "/actions", start.clone());
    assert_eq!(client.ok("GET", "/", Value::Null)["state"], "Running");
    assert_eq!(client.refused("PUT", "/actions", start), NOT_AFTER);
    assert_eq!(client.refused("PUT", "/entropy", json!({})), NOT_AFTER);
    client.ok("PATCH", "/vm", json!({"state": "Paused"}));
    assert_eq!(client.ok("GET", "/", Value::Null)["state"], "Paused");
    client.ok("PATCH", "/vm", json!({"state": "Resumed"}));
    let config = client.ok("GET", "/vm/config", Value::Null);
    assert_eq!(config["drives"][0]["path_on_host"], json!(disk));
    assert!(vsock.exists());
    client.ok(
        "PUT",
        "/logger",
        json!({"log_path": monitor.dir.path().join("later"), "level": "Error"}),
    );
    assert!(monitor.dir.path().join("later").exists());
}

/// Puts a drive, a balloon and metrics into a monitor and starts its guest, which runs for ever.
fn start_with_devices(monitor: &mut Monitor) {
    let (kernel, disk) = (
        monitor.file("vmlinux", &kernel()),
        monitor.file("disk", &[0; 4096]),
    );
    let (metrics, pmem) = (monitor.file("metrics", b""), monitor.file("pmem", &[0; 2 << 20]));
    let client = &mut monitor.client;
    client.ok("PUT", "/metrics", json!({"metrics_path": metrics}));
    client.ok("PUT", "/boot-source", json!({"kernel_image_path": kernel}));
    client.ok(
        "PUT",
        "/drives/data",
        json!({"drive_id": "data", "is_root_device": false, "path_on_host": disk}),
    );
    client.ok(
        "PUT",
        "/pmem/root",
        json!({"id": "root", "path_on_host": pmem, "read_only": true}),
    );
    client.ok(
        "PUT",
        "/balloon",
        json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}),
    );
    client.ok("PUT", "/actions", json!({"action_type": "InstanceStart"}));
}

#[test]
fn devices_change_while_the_guest_runs() {
    if !kvm() {
        return;
    }
    let mut monitor = Monitor::start(&[]);
    start_with_devices(&mut monitor);
    let bigger = monitor.file("bigger", &[0; 8192]);
    let client = &mut monitor.client;
    let bucket = |size: u64| json!({"size": size, "refill_time": 100});
    client.ok(
        "PATCH",
        "/drives/data",
        json!({"drive_id": "data", "path_on_host": bigger, "rate_limiter": {"bandwidth": bucket(4096), "ops": bucket(10)}}),
    );
    // Only what is named changes; a size of 0 takes a limit away.
    client.ok(
        "PATCH",
        "/drives/data",
        json!({"drive_id": "data", "rate_limiter": {"ops": bucket(0)}}),
    );
    client.ok(
        "PATCH",
        "/pmem/root",
        json!({"id": "root", "rate_limiter": {"ops": bucket(3)}}),
    );
    client.ok("PATCH", "/balloon", json!({"amount_mib": 8}));
    client.ok(
        "PATCH",
        "/balloon/statistics",
        json!({"stats_polling_interval_s": 5}),
    );
    assert_eq!(
        client.ok("GET", "/balloon/statistics", Value::Null)["target_mib"],
        8
    );
    assert_eq!(client.ok("GET", "/balloon", Value::Null)["amount_mib"], 8);
    let config = client.ok("GET", "/vm/config", Value::Null);
    assert_eq!(config["drives"][0]["path_on_host"], json!(bigger));
    assert_eq!(
        config["drives"][0]["rate_limiter"],
        json!({"bandwidth": bucket(4096)})
    );
    assert_eq!(config["pmem"][0]["rate_limiter"], json!({"ops": bucket(3)}));
    assert_eq!(config["balloon"]["stats_polling_interval_s"], 5);
    for (path, body, words) in [
        ("/drives/none", json!({"drive_id": "none"}), "no such drive"),
        (
            "/drives/data",
            json!({"drive_id": "data", "path_on_host": "/no/such"}),
            "/no/such",
        ),
        (
            "/network-interfaces/eth0",
            json!({"iface_id": "eth0"}),
            "no such device",
        ),
        ("/balloon", json!({"amount_mib": 100_000}), "100000"),
        (
            "/balloon/statistics",
            json!({"stats_polling_interval_s": 0}),
            "is 0",
        ),
        ("/vm", json!({"state": "Parked"}), "Parked"),
    ] {
        let message = client.refused("PATCH", path, body);
        assert!(message.contains(words), "{path}: {message}");
    }
    // What was refused changed nothing.
    assert_eq!(client.ok("GET", "/vm/config", Value::Null), config);
}

#[test]
fn metrics_are_a_line_for_each_flush_and_one_at_the_end() {
    if !kvm() {
        return;
    }
    let mut monitor = Monitor::start(&[]);
    start_with_devices(&mut monitor);
    let path = monitor.dir.path().join("metrics");
    let client = &mut monitor.client;
    // The guest prints two characters: two port writes.
    while client.ok("GET", "/metrics", Value::Null)["vcpu"]["exit_io_out"] != 2 {}
    let flush = json!({"action_type": "FlushMetrics"});
    client.ok("PUT", "/actions", flush.clone());
    client.refused("PATCH", "/vm", json!({"state": "Parked"}));
    client.ok("PUT", "/actions", flush);
    let pid = rustix::process::Pid::from_child(&monitor.process);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(monitor.process.wait().unwrap().code(), Some(67));
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["id"], "vm1");
    assert_eq!(lines[0]["vcpu"]["exit_io_out"], 2);
    assert_eq!(lines[0]["block_data"]["read_count"], 0);
    assert!(lines[0]["balloon"].is_object());
    let refused = |line: &Value| line["api_server"]["refused_count"].as_u64().unwrap();
    assert_eq!(refused(&lines[1]), refused(&lines[0]) + 1);
}

#[test]
fn a_jailed_monitor_takes_descriptors_and_refuses_paths() {
    if !kvm() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: the jail needs root");
        return;
    }
    let mut monitor = Monitor::start(&["--jail-uid", "60000", "--jail-gid", "60000"]);
    start_with_devices(&mut monitor);
    let other = monitor.file("other", &[0; 8192]);
    let client = &mut monitor.client;
    let body = json!({"drive_id": "data", "path_on_host": other});
    assert!(client.refused("PATCH", "/drives/data", body).contains("jailed"));
    let log = json!({"log_path": other});
    assert!(client.refused("PUT", "/logger", log).contains("jailed"));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(other)
        .unwrap();
    let body = json!({"drive_id": "data", "path_on_host": "fd:disk2"});
    client.send("PATCH", "/drives/data", &body, &[("disk2", file.as_fd())]);
    assert_eq!(client.answer().0, 204);
    let drives = &client.ok("GET", "/vm/config", Value::Null)["drives"];
    assert_eq!(drives[0]["path_on_host"], "fd:disk2");
    assert!(
        client.refused("PATCH", "/drives/data", body).contains("disk2"),
        "it is used up"
    );
}

#[test]
fn a_start_that_fails_says_why_and_can_be_tried_again() {
    if !kvm() {
        return;
    }
    let mut monitor = Monitor::start(&[]);
    let (bad, good) = (
        monitor.file("bad", b"not a kernel"),
        monitor.file("good", &short_kernel()),
    );
    let vsock = monitor.dir.path().join("v.sock");
    let client = &mut monitor.client;
    let start = json!({"action_type": "InstanceStart"});
    client.ok("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": vsock}));
    client.ok("PUT", "/boot-source", json!({"kernel_image_path": bad}));
    assert!(
        client
            .refused("PUT", "/actions", start.clone())
            .contains("kernel image")
    );
    assert_eq!(client.ok("GET", "/", Value::Null)["state"], "Not started");
    client.ok("PUT", "/boot-source", json!({"kernel_image_path": good}));
    client.ok("PUT", "/actions", start);
    assert_eq!(monitor.finish(), (Some(0), "Hi".to_owned()));
}

#[test]
fn descriptors_come_with_requests() {
    let mut monitor = Monitor::start(&[]);
    let kernel = std::fs::File::open(monitor.file("vmlinux", &short_kernel())).unwrap();
    let client = &mut monitor.client;
    let boot = json!({"kernel_image_path": "fd:kernel"});
    let message = client.refused("PUT", "/boot-source", boot.clone());
    assert!(message.contains("\"kernel\""), "{message}");
    client.send("PUT", "/boot-source", &boot, &[("kernel", kernel.as_fd())]);
    assert_eq!(client.answer().0, 204);
    client.send("PUT", "/entropy", &json!({}), &[("kernel", kernel.as_fd())]);
    assert_eq!(client.answer().0, 400, "the name is taken");
    if !kvm() {
        return;
    }
    client.ok("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    assert_eq!(monitor.finish(), (Some(0), "Hi".to_owned()));
}

/// Another HTTP client than ours: Python's, with a connection that stays open.
#[test]
fn pythons_http_client_configures_and_starts() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/control_socket.py");
    if !kvm() || Command::new("python3").arg("--version").output().is_err() {
        eprintln!("skipped: there is no Python here, or no KVM");
        return;
    }
    let monitor = Monitor::start(&["--boot-timer"]);
    let kernel = monitor.file("vmlinux", &short_kernel());
    let status = Command::new("python3")
        .arg(script)
        .arg(monitor.dir.path().join("api.sock"))
        .arg(&kernel)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(monitor.finish(), (Some(0), "Hi".to_owned()));
}

#[test]
fn a_signal_before_boot_ends_the_monitor() {
    let mut monitor = Monitor::start(&[]);
    monitor.client.ok("GET", "/version", Value::Null);
    let pid = rustix::process::Pid::from_child(&monitor.process);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(monitor.finish().0, Some(67));
}

#[test]
fn requests_that_cannot_be_are_refused_in_firecrackers_words() {
    let mut monitor = Monitor::start(&[]);
    let client = &mut monitor.client;
    for (method, path, body, words) in [
        (
            "GET",
            "/nothing",
            Value::Null,
            "Invalid request method and/or path: GET nothing.",
        ),
        (
            "DELETE",
            "/drives/1",
            Value::Null,
            "Invalid request method and/or path: DELETE drives/1.",
        ),
        (
            "PUT",
            "/vm",
            json!({"state": "Paused"}),
            "Invalid request method and/or path: PUT vm.",
        ),
        ("PUT", "/boot-source", Value::Null, "Empty PUT request."),
        ("PATCH", "/machine-config", json!({}), "Empty PATCH request."),
        ("GET", "/", json!({}), "GET request cannot have a body."),
        (
            "PUT",
            "/boot-source",
            json!({"kernel": "x"}),
            "unknown field `kernel`",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 33, "mem_size_mib": 64}),
            "vcpu_count is 33; allowed: 1 to 32",
        ),
        (
            "PUT",
            "/drives/1",
            json!({"drive_id": "2", "is_root_device": true, "path_on_host": "/x"}),
            "[1] does not match the id from the body [2]",
        ),
        (
            "PUT",
            "/drives/1",
            json!({"drive_id": "1", "is_root_device": true, "path_on_host": "/no/such"}),
            "/no/such",
        ),
        ("PUT", "/snapshot/create", json!({}), "does not have it"),
        ("PUT", "/mmds", json!({}), "does not have it"),
    ] {
        let message = client.refused(method, path, body);
        assert!(message.contains(words), "{method} {path}: {message}");
    }
    // Nothing of that is in the configuration.
    assert_eq!(client.ok("GET", "/vm/config", Value::Null)["drives"], json!([]));
}
