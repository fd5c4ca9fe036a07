//! Nodes: added by their site's people, registered by themselves.
//!
//! ```text
//! reinstall ──registers──► boot ◄──operator──► safeboot, disabled, ...
//! (added)    (it runs)     slivers run here only
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use mandoline_api::authority::{NodeRegistered, NodeRegistration};
use serde_json::json;
use sqlx::Row;

use super::events::Record;
use super::{Caller, Ref, lookup, slivers};
use crate::auth::{node::verifying_key, sshkey};
use crate::db::{Conn, next_id, now};
use crate::error::{Error, Result};

/// PLCAPI's boot states.
pub const BOOT_STATES: [&str; 7] = [
    "boot",
    "failboot",
    "safeboot",
    "install",
    "reinstall",
    "upgrade",
    "disabled",
];
/// PLCAPI's node types.
pub const NODE_TYPES: [&str; 2] = ["regular", "reservable"];
/// Things of one kind that a node may announce.
const ANNOUNCED_MAX: usize = 64;

/// A node to add.
#[derive(Clone, Debug, Default)]
pub struct NewNode {
    /// Name.
    pub hostname: String,
    /// PLCAPI's node type; absent = regular.
    pub node_type: Option<String>,
    /// PLCAPI's boot state; absent = reinstall.
    pub boot_state: Option<String>,
    /// Make and model.
    pub model: Option<String>,
    /// Version of its software.
    pub version: Option<String>,
}

/// What to change in a node; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct NodeChange {
    /// Name.
    pub hostname: Option<String>,
    /// PLCAPI's node type.
    pub node_type: Option<String>,
    /// PLCAPI's boot state.
    pub boot_state: Option<String>,
    /// Make and model.
    pub model: Option<String>,
    /// Version of its software.
    pub version: Option<String>,
    /// `NODE_KEY`. Admins only. The node has to register anew.
    pub key: Option<String>,
}

fn one_of(attribute: &str, value: &str, allowed: &[&str]) -> Result<()> {
    match allowed.contains(&value) {
        true => Ok(()),
        false => Err(Error::invalid_value(attribute, value, &allowed.join(", "))),
    }
}

fn check_hostname(hostname: &str) -> Result<String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    if hostname.len() > 253 || !hostname.split('.').all(label) {
        return Err(Error::invalid_value(
            "hostname",
            hostname,
            "labels of letters, digits and '-', joined by dots",
        ));
    }
    Ok(hostname.to_lowercase())
}

/// Adds a node and makes its key. Gives its number and `NODE_KEY`.
pub async fn add(conn: &mut Conn, caller: &Caller, site: &Ref, node: &NewNode) -> Result<(i64, String)> {
    let site = lookup::site(conn, site).await?;
    if !caller.manages_nodes_of(site.id) {
        return Err(Error::denied("Not allowed to add nodes to specified site"));
    }
    let hostname = check_hostname(&node.hostname)?;
    let node_type = node.node_type.as_deref().unwrap_or("regular");
    one_of("node_type", node_type, &NODE_TYPES)?;
    let boot_state = node.boot_state.as_deref().unwrap_or("reinstall");
    one_of("boot_state", boot_state, &BOOT_STATES)?;
    if lookup::exists(lookup::node(conn, &Ref::Name(hostname.clone())).await)? {
        return Err(Error::Conflict(format!(
            "Hostname already in use: node '{hostname}' already exists"
        )));
    }
    let mut random = [0u8; 32];
    getrandom::fill(&mut random).map_err(Error::internal)?;
    // PLCAPI's form: 32 random bytes, base64 without '='.
    let key = STANDARD_NO_PAD.encode(random);
    let id = next_id(conn, "node").await?;
    sqlx::query(
        "INSERT INTO nodes (node_id, uuid, hostname, site_id, node_type, boot_state, model, version, node_key, \
         date_created, last_updated) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10)",
    )
    .bind(id)
    .bind(uuid::Uuid::now_v7().to_string())
    .bind(&hostname)
    .bind(site.id)
    .bind(node_type)
    .bind(boot_state)
    .bind(node.model.as_deref())
    .bind(node.version.as_deref())
    .bind(&key)
    .bind(now())
    .execute(&mut *conn)
    .await?;
    Record::new("node_added")
        .node(id)
        .site(site.id)
        .save(conn, caller)
        .await?;
    Ok((id, key))
}

