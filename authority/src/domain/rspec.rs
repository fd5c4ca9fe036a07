//! A slice's rspec: made of its tags, checked against the attribute table and against what nodes announce.

use std::collections::BTreeMap;

use mandoline_api::authority::VmType;
use mandoline_rspec::{KVM_MICROVM, Rspec};
use serde_json::Value as Json;
use sqlx::Row;

use super::lookup::{self, NodeRow};
use super::{Ref, slivers};
use crate::db::Conn;
use crate::error::{Error, Invalid, Result};

/// Sets an attribute from a tag's text: as text where the attribute takes that, else as JSON (lists; structs
/// of foreign attributes).
pub fn set_text(rspec: &mut Rspec, name: &str, value: &str) -> Result<()> {
    let json = match value.trim_start().starts_with(['[', '{']) {
        true => serde_json::from_str::<Json>(value).ok(),
        false => None,
    };
    let text = Json::String(value.to_owned());
    match json {
        Some(json) if name.starts_with("x-") => Ok(rspec.set_json(name, &json)?),
        Some(json) => match rspec.set_json(name, &text) {
            Ok(()) => Ok(()),
            Err(_) => Ok(rspec.set_json(name, &json)?),
        },
        None => Ok(rspec.set_json(name, &text)?),
    }
}

/// All tags of a slice that are attributes: those of the whole slice, and by node those of single slivers.
async fn tags(conn: &mut Conn, slice_id: i64) -> Result<(Rspec, BTreeMap<i64, Vec<(String, String)>>)> {
    let rows = sqlx::query(
        "SELECT y.tagname, t.value, t.node_id FROM slice_tags t JOIN tag_types y ON y.tag_type_id = t.tag_type_id \
         WHERE t.slice_id = $1 ORDER BY t.slice_tag_id",
    )
    .bind(slice_id)
    .fetch_all(conn)
    .await?;
    let mut wide = Rspec::new();
    let mut by_node: BTreeMap<i64, Vec<(String, String)>> = BTreeMap::new();
    for row in rows {
        let (name, value): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        if mandoline_rspec::attribute(&name).is_none() && !name.starts_with("x-") {
            continue;
        }
        match row.try_get::<Option<i64>, _>(2)? {
            None => set_text(&mut wide, &name, &value)?,
            Some(node) => by_node.entry(node).or_default().push((name, value)),
        }
    }
    Ok((wide, by_node))
}

/// What every sliver of the slice may use.
pub async fn slice_wide(conn: &mut Conn, slice_id: i64) -> Result<Rspec> {
    Ok(tags(conn, slice_id).await?.0)
}

fn overlay(wide: &Rspec, own: Option<&Vec<(String, String)>>) -> Result<Rspec> {
    let mut rspec = wide.clone();
    for (name, value) in own.into_iter().flatten() {
        rspec.remove(name);
        set_text(&mut rspec, name, value)?;
    }
    if rspec.vm_type().is_none() {
        rspec.set_json("vm_type", &Json::from(KVM_MICROVM))?;
    }
    Ok(rspec)
}

/// What the slice's sliver on this node may use: a sliver's tags hide the slice's. `vm_type` is always named.
pub async fn on_node(conn: &mut Conn, slice_id: i64, node_id: i64) -> Result<Rspec> {
    let (wide, by_node) = tags(conn, slice_id).await?;
    overlay(&wide, by_node.get(&node_id))
}

/// Names of the `vm_type`s in a node's announcement.
pub fn announced(vm_types: &str) -> Result<Vec<String>> {
    let types: Vec<VmType> = serde_json::from_str(vm_types).map_err(Error::internal)?;
    Ok(types.into_iter().map(|vm_type| vm_type.name).collect())
}

