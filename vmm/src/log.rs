//! The log: to a descriptor, in one line a record, and never faster than a guest may provoke.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use mandoline_api::monitor::{LogLevel, Logger};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::fds::{self, Inherited};

/// Lets `burst` messages pass an interval, and counts what it held back.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Option<Instant>,
    passed: u32,
    held: u64,
}

impl RateLimit {
    /// `burst` messages each `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            window: Mutex::new(Window {
                since: None,
                passed: 0,
                held: 0,
            }),
        }
    }

    /// Whether a message may pass now: then the number of those held back since the last that passed.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut window = self
            .window
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if window
            .since
            .is_none_or(|since| now.duration_since(since) >= self.interval)
        {
            window.since = Some(now);
            window.passed = 0;
        }
        if window.passed == self.burst {
            window.held += 1;
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.held))
    }
}

/// The log's place and filter, once it was started.
static LOG: OnceLock<Log> = OnceLock::new();
/// Whether lines show their level.
static SHOW_LEVEL: AtomicBool = AtomicBool::new(true);
/// Whether lines show the file and line that they come from.
static SHOW_ORIGIN: AtomicBool = AtomicBool::new(false);
/// Lines that nobody took.
static LOST: AtomicU64 = AtomicU64::new(0);

struct Log {
    fd: RawFd,
    filter: reload::Handle<Targets, Registry>,
    /// What `filter` lets pass.
    passes: Mutex<(LogLevel, Option<String>)>,
}

/// Sends the log to `file`.
pub fn start(file: File) {
    let fd = file.as_raw_fd();
    let (filter, handle) = reload::Layer::new(targets(LogLevel::default(), None));
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .event_format(Format)
        .with_writer(Sink(file));
    // Fails only when a log was started already: then that one stays.
    if tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .try_init()
        .is_ok()
    {
        let _ = LOG.set(Log {
            fd,
            filter: handle,
            passes: Mutex::default(),
        });
    }
}

/// Changes where the log goes and what is in it; what `logger` does not say stays.
pub fn change(logger: &Logger, inherited: &mut Inherited) -> Result<(), fds::Error> {
    let file = logger
        .log_path
        .as_deref()
        .map(|path| inherited.sink("log_path", path))
        .transpose()?;
    let Some(log) = LOG.get() else { return Ok(()) };
    if let Some(file) = file {
        // In the place of the old one: the handler of forbidden calls knows only the number.
        // SAFETY: both numbers are open; the old file's owner goes on with the new one, unaware.
        if unsafe { libc::dup3(file.as_raw_fd(), log.fd, libc::O_CLOEXEC) } < 0 {
            return Err(fds::Error::Duplicate {
                name: "log".to_owned(),
                source: io::Error::last_os_error(),
            });
        }
    }
    if let Some(show) = logger.show_level {
        SHOW_LEVEL.store(show, Ordering::Relaxed);
    }
    if let Some(show) = logger.show_log_origin {
        SHOW_ORIGIN.store(show, Ordering::Relaxed);
    }
    if logger.level.is_some() || logger.module.is_some() {
        let mut passes = log.passes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        passes.0 = logger.level.unwrap_or(passes.0);
        passes.1 = logger.module.clone().or(passes.1.take());
        let targets = targets(passes.0, passes.1.as_deref());
        // Fails only when the log is gone, and it never is.
        let _ = log.filter.reload(targets);
    }
    Ok(())
}

/// Lines that were lost because nobody took them.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// What is logged. What the libraries beneath say about rings (`virtio_queue`) is left out: devices report the same
/// errors themselves, under a limit.
fn targets(level: LogLevel, module: Option<&str>) -> Targets {
    let level = match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let targets = match module {
        Some(module) => Targets::new().with_target(module, level),
        None => Targets::new().with_default(level),
    };
    targets.with_target("virtio_queue", LevelFilter::OFF)
}

/// A line, as full as it shall be.
struct Format;

impl<S, N> FormatEvent<S, N> for Format
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        let origin = SHOW_ORIGIN.load(Ordering::Relaxed);
        tracing_subscriber::fmt::format()
            .with_level(SHOW_LEVEL.load(Ordering::Relaxed))
            .with_file(origin)
            .with_line_number(origin)
            .format_event(context, writer, event)
    }
}

/// The log's file. A line is one `write`; one that is not taken is lost and counted, since the log is no reason to stop.
struct Sink(File);

impl Write for &Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match (&self.0).write(line) {
            Ok(taken @ 1..) => Ok(taken),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Ok(0) | Err(_) => {
                LOST.fetch_add(1, Ordering::Relaxed);
                Ok(line.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = &'a Sink;

    fn make_writer(&'a self) -> &'a Sink {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::new(2, Duration::from_secs(1));
        let start = Instant::now();
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start), None);
        assert_eq!(limit.pass_at(start + Duration::from_millis(999)), None);
        assert_eq!(limit.pass_at(start + Duration::from_secs(1)), Some(2));
    }
}
