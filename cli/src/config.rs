//! `~/.config/mandoline/config.toml`: which authority, and the session's token. Mode 0600, since the token is
//! as good as the password while it lasts.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mandoline_api::authority_client::{AuthorityClient, Caller};
use serde::{Deserialize, Serialize};

use crate::error::{About, Error, Exit, Result};

/// What the file holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The authority's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authority: Option<String>,
    /// The session at that authority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
}

/// Where the file is.
pub(crate) fn path() -> Result<PathBuf> {
    Ok(base_dir("XDG_CONFIG_HOME", ".config")?.join("mandoline/config.toml"))
}

/// A directory of the XDG base directory specification.
pub(crate) fn base_dir(variable: &str, below_home: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
    {
        return Ok(dir);
    }
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .filter(|home| home.is_absolute());
    home.map(|home| home.join(below_home))
        .ok_or_else(|| Error::failure(format!("neither {variable} nor HOME is set")))
}

impl Config {
    /// Reads the file; none is an empty one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).about(path.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::failure(format!("{}: {error}", path.display()))),
        }
    }

    /// Writes the file whole, readable by its owner alone.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).about("configuration")?;
        write_private(path, text.as_bytes()).about(path.display())
    }
}

/// Replaces a file by one of mode 0600.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&part)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        // The error that matters is the first.
        let _ = fs::remove_file(&part);
    }
    written
}

/// The authority to call and how, from flags and environment first, then the file.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    pub(crate) authority: Option<String>,
    pub(crate) token: Option<String>,
}

impl Access {
    /// Puts together what flags (or the environment) say and what the file says. The file's token is for the
    /// file's authority only.
    pub(crate) fn resolve(authority: Option<String>, token: Option<String>, file: Config) -> Self {
        let same = authority.is_none()
            || authority.as_deref().map(trimmed) == file.authority.as_deref().map(trimmed);
        Self {
            authority: authority.or(file.authority),
            token: token.or(file.token.filter(|_| same)),
        }
    }

    /// The authority's address.
    pub(crate) fn url(&self) -> Result<&str> {
        self.authority.as_deref().ok_or_else(|| {
            Error::usage("which authority?").advise(
                "give --authority http://HOST:PORT, set MANDOLINE_AUTHORITY, or log in: mandoline login --authority URL",
            )
        })
    }

    /// A client with a session.
    pub(crate) fn client(&self) -> Result<AuthorityClient> {
        let url = self.url()?;
        let token = self.token.clone().ok_or_else(|| {
            Error::new(Exit::Refused, format!("not logged in at {url}"))
                .advise("log in with `mandoline login`")
        })?;
        Ok(AuthorityClient::new(url, Caller::Bearer(token))?)
    }
}

fn trimmed(url: &str) -> &str {
    url.trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn written_privately_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/config.toml");
        assert_eq!(Config::read(&path).unwrap(), Config::default());
        let config = Config {
            authority: Some("http://x".into()),
            token: Some("t".into()),
        };
        config.write(&path).unwrap();
        config.write(&path).unwrap();
        assert_eq!(Config::read(&path).unwrap(), config);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_token_does_not_go_to_another_authority() {
        let file = Config {
            authority: Some("http://a/".into()),
            token: Some("t".into()),
        };
        let resolve =
            |authority: Option<&str>| Access::resolve(authority.map(str::to_owned), None, file.clone()).token;
        assert_eq!(resolve(None).as_deref(), Some("t"));
        assert_eq!(resolve(Some("http://a")).as_deref(), Some("t"));
        assert_eq!(resolve(Some("http://b")), None);
    }
}
