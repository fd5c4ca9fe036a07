//! Where the monitor's own output goes: log, metrics, console.

use serde::{Deserialize, Deserializer, Serialize};

use super::TokenBucket;

/// `PUT /logger`: what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or named pipe that takes the log, or `fd:NAME`. On a pipe that is full, lines are lost and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// The least level that is logged; at the start `Info`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether a line shows its level; at the start it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether a line shows the file and line that it comes from; at the start it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only what comes from here, for example `mandoline_vmm::devices`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Levels of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Something failed.
    Error,
    /// Something is odd.
    Warning,
    /// Events.
    #[default]
    Info,
    /// For those who look for a fault.
    Debug,
    /// Everything.
    Trace,
}

/// Not one of [`LogLevel`].
#[derive(Debug, thiserror::Error)]
#[error("log level is {0:?}; allowed, in any case: Off, Error, Warning, Info, Debug, Trace")]
pub struct LogLevelError(String);

impl std::str::FromStr for LogLevel {
    type Err = LogLevelError;

    /// In any case; `warn` is `Warning`.
    fn from_str(text: &str) -> Result<Self, LogLevelError> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warning" | "warn" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(LogLevelError(text.to_owned())),
        }
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// `PUT /metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or named pipe that takes an object a line, or `fd:NAME`. On a pipe that is full, lines are lost and counted.
    pub metrics_path: String,
}

/// `PUT /serial`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or named pipe that takes the console's output, or `fd:NAME`; absent: standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
    /// Not supported: the monitor's memory for output that nobody takes is bounded anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_in_any_case() {
        for (text, level) in [
            ("Info", LogLevel::Info),
            ("WARN", LogLevel::Warning),
            ("warning", LogLevel::Warning),
            ("off", LogLevel::Off),
        ] {
            let read: LogLevel = serde_json::from_str(&format!("{text:?}")).unwrap();
            assert_eq!(read, level);
        }
        let error = serde_json::from_str::<LogLevel>(r#""loud""#).unwrap_err();
        assert!(error.to_string().contains("Trace"), "{error}");
    }
}
