//! GetSlivers: what PlanetLab's node manager fetched, field for field.

use serde_json::{Value as Json, json};
use sqlx::Row;

use super::fault::Fault;
use super::method::{Args, Ctx};
use crate::db::{Conn, now};
use crate::domain::{desired, lookup, nodes};
use crate::error::Result;
use crate::in_write;

/// Seconds of a lease's grain, as PlanetLab's (reservations themselves are not made yet).
const LEASE_GRANULARITY_S: i64 = 3600;

/// The body of GetSlivers.
pub(super) async fn get_slivers(ctx: &Ctx, args: &Args) -> std::result::Result<Json, Fault> {
    let node = match (args.opt_key(0), ctx.caller.node_id()) {
        (Some(key), None) => key,
        (Some(key), Some(me)) => {
            let asked = in_write!(ctx.service.db, |c| lookup::node(c, &key).await)?;
            if asked.id != me {
                return Err(Fault::denied("a node may ask for its own slivers only"));
            }
            me.into()
        }
        (None, Some(me)) => me.into(),
        (None, None) => return Err(Fault::invalid("'node_id_or_hostname' not specified")),
    };
    let is_node = ctx.caller.node_id().is_some();
    Ok(in_write!(ctx.service.db, |c| {
        let node = lookup::node(c, &node).await?;
        if is_node {
            nodes::touch(c, node.id).await?;
        }
        of_node(c, &node).await
    })?)
}

async fn of_node(conn: &mut Conn, node: &lookup::NodeRow) -> Result<Json> {
    let mut slivers = Vec::new();
    for slice in desired::slices_on(conn, node.id).await? {
        let keys: Vec<Json> = desired::keys_of(conn, slice.slice_id)
            .await?
            .into_iter()
            .map(|key| json!({ "key_type": "ssh", "key": key }))
            .collect();
        slivers.push(json!({
            "name": slice.name,
            "slice_id": slice.slice_id,
            "instantiation": slice.instantiation,
            "expires": slice.expires.min(i64::from(i32::MAX)),
            "keys": keys,
            "attributes": attributes(conn, slice.slice_id, node.id).await?,
            "GetSliceFamily": Json::Null,
        }));
    }
    let initscripts: Vec<Json> = sqlx::query(
        "SELECT initscript_id, name, script FROM initscripts WHERE enabled = 1 ORDER BY initscript_id",
    )
    .fetch_all(&mut *conn)
    .await?
    .iter()
    .map(|row| {
        Ok(json!({
            "initscript_id": row.try_get::<i64, _>(0)?,
            "name": row.try_get::<String, _>(1)?,
            "enabled": true,
            "script": row.try_get::<String, _>(2)?,
        }))
    })
    .collect::<Result<_>>()?;
    let node_type: String = sqlx::query_scalar("SELECT node_type FROM nodes WHERE node_id = $1")
        .bind(node.id)
        .fetch_one(&mut *conn)
        .await?;
    Ok(json!({
        "timestamp": now(),
        "node_id": node.id,
        "hostname": node.hostname,
        "interfaces": [],
        "groups": [],
        "conf_files": [],
        "initscripts": initscripts,
        "slivers": slivers,
        "accounts": [
            { "name": "site_admin", "keys": contact_keys(conn, node.site_id).await? },
            { "name": "root", "keys": admin_keys(conn).await? },
        ],
        "xmpp": { "server": Json::Null },
        "hrn": Json::Null,
        "reservation_policy": if node_type == "reservable" { "lease_or_idle" } else { "none" },
        "leases": Json::Null,
        "lease_granularity": LEASE_GRANULARITY_S,
    }))
}

/// A slice's tags as one node gets them: a name set for the sliver hides the slice's; several values of one
/// name at one level are all given.
async fn attributes(conn: &mut Conn, slice: i64, node: i64) -> Result<Vec<Json>> {
    let rows = sqlx::query(
        "SELECT y.tagname, t.value, t.node_id FROM slice_tags t JOIN tag_types y ON y.tag_type_id = t.tag_type_id \
         WHERE t.slice_id = $1 AND (t.node_id IS NULL OR t.node_id = $2) ORDER BY t.slice_tag_id",
    )
    .bind(slice)
    .bind(node)
    .fetch_all(conn)
    .await?;
    let mut all = Vec::new();
    for row in &rows {
        all.push((
            row.try_get::<String, _>(0)?,
            row.try_get::<String, _>(1)?,
            row.try_get::<Option<i64>, _>(2)?.is_some(),
        ));
    }
    let hidden = |name: &str, own: bool| !own && all.iter().any(|(other, _, own)| other == name && *own);
    Ok(all
        .iter()
        .filter(|(name, _, own)| !hidden(name, *own))
        .map(|(name, value, _)| json!({ "tagname": name, "value": value }))
        .collect())
}

/// Keys of the PIs and technical contacts of a node's site.
async fn contact_keys(conn: &mut Conn, site: i64) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar(
        "SELECT k.key_text FROM keys k JOIN persons p ON p.person_id = k.person_id \
         WHERE k.deleted = 0 AND p.deleted = 0 AND p.enabled = 1 \
         AND p.person_id IN (SELECT person_id FROM person_site WHERE site_id = $1) \
         AND p.person_id IN (SELECT person_id FROM person_role WHERE role_id IN (20, 40)) ORDER BY k.key_id",
    )
    .bind(site)
    .fetch_all(conn)
    .await?)
}

/// Keys of those who run the authority.
async fn admin_keys(conn: &mut Conn) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar(
        "SELECT k.key_text FROM keys k JOIN persons p ON p.person_id = k.person_id \
         WHERE k.deleted = 0 AND p.deleted = 0 AND p.enabled = 1 \
         AND p.person_id IN (SELECT person_id FROM person_role WHERE role_id = 10) ORDER BY k.key_id",
    )
    .fetch_all(conn)
    .await?)
}
