//! What belongs to a slice: its users and its nodes.

use serde_json::json;

use super::events::Record;
use super::lookup::nodes_of_slice;
use super::{Caller, Ref, lookup, rspec, slices};
use crate::db::Conn;
use crate::error::{Error, Result};

/// Makes a person a user of a slice: by admins and PIs of the slice's site.
pub async fn add_person(conn: &mut Conn, caller: &Caller, person: &Ref, slice: &Ref) -> Result<()> {
    let person = lookup::person(conn, person).await?;
    let slice = lookup::slice(conn, slice).await?;
    if !caller.is_admin() && !caller.is_pi_of(slice.site_id) {
        return Err(Error::denied(
            "Not allowed to add users to this slice: not a PI of its site",
        ));
    }
    let added =
        sqlx::query("INSERT INTO slice_person (slice_id, person_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(slice.id)
            .bind(person.id)
            .execute(&mut *conn)
            .await?
            .rows_affected();
    if added == 0 {
        // PLCAPI: adding twice is no error.
        return Ok(());
    }
    let wakes = nodes_of_slice(conn, slice.id).await?;
    Record::new("slice_person_added")
        .person(person.id)
        .slice(slice.id)
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// Ends a person's use of a slice: by admins, PIs of the slice's site, or the person itself.
pub async fn remove_person(conn: &mut Conn, caller: &Caller, person: &Ref, slice: &Ref) -> Result<()> {
    let person = lookup::person(conn, person).await?;
    let slice = lookup::slice(conn, slice).await?;
    if !caller.is_admin() && !caller.is_pi_of(slice.site_id) && caller.person_id() != Some(person.id) {
        return Err(Error::denied(
            "Not allowed to delete users from this slice: not a PI of its site",
        ));
    }
    sqlx::query("DELETE FROM slice_person WHERE slice_id = $1 AND person_id = $2")
        .bind(slice.id)
        .bind(person.id)
        .execute(&mut *conn)
        .await?;
    let wakes = nodes_of_slice(conn, slice.id).await?;
    Record::new("slice_person_removed")
        .person(person.id)
        .slice(slice.id)
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// Finds nodes by number or name. Those that are not there: an error that names them, or, as PLCAPI's own
/// server did, skipped.
async fn find_nodes(conn: &mut Conn, nodes: &[Ref], skip_unknown: bool) -> Result<Vec<lookup::NodeRow>> {
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    for key in nodes {
        match lookup::node(conn, key).await {
            Ok(node) => found.push(node),
            Err(Error::NoSuch(_)) => unknown.push(match key {
                Ref::Id(id) => id.to_string(),
                Ref::Name(name) => name.clone(),
            }),
            Err(error) => return Err(error),
        }
    }
    match unknown.is_empty() || skip_unknown {
        true => Ok(found),
        false => Err(Error::NoSuch(format!("node: {}", unknown.join(", ")))),
    }
}

/// Gives a slice a sliver on each of the nodes.
pub async fn add_nodes(
    conn: &mut Conn,
    caller: &Caller,
    slice: &Ref,
    nodes: &[Ref],
    skip_unknown: bool,
) -> Result<()> {
    let slice = slices::to_change(conn, caller, slice).await?;
    let nodes = find_nodes(conn, nodes, skip_unknown).await?;
    let mut added = Vec::new();
    for node in &nodes {
        rspec::check_on_node(conn, slice.id, node).await?;
        let new =
            sqlx::query("INSERT INTO slice_node (slice_id, node_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
                .bind(slice.id)
                .bind(node.id)
                .execute(&mut *conn)
                .await?
                .rows_affected();
        if new > 0 {
            // What a node said of an earlier sliver there is not news of the new one.
            sqlx::query("DELETE FROM slivers WHERE slice_id = $1 AND node_id = $2")
                .bind(slice.id)
                .bind(node.id)
                .execute(&mut *conn)
                .await?;
            added.push(node);
        }
    }
    if added.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = added.iter().map(|node| &node.hostname).collect();
    Record::new("slice_nodes_added")
        .slice(slice.id)
        .data(json!({ "nodes": names }))
        .wakes(added.iter().map(|node| node.id).collect())
        .save(conn, caller)
        .await
}

/// Ends a slice's slivers on the nodes.
pub async fn remove_nodes(
    conn: &mut Conn,
    caller: &Caller,
    slice: &Ref,
    nodes: &[Ref],
    skip_unknown: bool,
) -> Result<()> {
    let slice = slices::to_change(conn, caller, slice).await?;
    let nodes = find_nodes(conn, nodes, skip_unknown).await?;
    let mut removed = Vec::new();
    for node in &nodes {
        let gone = sqlx::query("DELETE FROM slice_node WHERE slice_id = $1 AND node_id = $2")
            .bind(slice.id)
            .bind(node.id)
            .execute(&mut *conn)
            .await?
            .rows_affected();
        if gone > 0 {
            sqlx::query("DELETE FROM slice_tags WHERE slice_id = $1 AND node_id = $2")
                .bind(slice.id)
                .bind(node.id)
                .execute(&mut *conn)
                .await?;
            removed.push(node);
        }
    }
    if removed.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = removed.iter().map(|node| &node.hostname).collect();
    Record::new("slice_nodes_removed")
        .slice(slice.id)
        .data(json!({ "nodes": names }))
        .wakes(removed.iter().map(|node| node.id).collect())
        .save(conn, caller)
        .await
}
