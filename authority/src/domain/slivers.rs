//! What nodes report of their slivers.

use mandoline_api::authority::{FailureClass, Sliver, SliverReport, SliverState, SshLogin};
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::events::Record;
use super::{Caller, rspec};
use crate::auth::sshkey;
use crate::db::{Conn, now};
use crate::error::{Error, Result};

/// Slivers in one report.
pub const REPORT_MAX: usize = 10_000;
/// Longest text in a report that is kept, characters.
const TEXT_MAX: usize = 1000;

fn word<T: serde::Serialize>(value: &T) -> Result<String> {
    match serde_json::to_value(value).map_err(Error::internal)? {
        Json::String(word) => Ok(word),
        other => Err(Error::internal(format!("not a word: {other}"))),
    }
}

fn cut(text: Option<&String>) -> Option<String> {
    text.map(|text| text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect())
}

/// Takes in a node's report.
pub async fn report(conn: &mut Conn, caller: &Caller, reports: &[SliverReport]) -> Result<()> {
    let node = caller
        .node_id()
        .ok_or_else(|| Error::denied("only a node reports slivers"))?;
    if reports.len() > REPORT_MAX {
        return Err(Error::invalid(format!(
            "{} slivers in a report: allowed are {REPORT_MAX}",
            reports.len()
        )));
    }
    for report in reports {
        take_in(conn, caller, node, report).await?;
    }
    Ok(())
}

async fn take_in(conn: &mut Conn, caller: &Caller, node: i64, report: &SliverReport) -> Result<()> {
    // A slice that was deleted, or was never this node's, is nobody's news.
    let slice: Option<i64> = sqlx::query_scalar(
        "SELECT s.slice_id FROM slices s JOIN slice_node b ON b.slice_id = s.slice_id AND b.node_id = $1 \
         WHERE s.name = $2 AND s.deleted = 0 AND s.uuid = COALESCE($3, s.uuid)",
    )
    .bind(node)
    .bind(&report.slice)
    .bind(report.slice_id.as_deref())
    .fetch_optional(&mut *conn)
    .await?;
    let Some(slice) = slice else { return Ok(()) };
    let host_keys = match &report.ssh_host_keys {
        Some(lines) => {
            let lines: Result<Vec<_>> = lines.iter().take(16).map(|line| sshkey::check(line)).collect();
            Some(json!(lines?).to_string())
        }
        None => None,
    };
    let address = match &report.address {
        Some(text) => Some(
            text.parse::<std::net::IpAddr>()
                .map_err(|_| Error::invalid_value("address", text, "an IP address"))?
                .to_string(),
        ),
        None => None,
    };
    let class = report.class.as_ref().map(word).transpose()?;
    let changed = sqlx::query(
        "INSERT INTO slivers (slice_id, node_id, seq, state, reason, class, vm_id, initscript, address, ssh_host_keys, \
           phases_us, updated) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, COALESCE($10, '[]'), $11, $12) \
         ON CONFLICT (slice_id, node_id) DO UPDATE SET seq = excluded.seq, state = excluded.state, \
           reason = excluded.reason, class = excluded.class, vm_id = COALESCE(excluded.vm_id, slivers.vm_id), \
           initscript = COALESCE(excluded.initscript, slivers.initscript), \
           address = COALESCE(excluded.address, slivers.address), \
           ssh_host_keys = COALESCE($10, slivers.ssh_host_keys), \
           phases_us = CASE WHEN excluded.phases_us = '{}' THEN slivers.phases_us ELSE excluded.phases_us END, \
           updated = excluded.updated \
         WHERE slivers.seq <= excluded.seq",
    )
    .bind(slice)
    .bind(node)
    .bind(i64::try_from(report.seq).map_err(|_| Error::invalid("seq: too large"))?)
    .bind(report.state.as_str())
    .bind(cut(report.reason.as_ref()))
    .bind(class)
    .bind(cut(report.vm_id.as_ref()))
    .bind(cut(report.initscript.as_ref()))
    .bind(address)
    .bind(host_keys)
    .bind(json!(report.phases_us).to_string())
    .bind(now())
    .execute(&mut *conn)
    .await?
    .rows_affected();
    if changed == 0 {
        return Ok(());
    }
    tell(conn, caller, slice, node).await
}

