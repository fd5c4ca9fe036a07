//! REST under `/v1`: the types of `mandoline_api::authority`, on the same domain functions as PLCAPI. The
//! OpenAPI description is made from the handlers.

mod error;
mod events;
mod extract;
mod node_side;
mod people;
mod sessions;
mod slices;
mod views;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::service::Service;

/// Largest request, bytes: a report of ten thousand slivers fits.
const BODY_MAX: usize = 16 << 20;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Mandoline authority",
        description = "People, sites, nodes, slices and slivers. Every answer that is not 2xx carries an error with \
                       its kind, a message, and where they apply attribute, value, allowed and node."
    ),
    modifiers(&Security)
)]
struct Description;

struct Security;

impl utoipa::Modify for Security {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme(
            "session",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
        components.add_security_scheme(
            "node",
            SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(
                "Authorization",
                "Mandoline-Node id=<node_id>,ts=<unix>,nonce=<hex>,alg=hmac-sha256|ed25519,sig=<base64>; sig covers \
                 method, path with query, ts, nonce and hex SHA-256 of the body, joined by line feeds",
            ))),
        );
    }
}

fn parts() -> (Router<Arc<Service>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(sessions::sign_in))
        .routes(routes!(sessions::whoami, sessions::sign_out))
        .routes(routes!(slices::list, slices::add))
        .routes(routes!(slices::get, slices::change, slices::delete))
        .routes(routes!(slices::add_nodes, slices::remove_nodes))
        .routes(routes!(slices::add_persons, slices::remove_persons))
        .routes(routes!(slices::slivers))
        .routes(routes!(people::list_nodes, people::add_node))
        .routes(routes!(people::get_node, people::delete_node))
        .routes(routes!(people::list_persons, people::add_person))
        .routes(routes!(people::change_person, people::delete_person))
        .routes(routes!(people::list_keys, people::add_key))
        .routes(routes!(people::delete_key))
        .routes(routes!(people::list_sites, people::add_site))
        .routes(routes!(events::of_person))
        .routes(routes!(node_side::register))
        .routes(routes!(node_side::slivers))
        .routes(routes!(node_side::status))
        .routes(routes!(events::of_node))
        .split_for_parts()
}

/// The OpenAPI description, as JSON for people to read.
pub fn openapi() -> Result<String, serde_json::Error> {
    parts().1.to_pretty_json()
}

/// The routes under `/v1`.
pub fn router(service: Arc<Service>) -> Router {
    let (routes, openapi) = parts();
    let text = openapi.to_json().unwrap_or_default();
    routes
        .route(
            "/v1/openapi.json",
            get(move || async move { ([(CONTENT_TYPE, "application/json")], text) }),
        )
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(service)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_description_names_every_call_of_the_table() {
        let json: serde_json::Value = serde_json::from_str(&super::openapi().unwrap()).unwrap();
        for (path, method) in [
            ("/v1/sessions", "post"),
            ("/v1/session", "delete"),
            ("/v1/slices", "post"),
            ("/v1/slices/{name}", "patch"),
            ("/v1/slices/{name}/nodes", "delete"),
            ("/v1/slices/{name}/persons", "post"),
            ("/v1/slices/{name}/slivers", "get"),
            ("/v1/nodes/{hostname}", "get"),
            ("/v1/persons/{email}", "patch"),
            ("/v1/keys/{id}", "delete"),
            ("/v1/sites", "post"),
            ("/v1/events", "get"),
            ("/v1/node/register", "post"),
            ("/v1/node/slivers", "get"),
            ("/v1/node/events", "get"),
            ("/v1/node/status", "post"),
        ] {
            assert!(json["paths"][path][method].is_object(), "{method} {path}");
        }
        for schema in ["Slice", "Sliver", "ErrorBody", "DesiredSlivers", "NodeStatus"] {
            assert!(json["components"]["schemas"][schema].is_object(), "{schema}");
        }
    }
}
