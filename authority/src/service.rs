//! The running authority: what every request handler needs, signing in, and what it does by itself
//! (slices expire, sessions and nonces are swept).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use tokio::sync::watch;

use crate::auth::limiter::Limiter;
use crate::auth::password::Hasher;
use crate::auth::session;
use crate::db::Db;
use crate::domain::events::Bus;
use crate::domain::{Caller, slices, tags};
use crate::error::{Error, Result};
use crate::{in_read, in_write};

/// How often what has ended is looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// What the operator chose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config {
    /// Take PlanetLab's HMAC-SHA1 of old nodes over PLCAPI.
    pub compat_hmac_sha1: bool,
    /// Skip unknown nodes in AddSliceToNodes and DeleteSliceFromNodes, as PlanetLab's own server did.
    pub compat_skip_unknown: bool,
}

/// The running authority.
#[derive(Debug)]
pub struct Service {
    /// The database.
    pub db: Db,
    /// Password hashes.
    pub hasher: Hasher,
    /// The brake on guessing.
    pub limiter: Limiter,
    /// Recorded events, as they come.
    pub bus: Bus,
    /// What the operator chose.
    pub config: Config,
    /// True when the program is to end: open streams end with it.
    pub stopping: watch::Receiver<bool>,
}

impl Service {
    /// Starts on an open database.
    pub async fn start(db: Db, config: Config, stopping: watch::Receiver<bool>) -> Result<Arc<Self>> {
        in_write!(db, |c| tags::seed(c).await)?;
        let service = Arc::new(Self {
            hasher: Hasher::new().await?,
            limiter: Limiter::default(),
            bus: Bus::start(db.clone()).await?,
            db,
            config,
            stopping,
        });
        tokio::spawn(housekeeping(Arc::downgrade(&service)));
        Ok(service)
    }

    /// The person behind an e-mail address and a password.
    pub async fn sign_in(&self, email: &str, password: &str, from: IpAddr) -> Result<Caller> {
        self.limiter.check(email, from)?;
        let email = email.to_lowercase();
        let found = in_read!(self.db, |c| {
            let row = sqlx::query(
                "SELECT person_id, password_hash FROM persons \
                 WHERE email = $1 AND enabled = 1 AND deleted = 0 AND peer_id IS NULL",
            )
            .bind(&email)
            .fetch_optional(c)
            .await?;
            match row {
                Some(row) => Ok(Some((
                    row.try_get::<i64, _>(0)?,
                    row.try_get::<Option<String>, _>(1)?,
                ))),
                None => Ok(None),
            }
        })?;
        let hash = found.as_ref().and_then(|(_, hash)| hash.as_deref());
        let right = self.hasher.verify(password, hash).await?;
        let caller = match found {
            Some((id, _)) if right => in_read!(self.db, |c| Caller::load_person(c, id).await)?,
            _ => None,
        };
        match caller {
            Some(caller) => {
                self.limiter.succeeded(&email, from);
                Ok(caller)
            }
            None => {
                self.limiter.failed(&email, from);
                tracing::info!(%from, account = %email, "password refused");
                Err(Error::Unauthenticated("Password verification failed".into()))
            }
        }
    }
}

async fn housekeeping(service: std::sync::Weak<Service>) {
    loop {
        tokio::time::sleep(HOUSEKEEPING).await;
        let Some(service) = service.upgrade() else { return };
        let ended = in_write!(service.db, |c| {
            session::sweep(c).await?;
            slices::expire(c).await
        });
        match ended {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "slices expired"),
            Err(error) => tracing::warn!(%error, "housekeeping"),
        }
    }
}
