//! Slices: made by PIs and admins, renewed by their users, kept for audit when they are deleted.
//!
//! ```text
//! added ──► active ◄─renewed─┐
//!             │ └────────────┘
//!             ├─ deleted by a user, its PI, an admin ─┐
//!             └─ expired ─────────────────────────────┴─► deleted (row, tags and events stay)
//! ```

use mandoline_api::authority::Instantiation;
use mandoline_rspec::SliceName;
use serde_json::json;

use super::events::Record;
use super::lookup::{SliceRow, nodes_of_slice};
use super::{Caller, Ref, Role, lookup};
use crate::db::{Conn, next_id, now};
use crate::error::{Error, Result};

/// How long a new slice lives: PLCAPI's two weeks.
pub const LIFE_S: i64 = 14 * 86_400;
/// How far ahead who is not admin may renew: PLCAPI's eight weeks.
pub const RENEW_MAX_S: i64 = 8 * 7 * 86_400;
/// PLCAPI's times are 32 bits wide.
const TIME_MAX: i64 = i32::MAX as i64;

/// A slice to add.
#[derive(Clone, Debug, Default)]
pub struct NewSlice {
    /// Name.
    pub name: String,
    /// How it comes to its nodes; absent = plc-instantiated.
    pub instantiation: Option<String>,
    /// A page about it.
    pub url: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// PLCAPI's bound, which nothing enforces.
    pub max_nodes: Option<i64>,
}

/// What to change in a slice; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct SliceChange {
    /// How it comes to its nodes.
    pub instantiation: Option<String>,
    /// A page about it.
    pub url: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// PLCAPI's bound. Admins and PIs only.
    pub max_nodes: Option<i64>,
    /// New end, Unix seconds.
    pub expires: Option<i64>,
    /// Whether its slivers run.
    pub enabled: Option<bool>,
}

fn check_instantiation(word: &str) -> Result<()> {
    let all = Instantiation::ALL.map(Instantiation::as_str);
    match all.contains(&word) {
        true => Ok(()),
        false => Err(Error::invalid_value("instantiation", word, &all.join(", "))),
    }
}

/// Reads a word of the database.
pub fn instantiation(word: &str) -> Instantiation {
    Instantiation::ALL
        .into_iter()
        .find(|i| i.as_str() == word)
        .unwrap_or(Instantiation::NotInstantiated)
}

