//! The interface: HTTP on the owner's socket, the services' socket and the slivers' streams. Its methods are
//! those of [`crate::methods`], as JSON and, at `/RPC2`, as XML-RPC ([`crate::xmlrpc`]).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::serve::IncomingStream;
use futures_util::{Stream, StreamExt, stream};
use mandoline_api::nodemgr::{
    Done, ErrorAnswer, ErrorBody, ErrorKind, IDEMPOTENCY_KEY, TAIL_MAX, Tail, VmId,
};
use mandoline_rspec::SliceId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::net::UnixListener;
use tokio_stream::wrappers::BroadcastStream;

use crate::accounts;
use crate::caller::Caller;
use crate::core::Core;
use crate::events::Told;
use crate::methods::{self, Fields, METHODS, bad};
use crate::ops::OpResult;
use crate::sensors::{METRICS_TYPE, PublishError, metrics};
use crate::services::Streams;
use crate::usage::Meter;
use crate::xmlrpc;

/// Largest request, in bytes: an rspec with a boot script and a thousand keys fits.
const MAX_REQUEST: usize = 4 << 20;
/// A comment line this often keeps an event stream's readers sure that it lives.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Which socket a request came in on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The owner's.
    Owner,
    /// The services'.
    Service,
}

#[derive(Clone)]
struct App {
    core: Arc<Core>,
    meter: Arc<Meter>,
    channel: Channel,
}

impl App {
    fn new(meter: Arc<Meter>, channel: Channel) -> Self {
        let core = Arc::clone(&meter.core);
        Self { core, meter, channel }
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
enum Peer {
    /// A process of this user, as the kernel says.
    Uid(Option<u32>),
    /// The sliver of this slice: the stream came on its own channel.
    Sliver(SliceId),
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::Uid(stream.io().peer_cred().ok().map(|peer| peer.uid()))
    }
}

impl Connected<IncomingStream<'_, Streams>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Streams>) -> Self {
        Self::Sliver(stream.remote_addr().slice.clone())
    }
}

/// Serves a socket until `until` is done; requests in progress are then finished.
pub async fn serve(
    meter: Arc<Meter>,
    listener: UnixListener,
    channel: Channel,
    until: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let app = router(App::new(meter, channel));
    axum::serve(listener, app.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(until)
        .await
}

/// Serves the streams on which slivers ask for the node manager.
pub async fn serve_slivers(meter: Arc<Meter>, streams: Streams) -> std::io::Result<()> {
    let app = router(App::new(meter, Channel::Service));
    axum::serve(streams, app.into_make_service_with_connect_info::<Peer>()).await
}

fn router(app: App) -> Router {
    Router::new()
        .route("/RPC2", post(xml_rpc))
        .route("/v1/node", get(node))
        .route("/v1/events", get(events))
        .route("/v1/ssh_keys/{account}", get(ssh_keys))
        .route("/v1/usage", get(usage))
        .route("/v1/slivers/{vm_id}/{what}", get(tail))
        .route("/v1/sensors/{name}", put(publish))
        .route("/metrics", get(all_metrics))
        .route("/v1/{operation}", post(operation))
        .fallback(|| async {
            let error = ErrorBody::new(ErrorKind::NotFound, "no such resource").allowed(
                "POST /RPC2 (XML-RPC), POST /v1/<operation>, PUT /v1/sensors/<name>, GET /metrics, /v1/node, \
                 /v1/events, /v1/usage, /v1/slivers/<vm_id>/console, /v1/slivers/<vm_id>/log, \
                 /v1/ssh_keys/<account>",
            );
            Refusal(error).into_response()
        })
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(app)
}

impl App {
    fn caller(&self, peer: &Peer) -> Caller {
        match (self.channel, peer) {
            // The socket's mode already keeps others out; its peers are the owner whatever their uid.
            (Channel::Owner, _) => Caller::Owner,
            (Channel::Service, Peer::Uid(Some(uid))) => self.core.rules.services.caller(*uid),
            (Channel::Service, Peer::Uid(None)) => Caller::Stranger(u32::MAX),
            (Channel::Service, Peer::Sliver(slice)) => Caller::Slice(slice.clone()),
        }
    }
}

struct Refusal(ErrorBody);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(ErrorAnswer { error: self.0 })).into_response()
    }
}

