//! The monitor's interface: configuration file, control socket, state file, exit codes.
