//! `openapi.json` says what the control socket takes: it is made of the routes and of the types, and each route takes
//! what its type's schema describes and nothing else.
//!
//! After a change of either: `MANDOLINE_OPENAPI=write cargo test -p mandoline-vmm --test openapi`.

#![allow(clippy::unwrap_used)] // a test ends where it fails

use mandoline_api::monitor::{self as api, InstanceInfo};
use mandoline_vmm::api::http::Request;
use mandoline_vmm::api::routes::{ROUTES, Route, When, command};
use serde_json::{Map, Value, json};
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(components(schemas(
    InstanceInfo,
    api::Action,
    api::Balloon,
    api::BalloonPatch,
    api::BalloonStats,
    api::BalloonStatsPatch,
    api::BootSource,
    api::Drive,
    api::DrivePatch,
    api::Entropy,
    api::Fault,
    api::Logger,
    api::MachineConfig,
    api::MachineConfigPatch,
    api::Metrics,
    api::NetworkInterface,
    api::NetworkInterfacePatch,
    api::Park,
    api::Pmem,
    api::PmemPatch,
    api::Serial,
    api::Version,
    api::VmConfig,
    api::VmPatch,
    api::Vsock,
)))]
struct Schemas;

fn schemas() -> Map<String, Value> {
    let mut document = serde_json::to_value(Schemas::openapi()).unwrap();
    let Value::Object(mut schemas) = document["components"]["schemas"].take() else {
        panic!("no schemas")
    };
    schemas.insert(
        "MetricsReport".to_owned(),
        json!({"type": "object", "description": "Groups of counters: see the monitor's documentation."}),
    );
    schemas
}

fn reference(name: &str) -> Value {
    json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{name}")}}})
}

fn operation(route: &Route) -> Value {
    let when = match route.when {
        When::Before => "Before boot only.",
        When::After => "After boot only.",
        When::Always | When::Never => "Before boot and after.",
    };
    let mut answers = Map::new();
    match route.answer {
        Some(name) => answers.insert(
            "200".into(),
            json!({"description": "It is this.", "content": reference(name)}),
        ),
        None => answers.insert("204".into(), json!({"description": "It is done."})),
    };
    answers.insert(
        "default".into(),
        json!({"description": "It cannot be: 400, or 503 at the VM's end.", "content": reference("Fault")}),
    );
    let mut operation = json!({
        "summary": route.summary,
        "description": when,
        "responses": answers,
    });
    if let Some(name) = route.body {
        operation["requestBody"] = json!({"required": true, "content": reference(name)});
    }
    if let Some((_, name)) = route.path.split_once('{') {
        operation["parameters"] = json!([{
            "name": name.trim_end_matches('}'), "in": "path", "required": true,
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"},
        }]);
    }
    operation
}

fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES.iter().filter(|route| route.when != When::Never) {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        let method = route.method.to_ascii_lowercase();
        assert!(path.get(&method).is_none(), "{route:?} is there twice");
        path[method] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Mandoline's monitor",
            "description": "HTTP/1.1 on a Unix socket, in the request shapes of Firecracker's public API; what is ours says so.",
            "version": "1",
        },
        "paths": paths,
        "components": {"schemas": schemas()},
    })
}

#[test]
fn the_file_is_that_of_the_routes_and_types() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let wanted = document();
    if std::env::var_os("MANDOLINE_OPENAPI").is_some() {
        let text = serde_json::to_string_pretty(&wanted).unwrap() + "\n";
        std::fs::write(path, text).unwrap();
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let there: Value = serde_json::from_str(&text).unwrap_or_default();
    assert!(
        there == wanted,
        "openapi.json is not what the code does: MANDOLINE_OPENAPI=write cargo test -p mandoline-vmm --test openapi"
    );
}

