//! The monitor's interface: configuration file, control socket, state file, exit codes, and the page of
//! registers through which a guest says when it has booted and why it ends.
//!
//! Shapes and field names are those of Firecracker's public API wherever the thing is the same; what
//! Mandoline adds is marked "ours". Wherever a path stands, `fd:NAME` may stand too: a descriptor that
//! the monitor inherited and was told of by `--fd NAME=N`.
//!
//! # The boot/exit page
//!
//! One 4 KiB page of memory-mapped registers at guest-physical [`EXIT_PAGE`], which a guest reaches
//! through `/dev/mem` (byte writes; reads give zero; writes elsewhere in the page are ignored):
//!
//! ```text
//! offset  byte written                          meaning
//! 0x00    123 (0x7b)                            boot timer: "my first user process runs" (as in Firecracker)
//! 0x08    1                                     power off: everything is synced, end this VM now
//!         2                                     reboot: everything is synced, reset this VM now
//!         3                                     panic: the guest gives itself up
//! ```
//!
//! A write to 0x08 takes effect at once: the guest's next instruction may never run. An agent that wants
//! to work under other monitors too goes on with `reboot(RB_AUTOBOOT)` after it (`reboot=k` on the
//! kernel's command line makes that a reset through the i8042). A reset through the i8042 *without* a
//! write to 0x08 is a reboot, unless the serial port's last lines hold `Kernel panic`: then it is a panic
//! (`panic=1` on the command line makes a panicking kernel reset itself).

mod config;
mod output;

use serde::{Deserialize, Serialize};

pub use config::*;
pub use output::*;

/// Guest-physical address of the boot/exit page: the first page of the MMIO hole.
pub const EXIT_PAGE: u64 = 0xc000_0000;
/// Size of the boot/exit page in bytes.
pub const EXIT_PAGE_SIZE: u64 = 0x1000;
/// Offset of the boot timer's register in [`EXIT_PAGE`].
pub const BOOT_TIMER_OFFSET: u64 = 0x00;
/// The byte that stops the boot timer.
pub const BOOT_TIMER_VALUE: u8 = 123;
/// Offset of the exit reason's register in [`EXIT_PAGE`].
pub const EXIT_REASON_OFFSET: u64 = 0x08;
/// Exit reason register: power off.
pub const EXIT_POWEROFF: u8 = 1;
/// Exit reason register: reboot.
pub const EXIT_REBOOT: u8 = 2;
/// Exit reason register: the guest panicked.
pub const EXIT_PANIC: u8 = 3;

/// The prefix by which a descriptor is named where a path may stand.
pub const FD_PREFIX: &str = "fd:";
/// The header of a request on the control socket that names the descriptors which come with it (`SCM_RIGHTS`), in their
/// order and separated by commas (ours): then `fd:NAME` may stand in the body where a path may.
pub const FD_NAMES_HEADER: &str = "Mandoline-Fd-Names";
/// Name of the inherited `SOCK_SEQPACKET` socket on which the monitor hands out streams that the guest opens.
pub const VSOCK_OUT_FD: &str = "vsock-out";

/// Name under which a caller may hand over its own end of [`VSOCK_OUT_FD`] as well: the monitor uses it for nothing
/// and keeps it open as long as it lives, so that a restarted node manager can fetch it back (`pidfd_getfd`) and the
/// guest's outward streams survive the restart.
pub const VSOCK_OUT_KEPT_FD: &str = "vsock-out-peer";

/// The message on [`VSOCK_OUT_FD`] that goes with the descriptor of a stream which the guest opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOut {
    /// The host port that the guest asked for.
    pub port: u32,
}

/// `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub struct InstanceInfo {
    /// `"Mandoline"`.
    pub app_name: String,
    /// What `--id` said.
    pub id: String,
    /// Whether the vCPUs run.
    pub state: InstanceState,
    /// The monitor's version.
    pub vmm_version: String,
}

/// `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub struct Version {
    /// The monitor's version, under the name that Firecracker's clients ask for.
    pub firecracker_version: String,
}

/// Whether the vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum InstanceState {
    /// Configured, not booted.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs stand still, devices are quiet.
    Paused,
    /// Paused, and guest memory was given back; an event for the guest wakes it (ours).
    Parked,
}

/// `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// The state wanted.
    pub state: VmPatchState,
}

/// The state that `PATCH /vm` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum VmPatchState {
    /// Stop the vCPUs.
    Paused,
    /// Run them again.
    Resumed,
    /// Stop the vCPUs and give guest memory back until something happens (ours).
    Parked,
}

/// `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// What `PUT /actions` can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum ActionType {
    /// Write the metrics out.
    FlushMetrics,
    /// Boot; refused after boot. From a configuration file the monitor boots by itself.
    InstanceStart,
    /// Press Ctrl-Alt-Del on the guest's keyboard.
    SendCtrlAltDel,
}

/// The body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub struct Fault {
    /// What went wrong: the thing, its value, and what is allowed.
    pub fault_message: String,
}

