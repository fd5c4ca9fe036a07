//! The interface's methods: one table for both wire forms, JSON ([`crate::http`]) and XML-RPC ([`crate::xmlrpc`]).
//!
//! A row says what a method takes and gives, and how it is made from its arguments: an answer at once, or an
//! operation that changes something. Adding a method means adding a row.

use std::sync::Arc;

use mandoline_api::nodemgr::{
    BindAnswer, Done, ErrorBody, ErrorKind, RcapAnswer, RcapsAnswer, RspecAnswer, VmId,
};
use mandoline_rspec::{Rcap, Rspec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::caller::Caller;
use crate::core::{Core, Key};
use crate::ops::{OpResult, Operation, SliceAction};
use crate::store::Outcome;

/// What an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// 32 hexadecimal digits.
    Rcap,
    /// An rspec: an object of attributes.
    Rspec,
    /// Text.
    Text,
    /// An object of its own shape.
    Struct,
    /// A list.
    List,
}

impl Type {
    /// Its name in XML-RPC signatures.
    pub fn signature(self) -> &'static str {
        match self {
            Self::Rcap | Self::Text => "string",
            Self::Rspec | Self::Struct => "struct",
            Self::List => "array",
        }
    }
}

/// A method of the interface.
pub struct Method {
    /// Its name, from the papers where they have it.
    pub name: &'static str,
    /// What it takes, in the order of XML-RPC, by the names of JSON.
    pub args: &'static [(&'static str, Type)],
    /// What it gives, as an XML-RPC type.
    pub returns: &'static str,
    /// What it does, for people.
    pub help: &'static str,
    /// Makes a call of it.
    pub make: fn(&Core, &Caller, &mut Fields) -> OpResult<Step>,
}

/// What a call comes to.
pub enum Step {
    /// It asked something: this is the answer.
    Answer(Answer),
    /// It changes something.
    Change(Operation),
}

/// An answer, in both wire forms.
#[derive(Debug, Clone)]
pub enum Answer {
    /// A pool's rcap.
    Rcap(Rcap),
    /// Rcaps of pools.
    Rcaps(Vec<Rcap>),
    /// What an rcap stands for.
    Rspec(RspecAnswer),
    /// A sliver's id.
    Vm(VmId),
    /// The change is recorded.
    Done,
    /// Anything else.
    Other(Json),
}

impl Answer {
    /// As the body of an HTTP answer.
    pub fn json(self) -> OpResult<Json> {
        match self {
            Self::Rcap(rcap) => json(RcapAnswer { rcap }),
            Self::Rcaps(rcaps) => json(RcapsAnswer { rcaps }),
            Self::Rspec(answer) => json(answer),
            Self::Vm(vm_id) => json(BindAnswer { vm_id }),
            Self::Done => json(Done {}),
            Self::Other(value) => Ok(value),
        }
    }

    /// As the papers' functions give it: the rcap, the rspec or the id itself; 1 for what is done.
    pub fn bare(self) -> OpResult<Json> {
        match self {
            Self::Rcap(rcap) => json(rcap),
            Self::Rcaps(rcaps) => json(rcaps),
            Self::Rspec(answer) => json(answer.rspec),
            Self::Vm(vm_id) => json(vm_id),
            Self::Done => Ok(Json::from(1)),
            Self::Other(value) => Ok(value),
        }
    }
}

fn json<T: Serialize>(value: T) -> OpResult<Json> {
    serde_json::to_value(value).map_err(|error| {
        tracing::error!(%error, "answer cannot be written");
        ErrorBody::new(ErrorKind::Internal, "the answer cannot be written")
    })
}

const OWNER_SCRIPT: &str = "owner_script";

/// Shorthand for an operation on one rcap.
macro_rules! on_rcap {
    ($operation:ident) => {
        |_, _, fields| Ok(Step::Change(Operation::$operation(fields.rcap("rcap")?)))
    };
}

const RCAP: (&str, Type) = ("rcap", Type::Rcap);
const RSPEC: (&str, Type) = ("rspec", Type::Rspec);
const SLICE: (&str, Type) = ("slice_name", Type::Text);

/// Shorthand for what can be done to the sliver of a slice.
macro_rules! on_slice {
    ($action:ident) => {
        |_, _, fields| {
            let operation = Operation::OnSlice(SliceAction::$action, fields.text("slice_name")?);
            Ok(Step::Change(operation))
        }
    };
}