/// Adds a slice.
pub async fn add(conn: &mut Conn, caller: &Caller, slice: &NewSlice) -> Result<i64> {
    if !caller.is_admin() && !caller.has(Role::Pi) {
        return Err(Error::denied("only admins and PIs may add slices"));
    }
    let name = SliceName::new(&slice.name)?;
    if mandoline_rspec::LOCAL_NAMES.contains(&name.as_str()) {
        return Err(Error::invalid_value(
            "name",
            name.as_str(),
            "a name that is not one of a node's own",
        ));
    }
    let site = match lookup::site(conn, &Ref::Name(name.login_base().to_owned())).await {
        Err(Error::NoSuch(_)) => {
            let prefix = name.login_base();
            return Err(Error::invalid(format!(
                "Invalid slice prefix {prefix} in {name}: no site has the login_base '{prefix}'"
            )));
        }
        other => other?,
    };
    if !caller.is_admin() {
        if !caller.is_pi_of(site.id) {
            return Err(Error::denied(format!(
                "Slice prefix {} must be the same as the login_base of one of your sites",
                site.login_base
            )));
        }
        if !site.enabled {
            return Err(Error::denied(format!(
                "Site {} is not enabled and can not create slices",
                site.login_base
            )));
        }
    }
    let instantiation = slice
        .instantiation
        .as_deref()
        .unwrap_or(Instantiation::default().as_str());
    check_instantiation(instantiation)?;
    if let Some(url) = &slice.url {
        check_url(url)?;
    }
    let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM slices WHERE site_id = $1 AND deleted = 0")
        .bind(site.id)
        .fetch_one(&mut *conn)
        .await?;
    if count >= site.max_slices {
        return Err(Error::invalid(format!(
            "Site {} has reached ({count}) its maximum allowable slice count ({})",
            site.login_base, site.max_slices
        )));
    }
    if lookup::exists(lookup::slice(conn, &Ref::Name(name.as_str().to_owned())).await)? {
        return Err(Error::Conflict(format!(
            "Slice name already in use: slice '{name}' already exists"
        )));
    }
    let id = next_id(conn, "slice").await?;
    let created = now();
    sqlx::query(
        "INSERT INTO slices (slice_id, uuid, site_id, name, instantiation, url, description, max_nodes, \
         creator_person_id, created, expires) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    )
    .bind(id)
    .bind(uuid::Uuid::now_v7().to_string())
    .bind(site.id)
    .bind(name.as_str())
    .bind(instantiation)
    .bind(slice.url.as_deref().unwrap_or_default())
    .bind(slice.description.as_deref().unwrap_or_default())
    .bind(slice.max_nodes.unwrap_or(100))
    .bind(caller.person_id())
    .bind(created)
    .bind(created + LIFE_S)
    .execute(&mut *conn)
    .await?;
    Record::new("slice_added")
        .slice(id)
        .site(site.id)
        .data(json!({ "name": name.as_str() }))
        .save(conn, caller)
        .await?;
    Ok(id)
}

fn check_url(url: &str) -> Result<()> {
    let schemes = ["http://", "https://"];
    let plain = url.len() <= 2048 && !url.chars().any(|c| c.is_control() || c.is_whitespace());
    // A page shows it as a link: "javascript:" must not get that far.
    match url.is_empty() || (plain && schemes.iter().any(|scheme| url.starts_with(scheme))) {
        true => Ok(()),
        false => Err(Error::invalid_value(
            "url",
            url,
            "http:// or https:// and no blanks",
        )),
    }
}

/// Whether the caller may change the slice: its users, the PIs of its site, admins.
pub async fn may_change(conn: &mut Conn, caller: &Caller, slice: &SliceRow) -> Result<bool> {
    if caller.is_admin() || caller.is_pi_of(slice.site_id) {
        return Ok(true);
    }
    match caller.person_id() {
        Some(person) => lookup::is_member(conn, slice.id, person).await,
        None => Ok(false),
    }
}

/// The slice, if the caller may change it.
pub async fn to_change(conn: &mut Conn, caller: &Caller, key: &Ref) -> Result<SliceRow> {
    let slice = lookup::slice(conn, key).await?;
    match may_change(conn, caller, &slice).await? {
        true => Ok(slice),
        false => Err(Error::denied(
            "Not allowed to modify specified slice: not a user of it, nor a PI of its site",
        )),
    }
}

/// Changes a slice.
pub async fn update(conn: &mut Conn, caller: &Caller, key: &Ref, change: &SliceChange) -> Result<()> {
    let slice = to_change(conn, caller, key).await?;
    if let Some(word) = &change.instantiation {
        check_instantiation(word)?;
    }
    if let Some(url) = &change.url {
        check_url(url)?;
    }
    if change.max_nodes.is_some() && !caller.is_admin() && !caller.is_pi_of(slice.site_id) {
        return Err(Error::denied("Only admins and PIs may update max_nodes"));
    }
    if let Some(expires) = change.expires
        && expires != slice.expires
    {
        let url = change.url.as_ref().unwrap_or(&slice.url);
        let description = change.description.as_ref().unwrap_or(&slice.description);
        check_renewal(conn, caller, &slice, expires, url, description).await?;
    }
    sqlx::query(
        "UPDATE slices SET instantiation = COALESCE($2, instantiation), url = COALESCE($3, url), \
         description = COALESCE($4, description), max_nodes = COALESCE($5, max_nodes), expires = COALESCE($6, expires), \
         enabled = COALESCE($7, enabled) WHERE slice_id = $1",
    )
    .bind(slice.id)
    .bind(change.instantiation.as_deref())
    .bind(change.url.as_deref())
    .bind(change.description.as_deref())
    .bind(change.max_nodes)
    .bind(change.expires)
    .bind(change.enabled.map(i64::from))
    .execute(&mut *conn)
    .await?;
    let wakes = nodes_of_slice(conn, slice.id).await?;
    Record::new("slice_changed")
        .slice(slice.id)
        .data(json!({ "expires": change.expires, "enabled": change.enabled, "instantiation": change.instantiation }))
        .wakes(wakes)
        .save(conn, caller)
        .await
}

async fn check_renewal(
    conn: &mut Conn,
    caller: &Caller,
    slice: &SliceRow,
    expires: i64,
    url: &str,
    description: &str,
) -> Result<()> {
    let here = now();
    if expires <= here {
        return Err(Error::invalid(format!(
            "'{}' not in the future",
            plc_time(expires)
        )));
    }
    if expires > TIME_MAX {
        return Err(Error::invalid(format!(
            "'{expires}' too far in the future: allowed is up to {TIME_MAX}"
        )));
    }
    if caller.is_admin() || expires < slice.expires {
        return Ok(());
    }
    if expires > here + RENEW_MAX_S {
        return Err(Error::invalid(format!(
            "'{}' is more than eight weeks ahead: allowed is up to '{}'",
            plc_time(expires),
            plc_time(here + RENEW_MAX_S)
        )));
    }
    if url.trim().is_empty() || description.trim().is_empty() {
        return Err(Error::invalid(
            "Cannot renew a slice with an empty description or URL",
        ));
    }
    let site = lookup::site(conn, &Ref::Id(slice.site_id)).await?;
    if site.max_slices <= 0 {
        return Err(Error::denied(format!(
            "Slice creation and renewal have been disabled for the site {}",
            site.login_base
        )));
    }
    Ok(())
}

/// A time as PLCAPI's messages print it: UTC, `1970-01-01 00:00:01`.
pub fn plc_time(unix: i64) -> String {
    jiff::Timestamp::from_second(unix).map_or_else(
        |_| unix.to_string(),
        |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

/// Deletes a slice: the row stays, its users and nodes are let go.
pub async fn delete(conn: &mut Conn, caller: &Caller, key: &Ref) -> Result<()> {
    let slice = to_change(conn, caller, key).await?;
    end(conn, caller, &slice, "slice_deleted").await
}

async fn end(conn: &mut Conn, caller: &Caller, slice: &SliceRow, kind: &'static str) -> Result<()> {
    let nodes = nodes_of_slice(conn, slice.id).await?;
    let persons: Vec<i64> = sqlx::query_scalar("SELECT person_id FROM slice_person WHERE slice_id = $1")
        .bind(slice.id)
        .fetch_all(&mut *conn)
        .await?;
    for sql in [
        "DELETE FROM slice_node WHERE slice_id = $1",
        "DELETE FROM slice_person WHERE slice_id = $1",
    ] {
        sqlx::query(sql).bind(slice.id).execute(&mut *conn).await?;
    }
    sqlx::query("UPDATE slices SET deleted = 1, deleted_at = $2 WHERE slice_id = $1")
        .bind(slice.id)
        .bind(now())
        .execute(&mut *conn)
        .await?;
    // The event keeps who and where: the answer to "whose was it?" after the fact.
    Record::new(kind)
        .slice(slice.id)
        .data(json!({ "name": slice.name, "uuid": slice.uuid, "persons": persons, "nodes": nodes }))
        .wakes(nodes)
        .save(conn, caller)
        .await
}

/// Ends the slices whose time is over. Gives how many.
pub async fn expire(conn: &mut Conn) -> Result<usize> {
    let over: Vec<i64> = sqlx::query_scalar(
        "SELECT slice_id FROM slices WHERE deleted = 0 AND peer_id IS NULL AND expires <= $1 LIMIT 100",
    )
    .bind(now())
    .fetch_all(&mut *conn)
    .await?;
    for id in &over {
        let slice = lookup::slice(conn, &Ref::Id(*id)).await?;
        end(conn, &Caller::authority(), &slice, "slice_expired").await?;
    }
    Ok(over.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_a_page_may_link() {
        for good in ["", "http://x.org", "https://x.org/a?b=c"] {
            assert!(check_url(good).is_ok(), "{good}");
        }
        for bad in ["javascript:alert(1)", "x.org", "http://x\n.org", "http://a b"] {
            assert!(check_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_printed_as_plcapi_does() {
        assert_eq!(plc_time(1), "1970-01-01 00:00:01");
    }
}
