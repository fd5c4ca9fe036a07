//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::fds::Named;

/// Runs one microVM on /dev/kvm.
///
/// Without a command it runs the VM of a configuration file, as a node manager does. `run` boots a sliver by
/// hand, with its console on this terminal.
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
    /// Run the VM of a configuration file (the default).
    Vm(VmArgs),
    /// Boot a sliver by hand, with its console on this terminal.
    Run(Box<crate::run::RunArgs>),
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
    /// The VM's configuration: JSON in Firecracker's shape. PATH or fd:NAME.
    #[arg(long, value_name = "PATH", required = true)]
    pub config_file: Option<String>,
    /// Control socket to make (PATH) or to serve (fd:NAME, a listening Unix stream socket).
    #[arg(long, value_name = "PATH", conflicts_with = "no_api")]
    pub api_sock: Option<String>,
    /// No control socket (the default without --api-sock).
    #[arg(long)]
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
    /// System call filters. `off` is for debugging only.
    #[arg(long, value_enum, default_value = "on")]
    pub seccomp: Switch,
    /// End when the parent process does.
    #[arg(long)]
    pub die_with_parent: bool,
    /// When the caller began to start this VM (CLOCK_MONOTONIC, ns): recorded as the first phase.
    #[arg(long, value_name = "NS")]
    pub start_time_ns: Option<u64>,
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
    }
}
