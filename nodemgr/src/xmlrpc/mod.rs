//! The interface as XML-RPC, at `/RPC2` of every socket: the papers' functions by their names ([`crate::methods`]),
//! those of the node manager that PlanetLab shipped ([`shipped`]), and `system.*`.
//!
//! ```text
//!  XML ─► name, arguments ─► name known (100) ─► their number (101) ─► their types (102) ─► method ─► XML
//! ```
//!
//! Fault codes and texts are those of the shipped node manager, whose clients match them. Where a method changes
//! something, one further argument of text is the idempotency key: a repetition gives the stored answer.

mod fault;
mod shipped;

use std::pin::Pin;
use std::sync::Arc;

use mandoline_api::xmlrpc::{self, Fault, Value, to_json};
use serde_json::{Map, Value as Json, json};

use crate::caller::Caller;
use crate::core::Core;
use crate::http::log_refusal;
use crate::methods::{self, Fields, METHODS, Method, Type, check_key};
use crate::ops::OpResult;

/// Most calls in one multicall.
const CALLS_MAX: usize = 1000;

const INTROSPECTION: [(&str, &[&str], &str); 4] = [
    ("system.listMethods", &["array"], "The names of all methods."),
    ("system.methodHelp", &["string", "string"], "What a method does."),
    (
        "system.methodSignature",
        &["array", "string"],
        "What a method gives and takes, one signature for each number of arguments.",
    ),
    (
        "system.multicall",
        &["array", "array"],
        "Makes several calls, each {methodName, params}; gives for each a list of its one result, or a struct of \
         faultCode and faultString.",
    ),
];

/// Answers a request's body.
pub async fn answer(core: &Arc<Core>, caller: &Caller, body: &[u8]) -> String {
    let outcome = match xmlrpc::parse(body) {
        Ok((name, args)) => call(core, caller, &name, args).await,
        Err(_) => Err(Fault::no_call()),
    };
    xmlrpc::answer(outcome)
}

/// One call. (Boxed, since multicall makes calls from within.)
fn call<'a>(
    core: &'a Arc<Core>,
    caller: &'a Caller,
    name: &'a str,
    args: Vec<Value>,
) -> Pin<Box<dyn Future<Output = Result<Json, Fault>> + Send + 'a>> {
    Box::pin(async move {
        if let Some(method) = methods::find(name) {
            return papers(core, caller, method, &args).await;
        }
        if let Some(function) = shipped::find(name) {
            return function.call(core, caller, &args).await;
        }
        match (name, args.as_slice()) {
            ("system.listMethods", []) => Ok(json!(names())),
            ("system.methodHelp", [Value::String(of)]) => help(of),
            ("system.methodSignature", [Value::String(of)]) => signatures(of).map(|list| json!(list)),
            ("system.multicall", [Value::Array(calls)]) => multicall(core, caller, calls).await,
            (name, args) => Err(match INTROSPECTION.iter().find(|row| row.0 == name) {
                Some((_, types, _)) => fault::count_or_type(args, &types[1..]),
                None => fault::no_method(name, &names()),
            }),
        }
    })
}

/// A method of the papers: arguments by place become fields by name.
async fn papers(
    core: &Arc<Core>,
    caller: &Caller,
    method: &'static Method,
    args: &[Value],
) -> Result<Json, Fault> {
    let takes_key = args.len() == method.args.len() + 1;
    if args.len() != method.args.len() && !takes_key {
        return Err(fault::count(args.len(), method.args.len()));
    }
    let mut fields = Map::new();
    for (place, ((name, wanted), value)) in method.args.iter().zip(args).enumerate() {
        if !fits(*wanted, value) {
            return Err(fault::wrong_type(place + 1, wanted.signature(), value));
        }
        fields.insert((*name).to_owned(), to_json(value));
    }
    let work = async {
        let key = match args.get(method.args.len()) {
            Some(Value::String(key)) => Some(check_key(key)?),
            Some(_) => return Err(methods::bad("the idempotency key is not text")),
            None => None,
        };
        let fields = Fields::new(Json::Object(fields))?;
        methods::call(core, caller, method, fields, key).await?.bare()
    };
    finish(caller, method.name, work.await)
}

fn finish(caller: &Caller, name: &str, outcome: OpResult<Json>) -> Result<Json, Fault> {
    outcome.map_err(|error| {
        log_refusal(caller, name, &error);
        fault::of(caller, &error)
    })
}

fn fits(wanted: Type, value: &Value) -> bool {
    match wanted {
        Type::Rcap | Type::Text => matches!(value, Value::String(_)),
        Type::Rspec | Type::Struct => matches!(value, Value::Struct(_)),
        Type::List => matches!(value, Value::Array(_)),
    }
}

fn names() -> Vec<&'static str> {
    let own = METHODS.iter().map(|method| method.name);
    let shipped = shipped::FUNCTIONS.iter().map(|function| function.name);
    own.chain(shipped)
        .chain(INTROSPECTION.iter().map(|row| row.0))
        .collect()
}

fn help(name: &str) -> Result<Json, Fault> {
    if let Some(method) = methods::find(name) {
        let args: Vec<_> = method.args.iter().map(|(name, _)| *name).collect();
        return Ok(json!(format!(
            "{name}({}[, idempotency_key])\n\n{}",
            args.join(", "),
            method.help
        )));
    }
    let shipped = shipped::find(name).map(|function| function.help);
    let system = INTROSPECTION.iter().find(|row| row.0 == name).map(|row| row.2);
    match shipped.or(system) {
        Some(help) => Ok(json!(help)),
        None => Err(fault::no_method(name, &names())),
    }
}

fn signatures(name: &str) -> Result<Vec<Vec<&'static str>>, Fault> {
    if let Some(method) = methods::find(name) {
        let mut types = vec![method.returns];
        types.extend(method.args.iter().map(|(_, wanted)| wanted.signature()));
        let mut with_key = types.clone();
        with_key.push("string");
        return Ok(vec![types, with_key]);
    }
    if let Some(function) = shipped::find(name) {
        return Ok(vec![function.signature.to_vec()]);
    }
    match INTROSPECTION.iter().find(|row| row.0 == name) {
        Some((_, types, _)) => Ok(vec![types.to_vec()]),
        None => Err(fault::no_method(name, &names())),
    }
}

async fn multicall(core: &Arc<Core>, caller: &Caller, calls: &[Value]) -> Result<Json, Fault> {
    if calls.len() > CALLS_MAX {
        return Err(fault::argument(&format!(
            "{} calls; allowed are {CALLS_MAX}",
            calls.len()
        )));
    }
    let mut results = Vec::with_capacity(calls.len());
    for one in calls {
        results.push(match inner(core, caller, one).await {
            Ok(result) => json!([result]),
            Err(fault) => fault.to_json(),
        });
    }
    Ok(Json::Array(results))
}

async fn inner(core: &Arc<Core>, caller: &Caller, one: &Value) -> Result<Json, Fault> {
    let Value::Struct(members) = one else {
        return Err(fault::argument("a call is a struct of methodName and params"));
    };
    let (Some(Value::String(name)), Some(Value::Array(params))) =
        (members.get("methodName"), members.get("params"))
    else {
        return Err(fault::argument("a call is a struct of methodName and params"));
    };
    if name == "system.multicall" {
        return Err(fault::argument("system.multicall cannot call itself"));
    }
    call(core, caller, name, params.clone()).await
}
