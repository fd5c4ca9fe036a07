//! Slice tags: PLCAPI's attributes of a slice or of one sliver. Those whose names stand in the rspec's
//! attribute table are checked against it; the rest is carried.

use mandoline_rspec::{ATTRIBUTES, Rspec, Setter};
use serde_json::json;
use sqlx::Row;

use super::events::Record;
use super::lookup::SliceRow;
use super::{Caller, Ref, Role, lookup, rspec, slices};
use crate::db::{Conn, next_id};
use crate::error::{Error, Result};

/// PLCAPI's own tags that the authority knows beside the rspec's attributes: name, description, least role.
const PLC_TAGS: &[(&str, &str, Role)] = &[
    ("system", "1: a sliver on every node", Role::Admin),
    ("enabled", "0: the sliver is stopped", Role::Admin),
    ("vref", "name of the root image (older clients)", Role::User),
    (
        "initscript_code",
        "text of the boot script (older clients)",
        Role::User,
    ),
    ("hrn", "name in a federation", Role::Admin),
    (
        "arch",
        "architecture of the root image (older clients)",
        Role::User,
    ),
    (
        "pldistro",
        "flavour of the root image (older clients)",
        Role::User,
    ),
    (
        "fcdistro",
        "distribution of the root image (older clients)",
        Role::User,
    ),
    ("delegations", "slices that may redeem its tickets", Role::User),
    (
        "exempt_slice_until",
        "no bandwidth cap until this day (YYYYMMDD)",
        Role::Admin,
    ),
];
/// Longest value that is carried, bytes. The attribute table bounds its own.
const VALUE_MAX: usize = 65_536;

/// Attributes of the table that are no tags: keys come from the slice's users.
fn is_tag(name: &str) -> bool {
    name != "keys"
}

fn role_of(setter: Setter) -> Role {
    match setter {
        Setter::User => Role::User,
        Setter::Pi => Role::Pi,
        Setter::Admin => Role::Admin,
    }
}

