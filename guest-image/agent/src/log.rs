//! The agent's log: the kernel's own (`/dev/kmsg`), so that it costs no file, no daemon and, with a quiet
//! console, no character on the serial port. Outside a sliver (tests): standard error.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::OnceLock;

static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Longest record: `/dev/kmsg` refuses more than about 1 KiB.
const LONGEST: usize = 900;

/// Sends the log to the kernel's from here on.
pub(crate) fn to_kernel() {
    KMSG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
}

/// Writes one record; `level` is syslog's (3 error, 4 warning, 6 information).
pub(crate) fn record(level: u8, message: fmt::Arguments<'_>) {
    let mut text = message.to_string().replace('\n', " ");
    if text.len() > LONGEST {
        let cut = (0..=LONGEST)
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text.truncate(cut);
    }
    // A log that cannot be written has nowhere to be told.
    let _ = match KMSG.get() {
        Some(Some(kmsg)) => (&*kmsg).write_all(format!("<{level}>mandoline-agent: {text}\n").as_bytes()),
        Some(None) => Ok(()),
        None => writeln!(std::io::stderr(), "mandoline-agent: {text}"),
    };
}

/// Logs what people may want to know.
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::record(6, format_args!($($arg)*)) };
}

/// Logs what went wrong and was lived with.
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::record(4, format_args!($($arg)*)) };
}

pub(crate) use {info, warning};
