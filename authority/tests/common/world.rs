//! An authority with an administrator and a site, and nodes that sign their calls.

#![allow(dead_code, reason = "each test program uses its part")]

use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer, SigningKey};
use hmac::{Hmac, KeyInit, Mac};
use mandoline_api::authority::{
    DesiredSlivers, ErrorKind, NewNode, NewSession, NewSite, NodeAuthAlgorithm, NodeAuthorization,
    NodeRegistration, RspecObject, Session, Sliver, SliverReport, SliverState, SshEndpoint, VmType,
    signing_string,
};
use mandoline_authority::db::Db;
use mandoline_authority::domain::persons::{self, NewPerson as Admin};
use mandoline_authority::domain::{Caller, Role};
use mandoline_authority::service::{Config, Service};
use mandoline_authority::{in_write, server};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(crate) const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";
pub(crate) const SECRET: &str = "a long test password";

/// An answer: status and body.
pub(crate) struct Answer(pub(crate) u16, pub(crate) Vec<u8>);

impl Answer {
    pub(crate) fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.1)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.1)))
    }

    pub(crate) fn kind(&self) -> ErrorKind {
        self.json::<mandoline_api::authority::ErrorBody>().error.kind
    }
}

pub(crate) struct World {
    pub(crate) addr: SocketAddr,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) token: String,
    pub(crate) db: Db,
}

/// One plain HTTP/1.1 request on a connection of its own.
pub(crate) async fn http(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &[u8],
) -> Answer {
    let mut stream = open(addr, method, path, headers, body, "close").await;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer(status, bytes[end + 4..].to_vec())
}

pub(crate) async fn open(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &[u8],
    keep: &str,
) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: {keep}\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream
}

impl World {
    pub(crate) async fn new(url: &str) -> Self {
        let db = Db::open(url).await.unwrap();
        let (stop, stopping) = watch::channel(false);
        let service = Service::start(db.clone(), Config::default(), stopping.clone())
            .await
            .unwrap();
        let admin = Admin {
            first_name: "A".into(),
            last_name: "B".into(),
            email: "admin@example.org".into(),
            password_hash: Some(service.hasher.hash(SECRET).await.unwrap()),
            enabled: true,
            roles: vec![Role::Admin],
            ..Admin::default()
        };
        in_write!(db, |c| persons::add(c, &Caller::authority(), &admin).await).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(server::serve(listener, Arc::clone(&service), stopping));
        let mut world = Self {
            addr,
            stop,
            token: String::new(),
            db,
        };
        world.token = world.sign_in("admin@example.org").await;
        let site = NewSite {
            name: "Example".into(),
            login_base: "example".into(),
            ..Default::default()
        };
        assert_eq!(world.call("POST", "/v1/sites", &site).await.0, 201);
        world
    }

    pub(crate) async fn sign_in(&self, email: &str) -> String {
        let body = serde_json::to_vec(&NewSession {
            email: email.into(),
            password: SECRET.into(),
        })
        .unwrap();
        http(self.addr, "POST", "/v1/sessions", &[], &body)
            .await
            .json::<Session>()
            .token
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &impl Serialize) -> Answer {
        self.call_as(&self.token, method, path, body).await
    }