/// Changes a node.
pub async fn update(conn: &mut Conn, caller: &Caller, key: &Ref, change: &NodeChange) -> Result<()> {
    let node = lookup::node(conn, key).await?;
    if !caller.manages_nodes_of(node.site_id) {
        return Err(Error::denied("Not allowed to update specified node"));
    }
    if change.key.is_some() {
        caller.must_be_admin("set a node's key")?;
    }
    if let Some(node_type) = &change.node_type {
        one_of("node_type", node_type, &NODE_TYPES)?;
    }
    if let Some(boot_state) = &change.boot_state {
        one_of("boot_state", boot_state, &BOOT_STATES)?;
    }
    if let Some(key) = &change.key
        && (key.len() < 16 || key.chars().any(|c| c.is_control() || c == '"'))
    {
        return Err(Error::invalid(
            "Invalid key: allowed are 16 bytes and more, no quotes or control characters",
        ));
    }
    let hostname = match &change.hostname {
        Some(hostname) => {
            let hostname = check_hostname(hostname)?;
            if hostname != node.hostname
                && lookup::exists(lookup::node(conn, &Ref::Name(hostname.clone())).await)?
            {
                return Err(Error::Conflict(format!(
                    "Hostname already in use: node '{hostname}' already exists"
                )));
            }
            Some(hostname)
        }
        None => None,
    };
    sqlx::query(
        "UPDATE nodes SET hostname = COALESCE($2, hostname), node_type = COALESCE($3, node_type), \
         boot_state = COALESCE($4, boot_state), model = COALESCE($5, model), version = COALESCE($6, version), \
         node_key = COALESCE($7, node_key), last_updated = $8 WHERE node_id = $1",
    )
    .bind(node.id)
    .bind(hostname)
    .bind(change.node_type.as_deref())
    .bind(change.boot_state.as_deref())
    .bind(change.model.as_deref())
    .bind(change.version.as_deref())
    .bind(change.key.as_deref())
    .bind(now())
    .execute(&mut *conn)
    .await?;
    if change.key.is_some() {
        forget_identity(conn, node.id).await?;
    }
    Record::new("node_changed")
        .node(node.id)
        .site(node.site_id)
        .data(json!({ "boot_state": change.boot_state }))
        .wakes(vec![node.id])
        .save(conn, caller)
        .await
}

/// Deletes a node: the row stays, its slivers and its identity end.
pub async fn delete(conn: &mut Conn, caller: &Caller, key: &Ref) -> Result<()> {
    let node = lookup::node(conn, key).await?;
    if !caller.manages_nodes_of(node.site_id) {
        return Err(Error::denied("Not allowed to delete specified node"));
    }
    forget_identity(conn, node.id).await?;
    for sql in [
        "DELETE FROM slice_node WHERE node_id = $1",
        "DELETE FROM slice_tags WHERE node_id = $1",
        "DELETE FROM slivers WHERE node_id = $1",
        "UPDATE nodes SET deleted = 1 WHERE node_id = $1",
    ] {
        sqlx::query(sql).bind(node.id).execute(&mut *conn).await?;
    }
    Record::new("node_deleted")
        .node(node.id)
        .site(node.site_id)
        .wakes(vec![node.id])
        .save(conn, caller)
        .await
}

async fn forget_identity(conn: &mut Conn, node: i64) -> Result<()> {
    sqlx::query("UPDATE nodes SET ed25519_key = NULL WHERE node_id = $1")
        .bind(node)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM sessions WHERE node_id = $1")
        .bind(node)
        .execute(conn)
        .await?;
    Ok(())
}

/// Notes that the node has called.
pub async fn touch(conn: &mut Conn, node: i64) -> Result<()> {
    sqlx::query("UPDATE nodes SET last_contact = $2 WHERE node_id = $1")
        .bind(node)
        .bind(now())
        .execute(conn)
        .await?;
    Ok(())
}

