//! Users' ssh keys.

use super::events::Record;
use super::{Caller, Ref, desired, lookup};
use crate::auth::sshkey;
use crate::db::{Conn, next_id, now};
use crate::error::{Error, Result};

/// Keys that one person may have: a sliver's authorized_keys must stay readable.
const PER_PERSON: i64 = 100;

/// Adds a key to a person: one's own, or anybody's by an admin.
pub async fn add(conn: &mut Conn, caller: &Caller, person: &Ref, key_type: &str, key: &str) -> Result<i64> {
    if key_type != "ssh" {
        return Err(Error::invalid_value("key_type", key_type, "'ssh'"));
    }
    let person = lookup::person(conn, person).await?;
    if !caller.is_admin() && caller.person_id() != Some(person.id) {
        return Err(Error::denied("You may only modify your own keys"));
    }
    let key = sshkey::check(key)?;
    let has: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM keys WHERE person_id = $1 AND deleted = 0")
        .bind(person.id)
        .fetch_one(&mut *conn)
        .await?;
    if has >= PER_PERSON {
        return Err(Error::invalid(format!(
            "account '{}' has {has} keys: allowed are {PER_PERSON}",
            person.email
        )));
    }
    let id = next_id(conn, "key").await?;
    sqlx::query(
        "INSERT INTO keys (key_id, person_id, key_type, key_text, date_created) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(id)
    .bind(person.id)
    .bind(key_type)
    .bind(key)
    .bind(now())
    .execute(&mut *conn)
    .await?;
    let wakes = desired::nodes_of_person(conn, person.id).await?;
    Record::new("key_added")
        .person(person.id)
        .wakes(wakes)
        .save(conn, caller)
        .await?;
    Ok(id)
}

/// Deletes a key: one's own, or anybody's by an admin.
pub async fn delete(conn: &mut Conn, caller: &Caller, key_id: i64) -> Result<()> {
    let person: Option<i64> =
        sqlx::query_scalar("SELECT person_id FROM keys WHERE key_id = $1 AND deleted = 0")
            .bind(key_id)
            .fetch_optional(&mut *conn)
            .await?;
    let person = person.ok_or_else(|| Error::NoSuch("key".into()))?;
    if !caller.is_admin() && caller.person_id() != Some(person) {
        return Err(Error::denied("You may only modify your own keys"));
    }
    sqlx::query("UPDATE keys SET deleted = 1 WHERE key_id = $1")
        .bind(key_id)
        .execute(&mut *conn)
        .await?;
    let wakes = desired::nodes_of_person(conn, person).await?;
    Record::new("key_deleted")
        .person(person)
        .wakes(wakes)
        .save(conn, caller)
        .await
}
