//! The database's rows as REST's objects. Lists are read with a few statements, not one for each object.

use std::collections::BTreeMap;

use mandoline_api::authority::{Key, Node, Person, RspecObject, Site, Slice, SshEndpoint};
use serde::de::DeserializeOwned;
use sqlx::Row;

use crate::db::Conn;
use crate::domain::{Caller, Role, rspec, slices as domain};
use crate::error::{Error, Result};

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(Error::internal)
}

/// Pairs of (number, text) as lists by number.
async fn lists(conn: &mut Conn, sql: &'static str) -> Result<BTreeMap<i64, Vec<String>>> {
    let mut all: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for row in sqlx::query(sql).fetch_all(conn).await? {
        all.entry(row.try_get(0)?).or_default().push(row.try_get(1)?);
    }
    Ok(all)
}

/// The slices that the caller may see.
pub(super) async fn slice_ids(conn: &mut Conn, caller: &Caller) -> Result<Vec<i64>> {
    if caller.is_admin() {
        let all = "SELECT slice_id FROM slices WHERE deleted = 0 AND peer_id IS NULL ORDER BY name";
        return Ok(sqlx::query_scalar(all).fetch_all(conn).await?);
    }
    let me = caller.person_id().unwrap_or(0);
    let pi = i64::from(caller.has(Role::Pi));
    Ok(sqlx::query_scalar(
        "SELECT slice_id FROM slices WHERE deleted = 0 AND peer_id IS NULL AND (\
           slice_id IN (SELECT slice_id FROM slice_person WHERE person_id = $1) \
           OR ($2 = 1 AND site_id IN (SELECT site_id FROM person_site WHERE person_id = $1))) ORDER BY name",
    )
    .bind(me)
    .bind(pi)
    .fetch_all(conn)
    .await?)
}

/// Slices by number, in that order.
pub(super) async fn slices(conn: &mut Conn, ids: &[i64]) -> Result<Vec<Slice>> {
    let mut found = Vec::with_capacity(ids.len());
    for id in ids {
        let row = sqlx::query(
            "SELECT s.slice_id, s.uuid, s.name, t.login_base, s.instantiation, s.enabled, s.url, s.description, \
             s.created, s.expires FROM slices s JOIN sites t ON t.site_id = s.site_id WHERE s.slice_id = $1 AND s.deleted = 0",
        )
        .bind(*id)
        .fetch_optional(&mut *conn)
        .await?;
        let Some(row) = row else { continue };
        let nodes = sqlx::query_scalar(
            "SELECT n.hostname FROM slice_node b JOIN nodes n ON n.node_id = b.node_id \
             WHERE b.slice_id = $1 ORDER BY n.hostname",
        )
        .bind(*id)
        .fetch_all(&mut *conn)
        .await?;
        let persons = sqlx::query_scalar(
            "SELECT p.email FROM slice_person m JOIN persons p ON p.person_id = m.person_id \
             WHERE m.slice_id = $1 ORDER BY p.email",
        )
        .bind(*id)
        .fetch_all(&mut *conn)
        .await?;
        let rspec: RspecObject = match rspec::slice_wide(conn, *id).await?.to_json() {
            serde_json::Value::Object(map) => map,
            _ => RspecObject::new(),
        };
        found.push(Slice {
            id: row.try_get(0)?,
            uuid: row.try_get(1)?,
            name: row.try_get(2)?,
            site: row.try_get(3)?,
            instantiation: domain::instantiation(&row.try_get::<String, _>(4)?),
            enabled: row.try_get::<i64, _>(5)? == 1,
            url: row.try_get(6)?,
            description: row.try_get(7)?,
            rspec,
            nodes,
            persons,
            created: row.try_get(8)?,
            expires: row.try_get(9)?,
        });
    }
    Ok(found)
}

