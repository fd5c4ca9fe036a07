//! The agent as PID 1 of namespaces of its own, on this machine's system as its read-only root: join, exec,
//! ssh, keys, boot script, shutdown, as a sliver has them but for vsock, the disk and the machine itself.
//! Needs root (namespaces, mounts) and a Unix system with `unshare`; says so and passes where it can't run.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mandoline_api::agent::frame::decode;
use mandoline_api::agent::{
    Bytes, Cidr, ErrorKind, Event, Exec, ExecEvent, ExecInput, ExitStatus, FrameError, HelloReply,
    Initscript, Interface, Join, JoinReply, Phase, Request, SetKeysReply, ShutdownMode, ShutdownReply,
    StatusReply, VERSION, decode_reply, read_frame, write_frame,
};
use serde::de::DeserializeOwned;

/// Makes the read-only root as a sliver has it, then becomes the agent: pid 1 here.
const STAGE: &str = r#"
set -e
mount --make-rprivate /
mount --bind / "$ROOT"
mount -o remount,bind,ro "$ROOT"
cd "$ROOT"
pivot_root . mnt
cd /
mount --rbind mnt/dev dev
mount -t proc proc proc
umount -l /mnt
exec "$AGENT" --inherited
"#;

struct Guest {
    unshare: Child,
    socket: PathBuf,
    events: UnixStream,
    dir: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // --kill-child: the namespace ends with it.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

impl Guest {
    /// `None` (and a line that says why) where this machine cannot.
    fn start() -> Option<Guest> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root, for namespaces and mounts");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("root");
        fs::create_dir(&root).expect("made");
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        let (events, theirs) = UnixStream::pair().expect("a pair");
        events
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("set");
        let descriptors = [(listener.as_raw_fd(), 20), (theirs.as_raw_fd(), 21)];
        let mut command = Command::new("unshare");
        command
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "/bin/sh",
                "-c",
                STAGE,
            ])
            .env("ROOT", &root)
            .env("AGENT", env!("CARGO_BIN_EXE_mandoline-agent"))
            .stdin(Stdio::null());
        // SAFETY: dup2 is async-signal-safe. Both targets are above what is open here, and the
        // sources are moved out of their way first.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in descriptors {
                    let high = libc::fcntl(from, libc::F_DUPFD, 30);
                    if high < 0 || libc::dup2(high, to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                    libc::close(high);
                }
                Ok(())
            });
        }
        let unshare = match command.spawn() {
            Ok(child) => child,
            Err(e) => {
                eprintln!("skipped: unshare (package util-linux): {e}");
                return None;
            }
        };
        Some(Guest {
            unshare,
            socket,
            events,
            dir,
        })
    }

    fn event(&mut self) -> Event {
        let body = read_frame(&mut self.events)
            .expect("an event")
            .expect("not the end");
        decode(&body).expect("an event")
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("connected");
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("set");
        stream
    }

    fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T, FrameError> {
        let mut stream = self.stream();
        write_frame(&mut stream, request)?;
        decode_reply(&read_frame(&mut stream)?.expect("an answer"))
    }

    fn exec(&self, exec: Exec, input: &[u8]) -> (String, String, ExitStatus) {
        let mut stream = self.stream();
        write_frame(&mut stream, &Request::Exec(exec)).expect("sent");
        for data in input.chunks(60_000) {
            write_frame(
                &mut stream,
                &ExecInput::Stdin {
                    data: Bytes(data.to_vec()),
                },
            )
            .expect("sent");
        }
        write_frame(&mut stream, &ExecInput::StdinEof).expect("sent");
        collect(&mut stream)
    }

    fn shell(&self, script: &str) -> String {
        let argv = vec!["/bin/sh".into(), "-c".into(), script.into()];
        let (stdout, stderr, status) = self.exec(
            Exec {
                argv,
                ..Exec::default()
            },
            b"",
        );
        assert_eq!(status.code, Some(0), "{script}: {stderr}");
        stdout.trim_end().to_owned()
    }
}

fn collect(stream: &mut UnixStream) -> (String, String, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let body = read_frame(stream).expect("a frame").expect("not the end");
        match decode_reply(&body).expect("an event") {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout { data } => stdout.extend(data.0),
            ExecEvent::Stderr { data } => stderr.extend(data.0),
            ExecEvent::Exited(status) => {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                return (text(&stdout), text(&stderr), status);
            }
        }
    }
}

fn remote(error: FrameError) -> ErrorKind {
    match error {
        FrameError::Remote(body) => body.kind,
        other => panic!("no answer of the agent's: {other}"),
    }
}

fn join() -> Join {
    Join {
        entropy: Bytes(vec![42; 32]),
        slice: "plc.princeton_codeen".into(),
        hostname: "codeen.node1".into(),
        time_unix_ns: None,
        interface: None,
        dns: vec!["10.128.0.1".parse().expect("valid")],
        disk: None,
        keys: vec![],
        initscript: None,
    }
}