/// Brings the tag types up to what this version of the attribute table says.
pub async fn seed(conn: &mut Conn) -> Result<()> {
    let table = ATTRIBUTES
        .iter()
        .filter(|attribute| is_tag(attribute.name))
        .map(|attribute| {
            (
                attribute.name,
                attribute.doc,
                "slice/rspec",
                role_of(attribute.setter),
            )
        });
    let plc = PLC_TAGS
        .iter()
        .map(|(name, doc, role)| (*name, *doc, "slice/plc", *role));
    for (name, doc, category, role) in table.chain(plc) {
        let id: Option<i64> = sqlx::query_scalar("SELECT tag_type_id FROM tag_types WHERE tagname = $1")
            .bind(name)
            .fetch_optional(&mut *conn)
            .await?;
        // What an operator made of a type that is there stays: who may set what is data.
        if id.is_none() {
            let id = next_id(conn, "tag_type").await?;
            sqlx::query(
                "INSERT INTO tag_types (tag_type_id, tagname, description, category, min_role_id) \
                 VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(id)
            .bind(name)
            .bind(doc)
            .bind(category)
            .bind(role.id())
            .execute(&mut *conn)
            .await?;
        }
    }
    Ok(())
}

/// The type of a tag, by number or name, and whether the caller may set it on the slice.
async fn tag_type(conn: &mut Conn, caller: &Caller, slice: &SliceRow, key: &Ref) -> Result<(i64, String)> {
    let row = match key {
        Ref::Id(id) => {
            sqlx::query("SELECT tag_type_id, tagname, min_role_id FROM tag_types WHERE tag_type_id = $1")
                .bind(*id)
                .fetch_optional(&mut *conn)
                .await?
        }
        Ref::Name(name) => {
            // The table's second names (peak_rate) are one tag with the first.
            let name = mandoline_rspec::attribute(name).map_or(name.as_str(), |attribute| attribute.name);
            sqlx::query("SELECT tag_type_id, tagname, min_role_id FROM tag_types WHERE tagname = $1")
                .bind(name)
                .fetch_optional(&mut *conn)
                .await?
        }
    };
    let row = row.ok_or_else(|| match key {
        Ref::Name(name) => Error::NoSuch(format!("tag type '{name}'")),
        Ref::Id(id) => Error::NoSuch(format!("tag type {id}")),
    })?;
    let name: String = row.try_get(1)?;
    let min_role: i64 = row.try_get(2)?;
    let allowed = caller.is_admin()
        || (min_role >= Role::Pi.id() && caller.is_pi_of(slice.site_id))
        || min_role >= Role::User.id();
    if !allowed {
        let who = Role::from_id(min_role).map_or("admin", Role::name);
        return Err(Error::denied(format!(
            "Not allowed to set '{name}': it takes the role {who}"
        )));
    }
    Ok((row.try_get(0)?, name))
}

fn check_value(name: &str, value: &str) -> Result<()> {
    if value.len() > VALUE_MAX || value.contains('\0') {
        return Err(Error::invalid(format!(
            "Invalid value of '{name}': allowed are {VALUE_MAX} bytes without NUL"
        )));
    }
    if mandoline_rspec::attribute(name).is_some() {
        rspec::set_text(&mut Rspec::new(), name, value)?;
    }
    Ok(())
}

/// Adds a tag to a slice, or to its sliver on one node. Gives its number.
pub async fn add(
    conn: &mut Conn,
    caller: &Caller,
    slice: &Ref,
    tag: &Ref,
    value: &str,
    node: Option<&Ref>,
) -> Result<i64> {
    let slice = slices::to_change(conn, caller, slice).await?;
    let (type_id, name) = tag_type(conn, caller, &slice, tag).await?;
    check_value(&name, value)?;
    let node = match node {
        Some(key) => Some(lookup::node(conn, key).await?),
        None => None,
    };
    let node_id = node.as_ref().map(|node| node.id);
    let nodes = lookup::nodes_of_slice(conn, slice.id).await?;
    if let Some(id) = node_id
        && !nodes.contains(&id)
    {
        return Err(Error::invalid(
            "AddSliceTag: slice not attached to specified node",
        ));
    }
    let present = find(conn, slice.id, type_id, node_id).await?;
    if present.is_some() {
        return Err(Error::Conflict(match node_id {
            Some(_) => format!("Sliver attribute already exists: '{name}'"),
            None => format!("Slice attribute already exists: '{name}'"),
        }));
    }
    let id = next_id(conn, "slice_tag").await?;
    sqlx::query("INSERT INTO slice_tags (slice_tag_id, slice_id, node_id, tag_type_id, value) VALUES ($1, $2, $3, $4, $5)")
        .bind(id)
        .bind(slice.id)
        .bind(node_id)
        .bind(type_id)
        .bind(value)
        .execute(&mut *conn)
        .await?;
    rspec::check(conn, slice.id).await?;
    let wakes = match node_id {
        Some(id) => vec![id],
        None => nodes,
    };
    Record::new("slice_tag_added")
        .slice(slice.id)
        .data(json!({ "name": name, "value": shown(value) }))
        .wakes(wakes)
        .save(conn, caller)
        .await?;
    Ok(id)
}

async fn find(conn: &mut Conn, slice: i64, tag_type: i64, node: Option<i64>) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar(
        "SELECT slice_tag_id FROM slice_tags WHERE slice_id = $1 AND tag_type_id = $2 AND COALESCE(node_id, 0) = $3",
    )
    .bind(slice)
    .bind(tag_type)
    .bind(node.unwrap_or(0))
    .fetch_optional(conn)
    .await?)
}

/// A tag's slice, type and node, if the caller may change it.
async fn to_change(conn: &mut Conn, caller: &Caller, tag_id: i64) -> Result<(SliceRow, String, Vec<i64>)> {
    let row = sqlx::query("SELECT slice_id, tag_type_id, node_id FROM slice_tags WHERE slice_tag_id = $1")
        .bind(tag_id)
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(|| Error::NoSuch("slice attribute".into()))?;
    let slice = slices::to_change(conn, caller, &Ref::Id(row.try_get(0)?)).await?;
    let (_, name) = tag_type(conn, caller, &slice, &Ref::Id(row.try_get(1)?)).await?;
    let wakes = match row.try_get::<Option<i64>, _>(2)? {
        Some(node) => vec![node],
        None => lookup::nodes_of_slice(conn, slice.id).await?,
    };
    Ok((slice, name, wakes))
}

