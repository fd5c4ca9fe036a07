//! XML-RPC over HTTP, and the order in which a call is checked.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use mandoline_api::xmlrpc::{self, Value};
use serde_json::Value as Json;

use super::auth;
use super::fault::Fault;
use super::method::{Args, Ctx};
use super::methods;
use super::value;
use crate::domain::{Caller, Who};
use crate::service::Service;

/// Largest request, bytes.
const BODY_MAX: usize = 4 << 20;

/// The routes of PLCAPI, with and without the trailing slash that PlanetLab's address has.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/PLCAPI/", post(handle))
        .route("/PLCAPI", post(handle))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(service)
}

async fn handle(
    State(service): State<Arc<Service>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    body: Bytes,
) -> Response {
    let outcome = match value::parse(&body) {
        Ok((name, params)) => call(&service, &name, params, from.ip()).await,
        Err(fault) => Err(fault),
    };
    ([(CONTENT_TYPE, xmlrpc::CONTENT_TYPE)], value::answer(outcome)).into_response()
}

/// One call, checked in PlanetLab's order. (Boxed, since multicall calls it from within.)
pub(super) fn call<'a>(
    service: &'a Arc<Service>,
    name: &'a str,
    params: Vec<Value>,
    from: IpAddr,
) -> Pin<Box<dyn Future<Output = Result<Json, Fault>> + Send + 'a>> {
    Box::pin(async move {
        let method = methods::find(name).ok_or_else(|| Fault::no_method(name))?;
        let anonymous = |fault: Fault| fault.for_call("", name);
        method.check_count(params.len()).map_err(anonymous)?;
        let (caller, session, args) = match method.takes_auth() {
            false => (Caller::anonymous(), None, params),
            true => {
                let mut params = params;
                let shape = auth::parse(params.first()).map_err(anonymous)?;
                let args = params.split_off(1);
                let (caller, session) = auth::authenticate(service, &shape, method, &args, from)
                    .await
                    .map_err(anonymous)?;
                (caller, session, args)
            }
        };
        let who = match &caller.who {
            Who::Person { id, .. } => format!("person_id {id}"),
            Who::Node { id } => format!("node_id {id}"),
            Who::Anonymous | Who::Authority => String::new(),
        };
        let known = |fault: Fault| fault.for_call(&who, name);
        method.check_types(&args).map_err(known)?;
        let ctx = Ctx {
            service: service.clone(),
            caller,
            from,
            session,
        };
        (method.run)(&ctx, &Args(args)).await.map_err(known)
    })
}
