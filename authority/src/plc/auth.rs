//! Auth structs: who calls, and whether the method is for them.
//!
//! A missing role is fault 103 where the call carries a password, and 108 where it carries a session: the
//! session is good, and stays.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use mandoline_api::authority::signing_string;
use mandoline_api::xmlrpc::Value;
use sha2::{Digest, Sha256};

use super::fault::Fault;
use super::method::Method;
use super::value::to_json;
use crate::auth::node::{check_time, hmac_sha1_is, hmac_sha256_is, use_nonce};
use crate::auth::session::{self, NoSession};
use crate::db::Conn;
use crate::domain::{Caller, Role, Who};
use crate::error::Error;
use crate::service::Service;
use crate::{in_read, in_write};

const METHODS: &str =
    "must be 'session', 'password', 'capability', 'gpg', 'hmac', 'hmac_dummybox', 'anonymous'";

/// An auth struct of the right shape.
#[derive(Clone, PartialEq)]
pub(super) enum Auth {
    Session(String),
    Password {
        username: String,
        password: String,
    },
    Hmac {
        node_id: i64,
        value: String,
        fresh: Option<(u64, String)>,
    },
    Anonymous,
    /// One that PlanetLab knows and this authority does not take.
    Unsupported(&'static str),
}

/// Reads an auth struct; its shape is checked before anything else about the call.
pub(super) fn parse(value: Option<&Value>) -> Result<Auth, Fault> {
    let Some(Value::Struct(members)) = value else {
        let got = value.map_or("nil", super::value::type_name);
        return Err(Fault::argument("auth", &format!("expected struct, got {got}")));
    };
    let method = match members.get("AuthMethod") {
        Some(Value::String(method)) => method.as_str(),
        Some(_) => return Err(Fault::argument("AuthMethod", METHODS)),
        None => return Err(Fault::argument("auth", "'AuthMethod' not specified")),
    };
    match method {
        "session" => Ok(Auth::Session(text(members, "session")?)),
        "password" => Ok(Auth::Password {
            username: text(members, "Username")?,
            password: text(members, "AuthString")?,
        }),
        "hmac" => {
            let fresh = match (number(members, "timestamp"), members.get("nonce")) {
                (Ok(time), Some(Value::String(nonce))) => Some((time.unsigned_abs(), nonce.clone())),
                _ => None,
            };
            Ok(Auth::Hmac {
                node_id: number(members, "node_id")?,
                value: text(members, "value")?,
                fresh,
            })
        }
        "anonymous" => Ok(Auth::Anonymous),
        "capability" => Ok(Auth::Unsupported("CapabilityAuth")),
        "gpg" => Ok(Auth::Unsupported("GPGAuth")),
        "hmac_dummybox" => Ok(Auth::Unsupported("DummyBoxAuth")),
        _ => Err(Fault::argument("AuthMethod", METHODS)),
    }
}

fn text(members: &BTreeMap<String, Value>, name: &str) -> Result<String, Fault> {
    match members.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(Fault::argument(
            name,
            &format!("expected string, got {}", super::value::type_name(other)),
        )),
        None => Err(Fault::argument("auth", &format!("'{name}' not specified"))),
    }
}

fn number(members: &BTreeMap<String, Value>, name: &str) -> Result<i64, Fault> {
    match members.get(name) {
        Some(Value::Integer(number)) => Ok(i64::from(*number)),
        Some(Value::Long(number)) => Ok(*number),
        Some(other) => Err(Fault::argument(
            name,
            &format!("expected int, got {}", super::value::type_name(other)),
        )),
        None => Err(Fault::argument("auth", &format!("'{name}' not specified"))),
    }
}