async fn operation(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(name): Path<String>,
    request: Request,
) -> Response {
    let caller = app.caller(&peer);
    match perform(&app, &caller, &name, request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            log_refusal(&caller, &name, &error);
            Refusal(error).into_response()
        }
    }
}

/// Values may be rcaps; message and kind are not.
pub(crate) fn log_refusal(caller: &Caller, operation: &str, error: &ErrorBody) {
    tracing::info!(%caller, operation, kind = ?error.kind, message = error.message, "refused");
}

async fn perform(app: &App, caller: &Caller, name: &str, request: Request) -> OpResult<Value> {
    let key = idempotency_key(&request)?;
    let fields = Fields::new(body(request.into_body()).await?)?;
    let Some(method) = methods::find(name) else {
        let known: Vec<_> = METHODS.iter().map(|method| method.name).collect();
        let error = ErrorBody::new(ErrorKind::NotFound, format!("no operation `{name}`"));
        return Err(error.allowed(known.join(", ")));
    };
    methods::call(&app.core, caller, method, fields, key)
        .await?
        .json()
}

async fn xml_rpc(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: axum::body::Bytes,
) -> Response {
    let answer = xmlrpc::answer(&app.core, &app.caller(&peer), &body).await;
    (
        [(header::CONTENT_TYPE, mandoline_api::xmlrpc::CONTENT_TYPE)],
        answer,
    )
        .into_response()
}

fn json<T: Serialize>(answer: T) -> Response {
    Json(answer).into_response()
}

async fn body(body: Body) -> OpResult<Value> {
    let bytes = to_bytes(body, MAX_REQUEST)
        .await
        .map_err(|_| bad("the request cannot be read").allowed(format!("at most {MAX_REQUEST} bytes")))?;
    if bytes.is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    serde_json::from_slice(&bytes).map_err(|error| bad(format!("the request is not JSON: {error}")))
}

fn idempotency_key(request: &Request) -> OpResult<Option<String>> {
    let value = request.headers().get(IDEMPOTENCY_KEY);
    // What is no text is no key either.
    value
        .map(|value| methods::check_key(value.to_str().unwrap_or("")))
        .transpose()
}

async fn node(State(app): State<App>) -> Response {
    json(app.core.node())
}

async fn usage(State(app): State<App>, ConnectInfo(peer): ConnectInfo<Peer>) -> Response {
    match app.meter.usage(&app.caller(&peer)).await {
        Ok(usage) => json(usage),
        Err(error) => Refusal(error).into_response(),
    }
}

async fn all_metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics(&app.meter).await).into_response()
}

#[derive(Deserialize)]
struct From {
    from: Option<u64>,
}

/// A sliver's console, for who may see the sliver, or its monitor's log, for the owner.
async fn tail(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path((vm_id, what)): Path<(VmId, String)>,
    Query(From { from }): Query<From>,
) -> Response {
    let caller = app.caller(&peer);
    let read = || -> OpResult<Tail> {
        let file = match what.as_str() {
            "console" => "console",
            "log" if caller == Caller::Owner => "monitor.log",
            "log" => {
                return Err(
                    ErrorBody::new(ErrorKind::Forbidden, "the monitor's log is the owner's")
                        .allowed("console"),
                );
            }
            _ => {
                return Err(
                    ErrorBody::new(ErrorKind::NotFound, format!("no such file {what:?}"))
                        .allowed("console, log"),
                );
            }
        };
        let seen = app.core.list(&caller)?.slivers;
        if !seen.iter().any(|sliver| sliver.event.vm_id == vm_id) {
            return Err(ErrorBody::new(
                ErrorKind::NotFound,
                format!("the caller has no sliver {vm_id}"),
            ));
        }
        let path = app.meter.logs.join(vm_id.to_string()).join(file);
        read_tail(&path, from).map_err(|error| {
            ErrorBody::new(
                ErrorKind::NotFound,
                format!("sliver {vm_id} has written nothing: {error}"),
            )
        })
    };
    match read() {
        Ok(tail) => json(tail),
        Err(error) => Refusal(error).into_response(),
    }
}

