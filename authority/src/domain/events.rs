//! The record of every change, which is also what the event streams are made from.
//!
//! ```text
//! change + event, one transaction ─commit─► [`Bus`] pump ─► subscribers (SSE of persons and nodes)
//! another process's commit ────────poll────────┘
//! ```
//!
//! The pump is the only reader: in this process it is woken by commits, for other processes on the same
//! database it polls. Numbers are given out inside the transactions, so nothing can slip in behind it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use sqlx::Row;
use sqlx::any::AnyRow;
use tokio::sync::broadcast;

use super::{Caller, Who};
use crate::db::{Conn, Db, next_id};
use crate::error::{Error, Result};
use crate::in_read;

/// How often the pump looks for what other processes committed.
const POLL: Duration = Duration::from_secs(1);
/// Events read at once.
const BATCH: i64 = 500;
/// A subscriber that lags more than this has to read the table from where it was.
const BACKLOG: usize = 1024;

/// An event to record.
#[derive(Clone, Debug)]
pub struct Record {
    kind: &'static str,
    person: Option<i64>,
    site: Option<i64>,
    slice: Option<i64>,
    node: Option<i64>,
    data: Json,
    wakes: Vec<i64>,
}

impl Record {
    /// An event of this kind.
    pub fn new(kind: &'static str) -> Self {
        Self {
            kind,
            person: None,
            site: None,
            slice: None,
            node: None,
            data: Json::Null,
            wakes: Vec::new(),
        }
    }

    /// About this person.
    pub fn person(mut self, id: i64) -> Self {
        self.person = Some(id);
        self
    }

    /// About this site.
    pub fn site(mut self, id: i64) -> Self {
        self.site = Some(id);
        self
    }

    /// About this slice.
    pub fn slice(mut self, id: i64) -> Self {
        self.slice = Some(id);
        self
    }

    /// About this node.
    pub fn node(mut self, id: i64) -> Self {
        self.node = Some(id);
        self
    }

    /// Details. Never a secret: events are shown.
    pub fn data(mut self, data: Json) -> Self {
        self.data = data;
        self
    }

    /// The nodes whose set of slivers changes with it.
    pub fn wakes(mut self, nodes: Vec<i64>) -> Self {
        self.wakes = nodes;
        self
    }

    /// Writes it, in the transaction of the change.
    pub async fn save(self, conn: &mut Conn, by: &Caller) -> Result<()> {
        let seq = next_id(conn, "event").await?;
        let (person, node) = match &by.who {
            Who::Person { id, .. } => (Some(*id), None),
            Who::Node { id } => (None, Some(*id)),
            Who::Anonymous | Who::Authority => (None, None),
        };
        sqlx::query(
            "INSERT INTO events (seq, time_us, kind, actor_person_id, actor_node_id, person_id, site_id, slice_id, \
             node_id, data, wakes) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(seq)
        .bind(jiff::Timestamp::now().as_microsecond())
        .bind(self.kind)
        .bind(person)
        .bind(node)
        .bind(self.person)
        .bind(self.site)
        .bind(self.slice)
        .bind(self.node)
        .bind(self.data.to_string())
        .bind(json!(self.wakes).to_string())
        .execute(conn)
        .await?;
        Ok(())
    }
}

/// An event as it was recorded, with the names of what it is about.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// As the interface shows it.
    pub event: mandoline_api::authority::Event,
    /// The person that it is about.
    pub person: Option<i64>,
    /// The slice that it is about.
    pub slice: Option<i64>,
    /// The site of that slice, or the site that it is about.
    pub site: Option<i64>,
    /// The nodes whose set of slivers changed with it.
    pub wakes: Vec<i64>,
}

fn recorded(row: &AnyRow) -> Result<Recorded> {
    let actor = match (
        row.try_get::<Option<i64>, _>(3)?,
        row.try_get::<Option<i64>, _>(4)?,
    ) {
        (Some(person), _) => format!("person {person}"),
        (None, Some(node)) => format!("node {node}"),
        (None, None) => "authority".to_owned(),
    };
    let data: String = row.try_get(11)?;
    let wakes: String = row.try_get(12)?;
    Ok(Recorded {
        event: mandoline_api::authority::Event {
            seq: row.try_get(0)?,
            time_us: row.try_get(1)?,
            kind: row.try_get(2)?,
            actor,
            slice: row.try_get(9)?,
            node: row.try_get(10)?,
            data: serde_json::from_str(&data).map_err(Error::internal)?,
        },
        person: row.try_get(5)?,
        site: row.try_get::<Option<i64>, _>(6)?.or(row.try_get(8)?),
        slice: row.try_get(7)?,
        wakes: serde_json::from_str(&wakes).map_err(Error::internal)?,
    })
}

/// Up to one batch of events after `since`, oldest first.
pub async fn after(conn: &mut Conn, since: i64) -> Result<Vec<Recorded>> {
    let rows = sqlx::query(
        "SELECT e.seq, e.time_us, e.kind, e.actor_person_id, e.actor_node_id, e.person_id, e.site_id, e.slice_id, \
         s.site_id, s.name, n.hostname, e.data, e.wakes FROM events e \
         LEFT JOIN slices s ON s.slice_id = e.slice_id LEFT JOIN nodes n ON n.node_id = e.node_id \
         WHERE e.seq > $1 ORDER BY e.seq LIMIT $2",
    )
    .bind(since)
    .bind(BATCH)
    .fetch_all(conn)
    .await?;
    rows.iter().map(recorded).collect()
}

/// The number of the last event.
pub async fn last_seq(conn: &mut Conn) -> Result<i64> {
    Ok(sqlx::query_scalar("SELECT COALESCE(MAX(seq), 0) FROM events")
        .fetch_one(conn)
        .await?)
}

/// Whether a caller may see an event: admins all; others what is about their slices, the slices and people of
/// sites that they answer for, themselves, or nodes.
pub async fn may_see(conn: &mut Conn, caller: &Caller, event: &Recorded) -> Result<bool> {
    if caller.is_admin() || event.site.is_some_and(|site| caller.is_pi_of(site)) {
        return Ok(true);
    }
    let Some(me) = caller.person_id() else {
        return Ok(false);
    };
    if event.person == Some(me) {
        return Ok(true);
    }
    match event.slice {
        Some(slice) => super::lookup::is_member(conn, slice, me).await,
        None => Ok(event.person.is_none() && event.event.node.is_some()),
    }
}

/// Hands recorded events to subscribers in this process.
#[derive(Clone, Debug)]
pub struct Bus {
    sender: broadcast::Sender<Arc<Recorded>>,
}

impl Bus {
    /// A bus and the task that feeds it until the bus and all subscribers are gone.
    pub async fn start(db: Db) -> Result<Self> {
        let (sender, _) = broadcast::channel(BACKLOG);
        let last = in_read!(db, |c| last_seq(c).await)?;
        let weak = sender.downgrade();
        tokio::spawn(async move {
            let mut last = last;
            loop {
                // A commit wakes us at once; the time-out is for commits of other processes.
                let _ = tokio::time::timeout(POLL, db.committed()).await;
                let Some(sender) = weak.upgrade() else { return };
                loop {
                    match in_read!(db, |c| after(c, last).await) {
                        Ok(events) if events.is_empty() => break,
                        Ok(events) => {
                            for event in events {
                                last = event.event.seq;
                                // Nobody listening is no error.
                                let _ = sender.send(Arc::new(event));
                            }
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot read events");
                            break;
                        }
                    }
                }
            }
        });
        Ok(Self { sender })
    }

    /// Everything from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Recorded>> {
        self.sender.subscribe()
    }
}
