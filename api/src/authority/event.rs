//! What changed: the event stream of persons.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that changed, and who changed it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Grows; `since` of the next call. Also the SSE id.
    pub seq: i64,
    /// When, Unix microseconds.
    pub time_us: i64,
    /// `slice_added`, `slice_changed`, `slice_deleted`, `sliver_state`, `node_registered`, ... Also the SSE event name.
    pub kind: String,
    /// `person 2`, `node 7`, or `authority`.
    pub actor: String,
    /// The slice that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slice: Option<String>,
    /// Hostname of the node that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Details; for `sliver_state` a [`Sliver`].
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
}
