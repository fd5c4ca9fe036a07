//! Kernel settings of the calling thread's network namespace, by /proc/sys/net.

use std::fs;
use std::io;

use crate::error::{Error, Result};

/// Sets `net.<name>` (written with slashes), unless it is so already: where /proc/sys is
/// read-only, right settings are enough.
pub fn set(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    let is = fs::read_to_string(&path).unwrap_or_default();
    if is.split_whitespace().eq(value.split_whitespace()) {
        return Ok(());
    }
    fs::write(&path, value).map_err(Error::file("set kernel setting", path))
}

/// Sets `net.<name>` where the kernel has such a setting.
pub fn set_if_there(name: &str, value: &str) -> Result<()> {
    match set(name, value) {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