/// The refusal, if a registered node does not announce this `vm_type`. A node that has not registered has
/// announced nothing: it is checked when it does (see [`check_node`]).
fn lacks(rspec: &Rspec, node: &NodeRow) -> Result<Option<Invalid>> {
    let wanted = rspec.vm_type().unwrap_or(KVM_MICROVM);
    let has = announced(&node.vm_types)?;
    if !node.registered || has.iter().any(|name| name == wanted) {
        return Ok(None);
    }
    let has = if has.is_empty() {
        "none".to_owned()
    } else {
        has.join(", ")
    };
    Ok(Some(Invalid {
        message: format!(
            "vm_type '{wanted}' is not on node {}: it has {has}",
            node.hostname
        ),
        attribute: Some("vm_type".to_owned()),
        value: Some(wanted.to_owned()),
        allowed: Some(has),
        node: Some(node.hostname.clone()),
    }))
}

/// Fails if the node has not what the slice's sliver there needs.
pub async fn check_on_node(conn: &mut Conn, slice_id: i64, node: &NodeRow) -> Result<()> {
    match lacks(&on_node(conn, slice_id, node.id).await?, node)? {
        Some(invalid) => Err(Error::Invalid(Box::new(invalid))),
        None => Ok(()),
    }
}

/// Fails if one of the slice's nodes has not what its sliver there needs.
pub async fn check(conn: &mut Conn, slice_id: i64) -> Result<()> {
    let (wide, by_node) = tags(conn, slice_id).await?;
    for node in lookup::nodes_of_slice(conn, slice_id).await? {
        let row = lookup::node(conn, &Ref::Id(node)).await?;
        if let Some(invalid) = lacks(&overlay(&wide, by_node.get(&node))?, &row)? {
            return Err(Error::Invalid(Box::new(invalid)));
        }
    }
    Ok(())
}

/// Which of the slices the node can run, by number: what it lacks is recorded as the sliver's failure.
pub async fn check_node(conn: &mut Conn, node: &NodeRow, slice_id: i64, rspec: &Rspec) -> Result<bool> {
    match lacks(rspec, node)? {
        None => Ok(true),
        Some(invalid) => {
            slivers::refuse(conn, slice_id, node.id, &invalid.message).await?;
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_text_whatever_the_attribute() {
        let mut rspec = Rspec::new();
        for (name, value) in [
            ("cpu_share", "20"),
            ("mem_limit", "128 MiB"),
            ("cpu_capped", "1"),
            ("ports", "[\"tcp/80\"]"),
            ("initscript", "[ -e x ]"),
        ] {
            set_text(&mut rspec, name, value).unwrap();
        }
        assert_eq!(rspec.number("cpu_share"), Some(20));
        assert_eq!(rspec.number("mem_limit"), Some(128 << 20));
        assert_eq!(rspec.text("initscript"), Some("[ -e x ]"));
        assert!(set_text(&mut rspec, "cpu_share", "-1").is_err());
        assert!(set_text(&mut rspec, "no_such", "1").is_err());
    }

    #[test]
    fn a_slivers_tags_hide_the_slices() {
        let mut wide = Rspec::new();
        set_text(&mut wide, "cpu_share", "5").unwrap();
        let own = vec![("cpu_share".to_owned(), "7".to_owned())];
        assert_eq!(overlay(&wide, Some(&own)).unwrap().number("cpu_share"), Some(7));
        assert_eq!(overlay(&wide, None).unwrap().number("cpu_share"), Some(5));
        assert_eq!(overlay(&wide, None).unwrap().vm_type(), Some(KVM_MICROVM));
    }

    #[test]
    fn what_a_node_lacks_is_named_with_what_it_has() {
        let node = |registered| NodeRow {
            id: 1,
            hostname: "n1.example.org".into(),
            site_id: 1,
            boot_state: "boot".into(),
            registered,
            vm_types: r#"[{"name":"kvm-microvm"}]"#.into(),
        };
        let mut rspec = Rspec::new();
        set_text(&mut rspec, "vm_type", "xen-domain").unwrap();
        let refusal = lacks(&rspec, &node(true)).unwrap().unwrap();
        for word in ["vm_type", "xen-domain", "n1.example.org", "kvm-microvm"] {
            assert!(refusal.message.contains(word), "{}", refusal.message);
        }
        assert_eq!(lacks(&rspec, &node(false)).unwrap(), None);
    }
}
