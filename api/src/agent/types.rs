//! The messages of the agent's protocol.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the host asks of the agent; the first frame of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answer: [`HelloReply`].
    Hello,
    /// Become this sliver. Answer: [`JoinReply`].
    Join(Box<Join>),
    /// How are you? Answer: [`StatusReply`].
    Status,
    /// Run a program; the stream becomes a session of [`ExecInput`] and [`ExecEvent`].
    Exec(Exec),
    /// Replace the users' keys. Answer: [`SetKeysReply`].
    SetKeys {
        /// Lines of root's `authorized_keys`.
        keys: Vec<String>,
    },
    /// Let the file system of the sliver's disk fill its device, which grew. Answer: [`GrowDiskReply`].
    GrowDisk,
    /// Stop. Answer: [`ShutdownReply`], before anything is stopped.
    Shutdown {
        /// Whether the monitor should start the sliver again.
        mode: ShutdownMode,
        /// Milliseconds between SIGTERM and SIGKILL; the agent's default is 5000, at most 60000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grace_ms: Option<u32>,
    },
}

/// Everything that makes an *up* guest into one sliver. All steps can be repeated: after a failed join the
/// host sends it again, after a finished one the same join (whatever its entropy and time) has the same answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// Fresh from the host's generator, [`super::MIN_ENTROPY`] to [`super::MAX_ENTROPY`] bytes. It is fed to
    /// the guest's generator, which is then reseeded, before anything else is done: clones must not be twins.
    pub entropy: Bytes,
    /// The slice's name.
    pub slice: String,
    /// Host name of the sliver (RFC 1123, at most 63 bytes for each label and 64 in all, Linux's bound).
    pub hostname: String,
    /// Wall clock, nanoseconds since 1970-01-01 UTC; absent: the guest's clock is right already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_unix_ns: Option<u64>,
    /// The sliver's network interface, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Interface>,
    /// Name servers for `/etc/resolv.conf`; empty: the file is left as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// Block device of the sliver's own disk (ext4). Absent: changes live in memory and are lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Lines of root's `authorized_keys`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// A script that root runs once the sliver is reachable, at every start of the sliver. Without `#!` it
    /// is given to `/bin/sh`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initscript: Option<String>,
}

/// How a sliver is reached: a routed interface, whose gateway need not be in any of its networks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Hardware address (`02:00:…`) that picks the interface; absent: the only Ethernet there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Addresses, as `10.128.0.5/32` or `2001:db8::5/128`.
    pub addresses: Vec<Cidr>,
    /// Default gateway, on-link; its family is that of the route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Default gateway for IPv6 where `gateway` is an IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway6: Option<Ipv6Addr>,
    /// Largest packet in bytes; absent: the device's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program (looked for in `PATH`) and its arguments; at least one.
    pub argv: Vec<String>,
    /// The environment, on top of `PATH`, `HOME`, `USER`, `LOGNAME`, `SHELL` and `LANG`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; absent: the user's home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// A name of the sliver's `/etc/passwd`; absent: root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whether [`ExecInput::Stdin`] will come; false: the program reads an empty input.
    #[serde(default)]
    pub stdin: bool,
}

/// From the host, in an `exec` session. The agent holds at most 1 MiB that the program has not read and
/// then reads no further frames, signals included. Closing the stream kills the program's process group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecInput {
    /// Bytes for the program's standard input.
    Stdin {
        /// At most [`super::frame::MAX_DATA`] bytes.
        data: Bytes,
    },
    /// No more input.
    StdinEof,
    /// A signal for the program's process group.
    Signal {
        /// Its number on x86-64 Linux, 1 to 64.
        signal: i32,
    },
}

/// From the agent, in an `exec` session. `Exited` is the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecEvent {
    /// The program runs.
    Started {
        /// Its process (and process group, and session) id in the sliver.
        pid: u32,
    },
    /// Standard output.
    Stdout {
        /// At most [`super::frame::MAX_DATA`] bytes.
        data: Bytes,
    },
    /// Standard error.
    Stderr {
        /// At most [`super::frame::MAX_DATA`] bytes.
        data: Bytes,
    },
    /// The program ended and its output is sent. Processes that it left behind live on.
    Exited(ExitStatus),
}

/// How a process ended: exactly one of the two is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Its exit code, 0 to 255.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// The signal that killed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
}

/// Whether the sliver is to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownMode {
    /// Stop for good.
    Poweroff,
    /// Start again.
    Reboot,
}

