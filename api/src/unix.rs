//! An HTTP/1.1 and JSON client over a Unix socket, for callers of the monitor and the node manager.
//!
//! Each request is a connection of its own: the servers are local, a connection costs tens of microseconds,
//! and a server that was restarted is found again without any state here.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;

use crate::sse::{Decoder, Event, SseError};

/// Largest answer that is read, in bytes; an event stream as a whole has no bound.
pub const MAX_ANSWER: usize = 64 << 20;
/// How long a request may take unless [`Client::timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// Nobody listens there, or this user may not connect.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The request could not be made from its parts.
    #[error("cannot make the request: {0}")]
    Request(String),
    /// The connection broke, or what came is no HTTP.
    #[error("{}: {message}", path.display())]
    Http {
        /// The socket.
        path: PathBuf,
        /// What happened.
        message: String,
    },
    /// No answer in time.
    #[error("{} did not answer in {after:?}", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// The event stream cannot be read.
    #[error(transparent)]
    Events(#[from] SseError),
}

/// A server behind a Unix socket.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Client {
    /// A client for the server that listens on `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// The same with another bound on how long a request may take.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// `GET`.
    pub async fn get(&self, target: &str) -> Result<Answer, UnixError> {
        self.request(Method::GET, target, None::<&()>, &[]).await
    }

    /// `POST` with a JSON body and further headers.
    pub async fn post<T: Serialize>(
        &self,
        target: &str,
        body: &T,
        headers: &[(&str, &str)],
    ) -> Result<Answer, UnixError> {
        self.request(Method::POST, target, Some(body), headers).await
    }

    /// `PUT` of plain text.
    pub async fn put_text(&self, target: &str, text: String) -> Result<Answer, UnixError> {
        let exchange = async {
            let request = Request::builder()
                .method(Method::PUT)
                .uri(target)
                .header(HOST, "localhost")
                .header(CONTENT_TYPE, "text/plain; charset=utf-8")
                .body(Full::new(Bytes::from(text)))
                .map_err(|e| UnixError::Request(e.to_string()))?;
            let response = self.exchange(request).await?;
            let status = response.status().as_u16();
            Ok(Answer {
                status,
                body: self.collect(response.into_body()).await?,
            })
        };
        self.in_time(exchange).await
    }

    /// Any method, with or without a JSON body.
    pub async fn request<T: Serialize>(
        &self,
        method: Method,
        target: &str,
        body: Option<&T>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, UnixError> {
        let exchange = async {
            let response = self
                .send(method, target, body, headers, "application/json")
                .await?;
            let status = response.status().as_u16();
            Ok(Answer {
                status,
                body: self.collect(response.into_body()).await?,
            })
        };
        self.in_time(exchange).await
    }

    /// `GET` of an event stream: its status, and the stream, which is an error's body when that is not 200.
    pub async fn events(&self, target: &str) -> Result<(u16, EventStream), UnixError> {
        let exchange = self.send(Method::GET, target, None::<&()>, &[], "text/event-stream");
        let response = self.in_time(exchange).await?;
        let status = response.status().as_u16();
        let stream = EventStream {
            client: self.clone(),
            body: response.into_body(),
            decoder: Decoder::new(),
            ready: VecDeque::new(),
        };
        Ok((status, stream))
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, UnixError>>) -> Result<T, UnixError> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(UnixError::Timeout {
                path: self.path.clone(),
                after: self.timeout,
            }),
        }
    }

    async fn send<T: Serialize>(
        &self,
        method: Method,
        target: &str,
        body: Option<&T>,
        headers: &[(&str, &str)],
        accept: &str,
    ) -> Result<Response<Incoming>, UnixError> {
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| UnixError::Request(e.to_string()))?,
            None => Vec::new(),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(target)
            .header(HOST, "localhost")
            .header(ACCEPT, accept);
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| UnixError::Request(e.to_string()))?;
        self.exchange(request).await
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, UnixError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| UnixError::Connect {
                path: self.path.clone(),
                source,
            })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.http(&e))?;
        // Ends when the answer's body is read or dropped; its errors also come out of the calls below.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|e| self.http(&e))
    }

    async fn collect(&self, body: Incoming) -> Result<Vec<u8>, UnixError> {
        match Limited::new(body, MAX_ANSWER).collect().await {
            Ok(body) => Ok(body.to_bytes().to_vec()),
            Err(error) => Err(UnixError::Http {
                path: self.path.clone(),
                message: error.to_string(),
            }),
        }
    }

    fn http(&self, error: &hyper::Error) -> UnixError {
        UnixError::Http {
            path: self.path.clone(),
            message: error.to_string(),
        }
    }
}

/// Server-sent events as they come.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
    body: Incoming,
    decoder: Decoder,
    ready: VecDeque<Event>,
}

impl EventStream {
    /// The next event, or none when the server ended the stream. Waits as long as it takes.
    pub async fn next(&mut self) -> Result<Option<Event>, UnixError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.client.http(&error)),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        self.ready.extend(self.decoder.push(bytes)?);
                    }
                }
            }
        }
    }

    /// The whole body, for an answer that turned out to be an error.
    pub async fn into_body(self) -> Result<Vec<u8>, UnixError> {
        self.client.in_time(self.client.collect(self.body)).await
    }
}
