//! Signing in and out.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use mandoline_api::authority::{ErrorBody, NewSession, Session};

use super::error::Refusal;
use super::extract::{Body, Person};
use super::views;
use crate::auth::session;
use crate::error::Error;
use crate::service::Service;
use crate::{in_read, in_write};

/// Sign in
#[utoipa::path(post, path = "/v1/sessions", tag = "sessions", request_body = NewSession,
    responses((status = 201, body = Session), (status = 401, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn sign_in(
    State(service): State<Arc<Service>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    Body(new): Body<NewSession>,
) -> Result<(StatusCode, Json<Session>), Refusal> {
    let caller = service.sign_in(&new.email, &new.password, from.ip()).await?;
    let (token, expires) = in_write!(service.db, |c| session::open(c, &caller, None).await)?;
    let expires = expires.ok_or_else(|| Error::internal("a person's session ends"))?;
    Ok((StatusCode::CREATED, Json(Session { token, expires })))
}

/// Who the session's person is
#[utoipa::path(get, path = "/v1/session", tag = "sessions", security(("session" = [])),
    responses((status = 200, body = mandoline_api::authority::Person), (status = 401, body = ErrorBody)))]
pub(super) async fn whoami(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
) -> Result<Json<mandoline_api::authority::Person>, Refusal> {
    let me = caller.person_id();
    let mut found = in_read!(service.db, |c| views::persons(c, me).await)?;
    Ok(Json(found.pop().ok_or_else(|| Error::NoSuch("account".into()))?))
}

/// Sign out
#[utoipa::path(delete, path = "/v1/session", tag = "sessions", security(("session" = [])),
    responses((status = 204), (status = 401, body = ErrorBody)))]
pub(super) async fn sign_out(
    State(service): State<Arc<Service>>,
    person: Person,
) -> Result<StatusCode, Refusal> {
    in_write!(service.db, |c| session::close(c, &person.1).await)?;
    Ok(StatusCode::NO_CONTENT)
}