    pub(crate) async fn call_as(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Answer {
        let headers = [("authorization", format!("Bearer {token}"))];
        http(
            self.addr,
            method,
            path,
            &headers,
            &serde_json::to_vec(body).unwrap(),
        )
        .await
    }

    pub(crate) async fn node(&self, hostname: &str) -> TestNode {
        let new = NewNode {
            hostname: hostname.into(),
            site: "example".into(),
            boot_state: None,
        };
        let added = self.call("POST", "/v1/nodes", &new).await;
        assert_eq!(added.0, 201, "{}", String::from_utf8_lossy(&added.1));
        let added: Json = added.json();
        TestNode {
            addr: self.addr,
            id: added["node"]["id"].as_i64().unwrap(),
            node_key: added["node_key"].as_str().unwrap().to_owned(),
            key: SigningKey::from_bytes(&[7; 32]),
        }
    }

    pub(crate) async fn slivers(&self, slice: &str) -> Vec<Sliver> {
        self.call("GET", &format!("/v1/slices/{slice}/slivers"), &())
            .await
            .json()
    }
}

pub(crate) struct TestNode {
    pub(crate) addr: SocketAddr,
    pub(crate) id: i64,
    pub(crate) node_key: String,
    pub(crate) key: SigningKey,
}

impl TestNode {
    pub(crate) fn sign(
        &self,
        algorithm: NodeAuthAlgorithm,
        method: &str,
        path: &str,
        body: &[u8],
        age_s: u64,
    ) -> NodeAuthorization {
        let mut nonce = [0u8; 16];
        getrandom::fill(&mut nonce).unwrap();
        let nonce = hex::encode(nonce);
        let timestamp = jiff::Timestamp::now().as_second() as u64 - age_s;
        let text = signing_string(
            method,
            path,
            timestamp,
            &nonce,
            &hex::encode(Sha256::digest(body)),
        );
        let signature = match algorithm {
            NodeAuthAlgorithm::Ed25519 => self.key.sign(text.as_bytes()).to_bytes().to_vec(),
            NodeAuthAlgorithm::HmacSha256 => {
                let mut mac = Hmac::<Sha256>::new_from_slice(self.node_key.as_bytes()).unwrap();
                mac.update(text.as_bytes());
                mac.finalize().into_bytes().to_vec()
            }
        };
        NodeAuthorization {
            node_id: self.id,
            timestamp,
            nonce,
            algorithm,
            signature: STANDARD.encode(signature),
        }
    }

    pub(crate) async fn send(
        &self,
        authorization: &NodeAuthorization,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Answer {
        http(
            self.addr,
            method,
            path,
            &[("authorization", authorization.to_string())],
            body,
        )
        .await
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &impl Serialize) -> Answer {
        let body = serde_json::to_vec(body).unwrap();
        let algorithm = match path {
            "/v1/node/register" => NodeAuthAlgorithm::HmacSha256,
            _ => NodeAuthAlgorithm::Ed25519,
        };
        let authorization = self.sign(algorithm, method, path, &body, 0);
        self.send(&authorization, method, path, &body).await
    }

    pub(crate) fn registration(&self, vm_types: &[&str]) -> NodeRegistration {
        NodeRegistration {
            ed25519_public_key: STANDARD.encode(self.key.verifying_key().as_bytes()),
            ssh_host_keys: vec![format!("{KEY} root@node")],
            ssh_endpoint: Some(SshEndpoint {
                host: "127.0.0.1".into(),
                port: 2222,
            }),
            vm_types: vm_types
                .iter()
                .map(|name| VmType {
                    name: (*name).into(),
                    capabilities: vec![],
                })
                .collect(),
            attribute_table_version: 1,
            capacity: json!({"mem_limit": "1 GiB"}).as_object().unwrap().clone(),
        }
    }

    pub(crate) async fn register(&self, vm_types: &[&str]) -> Answer {
        self.call("POST", "/v1/node/register", &self.registration(vm_types))
            .await
    }

    pub(crate) async fn desired(&self) -> DesiredSlivers {
        self.call("GET", "/v1/node/slivers", &()).await.json()
    }
}

pub(crate) fn report(slice: &str, uuid: Option<&str>, seq: u64, state: SliverState) -> SliverReport {
    SliverReport {
        slice: slice.into(),
        slice_id: uuid.map(str::to_owned),
        seq,
        vm_id: Some("vm-1".into()),
        state,
        reason: None,
        class: None,
        initscript: None,
        address: None,
        ssh_host_keys: None,
        phases_us: Default::default(),
    }
}

pub(crate) fn rspec(json: Json) -> RspecObject {
    json.as_object().unwrap().clone()
}