/// One line of the state file: an object a line, appended; the last line with a `state` wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StateLine {
    /// The VM's state changed.
    State(StateChange),
    /// A phase of the start was reached.
    Phase(PhaseMark),
}

/// The VM's state, as written to the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChange {
    /// The new state.
    pub state: RunState,
    /// Why the VM ended; only with [`RunState::Exited`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ExitReason>,
    /// More for people: the last lines of the console after a panic, an error's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// When, in ns since 1970 (`CLOCK_REALTIME`).
    pub unix_ns: u64,
}

/// The state in the state file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// vCPUs stand still by request.
    Paused,
    /// Idle, with its memory given back; wakes by itself.
    Parked,
    /// The guest asked for a reset, and starts again in the same process.
    Rebooting,
    /// The monitor is about to end.
    Exited,
}

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU took a triple fault.
    TripleFault,
    /// The monitor was told to end (SIGTERM, SIGINT).
    Killed,
    /// The monitor could not go on: configuration, host, or an exit of KVM that it does not know.
    Error,
}

impl ExitReason {
    /// The monitor's exit status for this reason.
    pub const fn exit_code(self) -> u8 {
        match self {
            ExitReason::Shutdown => 0,
            ExitReason::Error => 1,
            ExitReason::Reboot => 64,
            ExitReason::Panic => 65,
            ExitReason::TripleFault => 66,
            ExitReason::Killed => 67,
        }
    }

    /// The reason behind an exit status; `None` for [`EXIT_USAGE`], [`EXIT_SECCOMP`] and what the monitor never returns.
    pub const fn from_exit_code(code: u8) -> Option<ExitReason> {
        match code {
            0 => Some(ExitReason::Shutdown),
            1 => Some(ExitReason::Error),
            64 => Some(ExitReason::Reboot),
            65 => Some(ExitReason::Panic),
            66 => Some(ExitReason::TripleFault),
            67 => Some(ExitReason::Killed),
            _ => None,
        }
    }
}

/// Exit status when the command line was wrong.
pub const EXIT_USAGE: u8 = 2;
/// Exit status when a thread of the monitor made a system call that its filter forbids.
pub const EXIT_SECCOMP: u8 = 148;

/// A phase of the start and when it was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseMark {
    /// Which.
    pub phase: Phase,
    /// `CLOCK_MONOTONIC` in ns.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME` in ns since 1970.
    pub unix_ns: u64,
}

/// The phases of a start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The caller began to start the VM, as it said by `--start-time-ns`; absent without that.
    ProcessStart,
    /// `main` was entered.
    Main,
    /// The configuration is read and every descriptor open.
    ConfigRead,
    /// The VM exists and its memory is mapped.
    MemoryReady,
    /// The kernel, its command line and tables are in guest memory.
    KernelLoaded,
    /// Devices and vCPUs exist.
    VcpuCreated,
    /// The process is in its jail.
    Jailed,
    /// Just before the first `KVM_RUN`.
    FirstRun,
    /// The guest wrote its first byte to the serial port.
    FirstSerialByte,
    /// The guest wrote to the boot timer.
    BootTimer,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_file_is_firecrackers() {
        let text = r#"{
            "boot-source": {"kernel_image_path": "fd:kernel", "boot_args": "console=ttyS0"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
            "drives": [{"drive_id": "root", "path_on_host": "fd:root", "is_root_device": true, "is_read_only": true}],
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "fd:tap0", "guest_mac": "02:00:00:00:00:01"}],
            "vsock": {"guest_cid": 3, "uds_path": "fd:vsock"}
        }"#;
        let config: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.drives[0].cache_type, CacheType::Writeback);
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = r#"{"boot-source": {"kernel_image_path": "k", "kernel_args": "x"}}"#;
        let error = serde_json::from_str::<VmConfig>(text).unwrap_err().to_string();
        assert!(error.contains("kernel_args"), "{error}");
    }

    #[test]
    fn exit_codes_tell_the_reasons_apart() {
        for reason in [
            ExitReason::Shutdown,
            ExitReason::Reboot,
            ExitReason::Panic,
            ExitReason::TripleFault,
            ExitReason::Killed,
            ExitReason::Error,
        ] {
            assert_eq!(ExitReason::from_exit_code(reason.exit_code()), Some(reason));
        }
        assert_eq!(ExitReason::from_exit_code(EXIT_USAGE), None);
        assert_eq!(ExitReason::from_exit_code(EXIT_SECCOMP), None);
    }

    #[test]
    fn state_lines_read_back() {
        let line = r#"{"state":"exited","reason":"triple_fault","unix_ns":5}"#;
        let StateLine::State(change) = serde_json::from_str(line).unwrap() else {
            panic!("not a state")
        };
        assert_eq!(change.reason, Some(ExitReason::TripleFault));
        let line = r#"{"phase":"first_run","monotonic_ns":1,"unix_ns":2}"#;
        let StateLine::Phase(mark) = serde_json::from_str(line).unwrap() else {
            panic!("not a phase")
        };
        assert_eq!(mark.phase, Phase::FirstRun);
    }
}
