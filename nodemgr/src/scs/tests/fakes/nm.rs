//! The node manager, as far as the service calls it.

use std::collections::HashMap;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use futures_util::{Stream, StreamExt, stream};
use mandoline_api::nodemgr::{
    Bind, BindAnswer, Done, ErrorAnswer, ErrorBody, ErrorKind, IDEMPOTENCY_KEY, Initscript, ListAnswer,
    NodeInfo, RcapAnswer, RcapRequest, RspecAnswer, SliverEvent, SliverInfo, SliverState, SplitPool,
    VmTypeInfo,
};
use mandoline_rspec::{Rcap, Rspec};
use tokio_stream::wrappers::BroadcastStream;

use super::{NmState, Shared};

pub(super) fn routes(shared: Shared) -> Router {
    Router::new()
        .route("/v1/node", get(node))
        .route("/v1/events", get(events))
        .route("/v1/sensors/{name}", put(publish))
        .route("/v1/{operation}", post(operation))
        .with_state(shared)
}

async fn node() -> Response {
    let vm_type = |name: &str, available| VmTypeInfo {
        name: name.into(),
        available,
        detail: None,
        capabilities: vec![],
    };
    axum::Json(NodeInfo {
        vm_types: vec![vm_type("kvm-microvm", true), vm_type("broken", false)],
        vm_type_names: [
            ("linux_vserver".into(), "kvm-microvm".into()),
            ("xen-domain".into(), "broken".into()),
        ]
        .into(),
        attribute_table_version: 1,
        capacity: Rspec::new(),
        available: Rspec::new(),
        limits: Default::default(),
    })
    .into_response()
}

async fn events(
    State(shared): State<Shared>,
    Query(query): Query<HashMap<String, u64>>,
) -> Sse<impl Stream<Item = Result<Event, axum::Error>>> {
    let live = BroadcastStream::new(shared.nm_events.subscribe());
    let since = query["since"];
    // The last event of each sliver that is later, as the real one does it.
    let mut last: HashMap<u32, SliverEvent> = HashMap::new();
    for event in shared
        .nm
        .lock()
        .unwrap()
        .events
        .iter()
        .filter(|event| event.seq > since)
    {
        last.insert(event.vm_id, event.clone());
    }
    let mut replay: Vec<_> = last.into_values().collect();
    replay.sort_by_key(|event| event.seq);
    let events = stream::iter(replay)
        .chain(live.filter_map(|event| std::future::ready(event.ok())))
        .map(|event| Event::default().json_data(event));
    Sse::new(events).keep_alive(KeepAlive::default())
}

async fn publish(State(shared): State<Shared>, Path(name): Path<String>, table: String) -> Response {
    shared.nm.lock().unwrap().sensors.insert(name, table);
    shared.changed.notify_waiters();
    axum::Json(Done {}).into_response()
}

async fn operation(
    State(shared): State<Shared>,
    Path(operation): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let key = headers
        .get(IDEMPOTENCY_KEY)
        .map(|key| format!("{operation} {}", key.to_str().unwrap()));
    let stored = key
        .as_ref()
        .and_then(|key| shared.nm.lock().unwrap().answers.get(key).cloned());
    let answer = match stored {
        Some(answer) => Ok(answer),
        None => work(&shared, &operation, &body),
    };
    shared.changed.notify_waiters();
    let answer = match answer {
        Err(error) => {
            return (
                StatusCode::from_u16(error.kind.status()).unwrap(),
                axum::Json(ErrorAnswer { error }),
            )
                .into_response();
        }
        Ok(answer) => answer,
    };
    let mut nm = shared.nm.lock().unwrap();
    if let Some(key) = key {
        nm.answers.insert(key, answer.clone());
    }
    if let Some(at) = nm.lose_answers.iter().position(|lost| *lost == operation) {
        nm.lose_answers.remove(at);
        return (StatusCode::BAD_GATEWAY, "the connection broke").into_response();
    }
    axum::Json(answer).into_response()
}

