//! The HTTP server: PLCAPI and REST on one port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use mandoline_api::authority::{ApiError, ErrorBody, ErrorKind};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;

use crate::service::Service;
use crate::{plc, rest};

/// How long open requests may take to end when the program is told to.
const DRAIN: Duration = Duration::from_secs(10);

/// All routes.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .merge(plc::router(service.clone()))
        .merge(rest::router(service))
        .fallback(|| async {
            error(
                StatusCode::NOT_FOUND,
                ErrorKind::NotFound,
                "no such path: see /v1/openapi.json",
            )
        })
        .method_not_allowed_fallback(|| async {
            error(
                StatusCode::METHOD_NOT_ALLOWED,
                ErrorKind::InvalidArgument,
                "no such method: see /v1/openapi.json",
            )
        })
        .layer(CatchPanicLayer::new())
}

fn error(status: StatusCode, kind: ErrorKind, message: &str) -> impl IntoResponse {
    let error = ApiError {
        kind,
        message: message.into(),
        attribute: None,
        value: None,
        allowed: None,
        node: None,
    };
    (status, axum::Json(ErrorBody { error }))
}

/// Serves until `stopping` is true, then lets open requests end.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut stopping: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut deadline = stopping.clone();
    let app = router(service).into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        // An error means that nobody can tell us any more: stop as well.
        let _ = stopping.wait_for(|stop| *stop).await;
    });
    let overdue = async {
        let _ = deadline.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        ended = async { server.await } => ended,
        () = overdue => Ok(()),
    }
}