/// What a value of `schema` may be; `full`: with everything that may be absent.
fn example(schemas: &Map<String, Value>, schema: &Value, full: bool) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        return example(schemas, &schemas[name], full);
    }
    for choice in ["oneOf", "allOf", "anyOf"] {
        if let Some(choices) = schema[choice].as_array() {
            let of = choices.iter().find(|choice| choice["type"] != "null");
            return example(schemas, of.unwrap(), full);
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        return values[0].clone();
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap(),
        kind => kind,
    };
    match kind.as_str().unwrap_or_default() {
        "object" => {
            let required: Vec<&Value> = schema["required"].as_array().into_iter().flatten().collect();
            let properties = schema["properties"].as_object().into_iter().flatten();
            let chosen =
                properties.filter(|(name, _)| full || required.iter().any(|wanted| *wanted == *name));
            let fields = chosen.map(|(name, schema)| (name.clone(), example(schemas, schema, full)));
            Value::Object(fields.collect())
        }
        "array" => json!([example(schemas, &schema["items"], full)]),
        "string" => json!("x"),
        "boolean" => json!(false),
        "integer" => json!(1),
        other => panic!("{other:?} in {schema}"),
    }
}

/// A request for `route`; its name, where it has one, is that of the examples.
fn request(route: &Route, body: Option<&Value>) -> Request {
    let path = route.path.split('{').next().unwrap_or_default();
    let name = if path == route.path { "" } else { "x" };
    Request {
        method: route.method.to_owned(),
        path: format!("{path}{name}"),
        body: body.map(|body| body.to_string().into_bytes()).unwrap_or_default(),
        keep_alive: true,
        fd_names: Vec::new(),
    }
}

fn takes(route: &Route, body: &Value) -> Result<(), String> {
    let request = request(route, Some(body));
    // When a request may come depends on its body too: it may be either.
    match (command(&request, false), command(&request, true)) {
        (Ok(_), _) | (_, Ok(_)) => Ok(()),
        (Err(refusal), Err(_)) => Err(refusal.body),
    }
}

#[test]
fn routes_take_what_their_schemas_say_and_nothing_else() {
    let schemas = schemas();
    let mut with_body = 0;
    for route in ROUTES {
        let Some(name) = route.body else { continue };
        with_body += 1;
        let schema = &schemas[name];
        let full = example(&schemas, schema, true);
        assert_eq!(takes(route, &full), Ok(()), "{route:?} with everything: {full}");
        let least = example(&schemas, schema, false);
        // An empty PATCH of the machine asks for nothing.
        if least != json!({}) || route.path != "/machine-config" {
            assert_eq!(
                takes(route, &least),
                Ok(()),
                "{route:?} with what is required: {least}"
            );
        }
        for field in least.as_object().unwrap().keys() {
            let mut without = full.clone();
            without.as_object_mut().unwrap().remove(field);
            assert!(takes(route, &without).is_err(), "{route:?} without {field}");
        }
        let mut more = full.clone();
        more["unknown_field"] = json!(1);
        let refusal = takes(route, &more).unwrap_err();
        assert!(refusal.contains("unknown_field"), "{route:?}: {refusal}");
    }
    assert!(with_body > 15, "{with_body}");
}

#[test]
fn before_boot_and_after_every_request_is_refused_that_belongs_to_the_other() {
    let schemas = schemas();
    for route in ROUTES {
        let body = route.body.map(|name| example(&schemas, &schemas[name], true));
        let request = request(route, body.as_ref());
        let message = |booted| command(&request, booted).err().map(|refusal| refusal.body);
        let side = |side: &str| {
            let text = format!("The requested operation is not supported {side} starting the microVM.");
            Some(json!({"fault_message": text}).to_string())
        };
        let (before, after) = match route.when {
            // `InstanceStart` is not said by the schema's first value.
            When::Always if route.path == "/actions" => (side("before"), None),
            When::Always => (None, None),
            When::Before => (None, side("after")),
            When::After => (side("before"), None),
            When::Never => {
                assert!(message(false).unwrap().contains("does not have it"), "{route:?}");
                continue;
            }
        };
        assert_eq!((message(false), message(true)), (before, after), "{route:?}");
    }
}
