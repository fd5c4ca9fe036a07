//! `scs.toml`: what the slice creation service is told. Every field has a default, so that a packaged node
//! needs an empty file only.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's `pl_node.txt`.
    pub node_file: PathBuf,
    /// The node manager's socket for host services.
    pub nm_socket: PathBuf,
    /// Where the node's key is kept.
    pub state_dir: PathBuf,
    /// The node's ssh server's public host keys, announced to the authority.
    pub ssh_host_keys: Vec<PathBuf>,
    /// How often the authority is asked without being told that something has changed, seconds. The first
    /// PlanetLab's is ten minutes; a tenth of it is added or taken away at random.
    pub poll_seconds: u64,
    /// The longest pause between attempts, seconds.
    pub retry_max_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        let host_key = |kind| PathBuf::from(format!("/etc/ssh/ssh_host_{kind}_key.pub"));
        Self {
            node_file: "/etc/mandoline/node/pl_node.txt".into(),
            nm_socket: "/run/mandoline/nm.sock".into(),
            state_dir: "/var/lib/mandoline-scs".into(),
            ssh_host_keys: ["ed25519", "ecdsa", "rsa"].map(host_key).into(),
            poll_seconds: 600,
            retry_max_seconds: 60,
        }
    }
}

/// Why a configuration is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is not TOML, or names what does not exist.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A number out of bounds.
    #[error("{}: {name} is {value}; allowed: {allowed}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The field.
        name: &'static str,
        /// Its value.
        value: u64,
        /// Its bounds.
        allowed: &'static str,
    },
}

impl Config {
    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads `text`; `path` is for the messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let bounded = |name, value, allowed, ok: bool| {
            if ok {
                Ok(())
            } else {
                Err(ConfigError::Value {
                    path: path.to_owned(),
                    name,
                    value,
                    allowed,
                })
            }
        };
        let (poll, retry) = (config.poll_seconds, config.retry_max_seconds);
        bounded("poll_seconds", poll, "5 to 86400", (5..=86_400).contains(&poll))?;
        bounded(
            "retry_max_seconds",
            retry,
            "1 to 3600",
            (1..=3600).contains(&retry),
        )?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_enough() {
        let config = Config::parse("", Path::new("scs.toml")).unwrap();
        assert_eq!(config.poll_seconds, 600);
        assert_eq!(config.nm_socket, Path::new("/run/mandoline/nm.sock"));
    }

    #[test]
    fn unknown_names_and_absurd_numbers_are_refused() {
        for (text, part) in [
            ("pol_seconds = 5", "unknown field `pol_seconds`"),
            ("poll_seconds = 0", "poll_seconds is 0; allowed: 5 to 86400"),
            (
                "retry_max_seconds = 4000",
                "retry_max_seconds is 4000; allowed: 1 to 3600",
            ),
        ] {
            let message = Config::parse(text, Path::new("scs.toml"))
                .unwrap_err()
                .to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