#[test]
fn a_life() {
    let Some(mut guest) = Guest::start() else { return };
    let Event::Up(up) = guest.event() else {
        panic!("the first event is `up`")
    };
    assert_eq!((up.version, up.phase), (VERSION, Phase::Up));

    // Up: no identity, a read-only root, nothing that can be joined with nonsense.
    let hello: HelloReply = guest.call(&Request::Hello).expect("an answer");
    assert_eq!(hello.listen_ns, up.listen_ns);
    assert_eq!(
        guest.shell("touch /etc/x 2>/dev/null || echo read-only"),
        "read-only"
    );
    let keys = guest
        .call::<SetKeysReply>(&Request::SetKeys { keys: vec![] })
        .expect_err("not joined");
    assert_eq!(remote(keys), ErrorKind::WrongPhase);
    let bad = Join {
        entropy: Bytes(vec![0; 3]),
        ..join()
    };
    assert_eq!(
        remote(
            guest
                .call::<JoinReply>(&Request::Join(bad.into()))
                .expect_err("short")
        ),
        ErrorKind::BadRequest
    );
    let missing = Join {
        disk: Some("/dev/there-is-none".into()),
        ..join()
    };
    match guest
        .call::<JoinReply>(&Request::Join(missing.into()))
        .expect_err("no disk")
    {
        FrameError::Remote(body) => {
            assert_eq!(
                (body.kind, body.step.as_deref()),
                (ErrorKind::NotFound, Some("disk"))
            );
        }
        other => panic!("{other}"),
    }

    // A network interface as a tap would be: one end of a pair.
    guest.shell("ip link add eth0 address 02:00:0a:80:00:05 type veth peer name gw && ip link set gw up && ip link set gw address 02:00:00:00:00:99");
    let key = guest.dir.path().join("key");
    let keygen = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&key)
        .status();
    let have_ssh = keygen.is_ok_and(|status| status.success()) && Path::new("/usr/sbin/sshd").exists();
    if !have_ssh {
        eprintln!(
            "the rest is skipped: ssh-keygen and sshd (packages openssh-client, openssh-server) are wanted"
        );
        return;
    }
    let public = fs::read_to_string(key.with_extension("pub"))
        .expect("readable")
        .trim()
        .to_owned();
    let cidr = |text: &str| text.parse::<Cidr>().expect("valid");
    let joining = Join {
        interface: Some(Interface {
            mac: Some("02:00:0A:80:00:05".into()),
            addresses: vec![cidr("10.128.0.5/32"), cidr("fd00::5/128")],
            gateway: Some("10.128.0.1".parse().expect("valid")),
            gateway6: Some("fd00::1".parse().expect("valid")),
            mtu: Some(1400),
        }),
        keys: vec![public.clone()],
        initscript: Some("#!/bin/sh\necho said by the script\necho to stderr >&2\nexit 3\n".into()),
        ..join()
    };
    let reply: JoinReply = guest
        .call(&Request::Join(joining.clone().into()))
        .expect("joined");
    println!("join: {:?}", reply.timings_us);
    assert!(
        reply
            .ssh_host_keys
            .iter()
            .any(|key| key.starts_with("ssh-ed25519 ")),
        "{:?}",
        reply.ssh_host_keys
    );

    // The boot script ends with its code, apart from everything else.
    let failed = Initscript::Failed(ExitStatus {
        code: Some(3),
        signal: None,
    });
    assert_eq!(guest.event(), Event::InitscriptDone { initscript: failed });
    let status: StatusReply = guest.call(&Request::Status).expect("an answer");
    assert_eq!(
        (status.phase, status.initscript, status.ssh_listening),
        (Phase::Joined, failed, true)
    );
    assert_eq!(
        guest.shell("cat /var/log/initscript.log"),
        "said by the script\nto stderr"
    );

    // Identity and network, as the kernel and the files say.
    assert_eq!(
        guest.shell("hostname; cat /etc/hostname"),
        "codeen.node1\ncodeen.node1"
    );
    assert_eq!(guest.shell("cat /etc/resolv.conf"), "nameserver 10.128.0.1");
    assert_eq!(guest.shell("cat /sys/class/net/eth0/mtu"), "1400");
    assert!(guest.shell("ip -4 addr show eth0").contains("inet 10.128.0.5/32"));
    let routes = guest.shell("ip -4 route");
    assert!(
        routes.contains("default via 10.128.0.1 dev eth0") && routes.contains("10.128.0.1 dev eth0"),
        "{routes}"
    );
    assert!(
        guest
            .shell("ip -6 route")
            .contains("default via fd00::1 dev eth0")
    );
    assert!(!guest.shell("ip -6 addr show eth0").contains("tentative"));
    assert_eq!(guest.shell("findmnt -no FSTYPE /"), "overlay");
    assert_eq!(
        guest.shell("stat -c %a /root/.ssh /root/.ssh/authorized_keys /run/mandoline"),
        "700\n600\n700"
    );
    assert_eq!(
        guest
            .shell("touch /etc/x && (mountpoint -q /mnt || echo free) && ls /run/mandoline/disk/upper/etc/x"),
        "free\n/run/mandoline/disk/upper/etc/x"
    );
    assert!(
        !Path::new("/etc/x").exists(),
        "nothing goes through to the shared root"
    );

    // The same join again has the same answer; another is refused.
    let again: JoinReply = guest
        .call(&Request::Join(joining.clone().into()))
        .expect("the same answer");
    assert_eq!(again, reply);
    let other = Join {
        hostname: "other".into(),
        ..joining
    };
    assert_eq!(
        remote(
            guest
                .call::<JoinReply>(&Request::Join(other.into()))
                .expect_err("another")
        ),
        ErrorKind::AlreadyJoined
    );

    exec_sessions(&guest);

    // ssh with the key, against the host key that the join told; not without the key. (Loopback of the
    // guest's own network namespace, from outside: the client runs in it.)
    let known = guest.dir.path().join("known_hosts");
    let lines: String = reply
        .ssh_host_keys
        .iter()
        .map(|key| {
            format!(
                "127.0.0.1 {key}
"
            )
        })
        .collect();
    fs::write(&known, lines).expect("written");
    let ssh = |guest: &Guest| {
        let namespace = format!("--net=/proc/{}/ns/net", guest.agent_pid());
        Command::new("nsenter")
            .arg(namespace)
            .args([
                "ssh",
                "-F",
                "none",
                "-o",
                "BatchMode=yes",
                "-o",
                "StrictHostKeyChecking=yes",
                "-i",
            ])
            .arg(&key)
            .arg("-o")
            .arg(format!("UserKnownHostsFile={}", known.display()))
            .args(["root@127.0.0.1", "hostname; echo $$ >&2"])
            .output()
            .expect("ssh runs")
    };
    let out = ssh(&guest);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "codeen.node1\n");

    let unchanged: SetKeysReply = guest
        .call(&Request::SetKeys { keys: vec![public] })
        .expect("an answer");
    assert_eq!(
        unchanged,
        SetKeysReply {
            keys: 1,
            changed: false
        }
    );
    let none: SetKeysReply = guest.call(&Request::SetKeys { keys: vec![] }).expect("an answer");
    assert_eq!(
        none,
        SetKeysReply {
            keys: 0,
            changed: true
        }
    );
    let out = ssh(&guest);
    assert_eq!(out.status.code(), Some(255), "no key, no way in");

    // The end: a process that ignores SIGTERM is killed, the namespace ends with the agent's reboot(2).
    guest.shell("(trap '' TERM; while :; do sleep 1000; done) >/dev/null 2>&1 &");
    let mode = ShutdownMode::Poweroff;
    let reply: ShutdownReply = guest
        .call(&Request::Shutdown {
            mode,
            grace_ms: Some(200),
        })
        .expect("an answer");
    assert_eq!(reply.mode, mode);
    assert_eq!(guest.event(), Event::Stopping { mode });
    let ended = guest.unshare.wait().expect("ended");
    // reboot_pid_ns: the kernel ends a pid namespace's init with SIGINT for power-off, SIGHUP for restart;
    // unshare passes it on.
    assert_eq!(
        ended.signal().or(ended.code().map(|code| code - 128)),
        Some(libc::SIGINT),
        "{ended:?}"
    );
}

