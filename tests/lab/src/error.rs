//! What can go wrong in the lab, each with the cause and what to do about it.

use std::path::PathBuf;

/// An error of the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program that the lab needs is not installed.
    #[error("{program} is not installed; as root: apt-get install -y --no-install-recommends {package}")]
    MissingProgram {
        /// The program's name.
        program: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
    },
    /// Too little room for what a lab writes.
    #[error(
        "{path} has {free_mib} MiB free and a lab node needs {needed_mib} MiB; set MANDOLINE_LAB_DIR to a roomier place"
    )]
    NoSpace {
        /// Where the lab would be.
        path: PathBuf,
        /// Free, in MiB.
        free_mib: u64,
        /// Wanted, in MiB.
        needed_mib: u64,
    },
    /// An operation on a file failed.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A helper program failed.
    #[error("{program} failed ({status}): {stderr}")]
    Program {
        /// Which one.
        program: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// An image that the lab needs was not found.
    #[error("{what} was not found: {how}")]
    Image {
        /// Which image or directory.
        what: &'static str,
        /// Where it was looked for, and how to get it.
        how: String,
    },
    /// A value that the lab does not take.
    #[error("{name} is {value:?}; allowed: {allowed}")]
    Value {
        /// Which setting.
        name: &'static str,
        /// What it was.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A node did not come up.
    #[error("node {name} did not come up: {why}\n--- the last lines of its console ---\n{console}")]
    Boot {
        /// Which node.
        name: String,
        /// What was seen.
        why: String,
        /// The end of its console, and of what QEMU said.
        console: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {why}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's reason.
        why: String,
    },
    /// The connection to a node is gone.
    #[error("lost the ssh connection to node {name}: {why}")]
    Lost {
        /// Which node.
        name: String,
        /// What ssh said.
        why: String,
    },
    /// A command on a node did not end in its time: the node or the command hangs.
    #[error(
        "on node {name}, `{command}` did not end in {seconds} s\n--- the last lines of the console ---\n{console}"
    )]
    Hangs {
        /// Which node.
        name: String,
        /// What was run.
        command: String,
        /// How long it was waited for.
        seconds: u64,
        /// The end of its console, and of what QEMU said.
        console: String,
    },
    /// A command on a node failed.
    #[error("on node {name}, `{command}` ended with {status}\n{stderr}")]
    Command {
        /// Which node.
        name: String,
        /// What was run.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it said.
        stderr: String,
    },
}

impl LabError {
    /// For `map_err`: a [`LabError::File`] about `path`.
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> LabError {
        let path = path.into();
        move |source| LabError::File { what, path, source }
    }
}