/// Who calls, with the session if there is one. `args` are those after the auth struct, as signed.
pub(super) async fn authenticate(
    service: &Arc<Service>,
    auth: &Auth,
    method: &Method,
    args: &[Value],
    from: IpAddr,
) -> Result<(Caller, Option<String>), Fault> {
    match auth {
        Auth::Session(token) => {
            let found = in_read!(service.db, |c| session::find(c, token).await)?;
            let caller = match found {
                Ok(caller) => caller,
                Err(NoSession::Unknown) => return Err(Fault::authentication("SessionAuth: No such session")),
                Err(NoSession::Ended) => {
                    in_write!(service.db, |c| session::close(c, token).await)?;
                    return Err(Fault::authentication("SessionAuth: Invalid session"));
                }
            };
            match missing_role(&caller, method) {
                Some(roles) => Err(Fault::denied(format!("SessionAuth: missing role, {roles}"))),
                None => Ok((caller, Some(token.clone()))),
            }
        }
        Auth::Password { username, password } => {
            let caller = service
                .sign_in(username, password, from)
                .await
                .map_err(|error| match error {
                    Error::Unauthenticated(why) => Fault::authentication(format!("PasswordAuth: {why}")),
                    error @ Error::RateLimited { .. } => {
                        Fault::authentication(format!("PasswordAuth: {error}"))
                    }
                    other => other.into(),
                })?;
            match missing_role(&caller, method) {
                Some(roles) => Err(Fault::authentication(format!(
                    "PasswordAuth: missing role, {roles}"
                ))),
                None => Ok((caller, None)),
            }
        }
        Auth::Hmac {
            node_id,
            value,
            fresh,
        } => {
            let account = format!("node {node_id}");
            service.limiter.check(&account, from)?;
            let compat = service.config.compat_hmac_sha1;
            let caller = in_write!(service.db, |c| {
                node(c, *node_id, value, fresh.as_ref(), method.name, args, compat).await
            });
            match caller {
                Ok(caller) => match missing_role(&caller, method) {
                    Some(roles) => Err(Fault::authentication(format!("BootAuth: missing role, {roles}"))),
                    None => Ok((caller, None)),
                },
                Err(Error::Unauthenticated(why)) => {
                    service.limiter.failed(&account, from);
                    tracing::info!(%from, node_id, %why, "node refused");
                    Err(Fault::authentication(format!("BootAuth: {why}")))
                }
                Err(error) => Err(error.into()),
            }
        }
        Auth::Anonymous => match method.roles.contains(&Role::Anonymous) {
            true => Ok((Caller::anonymous(), None)),
            false => Err(Fault::authentication(
                "AnonymousAuth: method cannot be called anonymously",
            )),
        },
        Auth::Unsupported(class) => Err(Fault::authentication(format!(
            "{class}: not taken by this authority"
        ))),
    }
}

/// What is missing, if the caller has none of the method's roles.
fn missing_role(caller: &Caller, method: &Method) -> Option<String> {
    if caller.roles.iter().any(|role| method.roles.contains(role)) {
        return None;
    }
    let names = |roles: &[Role]| roles.iter().map(|role| role.name()).collect::<Vec<_>>().join(",");
    let who = match &caller.who {
        Who::Person { email, .. } => email.clone(),
        Who::Node { id } => format!("node {id}"),
        Who::Anonymous | Who::Authority => String::new(),
    };
    Some(format!(
        "method {} has roles [{}] -- caller {who} has roles [{}]",
        method.name,
        names(method.roles),
        names(&caller.roles)
    ))
}

