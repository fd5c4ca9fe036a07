//! The database: one code path for SQLite and PostgreSQL, and the only two ways to use it.
//!
//! [`in_write!`](crate::in_write) runs a change in a transaction that behaves as if it were alone (SQLite: `BEGIN IMMEDIATE`;
//! PostgreSQL: serializable) and runs it again when the database asks for that. [`in_read!`](crate::in_read) gives a
//! consistent view without blocking writers. Nothing else begins a transaction: the defaults of both
//! databases lose updates or fail at once under concurrency.

use std::sync::Arc;
use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{Any, AnyConnection, AnyPool, Row, Transaction};
use tokio::sync::Notify;

use crate::error::{Error, Result, is_transient};

/// A connection inside a transaction.
pub type Conn = AnyConnection;

/// How often a transaction is run again when the database asks for it.
const ATTEMPTS: u32 = 12;

/// How long SQLite waits for another writer.
const BUSY_TIMEOUT_MS: u32 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Sqlite,
    Postgres,
}

/// What a transaction is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Changes.
    Write,
    /// Looks only.
    Read,
}

/// The database.
#[derive(Clone)]
pub struct Db {
    pool: AnyPool,
    backend: Backend,
    committed: Arc<Notify>,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("backend", &self.backend)
            .finish_non_exhaustive()
    }
}

impl Db {
    /// Connects to `sqlite:...` or `postgres:...` and brings the schema up to date.
    pub async fn open(url: &str) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let backend = match url.split(':').next() {
            Some("sqlite") => Backend::Sqlite,
            Some("postgres" | "postgresql") => Backend::Postgres,
            _ => {
                let scheme = url.split(':').next().unwrap_or_default();
                return Err(Error::invalid_value(
                    "database URL",
                    &format!("{scheme}:..."),
                    "sqlite:... or postgres://...",
                ));
            }
        };
        let pool = AnyPoolOptions::new()
            .max_connections(if backend == Backend::Sqlite { 8 } else { 16 })
            .acquire_timeout(Duration::from_secs(10))
            .after_connect(move |conn, _| {
                Box::pin(async move {
                    if backend == Backend::Postgres {
                        sqlx::query("SET lock_timeout = '10s'")
                            .execute(&mut *conn)
                            .await?;
                    } else {
                        let timeout = sqlx::AssertSqlSafe(format!("PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}"));
                        sqlx::query(timeout).execute(&mut *conn).await?;
                        // FULL: what was answered survives a power cut, not only the death of the process.
                        for pragma in [
                            "PRAGMA journal_mode = WAL",
                            "PRAGMA synchronous = FULL",
                            "PRAGMA foreign_keys = ON",
                        ] {
                            sqlx::query(pragma).execute(&mut *conn).await?;
                        }
                    }
                    Ok(())
                })
            })
            .connect(url)
            .await?;
        sqlx::migrate!().run(&pool).await.map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error) => Error::Database(error),
            other => Error::Internal(format!("schema: {other}")),
        })?;
        Ok(Self {
            pool,
            backend,
            committed: Arc::new(Notify::new()),
        })
    }

    /// Returns when this process has committed a change since the last call.
    pub async fn committed(&self) {
        self.committed.notified().await;
    }

    /// Closes all connections; SQLite folds its log into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Begins a transaction; for the macros.
    #[doc(hidden)]
    pub async fn begin(&self, access: Access) -> Result<Transaction<'static, Any>> {
        let begin = match (self.backend, access) {
            (Backend::Sqlite, Access::Write) => "BEGIN IMMEDIATE",
            (Backend::Sqlite, Access::Read) => "BEGIN DEFERRED",
            (Backend::Postgres, Access::Write) => "BEGIN ISOLATION LEVEL SERIALIZABLE",
            (Backend::Postgres, Access::Read) => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        // In a task of its own: a caller that goes away (a client hangs up) while BEGIN is on its way would
        // give the connection back to the pool with a transaction open that sqlx does not know of, and the
        // next one would run inside it. A transaction that has begun is rolled back when it is dropped.
        let pool = self.pool.clone();
        let serial = (self.backend, access) == (Backend::Postgres, Access::Write);
        let begun = tokio::spawn(async move {
            let mut tx = pool.begin_with(begin).await?;
            if serial {
                // Every change takes a number from `ids`, so two at once would only fail each other. The lock
                // comes before the transaction's first look, which fixes what it sees.
                sqlx::query("LOCK TABLE ids IN EXCLUSIVE MODE")
                    .execute(&mut *tx)
                    .await?;
            }
            Ok::<_, sqlx::Error>(tx)
        });
        Ok(begun.await.map_err(Error::internal)??)
    }

    /// Gives the outcome back, or nothing if the transaction is to be run again; for the macros.
    #[doc(hidden)]
    pub async fn settle<T>(
        &self,
        access: Access,
        attempt: &mut u32,
        outcome: Result<T>,
    ) -> Option<Result<T>> {
        let failure = match outcome {
            Ok(value) => {
                if access == Access::Write {
                    self.committed.notify_one();
                }
                return Some(Ok(value));
            }
            Err(Error::Database(error)) if is_transient(&error) => error,
            Err(error) => return Some(Err(error)),
        };
        *attempt += 1;
        if *attempt >= ATTEMPTS {
            tracing::warn!(error = %failure, attempts = ATTEMPTS, "transaction given up");
            return Some(Err(Error::Unavailable));
        }
        // Full jitter: those who collided must not collide again in step.
        let longest = 1u64 << (*attempt).min(8);
        let mut random = [0u8; 8];
        if let Err(error) = getrandom::fill(&mut random) {
            return Some(Err(Error::internal(error)));
        }
        tokio::time::sleep(Duration::from_millis(u64::from_le_bytes(random) % longest)).await;
        None
    }
}

