//! `system.*`: introspection and multicall, without authentication.

use mandoline_api::xmlrpc::Value;
use serde_json::{Value as Json, json};

use super::fault::Fault;
use super::http::call;
use super::method::{Args, Ctx, Method, Ty, arg, signature_name};
use super::methods::{self, METHODS as ALL};

/// Calls in one multicall.
const CALLS_MAX: usize = 1000;

pub(super) static METHODS: &[Method] = &[
    Method {
        name: "system.listMethods",
        roles: &[],
        args: &[],
        returns: "array",
        help: "The names of all methods that work.",
        run: |_, _| Box::pin(async { Ok(json!(ALL.iter().map(|method| method.name).collect::<Vec<_>>())) }),
    },
    Method {
        name: "system.methodSignature",
        roles: &[],
        args: &[arg("method", Ty::Str(100))],
        returns: "array",
        help: "The signatures of a method: what it gives, then what it takes, one for each count of arguments.",
        run: |_, args| Box::pin(async move { signature(named(args)?) }),
    },
    Method {
        name: "system.methodHelp",
        roles: &[],
        args: &[arg("method", Ty::Str(100))],
        returns: "string",
        help: "What a method does.",
        run: |_, args| Box::pin(async move { Ok(json!(help(named(args)?))) }),
    },
    Method {
        name: "system.multicall",
        roles: &[],
        args: &[arg("calls", Ty::Calls)],
        returns: "array",
        help: "Makes several calls, each {methodName, params}; gives for each a list of its one result, or a \
               struct of faultCode and faultString.",
        run: |ctx, args| Box::pin(multicall(ctx, args)),
    },
];

fn named(args: &Args) -> Result<&'static Method, Fault> {
    let name = args.text(0).unwrap_or_default();
    methods::find(name).ok_or_else(|| Fault::no_method(name))
}

fn signature(method: &Method) -> Result<Json, Fault> {
    let required = method.args.iter().filter(|arg| !arg.optional).count();
    let one = |count: usize| {
        let mut types = vec![method.returns];
        if method.takes_auth() {
            types.push("struct");
        }
        types.extend(method.args.iter().take(count).map(|arg| signature_name(arg.ty)));
        types
    };
    Ok(json!((required..=method.args.len()).map(one).collect::<Vec<_>>()))
}

fn help(method: &Method) -> String {
    let mut text = format!("{}\n\n", method.help);
    let roles: Vec<_> = method.roles.iter().map(|role| role.name()).collect();
    text.push_str(&match roles.is_empty() {
        true => "Roles: none needed, no auth struct\n".to_owned(),
        false => format!("Roles: {}\n", roles.join(", ")),
    });
    for arg in method.args {
        let optional = if arg.optional { ", optional" } else { "" };
        text.push_str(&format!(
            "Argument {}: {}{optional}",
            arg.name,
            signature_name(arg.ty)
        ));
        if let Ty::Struct(fields) = arg.ty {
            let names: Vec<_> = fields.iter().map(|field| field.name).collect();
            text.push_str(&format!(" of {}", names.join(", ")));
        }
        text.push('\n');
    }
    text.push_str(&format!("Returns: {}\n", method.returns));
    text
}

async fn multicall(ctx: &Ctx, args: &Args) -> Result<Json, Fault> {
    let Value::Array(calls) = args.get(0) else {
        return Err(Fault::invalid("expected array"));
    };
    if calls.len() > CALLS_MAX {
        return Err(Fault::invalid(format!(
            "{} calls: allowed are {CALLS_MAX}",
            calls.len()
        )));
    }
    let mut results = Vec::with_capacity(calls.len());
    for one in calls {
        results.push(match inner(ctx, one).await {
            Ok(result) => json!([result]),
            Err(fault) => json!({ "faultCode": fault.code, "faultString": fault.text }),
        });
    }
    Ok(Json::Array(results))
}

async fn inner(ctx: &Ctx, one: &Value) -> Result<Json, Fault> {
    let Value::Struct(members) = one else {
        return Err(Fault::argument("calls", "expected structs"));
    };
    let (Some(Value::String(name)), Some(Value::Array(params))) =
        (members.get("methodName"), members.get("params"))
    else {
        return Err(Fault::argument(
            "calls",
            "expected structs of methodName and params",
        ));
    };
    if name == "system.multicall" {
        return Err(Fault::recursive_multicall());
    }
    call(&ctx.service, name, params.clone(), ctx.from).await
}
