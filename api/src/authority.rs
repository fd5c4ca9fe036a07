//! The authority's interface: what REST clients (`mandoline`) and nodes (`mandoline-scs`) exchange with it.
//!
//! Everything is JSON over HTTP under [`PREFIX`]; the same description is served as OpenAPI at
//! `/v1/openapi.json`. Times are Unix seconds unless a field's name says otherwise, rates bit/s, memory bytes.
//! Every answer that is not 2xx carries an [`ErrorBody`].
//!
//! Callers: a person sends `Authorization: Bearer <token>` (from `POST /v1/sessions`); a node signs each call,
//! see [`NodeAuthorization`].
//!
//! | call | takes | gives | who |
//! | --- | --- | --- | --- |
//! | `POST /v1/sessions` | [`NewSession`] | [`Session`] | anybody |
//! | `GET /v1/session`, `DELETE /v1/session` | | [`Person`], nothing | persons |
//! | `GET /v1/slices`, `POST /v1/slices` | [`NewSlice`] | list of [`Slice`], [`Slice`] | persons |
//! | `GET, PATCH, DELETE /v1/slices/{name}` | [`SliceChange`] | [`Slice`] | members, PIs |
//! | `POST, DELETE /v1/slices/{name}/nodes` | [`Hostnames`] | [`Slice`] | members, PIs |
//! | `POST, DELETE /v1/slices/{name}/persons` | [`Emails`] | [`Slice`] | PIs |
//! | `GET /v1/slices/{name}/slivers` | | list of [`Sliver`] | persons |
//! | `GET, POST /v1/nodes` | [`NewNode`] | list of [`Node`], [`NodeAdded`] | persons; PIs, techs |
//! | `GET, DELETE /v1/nodes/{hostname}` | | [`Node`] | persons; PIs, techs |
//! | `GET, POST /v1/persons`, `PATCH, DELETE /v1/persons/{email}` | [`NewPerson`], [`PersonChange`] | [`Person`] | persons; PIs |
//! | `GET, POST /v1/keys`, `DELETE /v1/keys/{id}` | [`NewKey`] | [`Key`] | persons |
//! | `GET, POST /v1/sites` | [`NewSite`] | [`Site`] | persons; admins |
//! | `GET /v1/events?since=<seq>` | | SSE of [`Event`] | persons |
//! | `POST /v1/node/register` | [`NodeRegistration`] | [`NodeRegistered`] | node (HMAC) |
//! | `GET /v1/node/slivers` | | [`DesiredSlivers`] | node (Ed25519) |
//! | `GET /v1/node/events` | | SSE: [`NODE_EVENT_SLIVERS`] | node (Ed25519) |
//! | `POST /v1/node/status` | [`NodeStatus`] | nothing | node (Ed25519) |

mod event;
mod node;
mod node_auth;
mod person;
mod slice;

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use event::*;
pub use node::*;
pub use node_auth::*;
pub use person::*;
pub use slice::*;

/// The path under which everything here lives.
pub const PREFIX: &str = "/v1";

/// SSE event that tells a node that the set of its slivers, or something in one of them, has changed.
/// Its data is a [`SliversChanged`].
pub const NODE_EVENT_SLIVERS: &str = "slivers";

/// How often an idle event stream carries a comment, so that both ends notice a dead connection. Seconds.
pub const HEARTBEAT_S: u64 = 15;

/// An rspec as it travels: attribute name to number, string with unit, boolean or list. `mandoline-rspec` gives it meaning.
pub type RspecObject = serde_json::Map<String, serde_json::Value>;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request does not say something that the authority can do (400).
    InvalidArgument,
    /// No session or signature, or not a valid one (401).
    Unauthenticated,
    /// The caller is known but may not do this (403).
    Forbidden,
    /// There is no such thing, or the caller may not see it (404).
    NotFound,
    /// There is one already, or its state does not allow this (409).
    Conflict,
    /// The body is larger than the authority reads (413).
    TooLarge,
    /// Too many attempts; try again later (429).
    RateLimited,
    /// The authority cannot answer at the moment; a retry may succeed (503).
    Unavailable,
    /// The authority failed (500); its log says how.
    Internal,
    /// A kind that this client does not know.
    #[serde(other)]
    Other,
}

/// One error: for people its message, for programs the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind of error.
    pub kind: ErrorKind,
    /// A sentence that names the thing, its value and what is allowed.
    pub message: String,
    /// The field or rspec attribute that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribute: Option<String>,
    /// The value that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What would have been allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// Hostname of the node that lacks what was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// Body of every answer that is not 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}

/// Signing in.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSession {
    /// The person's e-mail address.
    pub email: String,
    /// The person's password.
    pub password: String,
}

/// Never prints the password.
impl fmt::Debug for NewSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewSession")
            .field("email", &self.email)
            .finish_non_exhaustive()
    }
}

/// A session: its token goes into `Authorization: Bearer`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Opaque; keep it secret. PLCAPI takes it too (AuthMethod `session`).
    pub token: String,
    /// When it ends, Unix seconds.
    pub expires: i64,
}

/// Never prints the token.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_words_from_a_newer_authority_do_not_break_a_client() {
        assert_eq!(
            serde_json::from_str::<ErrorKind>("\"teapot\"").ok(),
            Some(ErrorKind::Other)
        );
        assert_eq!(
            serde_json::from_str::<SliverState>("\"levitating\"").ok(),
            Some(SliverState::Other)
        );
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!(
            "{:?}",
            NewSession {
                email: "a@b.c".into(),
                password: "hunter2".into()
            }
        );
        assert!(!text.contains("hunter2"));
    }
}
