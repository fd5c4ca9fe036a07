//! What handlers take from a request: who calls, and the body.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, Uri};
use axum::response::{IntoResponse, Response};
use mandoline_api::authority::{ApiError, ErrorBody, ErrorKind, NodeAuthAlgorithm, NodeAuthorization};
use serde::de::DeserializeOwned;

use super::error::Refusal;
use crate::auth::node::{SignedCall, verify};
use crate::auth::session;
use crate::domain::{Caller, nodes};
use crate::error::{Error, Result};
use crate::service::Service;
use crate::{in_read, in_write};

/// The person that calls, and the token that it called with.
#[derive(Debug)]
pub(super) struct Person(pub(super) Caller, pub(super) String);

fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim().to_owned())
}

impl FromRequestParts<Arc<Service>> for Person {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Self, Refusal> {
        let token = bearer(&parts.headers).ok_or_else(|| {
            Error::Unauthenticated("sign in first: POST /v1/sessions, then Authorization: Bearer".into())
        })?;
        let found = in_read!(service.db, |c| session::find(c, &token).await)?;
        match found {
            Ok(caller) if caller.person_id().is_some() => Ok(Self(caller, token)),
            Ok(_) => Err(Error::denied("this call is for persons").into()),
            Err(_) => {
                Err(Error::Unauthenticated("no such session, or it has ended: sign in again".into()).into())
            }
        }
    }
}

/// A body of JSON. Its content type does not matter; unknown fields do.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

fn too_large(rejection: BytesRejection) -> Response {
    let status = rejection.status();
    let kind = match status.as_u16() {
        413 => ErrorKind::TooLarge,
        _ => ErrorKind::InvalidArgument,
    };
    let message = format!("body: {}", rejection.body_text());
    let error = ApiError {
        kind,
        message,
        attribute: None,
        value: None,
        allowed: None,
        node: None,
    };
    (status, axum::Json(ErrorBody { error })).into_response()
}

/// Reads JSON.
pub(super) fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    // serde's message names the field and the place, and repeats single values at most.
    serde_json::from_slice(bytes).map_err(|error| Error::invalid(format!("body: {error}")))
}

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, service: &Arc<Service>) -> Result<Self, Response> {
        let bytes = Bytes::from_request(request, service).await.map_err(too_large)?;
        json(&bytes)
            .map(Self)
            .map_err(|error| Refusal(error).into_response())
    }
}

/// A node's call, its signature not yet checked: method, path and body are what was signed.
#[derive(Debug)]
pub(super) struct NodeCall {
    authorization: NodeAuthorization,
    method: Method,
    uri: Uri,
    body: Bytes,
}

impl FromRequest<Arc<Service>> for NodeCall {
    type Rejection = Response;

    async fn from_request(request: Request, service: &Arc<Service>) -> Result<Self, Response> {
        let header = request
            .headers()
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let authorization: NodeAuthorization = header.parse().map_err(|error| {
            Refusal(Error::Unauthenticated(format!("node signature: {error}"))).into_response()
        })?;
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let body = Bytes::from_request(request, service).await.map_err(too_large)?;
        Ok(Self {
            authorization,
            method,
            uri,
            body,
        })
    }
}

impl NodeCall {
    /// Checks the signature and notes that the node has called. The nonce stays used even if the call fails
    /// later: a call is made once.
    pub(super) async fn verify(&self, service: &Service, wanted: NodeAuthAlgorithm) -> Result<Caller> {
        let call = SignedCall {
            method: self.method.as_str(),
            path_and_query: self.uri.path_and_query().map_or("/", |path| path.as_str()),
            body: &self.body,
        };
        let checked = in_write!(service.db, |c| {
            let caller = verify(c, &self.authorization, wanted, &call).await?;
            nodes::touch(c, self.authorization.node_id).await?;
            Ok(caller)
        });
        if let Err(Error::Unauthenticated(why)) = &checked {
            tracing::info!(node_id = self.authorization.node_id, %why, path = call.path_and_query, "node refused");
        }
        checked
    }

    /// The body's JSON.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        json(&self.body)
    }
}
