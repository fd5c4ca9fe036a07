//! XML-RPC's wire form, for the two interfaces that have it: PLCAPI and the node manager's.
//!
//! Both speak JSON's values inside, so calls and answers are turned into those and back here.

use dxr::{FaultResponse, MethodCall, MethodResponse};
use serde_json::{Map, Value as Json};

pub use dxr::Value;

const PROLOG: &str = "<?xml version='1.0'?>\n";

/// The media type of calls and answers.
pub const CONTENT_TYPE: &str = "text/xml; charset=utf-8";

/// A request that is no method call. The parser's own text is left out: it would repeat the body, passwords and all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an XML-RPC method call")]
pub struct NoCall;

/// A fault's code and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// `faultCode`.
    pub code: i32,
    /// `faultString`.
    pub text: String,
}

impl Fault {
    /// [`NoCall`]: the code is that of the usual extension for faults of transport (-32700, "parse error").
    pub fn no_call() -> Self {
        Self {
            code: -32700,
            text: NoCall.to_string(),
        }
    }

    /// As `system.multicall` gives it among its results.
    pub fn to_json(&self) -> Json {
        serde_json::json!({ "faultCode": self.code, "faultString": self.text })
    }
}

/// Reads a method call: the method's name, and its arguments.
pub fn parse(body: &[u8]) -> Result<(String, Vec<Value>), NoCall> {
    let text = std::str::from_utf8(body).map_err(|_| NoCall)?;
    let call = MethodCall::from_xml(text).map_err(|_| NoCall)?;
    Ok((call.name.into_owned(), call.params))
}

/// Writes an answer.
pub fn answer(outcome: Result<Json, Fault>) -> String {
    let written = match outcome {
        Ok(json) => MethodResponse {
            value: from_json(json),
        }
        .to_xml(),
        Err(fault) => FaultResponse {
            fault: dxr::Fault::new(fault.code, printable(fault.text)),
        }
        .to_xml(),
    };
    // Everything that can be in a value can be written; should that be wrong, say no more than that.
    let xml = written.unwrap_or_else(|_| {
        "<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>111</int></value></member>\
         <member><name>faultString</name><value><string>Internal API error</string></value></member></struct></value>\
         </fault></methodResponse>"
            .to_owned()
    });
    format!("{PROLOG}{xml}")
}

/// The type's name in fault texts.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Integer(_) | Value::Long(_) => "int",
        Value::Boolean(_) => "boolean",
        Value::String(_) => "string",
        Value::Double(_) => "double",
        Value::DateTime(_) => "dateTime.iso8601",
        Value::Base64(_) => "base64",
        Value::Struct(_) => "struct",
        Value::Array(_) => "array",
        _ => "nil",
    }
}

/// As JSON. Dates and binary data, which no method takes, become text.
pub fn to_json(value: &Value) -> Json {
    match value {
        Value::Integer(number) => Json::from(*number),
        Value::Long(number) => Json::from(*number),
        Value::Boolean(value) => Json::from(*value),
        Value::String(text) => Json::from(text.as_str()),
        Value::Double(number) => Json::from(*number),
        Value::DateTime(time) => Json::from(time.to_string()),
        Value::Base64(bytes) => Json::from(String::from_utf8_lossy(bytes).into_owned()),
        Value::Struct(members) => Json::Object(
            members
                .iter()
                .map(|(name, value)| (name.clone(), to_json(value)))
                .collect::<Map<_, _>>(),
        ),
        Value::Array(items) => Json::Array(items.iter().map(to_json).collect()),
        _ => Json::Null,
    }
}

/// From JSON. Whole numbers of more than 32 bits travel as `i8`, which today's clients read.
pub fn from_json(json: Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(value) => Value::Boolean(value),
        Json::Number(number) => match number.as_i64() {
            Some(whole) => i32::try_from(whole).map_or(Value::Long(whole), Value::Integer),
            None => Value::Double(number.as_f64().unwrap_or(0.0)),
        },
        Json::String(text) => Value::String(printable(text)),
        Json::Array(items) => Value::Array(items.into_iter().map(from_json).collect()),
        Json::Object(members) => Value::Struct(
            members
                .into_iter()
                .map(|(name, value)| (printable(name), from_json(value)))
                .collect(),
        ),
    }
}

/// Characters that XML 1.0 cannot hold become `?`, as in PlanetLab's own server.
fn printable(text: String) -> String {
    let bad = |c: char| !matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
    match text.chars().any(bad) {
        true => text.chars().map(|c| if bad(c) { '?' } else { c }).collect(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_survives_the_way_over_xml() {
        let json = json!({"a": 1, "b": [true, null, "x < y & \u{e9}"], "c": 1.5, "big": 5_000_000_000i64});
        let xml = MethodResponse {
            value: from_json(json.clone()),
        }
        .to_xml()
        .unwrap();
        assert_eq!(to_json(&MethodResponse::from_xml(&xml).unwrap().value), json);
    }

    #[test]
    fn what_xml_cannot_hold_becomes_a_question_mark() {
        assert_eq!(
            from_json(json!("a\u{1}b\u{fffe}c\n")),
            Value::String("a?b?c\n".into())
        );
        assert!(answer(Ok(json!("\u{0}"))).contains("<string>?</string>"));
    }

    #[test]
    fn what_is_no_call_is_not_repeated() {
        assert_eq!(parse(b"<methodCall>secret").unwrap_err(), NoCall);
        assert_eq!(parse(b"\xff").unwrap_err(), NoCall);
        assert!(!NoCall.to_string().contains("secret"));
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_crash() {
        let deep = format!(
            "<methodCall><methodName>x</methodName><params><param><value>{}{}</value></param></params></methodCall>",
            "<array><data><value>".repeat(50_000),
            "</value></data></array>".repeat(50_000)
        );
        assert!(parse(deep.as_bytes()).is_err());
    }
}
