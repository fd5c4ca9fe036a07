//! The client of the authority's REST interface: what the command line and the slice creation service
//! call it with.
//!
//! This module is the way there and back (who calls, what went wrong, event streams); `people` has the
//! calls of users, `node` those of nodes.

mod node;
mod people;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, StatusCode, Url, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::authority::{ApiError, ErrorBody, ErrorKind, HEARTBEAT_S};
use crate::sse::{Decoder, Event, SseError};

/// How long a call may take from its start to the end of its answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long it may take to reach the authority.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An event stream that is silent for three heartbeats is taken for dead.
const STREAM_SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT_S);

/// The longest answer that is taken in, bytes.
const MAX_ANSWER: usize = 64 << 20;

/// What signs a node's calls.
pub trait Sign: Send + Sync {
    /// The `Authorization` header for this call; `path` includes the query.
    fn authorization(&self, method: &str, path: &str, body: &[u8]) -> String;
}

/// Who calls.
#[derive(Clone)]
pub enum Caller {
    /// Nobody yet: for logging in.
    Anonymous,
    /// A person with the token of a session.
    Bearer(String),
    /// A node.
    Node(Arc<dyn Sign>),
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Bearer(_) => "Bearer(..)",
            Self::Node(_) => "Node(..)",
        })
    }
}

/// What can go wrong between a caller and the authority.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("authority {url:?} is not an address: {why}; allowed: http://HOST[:PORT] or https://HOST[:PORT]")]
    BadUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// No answer: not running, not reachable, cut off.
    #[error("the authority at {base} does not answer: {why}")]
    Unavailable {
        /// Its address.
        base: String,
        /// What the network said.
        why: String,
    },
    /// An answer that says no.
    #[error("{error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the authority said.
        error: Box<ApiError>,
    },
    /// An answer that cannot be understood.
    #[error("the authority at {base} gave an answer to {call} that cannot be understood: {why}")]
    BadAnswer {
        /// Its address.
        base: String,
        /// Method and path.
        call: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What a caller can do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The same call may succeed later.
    Retryable,
    /// Not without different arguments or rights.
    Fatal,
    /// The thing is not there.
    NotFound,
    /// The caller may not, or is not known.
    Forbidden,
}

impl ClientError {
    /// What can be done about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::BadUrl { .. } => ErrorClass::Fatal,
            Self::Unavailable { .. } | Self::BadAnswer { .. } => ErrorClass::Retryable,
            Self::Refused { status, .. } => match status {
                401 | 403 => ErrorClass::Forbidden,
                404 | 410 => ErrorClass::NotFound,
                408 | 425 | 429 | 500..=599 => ErrorClass::Retryable,
                _ => ErrorClass::Fatal,
            },
        }
    }
}

/// A client of one authority.
#[derive(Debug, Clone)]
pub struct AuthorityClient {
    http: reqwest::Client,
    base: Url,
    caller: Caller,
}