fn check_announcement(registration: &NodeRegistration) -> Result<()> {
    verifying_key(&registration.ed25519_public_key)?;
    let many = |what: &str, n: usize| match n > ANNOUNCED_MAX {
        true => Err(Error::invalid(format!("{n} {what}: allowed are {ANNOUNCED_MAX}"))),
        false => Ok(()),
    };
    many("vm_types", registration.vm_types.len())?;
    many("ssh_host_keys", registration.ssh_host_keys.len())?;
    for vm_type in &registration.vm_types {
        many("capabilities", vm_type.capabilities.len())?;
        // The same rule as in an rspec: what cannot be asked for must not be announced.
        mandoline_rspec::Rspec::new().set_json("vm_type", &json!(vm_type.name))?;
    }
    mandoline_rspec::Rspec::from_map(&registration.capacity)?;
    if let Some(endpoint) = &registration.ssh_endpoint {
        let good = |c: char| c.is_ascii_alphanumeric() || ".:-[]%".contains(c);
        if endpoint.host.is_empty()
            || endpoint.host.len() > 255
            || !endpoint.host.chars().all(good)
            || endpoint.port == 0
        {
            return Err(Error::invalid_value(
                "ssh_endpoint",
                &endpoint.host,
                "a host name or address, and a port",
            ));
        }
    }
    Ok(())
}

/// A node says who it is and what it offers. Its call was signed under its `NODE_KEY`.
pub async fn register(
    conn: &mut Conn,
    caller: &Caller,
    registration: &NodeRegistration,
) -> Result<NodeRegistered> {
    let id = caller
        .node_id()
        .ok_or_else(|| Error::denied("only a node registers"))?;
    check_announcement(registration)?;
    let host_keys = registration
        .ssh_host_keys
        .iter()
        .map(|key| sshkey::check(key))
        .collect::<Result<Vec<_>>>()?;
    let row = sqlx::query(
        "SELECT uuid, hostname, boot_state, site_id FROM nodes WHERE node_id = $1 AND deleted = 0",
    )
    .bind(id)
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| Error::NoSuch("node".into()))?;
    let mut boot_state: String = row.try_get(2)?;
    // A node that registers has been installed: it leaves the state in which nodes begin, as PlanetLab's
    // boot manager did with BootUpdateNode. What an operator chose stays.
    if boot_state == "reinstall" || boot_state == "install" {
        boot_state = "boot".to_owned();
    }
    sqlx::query(
        "UPDATE nodes SET ed25519_key = $2, ssh_host_keys = $3, ssh_host = $4, ssh_port = $5, vm_types = $6, \
         attribute_table_version = $7, capacity = $8, boot_state = $9, run_level = 'boot', last_boot = $10, \
         last_contact = $10, last_updated = $10 WHERE node_id = $1",
    )
    .bind(id)
    .bind(&registration.ed25519_public_key)
    .bind(json!(host_keys).to_string())
    .bind(
        registration
            .ssh_endpoint
            .as_ref()
            .map(|endpoint| endpoint.host.as_str()),
    )
    .bind(
        registration
            .ssh_endpoint
            .as_ref()
            .map(|endpoint| i64::from(endpoint.port)),
    )
    .bind(json!(registration.vm_types).to_string())
    .bind(i64::from(registration.attribute_table_version))
    .bind(json!(registration.capacity).to_string())
    .bind(&boot_state)
    .bind(now())
    .execute(&mut *conn)
    .await?;
    slivers::restart_numbers(conn, id).await?;
    Record::new("node_registered")
        .node(id)
        .site(row.try_get(3)?)
        .data(json!({ "vm_types": registration.vm_types }))
        .wakes(vec![id])
        .save(conn, caller)
        .await?;
    Ok(NodeRegistered {
        node_id: id,
        uuid: row.try_get(0)?,
        hostname: row.try_get(1)?,
        boot_state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames() {
        assert_eq!(check_hostname("Node1.Example.ORG").unwrap(), "node1.example.org");
        for bad in [
            "",
            "a..b",
            "-a",
            "a-",
            "a b",
            "a_b",
            "a.",
            "ä.org",
            &"x".repeat(64),
        ] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
    }
}