/// Records that a sliver's state changed, with all that is known of it.
async fn tell(conn: &mut Conn, caller: &Caller, slice: i64, node: i64) -> Result<()> {
    let known = of_slice(conn, slice)
        .await?
        .into_iter()
        .find(|sliver| sliver.node == node);
    let data = serde_json::to_value(known).map_err(Error::internal)?;
    Record::new("sliver_state")
        .slice(slice)
        .node(node)
        .data(data)
        .save(conn, caller)
        .await
}

/// Records that a node cannot run a sliver.
pub async fn refuse(conn: &mut Conn, slice: i64, node: i64, why: &str) -> Result<()> {
    let changed = sqlx::query(
        "INSERT INTO slivers (slice_id, node_id, state, reason, class, updated) VALUES ($1, $2, 'failed', $3, $4, $5) \
         ON CONFLICT (slice_id, node_id) DO UPDATE SET state = 'failed', reason = excluded.reason, \
         class = excluded.class, updated = excluded.updated \
         WHERE slivers.state <> 'failed' OR COALESCE(slivers.reason, '') <> excluded.reason",
    )
    .bind(slice)
    .bind(node)
    .bind(why)
    .bind(word(&FailureClass::Continuable)?)
    .bind(now())
    .execute(&mut *conn)
    .await?
    .rows_affected();
    match changed {
        0 => Ok(()),
        _ => tell(conn, &Caller::authority(), slice, node).await,
    }
}

/// A node that starts anew may number its reports from the beginning.
pub async fn restart_numbers(conn: &mut Conn, node: i64) -> Result<()> {
    sqlx::query("UPDATE slivers SET seq = 0 WHERE node_id = $1")
        .bind(node)
        .execute(conn)
        .await?;
    Ok(())
}

fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(Error::internal)
}

fn from_word<T: DeserializeOwned>(word: String) -> Result<T> {
    serde_json::from_value(Json::String(word)).map_err(Error::internal)
}

/// The slivers of a slice, one for each of its nodes.
pub async fn of_slice(conn: &mut Conn, slice_id: i64) -> Result<Vec<Sliver>> {
    let rows = sqlx::query(
        "SELECT s.name, n.node_id, n.hostname, n.ssh_host, n.ssh_port, n.ssh_host_keys, \
         v.state, v.reason, v.class, v.vm_id, v.initscript, v.address, v.ssh_host_keys, v.phases_us, v.updated \
         FROM slice_node b JOIN slices s ON s.slice_id = b.slice_id JOIN nodes n ON n.node_id = b.node_id \
         LEFT JOIN slivers v ON v.slice_id = b.slice_id AND v.node_id = b.node_id \
         WHERE b.slice_id = $1 ORDER BY n.hostname",
    )
    .bind(slice_id)
    .fetch_all(&mut *conn)
    .await?;
    let mut slivers = Vec::with_capacity(rows.len());
    for row in &rows {
        let mut sliver = from_row(row)?;
        let rspec = rspec::on_node(conn, slice_id, sliver.node).await?;
        sliver.vm_type = rspec.vm_type().map(str::to_owned);
        slivers.push(sliver);
    }
    Ok(slivers)
}

fn from_row(row: &AnyRow) -> Result<Sliver> {
    let slice: String = row.try_get(0)?;
    let endpoint = match (
        row.try_get::<Option<String>, _>(3)?,
        row.try_get::<Option<i64>, _>(4)?,
    ) {
        (Some(host), Some(port)) => Some(SshLogin {
            host,
            port: u16::try_from(port).map_err(Error::internal)?,
            user: slice.clone(),
        }),
        _ => None,
    };
    let list = |index: usize| -> Result<Vec<String>> {
        row.try_get::<Option<String>, _>(index)?
            .map_or_else(|| Ok(Vec::new()), |text| from_json(&text))
    };
    let phases = row.try_get::<Option<String>, _>(13)?;
    Ok(Sliver {
        slice,
        node: row.try_get(1)?,
        hostname: row.try_get(2)?,
        state: row
            .try_get::<Option<String>, _>(6)?
            .map_or(Ok(SliverState::Pending), from_word)?,
        reason: row.try_get(7)?,
        class: row.try_get::<Option<String>, _>(8)?.map(from_word).transpose()?,
        vm_id: row.try_get(9)?,
        address: row.try_get(11)?,
        ssh_endpoint: endpoint,
        ssh_host_keys: list(12)?,
        node_host_keys: list(5)?,
        vm_type: None,
        initscript: row.try_get(10)?,
        phases_us: phases.map_or_else(|| Ok(Default::default()), |text| from_json(&text))?,
        updated: row.try_get::<Option<i64>, _>(14)?.unwrap_or(0),
    })
}
