//! The authority's errors as REST gives them.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use mandoline_api::authority::{ApiError, ErrorBody, ErrorKind};

use crate::error::Error;

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, kind) = match &self.0 {
            Error::Invalid(_) => (StatusCode::BAD_REQUEST, ErrorKind::InvalidArgument),
            Error::NoSuch(_) => (StatusCode::NOT_FOUND, ErrorKind::NotFound),
            Error::Conflict(_) => (StatusCode::CONFLICT, ErrorKind::Conflict),
            Error::Denied(_) => (StatusCode::FORBIDDEN, ErrorKind::Forbidden),
            Error::Unauthenticated(_) => (StatusCode::UNAUTHORIZED, ErrorKind::Unauthenticated),
            Error::RateLimited { .. } => (StatusCode::TOO_MANY_REQUESTS, ErrorKind::RateLimited),
            Error::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable),
            Error::Database(_) | Error::Internal(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Internal)
            }
        };
        let mut error = ApiError {
            kind,
            message: self.0.to_string(),
            attribute: None,
            value: None,
            allowed: None,
            node: None,
        };
        let mut retry = None;
        match self.0 {
            Error::Invalid(invalid) => {
                error.attribute = invalid.attribute;
                error.value = invalid.value;
                error.allowed = invalid.allowed;
                error.node = invalid.node;
            }
            // What the database says is for the log: it can hold anything.
            Error::Database(_) | Error::Internal(_) => {
                tracing::error!(error = %error.message, "internal");
                error.message = "the authority failed; its log has the details".into();
            }
            Error::RateLimited { retry_after_s } => retry = Some(retry_after_s),
            _ => {}
        }
        let mut response = (status, Json(ErrorBody { error })).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = retry {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
