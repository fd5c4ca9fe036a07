//! Event streams (server-sent events): to persons what changed, to nodes that their slivers did.
//!
//! A stream reads the table from where it is and then follows the bus; where it lags behind the bus it reads
//! the table again, so nothing is missed. It ends when the program ends.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::response::Sse;
use axum::response::sse::{Event as SseEvent, KeepAlive};
use futures_util::Stream;
use futures_util::stream::unfold;
use mandoline_api::authority::{
    ErrorBody, Event, HEARTBEAT_S, NODE_EVENT_SLIVERS, NodeAuthAlgorithm, SliversChanged,
};
use serde::Deserialize;
use tokio::sync::{broadcast, watch};

use super::error::Refusal;
use super::extract::{NodeCall, Person};
use crate::domain::Caller;
use crate::domain::events::{Recorded, after, last_seq, may_see};
use crate::error::Error;
use crate::in_read;
use crate::service::Service;

type Events = broadcast::Receiver<Arc<Recorded>>;

fn heartbeat() -> KeepAlive {
    KeepAlive::new().interval(Duration::from_secs(HEARTBEAT_S))
}

/// What comes next on the bus.
enum Next {
    Event(Arc<Recorded>),
    /// Some were missed.
    Lagged,
    /// The program ends.
    Over,
}

async fn next(events: &mut Events, stopping: &mut watch::Receiver<bool>) -> Next {
    tokio::select! {
        _ = stopping.wait_for(|stop| *stop) => Next::Over,
        event = events.recv() => match event {
            Ok(event) => Next::Event(event),
            Err(broadcast::error::RecvError::Lagged(_)) => Next::Lagged,
            Err(broadcast::error::RecvError::Closed) => Next::Over,
        },
    }
}

/// Where to begin.
#[derive(Debug, Deserialize)]
pub(super) struct From {
    /// Number of the last event that is known; absent: from now on.
    since: Option<i64>,
}

struct Following {
    service: Arc<Service>,
    caller: Caller,
    events: Events,
    stopping: watch::Receiver<bool>,
    last: i64,
    ready: VecDeque<Recorded>,
    behind: bool,
}

impl Following {
    /// The next event that the caller may see.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event.event.seq <= self.last {
                    continue;
                }
                self.last = event.event.seq;
                // Rights change while a stream is open: they are looked up for each event.
                let person = self.caller.person_id()?;
                let seen = in_read!(self.service.db, |c| match Caller::load_person(c, person).await? {
                    Some(caller) => may_see(c, &caller, &event).await.map(Some),
                    None => Ok(None),
                });
                match seen {
                    Ok(Some(true)) => return Some(event.event),
                    Ok(Some(false)) => continue,
                    Ok(None) | Err(_) => return None,
                }
            }
            if self.behind {
                let last = self.last;
                let batch = in_read!(self.service.db, |c| after(c, last).await).ok()?;
                self.behind = !batch.is_empty();
                self.ready.extend(batch);
                continue;
            }
            match next(&mut self.events, &mut self.stopping).await {
                Next::Event(event) => self.ready.push_back((*event).clone()),
                Next::Lagged => self.behind = true,
                Next::Over => return None,
            }
        }
    }
}

/// What changes, as it changes
#[utoipa::path(get, path = "/v1/events", tag = "events", security(("session" = [])),
    params(("since" = Option<i64>, Query, description = "Number of the last event that is known; absent: from now on")),
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream", body = Event),
              (status = 401, body = ErrorBody)))]
pub(super) async fn of_person(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Query(from): Query<From>,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, Refusal> {
    // The bus first, the table after it: what comes between is seen twice and told once.
    let events = service.bus.subscribe();
    let last = match from.since {
        Some(since) => since,
        None => in_read!(service.db, |c| last_seq(c).await)?,
    };
    let stopping = service.stopping.clone();
    let following = Following {
        service,
        caller,
        events,
        stopping,
        last,
        ready: VecDeque::new(),
        behind: true,
    };
    let stream = unfold(following, |mut following| async move {
        let event = following.next().await?;
        let told = SseEvent::default()
            .id(event.seq.to_string())
            .event(&event.kind)
            .json_data(&event)
            .ok()?;
        Some((Ok(told), following))
    });
    Ok(Sse::new(stream).keep_alive(heartbeat()))
}

/// That the node's slivers changed: fetch them. The first comes at once
#[utoipa::path(get, path = "/v1/node/events", tag = "node side", security(("node" = [])),
    responses((status = 200, description = "Server-sent events", content_type = "text/event-stream", body = SliversChanged),
              (status = 401, body = ErrorBody)))]
pub(super) async fn of_node(
    State(service): State<Arc<Service>>,
    call: NodeCall,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, Refusal> {
    let caller = call.verify(&service, NodeAuthAlgorithm::Ed25519).await?;
    let node = caller
        .node_id()
        .ok_or_else(|| Error::denied("this call is for nodes"))?;
    let events = service.bus.subscribe();
    let start = in_read!(service.db, |c| last_seq(c).await)?;
    let stopping = service.stopping.clone();
    let stream = unfold(
        (events, stopping, Some(start)),
        move |(mut events, mut stopping, first)| async move {
            let seq = match first {
                Some(seq) => seq,
                None => loop {
                    match next(&mut events, &mut stopping).await {
                        Next::Event(event) if event.wakes.contains(&node) => break event.event.seq,
                        Next::Event(_) => {}
                        Next::Lagged => break 0,
                        Next::Over => return None,
                    }
                },
            };
            let told = SseEvent::default()
                .event(NODE_EVENT_SLIVERS)
                .json_data(SliversChanged { seq })
                .ok()?;
            Some((Ok(told), (events, stopping, None)))
        },
    );
    Ok(Sse::new(stream).keep_alive(heartbeat()))
}
