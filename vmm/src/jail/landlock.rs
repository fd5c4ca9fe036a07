//! Landlock: a second wall behind the empty root and the filters, where the kernel has it, and the only one around files for
//! a monitor that is started without root.
//!
//! No file system access, no TCP, no signal to and no abstract socket of anybody outside. What is open stays
//! usable: rights are checked when a descriptor is made. It is best effort: older kernels know less of it or nothing,
//! and the monitor says so in its log.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest interface that the monitor knows (Linux 7.1).
const NEWEST: ABI = ABI::V9;

/// What a monitor that stands in no empty root still does by path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Opens the files that its control socket is told of.
    pub files: bool,
    /// Connects to sockets when the guest opens streams.
    pub sockets: bool,
}

impl Needs {
    /// The accesses to files that are denied.
    fn denied(self) -> BitFlags<AccessFs> {
        let mut all = AccessFs::from_all(NEWEST);
        if self.sockets {
            all.remove(AccessFs::ResolveUnix);
        }
        if self.files { BitFlags::empty() } else { all }
    }
}

/// Restricts the calling thread, and those that it starts, for good. Needs `no_new_privs`.
pub fn restrict(needs: Needs) -> Result<RestrictionStatus, RulesetError> {
    let mut rules = Ruleset::default();
    // The crate refuses an empty set.
    if !needs.denied().is_empty() {
        rules = rules.handle_access(needs.denied())?;
    }
    rules
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .no_new_privs(false)
        .restrict_self()
}

/// What was asked for and what came of it, for the log.
pub fn describe(needs: Needs, status: &RestrictionStatus) -> String {
    let files = if needs.files { "" } else { "files, " };
    let kernel = match status.landlock {
        LandlockStatus::NotImplemented => "this kernel has none".to_owned(),
        LandlockStatus::NotEnabled => "this kernel has it disabled".to_owned(),
        LandlockStatus::Available { effective_abi, .. } => format!("ABI {}", effective_abi as i32),
    };
    let enforced = match status.ruleset {
        RulesetStatus::FullyEnforced => "all",
        RulesetStatus::PartiallyEnforced => "as far as this kernel goes",
        RulesetStatus::NotEnforced => "nothing",
    };
    format!("Landlock against {files}TCP, signals to others, abstract sockets: {enforced} ({kernel})")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::net::TcpListener;

    use super::*;

    /// In a thread of its own, which alone is restricted.
    fn restricted<T: Send + 'static>(needs: Needs, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let thread = std::thread::spawn(move || {
            // SAFETY: prctl with numbers only.
            assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
            let status = restrict(needs).unwrap();
            match status.landlock {
                LandlockStatus::Available { effective_abi, .. } if effective_abi >= ABI::V4 => Some(work()),
                _ => {
                    eprintln!("skipped: {}", describe(needs, &status));
                    None
                }
            }
        });
        thread.join().unwrap()
    }

    #[test]
    fn what_is_open_stays_usable_and_nothing_new_opens() {
        let mut open = tempfile::tempfile().unwrap();
        let refused = restricted(Needs::default(), move || {
            io::Write::write_all(&mut open, b"still").unwrap();
            open.set_len(0).unwrap();
            [
                File::open("/dev/null").map(drop),
                std::fs::read_dir("/").map(drop),
                TcpListener::bind("127.0.0.1:0").map(drop),
            ]
            .map(|result| result.unwrap_err().kind())
        });
        if let Some(refused) = refused {
            assert_eq!(refused, [io::ErrorKind::PermissionDenied; 3]);
        }
    }

    #[test]
    fn a_control_socket_that_is_told_of_files_opens_them_and_nothing_else() {
        let needs = Needs {
            files: true,
            ..Needs::default()
        };
        let results = restricted(needs, || {
            (
                File::open("/dev/null").is_ok(),
                TcpListener::bind("127.0.0.1:0").is_ok(),
            )
        });
        if let Some(results) = results {
            assert_eq!(results, (true, false));
        }
    }
}
