//! The interface: HTTP and JSON on the owner's socket and the services' socket.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use futures_util::{Stream, StreamExt, stream};
use mandoline_api::nodemgr::{
    BindAnswer, Done, ErrorAnswer, ErrorBody, ErrorKind, IDEMPOTENCY_KEY, RcapAnswer, RcapsAnswer,
};
use mandoline_rspec::{Rcap, Rspec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::net::UnixListener;
use tokio_stream::wrappers::BroadcastStream;

use crate::accounts;
use crate::caller::Caller;
use crate::core::{Core, Key};
use crate::events::Told;
use crate::ops::{OpResult, Operation};
use crate::store::Outcome;

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
    channel: Channel,
}

/// The peer's user id, as the kernel says.
#[derive(Debug, Clone, Copy)]
struct Peer(Option<u32>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().ok().map(|peer| peer.uid()))
    }
}

/// Serves a socket until `until` is done; requests in progress are then finished.
pub async fn serve(
    core: Arc<Core>,
    listener: UnixListener,
    channel: Channel,
    until: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let app = router(App { core, channel });
    axum::serve(listener, app.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(until)
        .await
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/node", get(node))
        .route("/v1/events", get(events))
        .route("/v1/ssh_keys/{account}", get(ssh_keys))
        .route("/v1/{operation}", post(operation))
        .fallback(|| async {
            let error = ErrorBody::new(ErrorKind::NotFound, "no such resource")
                .allowed("POST /v1/<operation>, GET /v1/node, /v1/events, /v1/ssh_keys/<account>");
            Refusal(error).into_response()
        })
        .with_state(app)
}

impl App {
    fn caller(&self, peer: Peer) -> Caller {
        match (self.channel, peer.0) {
            // The socket's mode already keeps others out; its peers are the owner whatever their uid.
            (Channel::Owner, _) => Caller::Owner,
            (Channel::Service, Some(uid)) => self.core.rules.services.caller(uid),
            (Channel::Service, None) => Caller::Stranger(u32::MAX),
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
    let caller = app.caller(peer);
    let answer = perform(&app, caller.clone(), &name, request).await;
    if let Err(Refusal(error)) = &answer {
        // Values may be rcaps; message and kind are not.
        tracing::info!(%caller, operation = name, kind = ?error.kind, message = error.message, "refused");
    }
    answer.into_response()
}

async fn perform(app: &App, caller: Caller, name: &str, request: Request) -> Result<Response, Refusal> {
    let key = idempotency_key(&request).map_err(Refusal)?;
    let body = body(request.into_body()).await.map_err(Refusal)?;
    let mut fields = Fields::new(body).map_err(Refusal)?;
    let digest = fields.digest(name);
    let core = &app.core;
    let query = match name {
        "get_rcap" => Some(
            fields
                .end()
                .and_then(|()| core.oldest_rcap(&caller))
                .map(|rcap| json(RcapAnswer { rcap })),
        ),
        "get_rcaps" => Some(
            fields
                .end()
                .and_then(|()| core.rcaps(&caller))
                .map(|rcaps| json(RcapsAnswer { rcaps })),
        ),
        "list" => Some(fields.end().and_then(|()| core.list(&caller)).map(json)),
        "get_rspec" => Some(fields.rcap().and_then(|rcap| {
            fields.end()?;
            core.rspec(&caller, &rcap).map(json)
        })),
        _ => None,
    };
    if let Some(answer) = query {
        return answer.map_err(Refusal);
    }
    let operation = fields.operation(name).map_err(Refusal)?;
    let key = key.map(|key| Key { key, request: digest });
    let outcome = core
        .execute(caller.clone(), operation, key)
        .await
        .map_err(Refusal)?;
    tracing::info!(%caller, operation = name, ?outcome, "done");
    Ok(match outcome {
        Outcome::Rcap { pool, epoch } => json(RcapAnswer {
            rcap: core.rcap(pool, epoch),
        }),
        Outcome::Vm { vm_id } => json(BindAnswer { vm_id }),
        Outcome::Done => json(Done {}),
    })
}

fn json<T: Serialize>(answer: T) -> Response {
    Json(answer).into_response()
}

fn bad(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorKind::BadRequest, message)
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
    let Some(value) = request.headers().get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=128).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(bad("the idempotency key cannot be used").allowed("1 to 128 printable ASCII characters")),
    }
}

/// A request's fields: each is taken once, and what is left over is refused by name.
struct Fields(Map<String, Value>);

impl Fields {
    fn new(body: Value) -> OpResult<Self> {
        match body {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(bad("the request is no JSON object").allowed("an object with the operation's fields")),
        }
    }

    /// What tells whether a repeated key came with the same request: JSON objects are sorted here.
    fn digest(&self, operation: &str) -> String {
        let text = format!("{operation}\n{}", Value::Object(self.0.clone()));
        hex::encode(Sha256::digest(text.as_bytes()))
    }

    fn operation(&mut self, name: &str) -> OpResult<Operation> {
        let operation = match name {
            "create_root_pool" => Operation::CreateRootPool(self.rspec()?, self.text("slice_name")?),
            "split_pool" => Operation::SplitPool(self.rcap()?, self.rspec()?),
            "acquire" => Operation::Acquire(self.rspec()?),
            "bind" => Operation::Bind(self.rcap()?, self.text("slice_name")?),
            "release" => Operation::Release(self.rcap()?),
            "start" => Operation::Start(self.rcap()?),
            "stop" => Operation::Stop(self.rcap()?),
            "restart" => Operation::Restart(self.rcap()?),
            "destroy" => Operation::Destroy(self.rcap()?),
            _ => {
                let known = "create_root_pool, get_rcap, get_rcaps, get_rspec, split_pool, acquire, bind, release, \
                             start, stop, restart, destroy, list";
                return Err(
                    ErrorBody::new(ErrorKind::NotFound, format!("no operation `{name}`")).allowed(known),
                );
            }
        };
        self.end()?;
        Ok(operation)
    }

    fn take(&mut self, name: &str) -> OpResult<Value> {
        self.0.remove(name).ok_or_else(|| ErrorBody {
            attribute: Some(name.to_owned()),
            ..bad(format!("the request lacks the field `{name}`"))
        })
    }

    fn text(&mut self, name: &str) -> OpResult<String> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            _ => Err(ErrorBody {
                attribute: Some(name.to_owned()),
                ..bad(format!("`{name}` is not text"))
            }),
        }
    }

    fn rcap(&mut self) -> OpResult<Rcap> {
        let text = self.text("rcap")?;
        Rcap::from_hex(&text).map_err(|error| {
            let body = bad(error.to_string()).allowed("32 hexadecimal digits");
            ErrorBody {
                attribute: Some("rcap".to_owned()),
                ..body
            }
        })
    }

    fn rspec(&mut self) -> OpResult<Rspec> {
        Ok(Rspec::from_json(&self.take("rspec")?)?)
    }

    fn end(&self) -> OpResult<()> {
        match self.0.keys().next() {
            Some(name) => Err(ErrorBody {
                attribute: Some(name.clone()),
                ..bad(format!("the operation has no field `{name}`"))
            }),
            None => Ok(()),
        }
    }
}

async fn node(State(app): State<App>) -> Response {
    json(app.core.node())
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
    let caller = app.caller(peer);
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
