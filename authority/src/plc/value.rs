//! PLCAPI's calls and answers on the wire. The values between XML-RPC and JSON are `mandoline_api`'s.

use mandoline_api::xmlrpc::{self, Value};
use serde_json::Value as Json;

use super::fault::Fault;

pub(super) use mandoline_api::xmlrpc::{to_json, type_name};

/// Reads a method call.
pub(super) fn parse(body: &[u8]) -> Result<(String, Vec<Value>), Fault> {
    xmlrpc::parse(body).map_err(|_| Fault::unreadable())
}

/// Writes an answer.
pub(super) fn answer(outcome: Result<Json, Fault>) -> String {
    xmlrpc::answer(outcome.map_err(|fault| xmlrpc::Fault {
        code: fault.code,
        text: fault.text,
    }))
}
