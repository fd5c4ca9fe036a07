//! What a PLCAPI method is: its name, who may call it, what it takes and gives. One table of these drives
//! the checks before a body runs, and `system.methodSignature` and `methodHelp`.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use mandoline_api::xmlrpc::Value;
use serde_json::Value as Json;

use super::fault::Fault;
use super::value::type_name;
use crate::domain::{Caller, Ref, Role};
use crate::service::Service;

/// What one call works with.
#[derive(Clone, Debug)]
pub(super) struct Ctx {
    pub(super) service: Arc<Service>,
    pub(super) caller: Caller,
    /// Where it came from.
    pub(super) from: IpAddr,
    /// The session that it was made with, if it was.
    pub(super) session: Option<String>,
}

/// The future of a method's body.
pub(super) type Body<'a> = Pin<Box<dyn Future<Output = Result<Json, Fault>> + Send + 'a>>;

/// The type of an argument or a field.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ty {
    Int,
    Bool,
    Double,
    /// At most so many bytes.
    Str(usize),
    /// A number or a name.
    Key,
    /// A list of numbers and names.
    Keys,
    /// nil, a number, a name, a list of them, or a struct of conditions.
    Filter,
    /// nil or a list of field names.
    Fields,
    /// A struct with these fields; others are for the body to judge.
    Struct(&'static [FieldTy]),
    /// A list of structs (multicall).
    Calls,
}

/// A field of a struct argument.
#[derive(Clone, Copy, Debug)]
pub(super) struct FieldTy {
    pub(super) name: &'static str,
    pub(super) ty: Ty,
    pub(super) required: bool,
    pub(super) nullable: bool,
}

/// A field that may be left out or nil.
pub(super) const fn field(name: &'static str, ty: Ty) -> FieldTy {
    FieldTy {
        name,
        ty,
        required: false,
        nullable: true,
    }
}

/// A field that must be there.
pub(super) const fn needed(name: &'static str, ty: Ty) -> FieldTy {
    FieldTy {
        name,
        ty,
        required: true,
        nullable: false,
    }
}

/// An argument.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arg {
    pub(super) name: &'static str,
    pub(super) ty: Ty,
    pub(super) optional: bool,
}

pub(super) const fn arg(name: &'static str, ty: Ty) -> Arg {
    Arg {
        name,
        ty,
        optional: false,
    }
}

pub(super) const fn opt(name: &'static str, ty: Ty) -> Arg {
    Arg {
        name,
        ty,
        optional: true,
    }
}

/// A method.
#[derive(Clone, Copy)]
pub struct Method {
    pub(super) name: &'static str,
    /// Who may call it; nobody named: everybody, without an auth struct (`system.*`).
    pub(super) roles: &'static [Role],
    /// Arguments after the auth struct.
    pub(super) args: &'static [Arg],
    /// What it gives, by XML-RPC's type names.
    pub(super) returns: &'static str,
    pub(super) help: &'static str,
    pub(super) run: for<'a> fn(&'a Ctx, &'a Args) -> Body<'a>,
}

impl std::fmt::Debug for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Method")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Method {
    /// Whether its first argument is an auth struct.
    pub(super) fn takes_auth(&self) -> bool {
        !self.roles.is_empty()
    }

    /// Fails if too few or too many arguments were given; the auth struct counts.
    pub(super) fn check_count(&self, got: usize) -> Result<(), Fault> {
        let auth = usize::from(self.takes_auth());
        let least = auth + self.args.iter().filter(|arg| !arg.optional).count();
        let most = auth + self.args.len();
        match (least..=most).contains(&got) {
            true => Ok(()),
            false => Err(Fault::argument_count(least, most, got)),
        }
    }

    /// Fails at the first argument, left to right, of a wrong type. `values` are those after the auth struct.
    pub(super) fn check_types(&self, values: &[Value]) -> Result<(), Fault> {
        for (arg, value) in self.args.iter().zip(values) {
            if arg.optional && matches!(value, Value::Nil) {
                continue;
            }
            check(arg.name, value, arg.ty)?;
        }
        Ok(())
    }
}

fn check(name: &str, value: &Value, ty: Ty) -> Result<(), Fault> {
    let expected = |word: &str| {
        Err(Fault::argument(
            name,
            &format!("expected {word}, got {}", type_name(value)),
        ))
    };
    match (ty, value) {
        // In Python, which PlanetLab's server was written in, a boolean is an int.
        (Ty::Int, Value::Integer(_) | Value::Long(_) | Value::Boolean(_)) => Ok(()),
        (Ty::Int, _) => expected("int"),
        (Ty::Bool, Value::Boolean(_)) => Ok(()),
        (Ty::Bool, _) => expected("boolean"),
        (Ty::Double, Value::Double(_) | Value::Integer(_) | Value::Long(_)) => Ok(()),
        (Ty::Double, _) => expected("double"),
        (Ty::Str(max), Value::String(text)) if text.len() > max => Err(Fault::argument(
            name,
            &format!("{name} must be at most {max} bytes long"),
        )),
        (Ty::Str(_), Value::String(_)) => Ok(()),
        (Ty::Str(_), _) => expected("string"),
        (Ty::Key, Value::Integer(_) | Value::Long(_) | Value::Boolean(_) | Value::String(_)) => Ok(()),
        (Ty::Key, _) => expected("int or string"),
        (Ty::Keys, Value::Array(items)) => items.iter().try_for_each(|item| check(name, item, Ty::Key)),
        (Ty::Keys, _) => expected("array"),
        (Ty::Filter, Value::Array(items)) => items.iter().try_for_each(|item| check(name, item, Ty::Key)),
        (Ty::Filter, Value::Struct(_)) => Ok(()),
        (Ty::Filter, _) => check(name, value, Ty::Key).or_else(|_| expected("struct")),
        (Ty::Fields, Value::Array(items)) => {
            items.iter().try_for_each(|item| check(name, item, Ty::Str(254)))
        }
        (Ty::Fields, _) => expected("array"),
        (Ty::Struct(fields), Value::Struct(members)) => {
            for field in fields {
                match members.get(field.name) {
                    Some(Value::Nil) if field.nullable => {}
                    Some(value) => check(field.name, value, field.ty)?,
                    None if field.required => {
                        return Err(Fault::argument(name, &format!("'{}' not specified", field.name)));
                    }
                    None => {}
                }
            }
            Ok(())
        }
        (Ty::Struct(_), _) => expected("struct"),
        (Ty::Calls, Value::Array(_)) => Ok(()),
        (Ty::Calls, _) => expected("array"),
    }
}

