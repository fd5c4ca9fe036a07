//! The guest agent's protocol: what a node manager and the PID 1 of a sliver say to each other over vsock.
//!
//! ```text
//!   kernel ──► first byte on the serial port ──► listening on vsock port 1024
//!                                                       │ Event::Up to host port 1024
//!                                                       ▼
//!        ┌──────────── up: root read-only, no disk, no identity, no daemon ◄─┐ (a template is taken here)
//!        │ join                                                              │
//!        ▼                                                                   │
//!     joining ── a step failed: error names it; send join again ─────────────┘
//!        │ every step done, sshd's port listening: JoinReply
//!        ▼
//!     joined ── set_keys, exec, status, the same join again (same answer)
//!        │ shutdown, from the host or from inside
//!        ▼
//!     stopping ── SIGTERM, SIGKILL, sync, read-only, exit register, reset
//! ```
//!
//! A stream carries *frames*: a big-endian `u32` length, at most [`MAX_FRAME`], then that many bytes of JSON
//! ([`frame`] works on byte slices and on `io::Read`/`io::Write`, so that both ends use the same code).
//! The host opens a stream, sends a [`Request`] and reads one answer, `{"error": …}` or the request's own
//! reply type ([`decode_reply`]); it may then send another. `exec` alone turns its stream into a session of
//! [`ExecInput`] and [`ExecEvent`]. Unknown fields are ignored by both ends, an unknown `op` is answered with
//! [`ErrorKind::Unsupported`]: so a newer host can talk to the agent of an older image. See
//! `docs/agent-protocol.md`.

pub mod frame;
mod types;

pub use frame::{Decoder, FrameError, MAX_FRAME, decode_reply, encode, read_frame, split, write_frame};
pub use types::*;

/// Version of this protocol, which [`Event::Up`] and [`HelloReply`] announce. It rises only when an old host
/// and a new agent (or the reverse) could misunderstand each other; additions don't raise it.
pub const VERSION: u32 = 1;

/// The vsock port on which the agent listens for the host.
pub const AGENT_PORT: u32 = 1024;

/// The vsock port of the host to which the agent opens its event stream.
pub const HOST_EVENT_PORT: u32 = 1024;

/// The vsock port of the host to which a guest opens a stream to a service: the stream's first line is
/// `CONNECT <service>\n`, the host answers `OK\n` or `ERR <why>\n`, and after `OK` the stream is the service's.
pub const SERVICES_PORT: u32 = 1025;

/// Longest first line of a stream to [`SERVICES_PORT`], in bytes without its end.
pub const SERVICE_LINE_MAX: usize = 128;

/// The host's context id (CID) on vsock.
pub const HOST_CID: u32 = 2;

/// The byte that marks a sliver's first user instruction: the first that the agent writes to the serial
/// port. ASCII "record separator": the kernel prints no such byte and a terminal shows nothing.
pub const SERIAL_MARK: u8 = 0x1e;

/// Guest-physical address of the page that holds the boot timer and the exit register (monitors that lack
/// them ignore the writes).
pub const BOOT_PAGE: u64 = 0xC000_0000;

/// What the agent writes to the first byte of [`BOOT_PAGE`] at its first instruction (Firecracker's boot
/// timer, same address and value).
pub const BOOT_TIMER_VALUE: u8 = 123;

/// Offset in [`BOOT_PAGE`] of the exit register: one byte, written just before the reset that ends the
/// sliver, tells the monitor why ([`EXIT_SHUTDOWN`] or [`EXIT_REBOOT`]).
pub const EXIT_REGISTER_OFFSET: usize = 8;

/// Exit register: the sliver was shut down and is not to be started again.
pub const EXIT_SHUTDOWN: u8 = 1;

/// Exit register: the sliver asks to be started again.
pub const EXIT_REBOOT: u8 = 2;

/// Bytes of entropy that a [`Join`] must bring at least: a full seed of the kernel's generator.
pub const MIN_ENTROPY: usize = 32;

/// Bytes of entropy that a [`Join`] may bring at most.
pub const MAX_ENTROPY: usize = 4096;