/// A node that signed its call under its NODE_KEY.
///
/// With `timestamp` and `nonce`: `value` is the hex HMAC-SHA256 of the string that REST calls sign, with
/// method `PLCAPI`, the method's name for the path, and the arguments as JSON (members sorted, no blanks) for
/// the body. Without: PlanetLab's HMAC-SHA1 over the argument values, where the operator allows it.
async fn node(
    conn: &mut Conn,
    node_id: i64,
    value: &str,
    fresh: Option<&(u64, String)>,
    method: &str,
    args: &[Value],
    compat: bool,
) -> Result<Caller, Error> {
    let refused = |why: &str| Error::Unauthenticated(why.to_owned());
    let key: Option<String> = sqlx::query_scalar(
        "SELECT node_key FROM nodes WHERE node_id = $1 AND deleted = 0 AND peer_id IS NULL",
    )
    .bind(node_id)
    .fetch_optional(&mut *conn)
    .await?;
    let key = key.ok_or_else(|| refused("No such node"))?;
    let tag = hex::decode(value).map_err(|_| refused("value is not hexadecimal"))?;
    match fresh {
        Some((time, nonce)) => {
            check_time(*time)?;
            let body =
                serde_json::to_vec(&args.iter().map(to_json).collect::<Vec<_>>()).map_err(Error::internal)?;
            let signed = signing_string(
                "PLCAPI",
                method,
                *time,
                nonce,
                &hex::encode(Sha256::digest(&body)),
            );
            if nonce.len() > 128 || !hmac_sha256_is(&key, signed.as_bytes(), &tag) {
                return Err(refused("Call could not be authenticated"));
            }
            use_nonce(conn, node_id, nonce).await?;
        }
        None if compat => {
            if !hmac_sha1_is(&key, compat_canonical(args).as_bytes(), &tag) {
                return Err(refused("Call could not be authenticated"));
            }
        }
        None => {
            return Err(refused(
                "HMAC-SHA1 is off on this authority (--compat-hmac-sha1): sign with HMAC-SHA256, timestamp and nonce",
            ));
        }
    }
    Caller::load_node(conn, node_id)
        .await?
        .ok_or_else(|| refused("No such node"))
}

/// PlanetLab's canonical form: lists flattened, structs as their values, scalars as Python prints them, all
/// sorted and joined in brackets.
fn compat_canonical(args: &[Value]) -> String {
    fn collect(value: &Value, out: &mut Vec<String>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| collect(item, out)),
            Value::Struct(members) => members.values().for_each(|item| collect(item, out)),
            Value::Boolean(true) => out.push("True".into()),
            Value::Boolean(false) => out.push("False".into()),
            Value::Integer(number) => out.push(number.to_string()),
            Value::Long(number) => out.push(number.to_string()),
            Value::Double(number) if number.fract() == 0.0 && number.abs() < 1e16 => {
                out.push(format!("{number:.1}"))
            }
            Value::Double(number) => out.push(number.to_string()),
            Value::String(text) => out.push(text.clone()),
            Value::Base64(bytes) => out.push(base64::engine::general_purpose::STANDARD.encode(bytes)),
            Value::DateTime(time) => out.push(time.to_string()),
            _ => out.push("None".into()),
        }
    }
    let mut parts = Vec::new();
    for arg in args {
        collect(arg, &mut parts);
    }
    parts.sort();
    format!("[{}]", parts.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(value: Option<&Value>) -> String {
        match parse(value) {
            Err(fault) => fault.for_call("", "AuthCheck").text,
            Ok(_) => String::new(),
        }
    }

    fn auth(members: &[(&str, &str)]) -> Value {
        Value::Struct(
            members
                .iter()
                .map(|(k, v)| ((*k).to_owned(), Value::String((*v).to_owned())))
                .collect(),
        )
    }

    #[test]
    fn shapes_are_refused_in_planetlabs_words() {
        assert_eq!(
            text_of(Some(&auth(&[]))),
            ": AuthCheck: Invalid auth value: 'AuthMethod' not specified"
        );
        assert_eq!(
            text_of(Some(&auth(&[("AuthMethod", "magic")]))),
            ": AuthCheck: Invalid AuthMethod value: must be 'session', 'password', 'capability', 'gpg', 'hmac', \
             'hmac_dummybox', 'anonymous'"
        );
        assert_eq!(
            text_of(Some(&Value::Integer(1))),
            ": AuthCheck: Invalid auth value: expected struct, got int"
        );
        assert_eq!(
            text_of(Some(&auth(&[("AuthMethod", "password"), ("Username", "a")]))),
            ": AuthCheck: Invalid auth value: 'AuthString' not specified"
        );
    }

    #[test]
    fn the_old_canonical_form() {
        let args = [
            Value::Struct([("run_level".to_owned(), Value::String("boot".into()))].into()),
            Value::Array(vec![Value::Boolean(true), Value::Nil, Value::Integer(7)]),
        ];
        assert_eq!(compat_canonical(&args), "[7NoneTrueboot]");
        assert_eq!(compat_canonical(&[]), "[]");
    }
}
