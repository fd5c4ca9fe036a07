//! An authority on loopback and a node manager on a Unix socket, as far as the service calls them.

mod nm;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, VerifyingKey};
use futures_util::StreamExt;
use hmac::{Hmac, KeyInit, Mac};
use mandoline_api::authority::{
    DesiredSliver, DesiredSlivers, KnownNode, NodeAuthAlgorithm, NodeAuthorization, NodeRegistered,
    NodeRegistration, NodeStatus, SliverReport, signing_string,
};
use mandoline_api::nodemgr::{SliverEvent, SliverInfo, SliverState};
use mandoline_rspec::Rspec;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, broadcast};
use tokio_stream::wrappers::BroadcastStream;

use crate::scs::Service;
use crate::scs::config::Config;

const NODE_KEY: &str = "c2VjcmV0";

/// What the authority knows, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct AuthorityState {
    pub(super) registered: Option<NodeRegistration>,
    pub(super) desired: Vec<DesiredSliver>,
    pub(super) nodes: Vec<KnownNode>,
    pub(super) reports: Vec<SliverReport>,
    pub(super) listeners: usize,
    pub(super) asked: usize,
    pub(super) refused: usize,
    /// It answers 503 to everything.
    pub(super) down: bool,
    /// What it answers instead of the slivers.
    pub(super) nonsense: Option<String>,
    nonces: Vec<String>,
}

/// What the node manager knows, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct NmState {
    pub(super) slivers: Vec<SliverInfo>,
    pub(super) pools_made: u8,
    /// Sensors that were published, by name.
    pub(super) sensors: std::collections::BTreeMap<String, String>,
    pub(super) destroyed: usize,
    /// Operations whose next answer is lost after the work is done.
    pub(super) lose_answers: Vec<&'static str>,
    /// Why no pool can be split.
    pub(super) refuse_split: Option<String>,
    pools: HashMap<String, Rspec>,
    bound: HashMap<String, u32>,
    answers: HashMap<String, serde_json::Value>,
    events: Vec<SliverEvent>,
}

/// Both, and the service between them.
pub(super) struct Fakes {
    pub(super) authority: Arc<Mutex<AuthorityState>>,
    pub(super) nm: Arc<Mutex<NmState>>,
    pub(super) changed: Arc<Notify>,
    /// `true` tells of a change, `false` cuts the streams.
    tell: broadcast::Sender<bool>,
    nm_events: broadcast::Sender<SliverEvent>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Drop for Fakes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

#[derive(Clone)]
struct Shared {
    authority: Arc<Mutex<AuthorityState>>,
    nm: Arc<Mutex<NmState>>,
    changed: Arc<Notify>,
    tell: broadcast::Sender<bool>,
    nm_events: broadcast::Sender<SliverEvent>,
}

impl Fakes {
    pub(super) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared {
            authority: Arc::default(),
            nm: Arc::default(),
            changed: Arc::default(),
            tell: broadcast::channel(64).0,
            nm_events: broadcast::channel(64).0,
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let socket = dir.path().join("nm.sock");
        let nm_listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let authority = authority_routes(shared.clone());
        let nm = nm::routes(shared.clone());

        let node_file = dir.path().join("pl_node.txt");
        let text = format!(
            "NODE_ID=\"7\"\nNODE_KEY=\"{NODE_KEY}\"\nHOST_NAME=\"n1\"\nPLC_URL=\"http://127.0.0.1:{port}\"\nSSH_ENDPOINT=\"127.0.0.1:2201\"\n"
        );
        std::fs::write(&node_file, text).unwrap();
        let host_key = dir.path().join("host_key.pub");
        std::fs::write(&host_key, "ssh-ed25519 AAAAhost root@n1\n").unwrap();
        let config = Config {
            node_file,
            nm_socket: socket,
            state_dir: dir.path().join("state"),
            ssh_host_keys: vec![host_key, dir.path().join("none.pub")],
            poll_seconds: 3600,
            retry_max_seconds: 1,
        };
        let service = Service::new(config).unwrap();
        let tasks = vec![
            tokio::spawn(async move { axum::serve(listener, authority).await.unwrap() }),
            tokio::spawn(async move { axum::serve(nm_listener, nm).await.unwrap() }),
            tokio::spawn(service.run()),
        ];
        let Shared {
            authority,
            nm,
            changed,
            tell,
            nm_events,
        } = shared;
        Self {
            authority,
            nm,
            changed,
            tell,
            nm_events,
            tasks,
            _dir: dir,
        }
    }

    /// The authority wants these from now on, and says so.
    pub(super) fn want<const N: usize>(&self, desired: [DesiredSliver; N]) {
        self.authority.lock().unwrap().desired = desired.into();
        self.tell();
    }

    /// The authority says that something has changed.
    pub(super) fn tell(&self) {
        // Nobody may listen yet: whoever comes later asks anyway.
        let _ = self.tell.send(true);
    }

    /// The authority's event streams break.
    pub(super) fn cut(&self) {
        let _ = self.tell.send(false);
    }

