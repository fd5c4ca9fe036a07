//! What makes one guest differ from its clones: entropy, clock, name, machine id, keys.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use mandoline_api::agent::{MAX_ENTROPY, MIN_ENTROPY};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::{Context as _, Error};
use crate::files;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`: `_IOW('R', 3, int[2])`, `_IO('R', 7)`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Whether a join brings an acceptable amount of entropy.
pub(crate) fn check_entropy(entropy: &[u8]) -> Result<(), Error> {
    if (MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
        return Ok(());
    }
    let got = entropy.len();
    Err(Error::BadRequest(format!(
        "entropy has {got} bytes; {MIN_ENTROPY} to {MAX_ENTROPY} are allowed"
    )))
}

/// Feeds the kernel's generator and reseeds it, so that nothing drawn from now on is shared with a clone.
pub(crate) fn feed_entropy(entropy: &[u8]) -> Result<(), Error> {
    check_entropy(entropy)?;
    let random = fs::OpenOptions::new()
        .write(true)
        .open("/dev/random")
        .context(|| "/dev/random".to_owned())?;
    // struct rand_pool_info { int entropy_count (bits); int buf_size (bytes); __u32 buf[]; }, in words so
    // that it is aligned as the kernel's.
    let bytes = i32::try_from(entropy.len()).unwrap_or(0);
    let mut info: Vec<i32> = vec![bytes.saturating_mul(8), bytes];
    info.extend(entropy.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        i32::from_ne_bytes(word)
    }));
    // SAFETY: the kernel reads 8 bytes of header and then buf_size bytes; the vector holds both.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) };
    if added != 0 {
        return Err(io::Error::last_os_error()).context(|| "RNDADDENTROPY".to_owned());
    }
    // SAFETY: this request takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error()).context(|| "RNDRESEEDCRNG".to_owned());
    }
    Ok(())
}

/// Sets the wall clock.
pub(crate) fn set_clock(unix_ns: u64) -> Result<(), Error> {
    let seconds = i64::try_from(unix_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanos = i64::try_from(unix_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        },
    )
    .context(|| format!("setting the clock to {unix_ns} ns"))
}

/// Linux's bound (`__NEW_UTS_LEN`) and RFC 1123's alphabet, with the underscore that slice names have.
pub(crate) fn check_hostname(name: &str) -> Result<(), Error> {
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 64 && name.split('.').all(label_ok) {
        return Ok(());
    }
    Err(Error::BadRequest(format!(
        "hostname is `{name}`; at most 64 letters, digits, hyphens and underscores are allowed, in labels joined by dots"
    )))
}

/// Sets the host name.
pub(crate) fn set_hostname(name: &str) -> Result<(), Error> {
    rustix::system::sethostname(name.as_bytes()).context(|| format!("setting the host name {name}"))
}

/// `/etc/hostname`, `/etc/hosts` (left alone once it knows the name: the user may have added to it) and
/// `/etc/machine-id` (made once for each disk).
pub(crate) fn write_names(hostname: &str) -> Result<(), Error> {
    let write = |path: &str, text: &str| {
        files::replace(Path::new(path), text.as_bytes(), 0o644).context(|| format!("writing {path}"))
    };
    write("/etc/hostname", &format!("{hostname}\n"))?;

    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    if !hosts.split_whitespace().any(|word| word == hostname) {
        let short = hostname.split('.').next().unwrap_or(hostname);
        let names = if short == hostname {
            hostname.to_owned()
        } else {
            format!("{hostname} {short}")
        };
        write(
            "/etc/hosts",
            &format!("127.0.0.1 localhost\n127.0.1.1 {names}\n::1 localhost ip6-localhost ip6-loopback\n"),
        )?;
    }

    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let id = id.trim();
    if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let mut text = String::new();
        for byte in random::<16>()? {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
        files::replace(Path::new("/etc/machine-id"), text.as_bytes(), 0o444)
            .context(|| "writing /etc/machine-id".to_owned())?;
    }
    Ok(())
}

/// Bytes from the kernel's generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .context(|| "getrandom".to_owned())?;
    if got == N {
        Ok(bytes)
    } else {
        Err(Error::Busy(format!("getrandom gave {got} of {N} bytes")))
    }
}

/// Whether the lines can be lines of an `authorized_keys` file.
pub(crate) fn check_keys(keys: &[String]) -> Result<(), Error> {
    if keys.len() > 1024 {
        return Err(Error::BadRequest(format!(
            "keys has {} lines; at most 1024 are allowed",
            keys.len()
        )));
    }
    for (number, key) in keys.iter().enumerate() {
        if key.len() > 16 * 1024 || key.trim().is_empty() || key.chars().any(|c| c.is_control() && c != '\t')
        {
            return Err(Error::BadRequest(format!(
                "keys[{number}] has {} bytes; one line of 1 to 16384 bytes is allowed, not empty, without control characters",
                key.len()
            )));
        }
    }
    Ok(())
}

/// Replaces root's `authorized_keys`; answers whether it changed.
pub(crate) fn write_keys(keys: &[String]) -> Result<bool, Error> {
    check_keys(keys)?;
    let directory = Path::new("/root/.ssh");
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(|| format!("making {}", directory.display())),
    }
    let mut text = String::from(
        "# The slice's users' keys, kept by Mandoline: this file is replaced when they change.\n\
         # Keys of your own live on in authorized_keys2.\n",
    );
    for key in keys {
        text.push_str(key);
        text.push('\n');
    }
    let path = directory.join("authorized_keys");
    files::replace(&path, text.as_bytes(), 0o600).context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_follow_the_rules() {
        for good in ["a", "codeen.node1.example.org", "x-1", "1a", "princeton_codeen"] {
            assert!(check_hostname(good).is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in [
            "",
            "-a",
            "a-",
            "a..b",
            ".a",
            "a/b",
            "a b",
            "a\n",
            long.as_str(),
            &"ab.".repeat(22),
        ] {
            assert!(check_hostname(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_stay_on_their_line() {
        assert!(check_keys(&["ssh-ed25519 AAAA someone@somewhere".into()]).is_ok());
        for bad in ["", " ", "ssh-ed25519 AAAA\nssh-ed25519 BBBB", "a\0b", "a\rb"] {
            assert!(check_keys(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
        assert!(check_keys(&["x".repeat(16 * 1024 + 1)]).is_err());
        assert!(check_keys(&vec!["x".to_owned(); 1025]).is_err());
    }

    #[test]
    fn entropy_is_bounded() {
        assert!(check_entropy(&[0; 31]).is_err());
        assert!(check_entropy(&[0; 32]).is_ok());
        assert!(check_entropy(&[0; 4097]).is_err());
    }
}