/// The name of a type in `system.methodSignature`.
pub(super) fn signature_name(ty: Ty) -> &'static str {
    match ty {
        Ty::Int => "int",
        Ty::Bool => "boolean",
        Ty::Double => "double",
        Ty::Str(_) => "string",
        Ty::Key => "int or string",
        Ty::Keys | Ty::Fields | Ty::Calls => "array",
        Ty::Filter | Ty::Struct(_) => "struct",
    }
}

/// The arguments after the auth struct, of checked types.
#[derive(Clone, Debug)]
pub(super) struct Args(pub(super) Vec<Value>);

impl Args {
    /// The argument, or nil if it was left out.
    pub(super) fn get(&self, index: usize) -> &Value {
        self.0.get(index).unwrap_or(&Value::Nil)
    }

    pub(super) fn int(&self, index: usize) -> Option<i64> {
        int(self.get(index))
    }

    pub(super) fn text(&self, index: usize) -> Option<&str> {
        match self.get(index) {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A thing by number or name; a type check has made sure that it is one of the two.
    pub(super) fn key(&self, index: usize) -> Result<Ref, Fault> {
        self.opt_key(index)
            .ok_or_else(|| Fault::invalid("expected int or string"))
    }

    pub(super) fn opt_key(&self, index: usize) -> Option<Ref> {
        key(self.get(index))
    }

    pub(super) fn keys(&self, index: usize) -> Vec<Ref> {
        match self.get(index) {
            Value::Array(items) => items.iter().filter_map(key).collect(),
            _ => Vec::new(),
        }
    }

    /// A struct argument, to take its fields out of.
    pub(super) fn fields(&self, index: usize) -> Fields {
        match self.get(index) {
            Value::Struct(members) => Fields(members.clone()),
            _ => Fields(Default::default()),
        }
    }
}

fn int(value: &Value) -> Option<i64> {
    match value {
        Value::Integer(number) => Some(i64::from(*number)),
        Value::Long(number) => Some(*number),
        Value::Boolean(value) => Some(i64::from(*value)),
        _ => None,
    }
}

fn key(value: &Value) -> Option<Ref> {
    match value {
        Value::String(name) => Some(Ref::Name(name.clone())),
        other => int(other).map(Ref::Id),
    }
}

/// The fields of a struct argument; what is left at the end is unknown.
#[derive(Clone, Debug)]
pub(super) struct Fields(std::collections::BTreeMap<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !matches!(value, Value::Nil))
    }

    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn int(&mut self, name: &str) -> Option<i64> {
        int(&self.take(name)?)
    }

    pub(super) fn flag(&mut self, name: &str) -> Option<bool> {
        int(&self.take(name)?).map(|number| number != 0)
    }

    pub(super) fn double(&mut self, name: &str) -> Option<f64> {
        match self.take(name)? {
            Value::Double(number) => Some(number),
            other => int(&other).map(|number| number as f64),
        }
    }

    /// What was not taken, as (name, text).
    pub(super) fn rest(&mut self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.0).into_iter().collect()
    }

    /// Fails if something was not taken: `Cannot add Slice with column(s) ['x']`.
    pub(super) fn finish(self, what: &str) -> Result<(), Fault> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(unknown_columns(what, self.0.keys())),
        }
    }
}

/// The fault for fields that nobody knows.
pub(super) fn unknown_columns<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Fault {
    let names: Vec<_> = names.map(|name| format!("'{name}'")).collect();
    Fault::invalid(format!("Cannot {what} with column(s) [{}]", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_named_as_planetlab_names_them() {
        const NAMED: &[FieldTy] = &[needed("name", Ty::Str(64))];
        let text = |value: Value, ty| check("slice_fields", &value, ty).unwrap_err().text;
        assert_eq!(
            text(Value::Integer(1), Ty::Struct(&[])),
            "Invalid slice_fields value: expected struct, got int"
        );
        assert_eq!(
            text(Value::Struct(Default::default()), Ty::Struct(NAMED)),
            "Invalid slice_fields value: 'name' not specified"
        );
        assert_eq!(
            text(Value::String("x".repeat(65)), Ty::Str(64)),
            "Invalid slice_fields value: slice_fields must be at most 64 bytes long"
        );
        assert!(check("n", &Value::Boolean(true), Ty::Int).is_ok());
        assert!(check("n", &Value::Integer(1), Ty::Bool).is_err());
        assert!(check("f", &Value::Array(vec![Value::Nil]), Ty::Filter).is_err());
    }
}
