//! The kernel's command line: the few words of it that name the root.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::Error;

/// What the kernel would start if it mounted the root itself, by its first choice.
const DEFAULT_INIT: &str = "/sbin/init";

/// What mounts a root whose `rootfstype=` nobody gave: the file systems that root images of slivers have.
const DEFAULT_TYPES: [&str; 2] = ["erofs", "ext4"];

/// The words that matter here. Where a word comes twice, the last one counts, as in the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// `root=`, a device in `/dev`.
    pub(crate) root: Option<String>,
    /// `rootfstype=`, tried in order.
    pub(crate) types: Vec<String>,
    /// `rootflags=`, the file system's own options.
    pub(crate) flags: String,
    /// Neither `rw`, nor `rw` after `ro`.
    pub(crate) read_only: bool,
    /// `init=`.
    pub(crate) init: String,
}

impl CommandLine {
    /// The running kernel's. `/proc` is mounted for it and let go again: the root's init mounts its own.
    pub(crate) fn of_kernel() -> Result<Self, Error> {
        std::fs::create_dir_all("/proc").map_err(Error::system("making /proc"))?;
        mount("proc", "/proc", "proc", MountFlags::empty(), c"")
            .map_err(|e| Error::system("mounting proc on /proc")(e.into()))?;
        let text = std::fs::read("/proc/cmdline").map_err(Error::system("reading /proc/cmdline"))?;
        unmount("/proc", UnmountFlags::empty()).map_err(|e| Error::system("unmounting /proc")(e.into()))?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    /// Words are separated by white space, but for that between double quotes; after `--` they are init's own.
    fn parse(text: &str) -> Self {
        let mut line = CommandLine {
            root: None,
            types: DEFAULT_TYPES.map(str::to_owned).to_vec(),
            flags: String::new(),
            read_only: true,
            init: DEFAULT_INIT.to_owned(),
        };
        let mut quoted = false;
        let words = text.split(|c: char| {
            quoted ^= c == '"';
            c.is_ascii_whitespace() && !quoted
        });
        for word in words.take_while(|word| *word != "--") {
            let word = word.replace('"', "");
            match word.split_once('=').unwrap_or((&word, "")) {
                ("root", value) => line.root = Some(value.to_owned()),
                ("rootfstype", value) => line.types = value.split(',').map(str::to_owned).collect(),
                ("rootflags", value) => line.flags = value.to_owned(),
                ("init", value) => line.init = value.to_owned(),
                ("ro", "") => line.read_only = true,
                ("rw", "") => line.read_only = false,
                _ => {}
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_kernels() {
        let line = CommandLine::parse(
            "console=ttyS0 root=/dev/vda rootfstype=erofs,ext4 rootflags=dax=always rw init=/sbin/mandoline-agent\n",
        );
        assert_eq!(line.root.as_deref(), Some("/dev/vda"));
        assert_eq!(line.types, ["erofs", "ext4"]);
        assert_eq!(line.flags, "dax=always");
        assert!(!line.read_only);
        assert_eq!(line.init, "/sbin/mandoline-agent");
    }

    #[test]
    fn what_is_not_said_is_what_the_kernel_does() {
        let line = CommandLine::parse("quiet");
        assert_eq!(line.root, None);
        assert_eq!(line.types, DEFAULT_TYPES);
        assert!(line.read_only);
        assert_eq!(line.init, DEFAULT_INIT);
    }

    #[test]
    fn the_last_word_counts() {
        let line = CommandLine::parse("rw root=/dev/vdb ro root=/dev/vda");
        assert_eq!(line.root.as_deref(), Some("/dev/vda"));
        assert!(line.read_only);
    }

    #[test]
    fn quotes_hold_words_together_and_what_follows_two_dashes_is_not_ours() {
        let line = CommandLine::parse(r#"dyndbg="file a.c root=/dev/bad" root=/dev/vda -- root=/dev/worse"#);
        assert_eq!(line.root.as_deref(), Some("/dev/vda"));
        let line = CommandLine::parse(r#""rootflags=a b" root=/dev/vda"#);
        assert_eq!(line.flags, "a b");
    }
}