#[doc(hidden)]
#[macro_export]
macro_rules! transaction {
    ($db:expr, $access:expr, |$conn:ident| $body:expr) => {{
        let db: &$crate::db::Db = &$db;
        let mut attempt = 0u32;
        loop {
            let outcome: $crate::error::Result<_> = async {
                let mut tx = db.begin($access).await?;
                let value = {
                    let $conn: &mut $crate::db::Conn = &mut tx;
                    let value: $crate::error::Result<_> = async { $body }.await;
                    value?
                };
                tx.commit().await?;
                Ok(value)
            }
            .await;
            if let Some(outcome) = db.settle($access, &mut attempt, outcome).await {
                break outcome;
            }
        }
    }};
}

/// Runs a change in a transaction: `in_write!(db, |conn| change(conn).await)`. The body may run several times,
/// so it must do nothing but use the connection. (A macro, since the future of an async closure that borrows
/// cannot be shown to be `Send`.)
#[macro_export]
macro_rules! in_write {
    ($db:expr, |$conn:ident| $body:expr) => {
        $crate::transaction!($db, $crate::db::Access::Write, |$conn| $body)
    };
}

/// Reads from one consistent state: `in_read!(db, |conn| look(conn).await)`.
#[macro_export]
macro_rules! in_read {
    ($db:expr, |$conn:ident| $body:expr) => {
        $crate::transaction!($db, $crate::db::Access::Read, |$conn| $body)
    };
}

/// The next number of a kind of object. Numbers are never used twice, not even after a deletion.
pub async fn next_id(conn: &mut Conn, kind: &str) -> Result<i64> {
    let row = sqlx::query(
        "INSERT INTO ids (name, last) VALUES ($1, 1)
         ON CONFLICT (name) DO UPDATE SET last = ids.last + 1 RETURNING last",
    )
    .bind(kind)
    .fetch_one(conn)
    .await?;
    let id: i64 = row.try_get(0)?;
    // XML-RPC's int has 32 bits.
    if id > i64::from(i32::MAX) && kind != "event" {
        return Err(Error::Internal(format!("no {kind} numbers are left")));
    }
    Ok(id)
}

/// Now, Unix seconds.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn concurrent_writers_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}?mode=rwc", dir.path().join("db").display());
        let db = Db::open(&url).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let db = db.clone();
            tasks.spawn(async move {
                for _ in 0..25 {
                    in_write!(db, |c| next_id(c, "test").await).unwrap();
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(in_write!(db, |c| next_id(c, "test").await).unwrap(), 201);
    }

    #[tokio::test]
    async fn a_failed_change_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}?mode=rwc", dir.path().join("db").display());
        let db = Db::open(&url).await.unwrap();
        let failed = in_write!(db, |c| {
            next_id(c, "test").await?;
            Err::<(), _>(Error::invalid("no"))
        });
        assert!(failed.is_err());
        assert_eq!(in_write!(db, |c| next_id(c, "test").await).unwrap(), 1);
    }

    #[tokio::test]
    async fn other_databases_are_refused_without_showing_the_url() {
        let error = Db::open("mysql://root:secret@host/db")
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("postgres") && !error.contains("secret"), "{error}");
    }
}