    /// Something happens to a sliver by itself.
    pub(super) fn nm_event(&self, slice: &str, state: SliverState) {
        let shared = Shared {
            authority: self.authority.clone(),
            nm: self.nm.clone(),
            changed: self.changed.clone(),
            tell: self.tell.clone(),
            nm_events: self.nm_events.clone(),
        };
        let vm_id = {
            let nm = self.nm.lock().unwrap();
            nm.slivers
                .iter()
                .find(|sliver| sliver.account == slice)
                .unwrap()
                .event
                .vm_id
        };
        shared.move_to(vm_id, state);
    }
}

impl Shared {
    fn move_to(&self, vm_id: u32, state: SliverState) {
        let event = {
            let mut nm = self.nm.lock().unwrap();
            let seq = nm.events.len() as u64 + 1;
            let sliver = nm
                .slivers
                .iter_mut()
                .find(|sliver| sliver.event.vm_id == vm_id)
                .unwrap();
            sliver.event.seq = seq;
            sliver.event.state = state;
            let event = sliver.event.clone();
            nm.events.push(event.clone());
            event
        };
        let _ = self.nm_events.send(event);
        self.changed.notify_waiters();
    }
}

fn authority_routes(shared: Shared) -> Router {
    Router::new()
        .route("/v1/node/register", post(register))
        .route("/v1/node/slivers", get(desired))
        .route("/v1/node/events", get(authority_events))
        .route("/v1/node/status", post(status))
        .layer(axum::middleware::from_fn_with_state(shared.clone(), check))
        .with_state(shared)
}

/// Verifies the signature as the contract says, and is away when it is to be.
async fn check(State(shared): State<Shared>, request: Request, next: axum::middleware::Next) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let refusal = {
        let mut authority = shared.authority.lock().unwrap();
        let path = parts.uri.path_and_query().unwrap().as_str();
        let header = parts.headers["authorization"].to_str().unwrap();
        match authority.down {
            true => Some((StatusCode::SERVICE_UNAVAILABLE, "away")),
            false => match verify(&mut authority, parts.method.as_str(), path, header, &body) {
                true => None,
                false => Some((StatusCode::UNAUTHORIZED, "not known")),
            },
        }
        .inspect(|_| authority.refused += 1)
    };
    shared.changed.notify_waiters();
    match refusal {
        None => next.run(Request::from_parts(parts, body.into())).await,
        Some((status, message)) => {
            let kind = if status == 401 {
                "unauthenticated"
            } else {
                "unavailable"
            };
            (
                status,
                axum::Json(json!({"error": {"kind": kind, "message": message}})),
            )
                .into_response()
        }
    }
}

fn verify(authority: &mut AuthorityState, method: &str, path: &str, header: &str, body: &[u8]) -> bool {
    let header: NodeAuthorization = header.parse().unwrap();
    assert_eq!(header.node_id, 7);
    assert!(!authority.nonces.contains(&header.nonce), "a nonce came twice");
    authority.nonces.push(header.nonce.clone());
    let text = signing_string(
        method,
        path,
        header.timestamp,
        &header.nonce,
        &hex::encode(Sha256::digest(body)),
    );
    let signature = BASE64.decode(&header.signature).unwrap();
    match (
        header.algorithm,
        path.ends_with("/register"),
        &authority.registered,
    ) {
        (NodeAuthAlgorithm::HmacSha256, true, _) => {
            let mut mac = Hmac::<Sha256>::new_from_slice(NODE_KEY.as_bytes()).unwrap();
            mac.update(text.as_bytes());
            mac.verify_slice(&signature).is_ok()
        }
        (NodeAuthAlgorithm::Ed25519, false, Some(registration)) => {
            let key = BASE64.decode(&registration.ed25519_public_key).unwrap();
            let key = VerifyingKey::from_bytes(key.as_slice().try_into().unwrap()).unwrap();
            let signature = Signature::from_slice(&signature).unwrap();
            key.verify_strict(text.as_bytes(), &signature).is_ok()
        }
        _ => false,
    }
}

async fn register(State(shared): State<Shared>, body: Bytes) -> Response {
    shared.authority.lock().unwrap().registered = Some(serde_json::from_slice(&body).unwrap());
    shared.changed.notify_waiters();
    let answer = NodeRegistered {
        node_id: 7,
        uuid: "u".into(),
        hostname: "n1".into(),
        boot_state: "boot".into(),
    };
    axum::Json(answer).into_response()
}

async fn desired(State(shared): State<Shared>) -> Response {
    let answer = {
        let mut authority = shared.authority.lock().unwrap();
        authority.asked += 1;
        match &authority.nonsense {
            Some(text) => text.clone().into_response(),
            None => axum::Json(DesiredSlivers {
                revision: authority.asked.to_string(),
                time: 0,
                slivers: authority.desired.clone(),
                nodes: authority.nodes.clone(),
            })
            .into_response(),
        }
    };
    shared.changed.notify_waiters();
    answer
}

async fn authority_events(State(shared): State<Shared>) -> impl IntoResponse {
    let told = BroadcastStream::new(shared.tell.subscribe());
    shared.authority.lock().unwrap().listeners += 1;
    shared.changed.notify_waiters();
    let events = told
        .take_while(|told| std::future::ready(matches!(told, Ok(true))))
        .map(|_| Ok::<_, std::convert::Infallible>(Event::default().event("slivers").data("{\"seq\":1}")));
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(5)))
}

async fn status(State(shared): State<Shared>, body: Bytes) -> Response {
    let status: NodeStatus = serde_json::from_slice(&body).unwrap();
    shared.authority.lock().unwrap().reports.extend(status.slivers);
    shared.changed.notify_waiters();
    StatusCode::NO_CONTENT.into_response()
}