/// What stands in a file from a place on; from its last part, if no place is named or the file was cut since.
fn read_tail(path: &std::path::Path, from: Option<u64>) -> std::io::Result<Tail> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let start = from
        .filter(|from| *from <= length)
        .unwrap_or_else(|| length.saturating_sub(TAIL_MAX));
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(TAIL_MAX).read_to_end(&mut bytes)?;
    Ok(Tail {
        next: start + bytes.len() as u64,
        text: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// A service of the host, or the owner, publishes a sensor. Slivers cannot: who reads a sensor trusts the node.
async fn publish(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(name): Path<String>,
    table: String,
) -> Response {
    let caller = app.caller(&peer);
    if matches!(peer, Peer::Sliver(_)) || matches!(caller, Caller::Stranger(_)) {
        let error = ErrorBody::new(ErrorKind::Forbidden, format!("{caller} may not publish sensors"));
        return Refusal(error.allowed("the owner, and services of the host")).into_response();
    }
    let meter = Arc::clone(&app.meter);
    let published = tokio::task::spawn_blocking(move || meter.published.publish(&name, &table)).await;
    match published {
        Ok(Ok(())) => json(Done {}),
        Ok(Err(error @ PublishError::File { .. })) => {
            tracing::error!(%error, "sensor not published");
            Refusal(ErrorBody::new(
                ErrorKind::Internal,
                "the sensor cannot be kept; the log says why",
            ))
            .into_response()
        }
        Ok(Err(error)) => Refusal(bad(error.to_string())).into_response(),
        Err(error) => Refusal(ErrorBody::new(ErrorKind::Internal, error.to_string())).into_response(),
    }
}

#[derive(Deserialize)]
struct Since {
    since: Option<u64>,
}

async fn events(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Query(Since { since }): Query<Since>,
) -> Response {
    let caller = app.caller(&peer);
    if let Caller::Stranger(uid) = caller {
        let message = format!("uid {uid} is no service of this node");
        return Refusal(ErrorBody::new(ErrorKind::Forbidden, message)).into_response();
    }
    let (past, receiver) = app.core.events.subscribe(since);
    let present = BroadcastStream::new(receiver)
        // A reader that was too slow has missed events: its stream ends, and it asks again with `since`.
        .take_while(|told| std::future::ready(told.is_ok()))
        .filter_map(|told| std::future::ready(told.ok()));
    let sees = move |told: &Told| match &caller {
        Caller::Slice(slice) => told.audience.contains(slice),
        _ => true,
    };
    let stream = stream::iter(past)
        .chain(present)
        .filter(move |told| std::future::ready(sees(told)));
    Sse::new(as_sse(stream))
        .keep_alive(KeepAlive::new().interval(HEARTBEAT))
        .into_response()
}

fn as_sse(events: impl Stream<Item = Told>) -> impl Stream<Item = Result<Event, Infallible>> {
    events.filter_map(|told| {
        let event = Event::default()
            .event("sliver")
            .id(told.event.seq.to_string())
            .json_data(&told.event);
        std::future::ready(event.ok().map(Ok))
    })
}

async fn ssh_keys(State(app): State<App>, Path(account): Path<String>) -> Response {
    let specs = app.core.specs();
    let found = specs
        .iter()
        .filter(|spec| spec.account == account)
        .max_by_key(|spec| spec.vm_id);
    let text = found.and_then(|spec| {
        let backend = app.core.registry.get(&app.core.sliver(spec.vm_id)?.vm_type)?;
        Some(accounts::authorized_keys(spec, backend.address(spec)?))
    });
    match text {
        Some(text) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response(),
        None => Refusal(ErrorBody::new(
            ErrorKind::NotFound,
            "no sliver of this node has this account",
        ))
        .into_response(),
    }
}