/// Where the agent is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No identity, no disk, no daemon.
    Up,
    /// A join is being done.
    Joining,
    /// This is a sliver.
    Joined,
    /// It is being shut down.
    Stopping,
}

/// State of the boot script.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Initscript {
    /// There is none.
    #[default]
    None,
    /// It runs.
    Running,
    /// It ended with exit code 0.
    Ok,
    /// It ended otherwise, or could not be started (exit code 127).
    Failed(ExitStatus),
}

/// What the agent tells unasked, on the stream that it opens to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent listens. The first event of every event stream.
    Up(HelloReply),
    /// The boot script ended.
    InitscriptDone {
        /// `ok` or `failed`.
        initscript: Initscript,
    },
    /// The sliver is being shut down.
    Stopping {
        /// What its owner wants.
        mode: ShutdownMode,
    },
    /// An event of a later version.
    #[serde(other)]
    Unknown,
}

/// Who the agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// [`super::VERSION`] of the agent.
    pub version: u32,
    /// Version of the agent program.
    pub agent: String,
    /// Release of the running kernel.
    pub kernel: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// Guest time since boot in nanoseconds (`CLOCK_BOOTTIME`) when the first byte was written to the serial port.
    pub mark_ns: u64,
    /// Guest time since boot in nanoseconds when the agent began to listen.
    pub listen_ns: u64,
}

/// The sliver is reachable: sshd's port listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinReply {
    /// Public host keys of the sliver's sshd, as in `ssh_host_*_key.pub`.
    pub ssh_host_keys: Vec<String>,
    /// How long each step took, in guest time.
    pub timings_us: JoinTimings,
}

/// Microseconds of each step of a join, in guest time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTimings {
    /// Feeding and reseeding the kernel's generator.
    pub entropy: u64,
    /// Clock and host name.
    pub clock: u64,
    /// Mounting the disk and moving onto it.
    pub disk: u64,
    /// Addresses, routes, name servers.
    pub network: u64,
    /// The files that make the identity: hosts, machine-id, users' keys.
    pub keys: u64,
    /// Host key (made at the first start on a disk) and sshd's port.
    pub sshd: u64,
    /// From the decoded request to the answer.
    pub total: u64,
}

/// How the sliver does, from inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// Where the agent is in its life.
    pub phase: Phase,
    /// The boot script.
    pub initscript: Initscript,
    /// Guest time since boot, nanoseconds.
    pub uptime_ns: u64,
    /// Whether sshd's port listens.
    pub ssh_listening: bool,
    /// Connections that sshd serves.
    pub ssh_connections: u32,
    /// Programs that run in `exec` sessions.
    pub execs: u32,
    /// Memory of the guest, bytes.
    pub memory_total: u64,
    /// Memory of the guest that is neither used nor holds cached files, bytes.
    pub memory_free: u64,
    /// Processes and threads in the guest.
    pub tasks: u32,
}

/// The users' keys are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetKeysReply {
    /// How many lines there are now.
    pub keys: usize,
    /// Whether the file was another before.
    pub changed: bool,
}

/// The disk's file system fills its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowDiskReply {
    /// Length of the device in bytes.
    pub bytes: u64,
    /// Whether the file system was smaller before.
    pub grown: bool,
}

/// The shutdown begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShutdownReply {
    /// What will be done.
    pub mode: ShutdownMode,
}

/// An answer that is an error: `{"error": {…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// What went wrong.
    pub error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For programs.
    pub kind: ErrorKind,
    /// For people; names the thing, its value and what is allowed.
    pub message: String,
    /// The step of a join that failed: a field of [`JoinTimings`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.step {
            Some(step) => write!(f, "{step}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Classes of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is malformed or a value in it is out of bounds.
    BadRequest,
    /// The agent knows no such operation.
    Unsupported,
    /// Not in this phase of the agent's life.
    WrongPhase,
    /// The guest joined as another sliver already.
    AlreadyJoined,
    /// Too many streams or programs at once; try again later.
    Busy,
    /// The thing named (user, program, device, interface) is not there.
    NotFound,
    /// A system call failed; `step` and `message` say which.
    Failed,
    /// A kind of a later version.
    #[serde(other)]
    Unknown,
}

/// Bytes, as base64 (RFC 4648, with padding) in JSON. `Debug` shows their number only: they may be secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Bytes).map_err(serde::de::Error::custom)
    }
}

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// Bits of the prefix, 0 to 32 or 128.
    pub prefix: u8,
}

