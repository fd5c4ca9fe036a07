//! The jail: what a monitor gives up between "everything is open" and the guest's first instruction.
//!
//! ```text
//! inherited descriptors other than the named ones closed     (fds::Inherited::adopt, at the start)
//! root directory: an empty one that is deleted               needs CAP_SYS_CHROOT
//! groups dropped, gid and uid set                            needs CAP_SETGID, CAP_SETUID
//! all capabilities dropped, also from the bounding set
//! no new privileges, no core dumps, no debugger
//! no files, no TCP, no signals to others                     (landlock), as far as the kernel has it
//! one system call filter for each thread role                (seccomp)
//! ```
//!
//! There is no mount namespace: a private copy of the mount table would pin every file system that was mounted
//! when the monitor started, so that the operator could unmount none while a sliver runs. A root directory
//! that is deleted has no entries and can get none, and without `CAP_SYS_CHROOT` there is no way out of it.

pub mod landlock;
pub mod seccomp;

use std::ffi::CString;
use std::io;

/// A step into the jail failed. The monitor does not run half-jailed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call of ours.
    #[error("jail: {step}: {source}")]
    Step {
        /// What was to be given up.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Landlock, where the kernel has it.
    #[error("jail: Landlock: {0}")]
    Landlock(#[from] ::landlock::RulesetError),
}

/// Who the monitor becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

fn check(step: &'static str, result: libc::c_int) -> Result<(), Error> {
    if result == 0 {
        Ok(())
    } else {
        Err(Error::Step {
            step,
            source: io::Error::last_os_error(),
        })
    }
}

/// Gives up the file system and every privilege. Must run before any other thread is started.
///
/// Without `identity` only what an ordinary user can give up is given up: no new privileges, no core dumps, and by
/// Landlock (without `needs`: not at all) all files and sockets but those that are needed.
pub fn enter(identity: Option<Identity>, needs: Option<landlock::Needs>) -> Result<(), Error> {
    if let Some(Identity { uid, gid }) = identity {
        empty_root()?;
        drop_bounding_set()?;
        // SAFETY: none of these touches memory of ours.
        unsafe {
            check("setgroups", libc::setgroups(0, std::ptr::null()))?;
            check("setresgid", libc::setresgid(gid, gid, gid))?;
            check("setresuid", libc::setresuid(uid, uid, uid))?;
        }
    }
    drop_capabilities()?;
    // SAFETY: prctl with numbers only.
    unsafe {
        check("no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check("dumpable", libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))?;
    }
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: setrlimit reads one rlimit.
    check("core limit", unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) })?;
    if let Some(needs) = needs {
        let status = landlock::restrict(needs)?;
        tracing::info!("{}", landlock::describe(needs, &status));
    }
    Ok(())
}

/// Ends this process when its parent does. After [`enter`], since a change of user id takes it back.
pub fn die_with_parent() -> Result<(), Error> {
    // SAFETY: prctl with numbers only.
    check("death signal", unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0)
    })?;
    // It may have ended before that.
    if rustix::process::getppid() == Some(rustix::process::Pid::INIT) {
        let source = io::Error::new(io::ErrorKind::NotFound, "the parent process has ended");
        return Err(Error::Step {
            step: "death signal",
            source,
        });
    }
    Ok(())
}

/// Makes an empty directory the root and deletes it.
fn empty_root() -> Result<(), Error> {
    let failed = |step| move |source| Error::Step { step, source };
    let template = if std::path::Path::new("/run").is_dir() {
        "/run"
    } else {
        "/tmp"
    };
    let template = CString::new(format!("{template}/mandoline-root-XXXXXX"))
        .map_err(|error| failed("name of the empty root")(error.into()))?;
    let mut name = template.into_bytes_with_nul();
    // SAFETY: mkdtemp changes the six X in place; the buffer is NUL-terminated and ours.
    if unsafe { libc::mkdtemp(name.as_mut_ptr().cast()) }.is_null() {
        return Err(failed("making the empty root")(io::Error::last_os_error()));
    }
    let path: *const libc::c_char = name.as_ptr().cast();
    // SAFETY: `path` is the NUL-terminated name that mkdtemp left in `name`, which lives on.
    unsafe {
        // The directory is entered, deleted by its old name, and only then made the root: nothing is left behind.
        let result = check("entering the empty root", libc::chdir(path));
        let deleted = check("deleting the empty root", libc::rmdir(path));
        result.and(deleted)?;
        check("chroot", libc::chroot(c".".as_ptr()))
    }
}

fn drop_bounding_set() -> Result<(), Error> {
    for capability in 0..64 {
        // SAFETY: prctl with numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let source = io::Error::last_os_error();
            // The first number that the kernel does not know ends the list.
            if source.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(Error::Step {
                step: "capability bounding set",
                source,
            });
        }
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), Error> {
    /// `struct __user_cap_header_struct`, version 3: two sets of 32 bits.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // effective, permitted, inheritable, twice
    let none = [0u32; 6];
    // SAFETY: capset reads the header and two data structures of three words each.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    check("capset", if result == 0 { 0 } else { -1 })?;
    // SAFETY: prctl with numbers only.
    check("ambient capabilities", unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    })
}