fn work(shared: &Shared, operation: &str, body: &[u8]) -> Result<serde_json::Value, ErrorBody> {
    let mut nm = shared.nm.lock().unwrap();
    let rcap = |number: u8| Rcap::from_bytes([number; 16]);
    let of = |nm: &NmState, rcap: &Rcap| {
        let sliver = nm
            .slivers
            .iter()
            .find(|sliver| sliver.rcap == *rcap)
            .map(|sliver| sliver.event.vm_id);
        sliver.ok_or_else(|| ErrorBody::new(ErrorKind::NotFound, "no such sliver"))
    };
    let answer = match operation {
        "get_rcap" => serde_json::to_value(RcapAnswer { rcap: rcap(255) }),
        "list" => serde_json::to_value(ListAnswer {
            pools: vec![],
            slivers: nm.slivers.clone(),
        }),
        "split_pool" => {
            if let Some(reason) = &nm.refuse_split {
                return Err(ErrorBody::new(ErrorKind::Insufficient, reason.clone()));
            }
            let request: SplitPool = serde_json::from_slice(body).unwrap();
            nm.pools_made += 1;
            let made = rcap(nm.pools_made);
            nm.pools.insert(made.to_hex(), request.rspec);
            serde_json::to_value(RcapAnswer { rcap: made })
        }
        "get_rspec" => {
            let request: RcapRequest = serde_json::from_slice(body).unwrap();
            let hex = request.rcap.to_hex();
            let rspec = nm.pools.get(&hex).cloned();
            let rspec = rspec.ok_or_else(|| ErrorBody::new(ErrorKind::NotFound, "no such pool"))?;
            serde_json::to_value(RspecAnswer {
                rspec,
                vm_id: nm.bound.get(&hex).copied(),
                slice: None,
            })
        }
        "release" => {
            let request: RcapRequest = serde_json::from_slice(body).unwrap();
            nm.pools.remove(&request.rcap.to_hex());
            serde_json::to_value(Done {})
        }
        "bind" => {
            let request: Bind = serde_json::from_slice(body).unwrap();
            let vm_id = bind(&mut nm, &request);
            drop(nm);
            for state in [SliverState::Defined, SliverState::Reachable] {
                shared.move_to(vm_id, state);
            }
            serde_json::to_value(BindAnswer { vm_id })
        }
        "stop" | "start" => {
            let request: RcapRequest = serde_json::from_slice(body).unwrap();
            let vm_id = of(&nm, &request.rcap)?;
            drop(nm);
            let state = if operation == "stop" {
                SliverState::Stopped
            } else {
                SliverState::Starting
            };
            shared.move_to(vm_id, state);
            serde_json::to_value(Done {})
        }
        "destroy" => {
            let request: RcapRequest = serde_json::from_slice(body).unwrap();
            let vm_id = of(&nm, &request.rcap)?;
            drop(nm);
            shared.move_to(vm_id, SliverState::Gone);
            let mut nm = shared.nm.lock().unwrap();
            nm.destroyed += 1;
            nm.slivers.retain(|sliver| sliver.event.vm_id != vm_id);
            let dead: Vec<_> = nm
                .bound
                .iter()
                .filter(|(_, vm)| **vm == vm_id)
                .map(|(hex, _)| hex.clone())
                .collect();
            for hex in dead {
                nm.pools.remove(&hex);
            }
            serde_json::to_value(Done {})
        }
        other => {
            return Err(ErrorBody::new(
                ErrorKind::BadRequest,
                format!("no operation {other}"),
            ));
        }
    };
    Ok(answer.unwrap())
}

/// Makes the slice's sliver, or adds to the one that is there.
fn bind(nm: &mut NmState, request: &Bind) -> u32 {
    let hex = request.rcap.to_hex();
    let pool = nm.pools[&hex].clone();
    if let Some(sliver) = nm
        .slivers
        .iter_mut()
        .find(|sliver| sliver.account == request.slice_name)
    {
        sliver.rspec.add(&pool).unwrap();
        let vm_id = sliver.event.vm_id;
        nm.bound.insert(hex, vm_id);
        return vm_id;
    }
    let vm_id = u32::from(nm.pools_made);
    nm.bound.insert(hex, vm_id);
    let event = SliverEvent {
        seq: 0,
        vm_id,
        slice: format!("plc.{}", request.slice_name),
        vm_type: "kvm-microvm".into(),
        state: SliverState::Defined,
        reason: None,
        class: None,
        initscript: Initscript::None,
        address: Some([10, 128, 0, 5].into()),
        ssh_host_keys: vec![],
        phases_us: Default::default(),
        unix_ns: 0,
    };
    let account = request.slice_name.clone();
    nm.slivers.push(SliverInfo {
        parent: None,
        rcap: request.rcap.clone(),
        rspec: pool,
        account,
        event,
    });
    vm_id
}
