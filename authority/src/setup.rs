//! Making an authority's data directory, and opening it again.
//!
//! ```text
//! DIR/                  0700
//!   authority.sqlite    0600, unless the database is elsewhere (--database)
//!   lock                held while `serve` runs: one process for one SQLite database
//! ```

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::auth::password::Hasher;
use crate::db::Db;
use crate::domain::persons::{self, NewPerson};
use crate::domain::{Caller, Role, tags};
use crate::error::Error;
use crate::in_write;

const DATABASE: &str = "authority.sqlite";

/// Why an authority cannot be made or opened: a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There is none.
    #[error("there is no authority in {dir}: make one with `mandoline-authority init --data {dir} ...`", dir = .0.display())]
    NotThere(PathBuf),
    /// There is one.
    #[error("there is an authority in {0} already; `serve` runs it")]
    Already(String),
    /// Others can read secrets.
    #[error("{path} is open to others (mode {mode:04o}): chmod {want:o} {path}", path = .path.display())]
    OpenToOthers {
        /// What.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        want: u32,
    },
    /// Another process runs it.
    #[error("another mandoline-authority runs on {}: stop it first", .0.display())]
    Running(PathBuf),
    /// A file or directory.
    #[error("{}: {error}", .path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The database.
    #[error("the database cannot be opened: {0}")]
    Database(Error),
    /// What was asked for.
    #[error("{0}")]
    Refused(Error),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SetupError + '_ {
    move |error| SetupError::Io {
        path: path.to_owned(),
        error,
    }
}

fn check_mode(path: &Path, want: u32) -> Result<(), SetupError> {
    let mode = path.metadata().map_err(io_error(path))?.permissions().mode() & 0o7777;
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(SetupError::OpenToOthers {
            path: path.to_owned(),
            mode,
            want,
        }),
    }
}

/// The password in a file that only its owner can read. A line feed at its end is not part of it.
pub fn read_password(path: &Path) -> Result<String, SetupError> {
    check_mode(path, 0o600)?;
    let text = std::fs::read_to_string(path).map_err(io_error(path))?;
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn sqlite_url(path: &Path) -> String {
    // In a URL, '?' begins the parameters and '%' an escape.
    let path = path
        .display()
        .to_string()
        .replace('%', "%25")
        .replace('?', "%3f")
        .replace('#', "%23");
    format!("sqlite://{path}?mode=rw")
}

/// Makes an authority with one administrator. What it made is removed again if it fails.
pub async fn init(dir: &Path, database: Option<&str>, email: &str, password: &str) -> Result<(), SetupError> {
    let new_dir = !dir.exists();
    if new_dir {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io_error(dir))?;
    }
    check_mode(dir, 0o700)?;
    let file = dir.join(DATABASE);
    let url = match database {
        Some(url) => url.to_owned(),
        None => {
            // Made here so that nobody else can read it from its first byte on; its log files take its mode.
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&file)
            {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(SetupError::Already(dir.display().to_string()));
                }
                Err(error) => return Err(SetupError::Io { path: file, error }),
            }
            sqlite_url(&file)
        }
    };
    let made = populate(&url, email, password).await;
    if made.is_err() && database.is_none() {
        for suffix in ["", "-wal", "-shm"] {
            let path = dir.join(format!("{DATABASE}{suffix}"));
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "left behind");
            }
        }
    }
    if made.is_err() && new_dir {
        // Only if nothing is in it.
        let _ = std::fs::remove_dir(dir);
    }
    made
}

async fn populate(url: &str, email: &str, password: &str) -> Result<(), SetupError> {
    let db = Db::open(url).await.map_err(SetupError::Database)?;
    let hasher = Hasher::new().await.map_err(SetupError::Refused)?;
    let hash = hasher.hash(password).await.map_err(SetupError::Refused)?;
    let admin = NewPerson {
        first_name: "Authority".into(),
        last_name: "Administrator".into(),
        email: email.to_owned(),
        password_hash: Some(hash),
        enabled: true,
        roles: vec![Role::Admin],
        ..NewPerson::default()
    };
    let made = in_write!(db, |c| {
        let people: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM persons")
            .fetch_one(&mut *c)
            .await?;
        if people > 0 {
            return Ok(false);
        }
        tags::seed(c).await?;
        persons::add(c, &Caller::authority(), &admin).await?;
        Ok(true)
    });
    db.close().await;
    match made {
        Ok(true) => Ok(()),
        Ok(false) => Err(SetupError::Already("this database".into())),
        Err(error) => Err(SetupError::Refused(error)),
    }
}

/// An open authority; the lock is held as long as it lives.
#[derive(Debug)]
pub struct Opened {
    /// The database.
    pub db: Db,
    _lock: Option<File>,
}

/// Opens the authority in a directory, or with another database.
pub async fn open(dir: &Path, database: Option<&str>) -> Result<Opened, SetupError> {
    if let Some(url) = database {
        let db = Db::open(url).await.map_err(SetupError::Database)?;
        return Ok(Opened { db, _lock: None });
    }
    let file = dir.join(DATABASE);
    if !file.exists() {
        return Err(SetupError::NotThere(dir.to_owned()));
    }
    check_mode(dir, 0o700)?;
    check_mode(&file, 0o600)?;
    let path = dir.join("lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error(&path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(SetupError::Running(dir.to_owned())),
        Err(TryLockError::Error(error)) => return Err(SetupError::Io { path, error }),
    }
    let db = Db::open(&sqlite_url(&file)).await.map_err(SetupError::Database)?;
    Ok(Opened {
        db,
        _lock: Some(lock),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn an_authority_is_made_once_for_its_owner_only_and_runs_once() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("a b?c");
        assert!(matches!(open(&dir, None).await, Err(SetupError::NotThere(_))));
        init(&dir, None, "admin@example.org", "a long password")
            .await
            .unwrap();
        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(
            dir.join(DATABASE).metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = init(&dir, None, "admin@example.org", "a long password").await;
        assert!(matches!(again, Err(SetupError::Already(_))));
        let opened = open(&dir, None).await.unwrap();
        assert!(matches!(open(&dir, None).await, Err(SetupError::Running(_))));
        drop(opened);
        mode(&dir.join(DATABASE), 0o644);
        assert!(matches!(
            open(&dir, None).await,
            Err(SetupError::OpenToOthers { .. })
        ));
    }

    #[tokio::test]
    async fn a_failed_init_leaves_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("new");
        for (email, password) in [("not an address", "a long password"), ("a@b.c", "short")] {
            assert!(init(&dir, None, email, password).await.is_err());
            assert!(!dir.exists());
        }
    }

    #[test]
    fn a_password_file_that_others_can_read_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("pw");
        std::fs::write(&path, "a long password\n").unwrap();
        mode(&path, 0o644);
        assert!(matches!(
            read_password(&path),
            Err(SetupError::OpenToOthers { .. })
        ));
        mode(&path, 0o600);
        assert_eq!(read_password(&path).unwrap(), "a long password");
    }
}