/// Changes a tag's value.
pub async fn update(conn: &mut Conn, caller: &Caller, tag_id: i64, value: &str) -> Result<()> {
    let (slice, name, wakes) = to_change(conn, caller, tag_id).await?;
    check_value(&name, value)?;
    sqlx::query("UPDATE slice_tags SET value = $2 WHERE slice_tag_id = $1")
        .bind(tag_id)
        .bind(value)
        .execute(&mut *conn)
        .await?;
    rspec::check(conn, slice.id).await?;
    Record::new("slice_tag_changed")
        .slice(slice.id)
        .data(json!({ "name": name, "value": shown(value) }))
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// Deletes a tag.
pub async fn delete(conn: &mut Conn, caller: &Caller, tag_id: i64) -> Result<()> {
    let (slice, name, wakes) = to_change(conn, caller, tag_id).await?;
    sqlx::query("DELETE FROM slice_tags WHERE slice_tag_id = $1")
        .bind(tag_id)
        .execute(&mut *conn)
        .await?;
    rspec::check(conn, slice.id).await?;
    Record::new("slice_tag_deleted")
        .slice(slice.id)
        .data(json!({ "name": name }))
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// Puts a whole rspec in place of the slice-wide tags that make the old one.
pub async fn set_rspec(
    conn: &mut Conn,
    caller: &Caller,
    slice: &Ref,
    wanted: &mandoline_api::authority::RspecObject,
) -> Result<()> {
    let slice = slices::to_change(conn, caller, slice).await?;
    let wanted = Rspec::from_map(wanted)?;
    let old = rspec::slice_wide(conn, slice.id).await?;
    if wanted == old {
        return Ok(());
    }
    let text = |value: &mandoline_rspec::Value| match value.to_json() {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    };
    for (name, value) in wanted.iter() {
        if !is_tag(name) {
            return Err(Error::invalid(format!(
                "attribute '{name}' cannot be set on a slice: it comes from its users' keys"
            )));
        }
        if old.get(name) == Some(value) {
            continue;
        }
        let type_id = match name.starts_with("x-") {
            true => foreign_type(conn, name).await?,
            false => {
                tag_type(conn, caller, &slice, &Ref::Name(name.to_owned()))
                    .await?
                    .0
            }
        };
        let value = text(value);
        check_value(name, &value)?;
        match find(conn, slice.id, type_id, None).await? {
            Some(id) => {
                sqlx::query("UPDATE slice_tags SET value = $2 WHERE slice_tag_id = $1")
                    .bind(id)
                    .bind(&value)
                    .execute(&mut *conn)
                    .await?;
            }
            None => {
                let id = next_id(conn, "slice_tag").await?;
                sqlx::query("INSERT INTO slice_tags (slice_tag_id, slice_id, tag_type_id, value) VALUES ($1, $2, $3, $4)")
                    .bind(id)
                    .bind(slice.id)
                    .bind(type_id)
                    .bind(&value)
                    .execute(&mut *conn)
                    .await?;
            }
        }
    }
    for (name, _) in old.iter().filter(|(name, _)| wanted.get(name).is_none()) {
        let (type_id, _) = tag_type(conn, caller, &slice, &Ref::Name(name.to_owned())).await?;
        sqlx::query("DELETE FROM slice_tags WHERE slice_id = $1 AND tag_type_id = $2 AND node_id IS NULL")
            .bind(slice.id)
            .bind(type_id)
            .execute(&mut *conn)
            .await?;
    }
    rspec::check(conn, slice.id).await?;
    let wakes = lookup::nodes_of_slice(conn, slice.id).await?;
    Record::new("slice_rspec_changed")
        .slice(slice.id)
        .data(json!({ "rspec": wanted.to_string() }))
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// The tag type of a foreign attribute (`x-...`), made when it is first used.
async fn foreign_type(conn: &mut Conn, name: &str) -> Result<i64> {
    let found: Option<i64> = sqlx::query_scalar("SELECT tag_type_id FROM tag_types WHERE tagname = $1")
        .bind(name)
        .fetch_optional(&mut *conn)
        .await?;
    if let Some(id) = found {
        return Ok(id);
    }
    let id = next_id(conn, "tag_type").await?;
    sqlx::query("INSERT INTO tag_types (tag_type_id, tagname, description, category, min_role_id) VALUES ($1, $2, '', 'slice/rspec', 30)")
        .bind(id)
        .bind(name)
        .execute(conn)
        .await?;
    Ok(id)
}

/// A value as events show it: scripts are long.
fn shown(value: &str) -> String {
    value.chars().take(200).collect()
}
