//! What each node should run.

use mandoline_api::authority::{DesiredSliver, DesiredSlivers, KnownNode};
use sha2::{Digest, Sha256};
use sqlx::Row;

use super::{Ref, lookup, rspec, slices};
use crate::db::{Conn, now};
use crate::error::{Error, Result};

/// A slice that has a sliver on a node.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Number.
    pub slice_id: i64,
    /// This slice and no other of the same name.
    pub uuid: String,
    /// Name.
    pub name: String,
    /// PLCAPI's word.
    pub instantiation: String,
    /// Whether its slivers run.
    pub enabled: bool,
    /// When it ends.
    pub expires: i64,
}

/// The slices of a node as PLCAPI's GetSlivers lists them: bound to it, or tagged `system`, or of a kind
/// that is made on nodes by others (`delegated`, `nm-controller`).
pub async fn slices_on(conn: &mut Conn, node_id: i64) -> Result<Vec<Bound>> {
    let rows = sqlx::query(
        "SELECT s.slice_id, s.uuid, s.name, s.instantiation, s.enabled, s.expires FROM slices s \
         WHERE s.deleted = 0 AND s.peer_id IS NULL AND s.expires > $2 AND (\
           EXISTS (SELECT 1 FROM slice_node b WHERE b.slice_id = s.slice_id AND b.node_id = $1) \
           OR s.instantiation IN ('delegated', 'nm-controller') \
           OR EXISTS (SELECT 1 FROM slice_tags t JOIN tag_types y ON y.tag_type_id = t.tag_type_id \
                      WHERE t.slice_id = s.slice_id AND y.tagname = 'system' AND t.value = '1')) \
         ORDER BY s.name",
    )
    .bind(node_id)
    .bind(now())
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Bound {
                slice_id: row.try_get(0)?,
                uuid: row.try_get(1)?,
                name: row.try_get(2)?,
                instantiation: row.try_get(3)?,
                enabled: row.try_get::<i64, _>(4)? == 1,
                expires: row.try_get(5)?,
            })
        })
        .collect()
}

/// Key lines of the slice's enabled users.
pub async fn keys_of(conn: &mut Conn, slice_id: i64) -> Result<Vec<String>> {
    Ok(sqlx::query_scalar(
        "SELECT k.key_text FROM keys k JOIN persons p ON p.person_id = k.person_id \
         JOIN slice_person m ON m.person_id = p.person_id \
         WHERE m.slice_id = $1 AND k.deleted = 0 AND p.deleted = 0 AND p.enabled = 1 ORDER BY k.key_id",
    )
    .bind(slice_id)
    .fetch_all(conn)
    .await?)
}

/// What a node should run. Slivers that it cannot run are recorded as failed and left out.
pub async fn of_node(conn: &mut Conn, node_id: i64) -> Result<DesiredSlivers> {
    let node = lookup::node(conn, &Ref::Id(node_id)).await?;
    let mut slivers = Vec::new();
    // Only a node in state boot runs slivers: the operators' other states mean that it must not.
    let bound = match node.boot_state == "boot" {
        true => slices_on(conn, node_id).await?,
        false => Vec::new(),
    };
    for slice in bound {
        if slice.instantiation == "not-instantiated" {
            continue;
        }
        let mut wanted = rspec::on_node(conn, slice.slice_id, node_id).await?;
        if !rspec::check_node(conn, &node, slice.slice_id, &wanted).await? {
            continue;
        }
        let initscript = wanted.text("initscript").map(str::to_owned);
        wanted.remove("initscript");
        let rspec = match wanted.to_json() {
            serde_json::Value::Object(map) => map,
            _ => return Err(Error::internal("an rspec is an object")),
        };
        slivers.push(DesiredSliver {
            slice_id: slice.uuid,
            slice: slice.name,
            rspec,
            keys: keys_of(conn, slice.slice_id).await?,
            initscript,
            expires: slice.expires,
            instantiation: slices::instantiation(&slice.instantiation),
            enabled: slice.enabled,
        });
    }
    let nodes = known_nodes(conn).await?;
    let text = serde_json::to_vec(&(&slivers, &nodes)).map_err(Error::internal)?;
    Ok(DesiredSlivers {
        revision: hex::encode(&Sha256::digest(&text)[..16]),
        time: now(),
        slivers,
        nodes,
    })
}

/// All nodes of this authority.
async fn known_nodes(conn: &mut Conn) -> Result<Vec<KnownNode>> {
    let rows = sqlx::query(
        "SELECT hostname, ssh_host FROM nodes WHERE deleted = 0 AND peer_id IS NULL ORDER BY hostname",
    )
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(KnownNode {
                hostname: row.try_get(0)?,
                address: row.try_get(1)?,
            })
        })
        .collect()
}

/// The nodes on which a person's keys matter.
pub async fn nodes_of_person(conn: &mut Conn, person_id: i64) -> Result<Vec<i64>> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT b.node_id FROM slice_node b JOIN slice_person m ON m.slice_id = b.slice_id \
         WHERE m.person_id = $1 ORDER BY b.node_id",
    )
    .bind(person_id)
    .fetch_all(conn)
    .await?)
}