/// All nodes, or one.
pub(super) async fn nodes(conn: &mut Conn, only: Option<i64>) -> Result<Vec<Node>> {
    let rows = sqlx::query(
        "SELECT n.node_id, n.uuid, n.hostname, s.login_base, n.boot_state, n.ed25519_key, n.vm_types, \
         n.attribute_table_version, n.capacity, n.ssh_host, n.ssh_port, n.ssh_host_keys, n.last_contact \
         FROM nodes n JOIN sites s ON s.site_id = n.site_id \
         WHERE n.deleted = 0 AND n.peer_id IS NULL AND n.node_id = COALESCE($1, n.node_id) ORDER BY n.hostname",
    )
    .bind(only)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            let endpoint = match (
                row.try_get::<Option<String>, _>(9)?,
                row.try_get::<Option<i64>, _>(10)?,
            ) {
                (Some(host), Some(port)) => Some(SshEndpoint {
                    host,
                    port: u16::try_from(port).map_err(Error::internal)?,
                }),
                _ => None,
            };
            let version = row.try_get::<Option<i64>, _>(7)?;
            Ok(Node {
                id: row.try_get(0)?,
                uuid: row.try_get(1)?,
                hostname: row.try_get(2)?,
                site: row.try_get(3)?,
                boot_state: row.try_get(4)?,
                registered: row.try_get::<Option<String>, _>(5)?.is_some(),
                vm_types: from_json(&row.try_get::<String, _>(6)?)?,
                attribute_table_version: version.map(u32::try_from).transpose().map_err(Error::internal)?,
                capacity: from_json(&row.try_get::<String, _>(8)?)?,
                ssh_endpoint: endpoint,
                ssh_host_keys: from_json(&row.try_get::<String, _>(11)?)?,
                last_contact: row.try_get(12)?,
            })
        })
        .collect()
}

/// All persons, or one.
pub(super) async fn persons(conn: &mut Conn, only: Option<i64>) -> Result<Vec<Person>> {
    let mut roles: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    let given = sqlx::query("SELECT person_id, role_id FROM person_role ORDER BY role_id")
        .fetch_all(&mut *conn)
        .await?;
    for row in given {
        if let Some(role) = Role::from_id(row.try_get(1)?) {
            roles
                .entry(row.try_get(0)?)
                .or_default()
                .push(role.name().to_owned());
        }
    }
    let mut sites = lists(
        conn,
        "SELECT p.person_id, s.login_base FROM person_site p JOIN sites s ON s.site_id = p.site_id ORDER BY s.login_base",
    )
    .await?;
    let mut slices = lists(
        conn,
        "SELECT m.person_id, s.name FROM slice_person m JOIN slices s ON s.slice_id = m.slice_id ORDER BY s.name",
    )
    .await?;
    let rows = sqlx::query(
        "SELECT person_id, email, first_name, last_name, enabled FROM persons \
         WHERE deleted = 0 AND peer_id IS NULL AND person_id = COALESCE($1, person_id) ORDER BY email",
    )
    .bind(only)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            let id = row.try_get(0)?;
            Ok(Person {
                id,
                email: row.try_get(1)?,
                first_name: row.try_get(2)?,
                last_name: row.try_get(3)?,
                enabled: row.try_get::<i64, _>(4)? == 1,
                roles: roles.remove(&id).unwrap_or_default(),
                sites: sites.remove(&id).unwrap_or_default(),
                slices: slices.remove(&id).unwrap_or_default(),
            })
        })
        .collect()
}

/// Keys of all persons, or of one.
pub(super) async fn keys(conn: &mut Conn, person: Option<i64>) -> Result<Vec<Key>> {
    let rows = sqlx::query(
        "SELECT k.key_id, p.email, k.key_text FROM keys k JOIN persons p ON p.person_id = k.person_id \
         WHERE k.deleted = 0 AND k.person_id = COALESCE($1, k.person_id) ORDER BY k.key_id",
    )
    .bind(person)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Key {
                id: row.try_get(0)?,
                email: row.try_get(1)?,
                key: row.try_get(2)?,
            })
        })
        .collect()
}

/// All sites, or one.
pub(super) async fn sites(conn: &mut Conn, only: Option<i64>) -> Result<Vec<Site>> {
    let mut nodes = lists(
        conn,
        "SELECT site_id, hostname FROM nodes WHERE deleted = 0 ORDER BY hostname",
    )
    .await?;
    let rows = sqlx::query(
        "SELECT site_id, name, login_base, abbreviated_name, enabled, max_slices FROM sites \
         WHERE deleted = 0 AND peer_id IS NULL AND site_id = COALESCE($1, site_id) ORDER BY login_base",
    )
    .bind(only)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            let id = row.try_get(0)?;
            Ok(Site {
                id,
                name: row.try_get(1)?,
                login_base: row.try_get(2)?,
                abbreviated_name: row.try_get(3)?,
                enabled: row.try_get::<i64, _>(4)? == 1,
                max_slices: row.try_get(5)?,
                nodes: nodes.remove(&id).unwrap_or_default(),
            })
        })
        .collect()
}