impl AuthorityClient {
    /// A client of the authority at `base` (`http://HOST[:PORT]`), calling as `caller`. Connects at the first call.
    pub fn new(base: &str, caller: Caller) -> Result<Self, ClientError> {
        let bad = |why: String| ClientError::BadUrl {
            url: base.to_owned(),
            why,
        };
        let url = Url::parse(base).map_err(|e| bad(e.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad("it names no web server".into()));
        }
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(bad("credentials and queries do not belong there".into()));
        }
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("mandoline/", env!("CARGO_PKG_VERSION")));
        if url.scheme() == "http" {
            // Nothing to verify: a node without certificate bundle must get by, and need not spend time on reading one.
            builder = builder.tls_certs_only(std::iter::empty());
        }
        if is_loopback(&url) {
            // A proxy in the environment could not reach this machine's loopback.
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|e| bad(innermost(&e)))?;
        Ok(Self {
            http,
            base: url,
            caller,
        })
    }

    /// The same authority, called by somebody else.
    pub fn with_caller(&self, caller: Caller) -> Self {
        Self {
            http: self.http.clone(),
            base: self.base.clone(),
            caller,
        }
    }

    /// The authority's address, without a slash at its end.
    pub fn base(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// `GET`s JSON.
    pub async fn get<A: DeserializeOwned>(&self, path: &[&str]) -> Result<A, ClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// `POST`s JSON and takes JSON back.
    pub async fn post<B: Serialize + ?Sized, A: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &B,
    ) -> Result<A, ClientError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `DELETE`s, with a body where the call takes one.
    pub async fn delete<B: Serialize + ?Sized>(
        &self,
        path: &[&str],
        body: Option<&B>,
    ) -> Result<(), ClientError> {
        self.call::<B, serde_json::Value>(Method::DELETE, path, body)
            .await
            .map(drop)
    }

    /// Any call with JSON there and back; an empty answer reads as `null`.
    pub async fn call<B: Serialize + ?Sized, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&B>,
    ) -> Result<A, ClientError> {
        let url = self.url(path)?;
        let call = format!("{method} {}", url.path());
        let body = match body {
            None => None,
            Some(body) => Some(
                serde_json::to_vec(body).map_err(|e| self.bad_answer(&call, format!("own request: {e}")))?,
            ),
        };
        let answer = self
            .send(method, url, body, Some(CALL_TIMEOUT))
            .await?
            .error_for_refusal(self, &call)
            .await?;
        let bytes = self.whole_body(answer, &call).await?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|e| self.bad_answer(&call, e.to_string()))
    }

    /// Opens an event stream.
    pub async fn stream(&self, path: &[&str], query: &[(&str, &str)]) -> Result<EventStream, ClientError> {
        let mut url = self.url(path)?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let call = format!("GET {}", url.path());
        let request = self
            .request(Method::GET, url, None)
            .header(header::ACCEPT, "text/event-stream");
        let answer = request
            .send()
            .await
            .map_err(|e| self.unavailable(&e))?
            .error_for_refusal(self, &call)
            .await?;
        let kind = answer
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        if !kind.starts_with("text/event-stream") {
            return Err(self.bad_answer(&call, format!("content type {kind:?}; wanted text/event-stream")));
        }
        Ok(EventStream {
            client: self.clone(),
            call,
            answer,
            decoder: Decoder::new(),
            ready: VecDeque::new(),
        })
    }

    fn url(&self, path: &[&str]) -> Result<Url, ClientError> {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .map_err(|()| ClientError::BadUrl {
                url: self.base.to_string(),
                why: "it takes no path".into(),
            })?
            .pop_if_empty()
            .extend(path);
        Ok(url)
    }

    fn request(&self, method: Method, url: Url, body: Option<Vec<u8>>) -> reqwest::RequestBuilder {
        let path = match url.query() {
            None => url.path().to_owned(),
            Some(query) => format!("{}?{query}", url.path()),
        };
        let mut request = self.http.request(method.clone(), url);
        request = match &self.caller {
            Caller::Anonymous => request,
            Caller::Bearer(token) => request.bearer_auth(token),
            Caller::Node(sign) => {
                let line = sign.authorization(method.as_str(), &path, body.as_deref().unwrap_or_default());
                request.header(header::AUTHORIZATION, line)
            }
        };
        match body {
            None => request,
            Some(body) => request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body),
        }
    }

    async fn send(
        &self,
        method: Method,
        url: Url,
        body: Option<Vec<u8>>,
        timeout: Option<Duration>,
    ) -> Result<reqwest::Response, ClientError> {
        let mut request = self.request(method, url, body);
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        request.send().await.map_err(|e| self.unavailable(&e))
    }

    async fn whole_body(&self, mut answer: reqwest::Response, call: &str) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|e| self.unavailable(&e))? {
            if bytes.len() + chunk.len() > MAX_ANSWER {
                return Err(self.bad_answer(call, format!("longer than {MAX_ANSWER} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn unavailable(&self, error: &reqwest::Error) -> ClientError {
        ClientError::Unavailable {
            base: self.base().to_owned(),
            why: innermost(error),
        }
    }

    fn bad_answer(&self, call: &str, why: String) -> ClientError {
        ClientError::BadAnswer {
            base: self.base().to_owned(),
            call: call.to_owned(),
            why,
        }
    }
}

/// Turns an answer that says no into an error.
trait Refusal: Sized {
    async fn error_for_refusal(self, client: &AuthorityClient, call: &str) -> Result<Self, ClientError>;
}

impl Refusal for reqwest::Response {
    async fn error_for_refusal(self, client: &AuthorityClient, call: &str) -> Result<Self, ClientError> {
        let status = self.status();
        if status.is_success() {
            return Ok(self);
        }
        let bytes = client.whole_body(self, call).await?;
        let error = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body.error,
            // A proxy, or something else that is no authority.
            Err(_) => ApiError {
                kind: kind_of(status),
                message: format!(
                    "{call}: {} answered {status}, without a word that an authority would say",
                    client.base()
                ),
                attribute: None,
                value: None,
                allowed: None,
                node: None,
            },
        };
        Err(ClientError::Refused {
            status: status.as_u16(),
            error: Box::new(error),
        })
    }
}

fn kind_of(status: StatusCode) -> ErrorKind {
    match status.as_u16() {
        401 => ErrorKind::Unauthenticated,
        403 => ErrorKind::Forbidden,
        404 => ErrorKind::NotFound,
        429 | 502 | 503 | 504 => ErrorKind::Unavailable,
        500..=599 => ErrorKind::Internal,
        _ => ErrorKind::Other,
    }
}

/// The events of a stream that is open.
#[derive(Debug)]
pub struct EventStream {
    client: AuthorityClient,
    call: String,
    answer: reqwest::Response,
    decoder: Decoder,
    ready: VecDeque<Event>,
}

impl EventStream {
    /// The next event; `None` when the authority has ended the stream. Dropping the future loses nothing
    /// that was not read yet.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let chunk = tokio::time::timeout(STREAM_SILENCE, self.answer.chunk())
                .await
                .map_err(|_| {
                    let why = format!("no heartbeat for {} s", STREAM_SILENCE.as_secs());
                    ClientError::Unavailable {
                        base: self.client.base().to_owned(),
                        why,
                    }
                })?;
            match chunk.map_err(|e| self.client.unavailable(&e))? {
                None => return Ok(None),
                Some(bytes) => {
                    let events = self
                        .decoder
                        .push(&bytes)
                        .map_err(|e: SseError| self.client.bad_answer(&self.call, e.to_string()))?;
                    self.ready.extend(events);
                }
            }
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(|host| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    })
}

/// The cause at the bottom: "connection refused" says more than "error sending request".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