/// All methods.
pub static METHODS: &[Method] = &[
    Method {
        name: "create_root_pool",
        args: &[RSPEC, SLICE],
        returns: "string",
        help: "Makes a pool from what the node has left, for a slice to fetch with get_rcap; the owner only.",
        make: |_, _, fields| {
            let operation = Operation::CreateRootPool(fields.rspec("rspec")?, fields.text("slice_name")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "get_rcap",
        args: &[],
        returns: "string",
        help: "The rcap of the caller's oldest unbound pool.",
        make: |core, caller, _| Ok(Step::Answer(Answer::Rcap(core.oldest_rcap(caller)?))),
    },
    Method {
        name: "get_rcaps",
        args: &[],
        returns: "array",
        help: "The rcaps of all of the caller's unbound pools, oldest first.",
        make: |core, caller, _| Ok(Step::Answer(Answer::Rcaps(core.rcaps(caller)?))),
    },
    Method {
        name: "get_rspec",
        args: &[RCAP],
        returns: "struct",
        help: "What is left in a pool, or what a sliver has.",
        make: |core, caller, fields| {
            let rcap = fields.rcap("rcap")?;
            Ok(Step::Answer(Answer::Rspec(core.rspec(caller, &rcap)?)))
        },
    },
    Method {
        name: "split_pool",
        args: &[RCAP, RSPEC],
        returns: "string",
        help: "Makes a pool from part of another; the other holds that much less.",
        make: |_, _, fields| {
            let operation = Operation::SplitPool(fields.rcap("rcap")?, fields.rspec("rspec")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "acquire",
        args: &[RSPEC],
        returns: "string",
        help: "split_pool from the caller's own oldest pool.",
        make: |_, _, fields| Ok(Step::Change(Operation::Acquire(fields.rspec("rspec")?))),
    },
    Method {
        name: "bind",
        args: &[RCAP, SLICE],
        returns: "int",
        help: "Makes the slice's VM from a pool that names a vm_type, or adds the pool to the VM that is there. \
               Gives the vm_id.",
        make: |_, _, fields| {
            let operation = Operation::Bind(fields.rcap("rcap")?, fields.text("slice_name")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "release",
        args: &[RCAP],
        returns: "int",
        help: "Gives a pool back to the one that it was split from.",
        make: on_rcap!(Release),
    },
    Method {
        name: "start",
        args: &[RCAP],
        returns: "int",
        help: "Lets a sliver run.",
        make: on_rcap!(Start),
    },
    Method {
        name: "stop",
        args: &[RCAP],
        returns: "int",
        help: "Stops a sliver; its disk stays.",
        make: on_rcap!(Stop),
    },
    Method {
        name: "restart",
        args: &[RCAP],
        returns: "int",
        help: "Stops a sliver and starts it again.",
        make: on_rcap!(Restart),
    },
    Method {
        name: "destroy",
        args: &[RCAP],
        returns: "int",
        help: "Ends a sliver and all that it has; its pools return to where they came from.",
        make: on_rcap!(Destroy),
    },
    Method {
        name: "resize",
        args: &[RCAP, RSPEC],
        returns: "int",
        help: "Gives a pool, and the sliver that it is bound to, other amounts of what the rspec names; the rest \
               stays.",
        make: |_, _, fields| {
            let operation = Operation::Resize(fields.rcap("rcap")?, fields.rspec("rspec")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "start_slice",
        args: &[SLICE],
        returns: "int",
        help: "start for the sliver of a slice, by the slice itself, its delegates, or who may stop all slivers.",
        make: on_slice!(Start),
    },
    Method {
        name: "stop_slice",
        args: &[SLICE],
        returns: "int",
        help: "stop for the sliver of a slice, by the slice itself, its delegates, or who may stop all slivers.",
        make: on_slice!(Stop),
    },
    Method {
        name: "restart_slice",
        args: &[SLICE],
        returns: "int",
        help: "restart for the sliver of a slice, by the slice itself, its delegates, or who may stop all slivers.",
        make: on_slice!(Restart),
    },
    Method {
        name: "destroy_slice",
        args: &[SLICE],
        returns: "int",
        help: "destroy for the sliver of a slice, by the slice itself, its delegates or the owner.",
        make: on_slice!(Destroy),
    },
    Method {
        name: "get_loans",
        args: &[SLICE],
        returns: "struct",
        help: "What a slice lends on this node, which loans wait, and what it has with all loans.",
        make: |core, caller, fields| {
            let loans = core.loans(caller, &fields.text("slice_name")?)?;
            Ok(Step::Answer(Answer::Other(json(loans)?)))
        },
    },
    Method {
        name: "set_loans",
        args: &[SLICE, ("loans", Type::List)],
        returns: "int",
        help: "Replaces all that a slice lends: a list of [recipient, resource, amount].",
        make: |_, _, fields| {
            let operation = Operation::SetLoans(fields.text("slice_name")?, fields.of("loans")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "set_node_limit",
        args: &[RSPEC],
        returns: "int",
        help: "Bounds the node as a whole: what it sends, what its pools can hold.",
        make: |_, _, fields| Ok(Step::Change(Operation::SetNodeLimit(fields.rspec("rspec")?))),
    },
    Method {
        name: "deny",
        args: &[SLICE, ("reason", Type::Text)],
        returns: "int",
        help: "Forbids a slice, or all of an authority: their slivers stop, and nothing is bound for them.",
        make: |_, _, fields| {
            let operation = Operation::Deny(fields.text("slice_name")?, fields.text("reason")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "allow",
        args: &[SLICE],
        returns: "int",
        help: "Takes a denial back: what it stopped runs again.",
        make: |_, _, fields| Ok(Step::Change(Operation::Allow(fields.text("slice_name")?))),
    },
    Method {
        name: "grant",
        args: &[SLICE, ("grant", Type::Struct)],
        returns: "int",
        help: "Replaces what a slice may do beyond its own pools: authorities, slices, vm_types, actuators. The owner only.",
        make: |_, _, fields| {
            let operation = Operation::Grant(fields.text("slice_name")?, fields.of("grant")?);
            Ok(Step::Change(operation))
        },
    },
    Method {
        name: "revoke",
        args: &[SLICE],
        returns: "int",
        help: "Takes away what a slice was granted. The owner only.",
        make: |_, _, fields| Ok(Step::Change(Operation::Revoke(fields.text("slice_name")?))),
    },
    Method {
        name: "policy",
        args: &[],
        returns: "struct",
        help: "What the owner has decided: bounds of the node, grants, denials.",
        make: |core, caller, _| Ok(Step::Answer(Answer::Other(json(core.policy(caller)?)?))),
    },
    Method {
        name: OWNER_SCRIPT,
        args: &[("script", Type::Text)],
        returns: "array",
        help: "Applies the owner's script, whole or not at all, and gives its pools' rcaps in order. In JSON, \
               `pools`, `deny`, `grants` and `node_limit` may stand instead of `script`.",
        make: |_, _, fields| Ok(Step::Change(Operation::OwnerScript(fields.rest()?))),
    },
    Method {
        name: "list",
        args: &[],
        returns: "struct",
        help: "The pools and slivers that the caller may see; the owner sees all.",
        make: |core, caller, _| Ok(Step::Answer(Answer::Other(json(core.list(caller)?)?))),
    },
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// Calls a method by its fields. With `key`, a repetition gives the stored answer.
pub async fn call(
    core: &Arc<Core>,
    caller: &Caller,
    method: &'static Method,
    mut fields: Fields,
    key: Option<String>,
) -> OpResult<Answer> {
    let request = fields.digest(method.name);
    fields.only(method)?;
    let step = (method.make)(core, caller, &mut fields)?;
    let key = key.map(|key| Key { key, request });
    perform(core, caller, method.name, step, key).await
}

/// Does what a call comes to.
pub async fn perform(
    core: &Arc<Core>,
    caller: &Caller,
    name: &str,
    step: Step,
    key: Option<Key>,
) -> OpResult<Answer> {
    let operation = match step {
        Step::Answer(answer) => return Ok(answer),
        Step::Change(operation) => operation,
    };
    let outcome = core.execute(caller.clone(), operation, key).await?;
    tracing::info!(%caller, operation = name, ?outcome, "done");
    Ok(match outcome {
        Outcome::Rcap { pool, epoch } => Answer::Rcap(core.rcap(pool, epoch)),
        Outcome::Vm { vm_id } => Answer::Vm(vm_id),
        Outcome::Rcaps { pools } => Answer::Rcaps(
            pools
                .iter()
                .map(|(pool, epoch)| core.rcap(*pool, *epoch))
                .collect(),
        ),
        Outcome::Done => Answer::Done,
    })
}

/// A request that cannot be understood.
pub(crate) fn bad(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorKind::BadRequest, message)
}

/// Checks an idempotency key.
pub(crate) fn check_key(key: &str) -> OpResult<String> {
    match (1..=128).contains(&key.len()) && key.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) {
        true => Ok(key.to_owned()),
        false => {
            Err(bad("the idempotency key cannot be used").allowed("1 to 128 printable ASCII characters"))
        }
    }
}

/// A request's fields: each is taken once, and what a method has not is refused by name.
pub struct Fields(Map<String, Json>);

impl Fields {
    /// The fields of a request's body.
    pub fn new(body: Json) -> OpResult<Self> {
        match body {
            Json::Object(fields) => Ok(Self(fields)),
            _ => Err(bad("the request is no JSON object").allowed("an object with the operation's fields")),
        }
    }

    /// What tells whether a repeated key came with the same request: JSON objects are sorted here.
    fn digest(&self, operation: &str) -> String {
        let text = format!("{operation}\n{}", Json::Object(self.0.clone()));
        hex::encode(Sha256::digest(text.as_bytes()))
    }

    fn only(&self, method: &Method) -> OpResult<()> {
        // Its parts beside `script` have no place in XML-RPC; what it has not is refused when it is read.
        if method.name == OWNER_SCRIPT {
            return Ok(());
        }
        let is_foreign = |name: &&String| !method.args.iter().any(|(known, _)| known == name);
        match self.0.keys().find(is_foreign) {
            Some(name) => Err(ErrorBody {
                attribute: Some(name.clone()),
                ..bad(format!("the operation {} has no field `{name}`", method.name))
            }),
            None => Ok(()),
        }
    }

    fn take(&mut self, name: &str) -> OpResult<Json> {
        self.0.remove(name).ok_or_else(|| ErrorBody {
            attribute: Some(name.to_owned()),
            ..bad(format!("the request lacks the field `{name}`"))
        })
    }

    /// A field that is text.
    pub fn text(&mut self, name: &str) -> OpResult<String> {
        match self.take(name)? {
            Json::String(text) => Ok(text),
            _ => Err(ErrorBody {
                attribute: Some(name.to_owned()),
                ..bad(format!("`{name}` is not text"))
            }),
        }
    }

    /// A field that is an rcap.
    pub fn rcap(&mut self, name: &str) -> OpResult<Rcap> {
        let text = self.text(name)?;
        Rcap::from_hex(&text).map_err(|error| ErrorBody {
            attribute: Some(name.to_owned()),
            ..bad(error.to_string()).allowed("32 hexadecimal digits")
        })
    }

    /// A field of a shape of its own.
    pub fn of<T: DeserializeOwned>(&mut self, name: &str) -> OpResult<T> {
        serde_json::from_value(self.take(name)?).map_err(|error| ErrorBody {
            attribute: Some(name.to_owned()),
            ..bad(format!("`{name}` cannot be read: {error}"))
        })
    }

    /// All fields together, as one thing.
    pub fn rest<T: DeserializeOwned>(&mut self) -> OpResult<T> {
        let fields = Json::Object(std::mem::take(&mut self.0));
        serde_json::from_value(fields).map_err(|error| bad(format!("the request cannot be read: {error}")))
    }

    /// A field that is an rspec.
    pub fn rspec(&mut self, name: &str) -> OpResult<Rspec> {
        Ok(Rspec::from_json(&self.take(name)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_tables_names_are_unique_and_their_types_exist() {
        let names: BTreeSet<_> = METHODS.iter().map(|method| method.name).collect();
        assert_eq!(names.len(), METHODS.len());
        for method in METHODS {
            assert!(
                ["string", "array", "struct", "int"].contains(&method.returns),
                "{}",
                method.name
            );
            assert!(method.help.ends_with('.'), "{}", method.name);
        }
    }

    #[test]
    fn keys_are_printable_and_bounded() {
        assert!(check_key("a key").is_ok());
        for bad in ["", "new\nline", "\u{e9}", &"k".repeat(129)] {
            assert!(check_key(bad).is_err(), "{bad:?}");
        }
    }
}