impl Guest {
    /// The agent's pid out here: unshare's only child.
    fn agent_pid(&self) -> u32 {
        let pid = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("readable");
        children.trim().parse().expect("one child")
    }
}

fn exec_sessions(guest: &Guest) {
    let argv = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();

    // Input, output and both ends' codes; a megabyte goes there and back through bounded buffers.
    let cat = Exec {
        argv: argv(&["cat"]),
        stdin: true,
        ..Exec::default()
    };
    let data = vec![b'x'; 1 << 20];
    let (stdout, _, status) = guest.exec(cat, &data);
    assert_eq!((stdout.len(), status.code), (data.len(), Some(0)));
    let fails = Exec {
        argv: argv(&["sh", "-c", "echo out; echo err >&2; exit 7"]),
        ..Exec::default()
    };
    let (stdout, stderr, status) = guest.exec(fails, b"");
    assert_eq!(
        (stdout.as_str(), stderr.as_str(), status.code),
        ("out\n", "err\n", Some(7))
    );

    // A program that reads nothing while a host writes: neither holds the other for ever.
    let deaf = Exec {
        argv: argv(&["true"]),
        stdin: true,
        ..Exec::default()
    };
    assert_eq!(guest.exec(deaf, &vec![0; 300_000]).2.code, Some(0));

    // Another user, with its groups and without root's.
    let nobody = Exec {
        argv: argv(&["id", "-un"]),
        user: Some("nobody".into()),
        ..Exec::default()
    };
    assert_eq!(guest.exec(nobody, b"").0, "nobody\n");
    let error = |exec: Exec| {
        remote(
            guest
                .call::<ExecEvent>(&Request::Exec(exec))
                .expect_err("refused"),
        )
    };
    assert_eq!(
        error(Exec {
            argv: argv(&["id"]),
            user: Some("no-such-user".into()),
            ..Exec::default()
        }),
        ErrorKind::NotFound
    );
    assert_eq!(
        error(Exec {
            argv: argv(&["no-such-program"]),
            ..Exec::default()
        }),
        ErrorKind::NotFound
    );
    assert_eq!(error(Exec::default()), ErrorKind::BadRequest);

    // Signals reach the process group; children see default signal masks.
    assert_eq!(
        guest.shell("grep SigBlk /proc/self/status | cut -f2"),
        "0000000000000000"
    );
    let mut stream = guest.stream();
    let sleep = Exec {
        argv: argv(&["sleep", "1000"]),
        ..Exec::default()
    };
    write_frame(&mut stream, &Request::Exec(sleep)).expect("sent");
    write_frame(
        &mut stream,
        &ExecInput::Signal {
            signal: libc::SIGTERM,
        },
    )
    .expect("sent");
    assert_eq!(
        collect(&mut stream).2,
        ExitStatus {
            code: None,
            signal: Some(libc::SIGTERM)
        }
    );

    // Closing the stream kills: the next exec waits, by the kernel's own word, for the group to be gone.
    let mut stream = guest.stream();
    let script = "sleep 1000 & echo $$; wait";
    write_frame(
        &mut stream,
        &Request::Exec(Exec {
            argv: argv(&["sh", "-c", script]),
            ..Exec::default()
        }),
    )
    .expect("sent");
    let pid = loop {
        let body = read_frame(&mut stream).expect("a frame").expect("not the end");
        if let ExecEvent::Stdout { data } = decode_reply(&body).expect("an event") {
            break String::from_utf8_lossy(&data.0).trim().to_owned();
        }
    };
    drop(stream);
    guest.shell(&format!("tail --pid={pid} -s 0.01 -f /dev/null"));

    // A descendant that holds the output open doesn't hold the answer.
    let argv_background = argv(&["sh", "-c", "sleep 1000 & echo started"]);
    let (stdout, _, status) = guest.exec(
        Exec {
            argv: argv_background,
            ..Exec::default()
        },
        b"",
    );
    assert_eq!((stdout.as_str(), status.code), ("started\n", Some(0)));

    // Nonsense is answered and survived.
    let mut stream = guest.stream();
    stream.write_all(&[0xff; 64]).expect("sent");
    let body = read_frame(&mut stream).expect("an answer").expect("not the end");
    assert_eq!(
        remote(decode_reply::<StatusReply>(&body).expect_err("an error")),
        ErrorKind::BadRequest
    );
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    let mut stream = guest.stream();
    write_frame(&mut stream, &serde_json::json!({"op": "levitate"})).expect("sent");
    let body = read_frame(&mut stream).expect("an answer").expect("not the end");
    assert_eq!(
        remote(decode_reply::<StatusReply>(&body).expect_err("an error")),
        ErrorKind::Unsupported
    );
    // The stream goes on after an error that leaves its framing whole.
    write_frame(&mut stream, &Request::Hello).expect("sent");
    assert!(read_frame(&mut stream).expect("an answer").is_some());

    // At the bound: busy, and free again afterwards.
    let mut streams: Vec<UnixStream> = (0..80).map(|_| guest.stream()).collect();
    let mut busy = 0;
    for stream in &mut streams {
        if write_frame(stream, &Request::Hello).is_err() {
            busy += 1;
            continue;
        }
        match read_frame(stream) {
            Ok(Some(body)) => match decode_reply::<HelloReply>(&body) {
                Ok(_) => {}
                Err(e) => {
                    assert_eq!(remote(e), ErrorKind::Busy);
                    busy += 1;
                }
            },
            _ => busy += 1,
        }
    }
    assert!(busy >= 16, "{busy} of 80 refused");
    drop(streams);
    // Their threads end as they see the end of their streams; a new stream may have to try more than once.
    while let Err(e) = guest.call::<HelloReply>(&Request::Hello) {
        assert!(matches!(e, FrameError::Remote(_) | FrameError::Io(_)), "{e}");
    }
}
