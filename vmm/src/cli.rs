//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use mandoline_api::monitor::{LogLevel, Logger};

use crate::fds::Named;

/// Runs one microVM on /dev/kvm.
///
/// Without a command it runs the VM of a configuration file (--config-file), or waits on its control socket
/// (--api-sock) to be configured and started. `run` boots a sliver by hand, with its console on this terminal.
///
/// It ends with the VM; its exit status says why: 0 shutdown, 1 error, 2 wrong usage, 64 reboot, 65 guest
/// panic, 66 triple fault, 67 killed, 148 forbidden system call.
#[derive(Debug, Parser)]
#[command(
    name = "mandoline-vmm",
    version,
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Without a command.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the VM of a configuration file or of a control socket (the default).
    Vm(Box<VmArgs>),
    /// Boot a sliver by hand, with its console on this terminal.
    Run(Box<crate::run::RunArgs>),
    /// Change the limits of a VM that `run` started, while it runs.
    Set(Box<crate::run::SetArgs>),
    /// Print which system calls each thread of a running monitor may make, and why.
    Filters,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// What happens when the guest reboots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnReboot {
    /// It starts again in this process, with the same devices. A guest that reboots within a second of its start ends
    /// the monitor all the same (status 64).
    Restart,
    /// The monitor ends with status 64, as Firecracker ends.
    Exit,
}

/// Options of `mandoline-vmm vm`. Wherever a PATH stands, `fd:NAME` names an inherited descriptor.
#[derive(Debug, Clone, Args)]
pub struct VmArgs {
    /// Name of the VM, in its log and on its control socket.
    #[arg(long, default_value = "anonymous-instance")]
    pub id: String,
    /// The VM's configuration: JSON in Firecracker's shape. PATH or fd:NAME. It boots at once.
    #[arg(long, value_name = "PATH", required_unless_present = "api_sock")]
    pub config_file: Option<String>,
    /// Control socket to make (PATH) or to serve (fd:NAME, a listening Unix stream socket). Without
    /// --config-file the VM is configured and started there.
    #[arg(long, value_name = "PATH", conflicts_with = "no_api")]
    pub api_sock: Option<String>,
    /// No control socket (the default without --api-sock).
    #[arg(long, requires = "config_file")]
    pub no_api: bool,
    /// Names an inherited descriptor: `--fd tap0=7` makes descriptor 7 available as fd:tap0. "kvm" is used in
    /// place of /dev/kvm, "vsock-out" receives the streams that the guest opens.
    #[arg(long = "fd", value_name = "NAME=N")]
    pub fds: Vec<Named>,
    /// Where states and phases go, a JSON object a line. PATH or fd:NAME.
    #[arg(long, value_name = "PATH")]
    pub state_file: Option<String>,
    /// Where the log goes. PATH or fd:NAME; standard error without it.
    #[arg(long, alias = "log-path", value_name = "PATH")]
    pub log: Option<String>,
    /// What is logged: Off, Error, Warning, Info, Debug or Trace.
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<LogLevel>,
    /// Log only what comes from this module, for example mandoline_vmm::devices.
    #[arg(long)]
    pub module: Option<String>,
    /// Show the level in the log (it is shown anyway).
    #[arg(long)]
    pub show_level: bool,
    /// Show file and line in the log.
    #[arg(long)]
    pub show_log_origin: bool,
    /// Where the metrics go, a JSON object a line. PATH or fd:NAME.
    #[arg(long, value_name = "PATH")]
    pub metrics_path: Option<String>,
    /// Where the guest's console output goes. PATH or fd:NAME; without it the console is standard input and
    /// output.
    #[arg(long, value_name = "PATH")]
    pub serial: Option<String>,
    /// Offer the boot timer: a guest that writes byte 123 to physical address 0xc0000000 stops it.
    #[arg(long)]
    pub boot_timer: bool,
    /// Become this user (needs root), in an empty root directory, without capabilities.
    #[arg(long, value_name = "UID", requires = "jail_gid")]
    pub jail_uid: Option<u32>,
    /// Become this group.
    #[arg(long, value_name = "GID", requires = "jail_uid")]
    pub jail_gid: Option<u32>,
    /// What happens when the guest reboots.
    #[arg(long, value_enum, default_value = "exit")]
    pub on_reboot: OnReboot,
    /// System call filters, and Landlock beside them. `off` is for debugging only.
    #[arg(long, value_enum, default_value = "on")]
    pub seccomp: Switch,
    /// The same as `--seccomp off`.
    #[arg(long, conflicts_with = "seccomp")]
    pub no_seccomp: bool,
    /// Refuse paths in requests after boot, as a jailed monitor does: files come as descriptors with the request.
    #[arg(long)]
    pub no_paths: bool,
    /// End when the parent process does.
    #[arg(long)]
    pub die_with_parent: bool,
    /// When the caller began to start this VM (CLOCK_MONOTONIC, ns): recorded as the first phase.
    #[arg(long, value_name = "NS")]
    pub start_time_ns: Option<u64>,
    /// The same in us.
    #[arg(long, value_name = "US", conflicts_with = "start_time_ns")]
    pub start_time_us: Option<u64>,
    /// CPU time of this process that the boot timer shall not count, in us.
    #[arg(long, value_name = "US")]
    pub start_time_cpu_us: Option<u64>,
    /// CPU time that the parent process spent on the start, in us: the boot timer counts it too.
    #[arg(long, value_name = "US")]
    pub parent_cpu_time_us: Option<u64>,
}

impl VmArgs {
    /// When the caller began to start this VM (`CLOCK_MONOTONIC`, ns).
    pub fn started(&self) -> Option<u64> {
        self.start_time_ns
            .or(self.start_time_us.map(|us| us.saturating_mul(1000)))
    }

    /// Whether threads are put under their filters.
    pub fn filters(&self) -> bool {
        self.seccomp == Switch::On && !self.no_seccomp
    }

    /// What the options say of the log, beside its place.
    pub fn logger(&self) -> Logger {
        Logger {
            log_path: None,
            level: self.level,
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_takes_firecrackers_flags() {
        Cli::command().debug_assert();
        let words = "mandoline-vmm --id x --boot-timer --no-api --config-file /c.json".split(' ');
        let cli = Cli::try_parse_from(words).unwrap();
        assert_eq!(cli.vm.config_file.as_deref(), Some("/c.json"));
        assert!(cli.command.is_none());
        let cli = Cli::try_parse_from("mandoline-vmm vm --config-file fd:c --fd c=3".split(' ')).unwrap();
        assert!(matches!(cli.command, Some(Command::Vm(_))));
        assert!(Cli::try_parse_from(["mandoline-vmm"]).is_err());
        assert!(Cli::try_parse_from(["mandoline-vmm", "--no-api"]).is_err());
        // firecracker-go-sdk's, with its defaults; the jailer's additions.
        let words = "mandoline-vmm --api-sock /s --id x --no-seccomp --start-time-us 5 --start-time-cpu-us 7 \
                     --parent-cpu-time-us 1 --log-path /l --level debug --show-level --metrics-path /m";
        let vm = Cli::try_parse_from(words.split_whitespace()).unwrap().vm;
        assert_eq!((vm.filters(), vm.started()), (false, Some(5000)));
        assert_eq!(vm.logger().level, Some(LogLevel::Debug));
        assert_eq!(vm.log.as_deref(), Some("/l"));
    }
}
