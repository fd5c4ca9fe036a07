//! What nodes call.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::{ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use mandoline_api::authority::{
    DesiredSlivers, ErrorBody, NodeAuthAlgorithm, NodeRegistered, NodeRegistration, NodeStatus,
};

use super::error::Refusal;
use super::extract::NodeCall;
use crate::domain::{desired, nodes, slivers as reported};
use crate::error::Error;
use crate::in_write;
use crate::service::Service;

/// A node says who it is and what it offers (signed with HMAC-SHA256 under NODE_KEY)
#[utoipa::path(post, path = "/v1/node/register", tag = "node side", security(("node" = [])),
    request_body = NodeRegistration,
    responses((status = 200, body = NodeRegistered), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(super) async fn register(
    State(service): State<Arc<Service>>,
    call: NodeCall,
) -> Result<Json<NodeRegistered>, Refusal> {
    let caller = call.verify(&service, NodeAuthAlgorithm::HmacSha256).await?;
    let registration: NodeRegistration = call.json()?;
    Ok(Json(in_write!(service.db, |c| nodes::register(
        c,
        &caller,
        &registration
    )
    .await)?))
}

/// What the node should run; an unchanged set (If-None-Match) answers 304
#[utoipa::path(get, path = "/v1/node/slivers", tag = "node side", security(("node" = [])),
    responses((status = 200, body = DesiredSlivers), (status = 304), (status = 401, body = ErrorBody)))]
pub(super) async fn slivers(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
    call: NodeCall,
) -> Result<Response, Refusal> {
    let caller = call.verify(&service, NodeAuthAlgorithm::Ed25519).await?;
    let node = caller
        .node_id()
        .ok_or_else(|| Error::denied("this call is for nodes"))?;
    let wanted = in_write!(service.db, |c| desired::of_node(c, node).await)?;
    let etag = format!("\"{}\"", wanted.revision);
    let known = headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    if known.is_some_and(|known| known.split(',').any(|one| one.trim() == etag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response());
    }
    Ok(([(ETAG, etag)], Json(wanted)).into_response())
}

/// What has become of the node's slivers
#[utoipa::path(post, path = "/v1/node/status", tag = "node side", security(("node" = [])), request_body = NodeStatus,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(super) async fn status(
    State(service): State<Arc<Service>>,
    call: NodeCall,
) -> Result<StatusCode, Refusal> {
    let caller = call.verify(&service, NodeAuthAlgorithm::Ed25519).await?;
    let status: NodeStatus = call.json()?;
    in_write!(service.db, |c| reported::report(c, &caller, &status.slivers)
        .await)?;
    Ok(StatusCode::NO_CONTENT)
}
