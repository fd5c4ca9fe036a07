//! Sessions: a random token that the caller keeps; the database has only its hash.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use sqlx::Row;

use crate::db::{Conn, now};
use crate::domain::{Caller, Who};
use crate::error::{Error, Result};

/// How long a person's session lasts unless asked otherwise: PLCAPI's 24 h.
pub const PERSON_SESSION_S: i64 = 86_400;
/// The longest that can be asked for.
pub const PERSON_SESSION_MAX_S: i64 = 30 * 86_400;

/// Why a token is not taken (PLCAPI tells the two apart).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSession {
    /// Nobody knows it.
    Unknown,
    /// It has ended, or its person was disabled.
    Ended,
}

fn hash(token: &str) -> String {
    hex::encode(Sha256::digest(token.as_bytes()))
}

/// Opens a session: 32 random bytes in base64, as PLCAPI's. Gives the token and its end.
pub async fn open(conn: &mut Conn, caller: &Caller, lasts_s: Option<i64>) -> Result<(String, Option<i64>)> {
    let mut random = [0u8; 32];
    getrandom::fill(&mut random).map_err(Error::internal)?;
    let token = STANDARD.encode(random);
    let (person, node, expires) = match &caller.who {
        Who::Person { id, .. } => {
            let lasts = lasts_s.unwrap_or(PERSON_SESSION_S);
            if !(1..=PERSON_SESSION_MAX_S).contains(&lasts) {
                return Err(Error::invalid_value(
                    "expires",
                    &lasts.to_string(),
                    "1 to 2592000 seconds from now",
                ));
            }
            (Some(*id), None, Some(now() + lasts))
        }
        Who::Node { id } => {
            // A node has one: a new one ends the one before.
            sqlx::query("DELETE FROM sessions WHERE node_id = $1")
                .bind(*id)
                .execute(&mut *conn)
                .await?;
            (None, Some(*id), None)
        }
        Who::Anonymous | Who::Authority => {
            return Err(Error::denied("a session belongs to a person or a node"));
        }
    };
    sqlx::query(
        "INSERT INTO sessions (token_hash, person_id, node_id, created, expires) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(hash(&token))
    .bind(person)
    .bind(node)
    .bind(now())
    .bind(expires)
    .execute(&mut *conn)
    .await?;
    Ok((token, expires))
}

/// Whose session it is.
pub async fn find(conn: &mut Conn, token: &str) -> Result<Result<Caller, NoSession>> {
    let row = sqlx::query("SELECT person_id, node_id, expires FROM sessions WHERE token_hash = $1")
        .bind(hash(token))
        .fetch_optional(&mut *conn)
        .await?;
    let Some(row) = row else {
        return Ok(Err(NoSession::Unknown));
    };
    let expires: Option<i64> = row.try_get(2)?;
    if expires.is_some_and(|end| end <= now()) {
        return Ok(Err(NoSession::Ended));
    }
    let person: Option<i64> = row.try_get(0)?;
    let node: Option<i64> = row.try_get(1)?;
    let caller = match (person, node) {
        (Some(person), _) => Caller::load_person(conn, person).await?,
        (None, Some(node)) => Caller::load_node(conn, node).await?,
        (None, None) => None,
    };
    Ok(caller.ok_or(NoSession::Ended))
}

/// Ends a session.
pub async fn close(conn: &mut Conn, token: &str) -> Result<()> {
    sqlx::query("DELETE FROM sessions WHERE token_hash = $1")
        .bind(hash(token))
        .execute(conn)
        .await?;
    Ok(())
}

/// Removes what has ended: sessions, and nonces that no replay window needs any more.
pub async fn sweep(conn: &mut Conn) -> Result<()> {
    sqlx::query("DELETE FROM sessions WHERE expires <= $1")
        .bind(now())
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM nonces WHERE expires <= $1")
        .bind(now())
        .execute(&mut *conn)
        .await?;
    Ok(())
}