/// A text that is no [`Cidr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no address with prefix: 10.128.0.5/32 or 2001:db8::5/128 would be")]
pub struct CidrError(pub String);

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let error = || CidrError(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        match prefix.parse::<u8>() {
            Ok(prefix) if prefix <= most => Ok(Cidr { address, prefix }),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_documented_join_parses() {
        let text = r#"{"op":"join","entropy":"AAAA","slice":"plc.princeton_codeen","hostname":"codeen.node1",
            "interface":{"addresses":["10.128.0.5/32"],"gateway":"10.128.0.1","mtu":1500},
            "dns":["10.128.0.1"],"disk":"/dev/vdb","keys":["ssh-ed25519 AAAA me"],"of_a_later_version":{"a":[1]}}"#;
        let Request::Join(join) = serde_json::from_str(text).expect("parses") else {
            panic!("not a join")
        };
        assert_eq!(join.entropy.0, [0, 0, 0]);
        let interface = join.interface.expect("is there");
        assert_eq!(interface.addresses, ["10.128.0.5/32".parse().expect("valid")]);
        assert_eq!(join.initscript, None);
    }

    #[test]
    fn shapes_on_the_wire_are_fixed() {
        let wire = |value: &dyn erased::Json| value.json();
        assert_eq!(wire(&Request::Hello), r#"{"op":"hello"}"#);
        assert_eq!(
            wire(&Request::Shutdown {
                mode: ShutdownMode::Poweroff,
                grace_ms: None
            }),
            r#"{"op":"shutdown","mode":"poweroff"}"#
        );
        assert_eq!(
            wire(&ExecEvent::Exited(ExitStatus {
                code: Some(3),
                signal: None
            })),
            r#"{"type":"exited","code":3}"#
        );
        assert_eq!(
            wire(&ExecInput::Stdin {
                data: Bytes(b"hi".to_vec())
            }),
            r#"{"type":"stdin","data":"aGk="}"#
        );
        assert_eq!(
            wire(&Event::InitscriptDone {
                initscript: Initscript::Failed(ExitStatus {
                    code: None,
                    signal: Some(9)
                })
            }),
            r#"{"event":"initscript_done","initscript":{"state":"failed","signal":9}}"#
        );
    }

    mod erased {
        pub(super) trait Json {
            fn json(&self) -> String;
        }
        impl<T: serde::Serialize> Json for T {
            fn json(&self) -> String {
                serde_json::to_string(self).expect("serialises")
            }
        }
    }

    #[test]
    fn events_of_a_later_version_are_known_as_such() {
        let event: Event = serde_json::from_str(r#"{"event":"levitating","height":3}"#).expect("parses");
        assert_eq!(event, Event::Unknown);
    }

    #[test]
    fn debug_never_shows_entropy() {
        assert_eq!(format!("{:?}", Bytes(vec![1, 2, 3])), "<3 bytes>");
    }

    #[test]
    fn prefixes_are_bounded_by_the_family() {
        for bad in [
            "10.0.0.1",
            "10.0.0.1/33",
            "10.0.0.1/-1",
            "::1/129",
            "/8",
            "10.0.0.1/",
            "a/8",
            "10.0.0.1/8/8",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        assert_eq!("::1/128".parse::<Cidr>().expect("valid").to_string(), "::1/128");
    }

    proptest! {
        #[test]
        fn exec_requests_round_trip(argv in prop::collection::vec(".*", 0..5), key in "[A-Z]{1,8}", value in ".*", stdin: bool) {
            let exec = Exec { argv, env: [(key, value)].into(), cwd: None, user: None, stdin };
            let request = Request::Exec(exec);
            let json = serde_json::to_vec(&request).expect("serialises");
            prop_assert_eq!(serde_json::from_slice::<Request>(&json).expect("parses"), request);
        }

        #[test]
        fn bytes_round_trip(data in prop::collection::vec(any::<u8>(), 0..500)) {
            let event = ExecEvent::Stdout { data: Bytes(data) };
            let json = serde_json::to_vec(&event).expect("serialises");
            prop_assert_eq!(serde_json::from_slice::<ExecEvent>(&json).expect("parses"), event);
        }

        #[test]
        fn cidrs_round_trip(address: [u8; 4], prefix in 0u8..=32) {
            let cidr = Cidr { address: address.into(), prefix };
            prop_assert_eq!(cidr.to_string().parse::<Cidr>(), Ok(cidr));
        }
    }
}
