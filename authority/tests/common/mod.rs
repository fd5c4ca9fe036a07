//! Databases for the integration tests: SQLite always, PostgreSQL where there is one.
//!
//! PostgreSQL is `MANDOLINE_TEST_POSTGRES` (a URL whose user may create databases), or a server of its own,
//! started from Debian's binaries in a temporary directory on a Unix socket. Without either the tests say so
//! and go on with SQLite alone.

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod world;

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A PostgreSQL server; one that was started here ends with it.
pub(crate) struct Postgres {
    url: String,
    own: Option<(Child, tempfile::TempDir)>,
}

impl Postgres {
    /// A server, or why there is none.
    pub(crate) fn find() -> Result<Self, String> {
        if let Ok(url) = std::env::var("MANDOLINE_TEST_POSTGRES") {
            return Ok(Self { url, own: None });
        }
        let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
            .map_err(|_| "no /usr/lib/postgresql/*/bin (Debian package postgresql)".to_owned())?
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .filter(|bin| bin.join("initdb").exists())
            .collect();
        found.sort();
        let bin = found
            .pop()
            .ok_or("no /usr/lib/postgresql/*/bin/initdb (Debian package postgresql)")?;
        Self::start(&bin)
    }

    fn start(bin: &Path) -> Result<Self, String> {
        let fail = |what: &str, error: &dyn std::fmt::Display| {
            format!("PostgreSQL in {}: {what}: {error}", bin.display())
        };
        let dir = tempfile::tempdir().map_err(|e| fail("temporary directory", &e))?;
        let data = dir.path().join("data");
        // PostgreSQL refuses to run as root: then it runs as the owner that Debian made for it, or as nobody.
        let user = match is_root() {
            true => Some(
                user("postgres")
                    .or_else(|| user("nobody"))
                    .ok_or("root, and no user postgres or nobody")?,
            ),
            false => None,
        };
        fs::create_dir(&data).map_err(|e| fail("data directory", &e))?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).map_err(|e| fail("mode", &e))?;
        if let Some((uid, gid)) = user {
            for path in [dir.path(), &data] {
                chown(path, Some(uid), Some(gid)).map_err(|e| fail("owner", &e))?;
            }
        }
        let command = |program: &str| {
            let mut command = Command::new(bin.join(program));
            command
                .current_dir(dir.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            if let Some((uid, gid)) = user {
                command.gid(gid).uid(uid);
            }
            command
        };
        let made = command("initdb")
            .args([
                "--auth=trust",
                "--username=test",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
                "-D",
            ])
            .arg(&data)
            .output()
            .map_err(|e| fail("initdb", &e))?;
        if !made.status.success() {
            return Err(fail("initdb", &String::from_utf8_lossy(&made.stderr)));
        }
        let server = command("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-k"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| fail("postgres", &e))?;
        let socket = dir.path().display().to_string().replace('/', "%2F");
        let server = Self {
            url: format!("postgres://test@{socket}/postgres"),
            own: Some((server, dir)),
        };
        server.wait_ready(bin)?;
        Ok(server)
    }

    fn wait_ready(&self, bin: &Path) -> Result<(), String> {
        let Some((_, dir)) = &self.own else { return Ok(()) };
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            let ready = Command::new(bin.join("pg_isready"))
                .arg("-q")
                .arg("-h")
                .arg(dir.path())
                .status();
            if ready.is_ok_and(|status| status.success()) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err("PostgreSQL did not become ready within a minute".into())
    }

    /// URL of a new, empty database.
    pub(crate) async fn database(&self, name: &str) -> String {
        use sqlx::Connection;
        let name = format!("mandoline_test_{name}_{}", std::process::id());
        let mut conn = sqlx::postgres::PgConnection::connect(&self.url).await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut conn)
            .await
            .unwrap();
        let (server, _) = self.url.rsplit_once('/').unwrap();
        format!("{server}/{name}")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.own {
            // Immediate shutdown: the directory goes with it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

fn user(name: &str) -> Option<(u32, u32)> {
    let passwd: io::Result<String> = fs::read_to_string("/etc/passwd");
    passwd.ok()?.lines().find_map(|line| {
        let mut parts = line.split(':');
        (parts.next() == Some(name)).then_some(())?;
        Some((parts.nth(1)?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

/// The databases to test with: name and URL; what they need lives as long as this.
pub(crate) struct Databases {
    pub(crate) urls: Vec<(&'static str, String)>,
    _dir: tempfile::TempDir,
    _postgres: Option<Postgres>,
}

/// Empty databases for one test.
pub(crate) async fn databases(test: &str) -> Databases {
    let dir = tempfile::tempdir().unwrap();
    let mut urls = vec![(
        "SQLite",
        format!("sqlite://{}?mode=rwc", dir.path().join("db").display()),
    )];
    let postgres = match Postgres::find() {
        Ok(postgres) => Some(postgres),
        Err(why) => {
            eprintln!("SKIPPED on PostgreSQL: {why}");
            None
        }
    };
    if let Some(postgres) = &postgres {
        urls.push(("PostgreSQL", postgres.database(test).await));
    }
    Databases {
        urls,
        _dir: dir,
        _postgres: postgres,
    }
}
