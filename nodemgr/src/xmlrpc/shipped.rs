//! The 15 functions of the node manager that PlanetLab shipped, as a view on pools and slivers: same names, order
//! of arguments, results and faults, so that a controller slice's programs work.
//!
//! A sliver is named by its slice. *Delegate* is whoever holds the pool that the sliver was made from, and whom
//! its attribute `delegations` names.

use std::pin::Pin;
use std::sync::Arc;

use mandoline_api::nodemgr::{ErrorBody, ErrorKind, LoansAnswer, SliverInfo};
use mandoline_api::xmlrpc::{Fault, Value, to_json};
use mandoline_rspec::{Loan, Rcap};
use serde_json::{Map, Value as Json, json};

use super::{fault, finish};
use crate::caller::Caller;
use crate::core::Core;
use crate::methods::{self, Step};
use crate::ops::{OpResult, Operation};

type Work<'a> = Pin<Box<dyn Future<Output = Result<Json, Fault>> + Send + 'a>>;

/// What a function does with the sliver that its first argument names.
enum Kind {
    /// It takes nothing and tells about all slivers.
    Ask(fn(&Core, &Caller) -> OpResult<Json>),
    /// It tells about one sliver.
    Tell(fn(&SliverInfo) -> Json),
    /// It changes one sliver.
    Change(fn(Rcap) -> Operation),
    /// `Create`: the sliver is not there yet.
    Create,
    /// It tells about a slice's loans.
    Loans(fn(&Core, LoansAnswer) -> Json),
    /// `SetLoans`.
    SetLoans,
    /// Not in this node manager; why, and what to use.
    Lacking(&'static str),
}

/// One of the functions.
pub(super) struct Function {
    pub(super) name: &'static str,
    pub(super) signature: &'static [&'static str],
    pub(super) help: &'static str,
    kind: Kind,
}

const NO_TICKETS: &str = "this node manager takes no tickets; the slice creation service delivers slivers";

pub(super) static FUNCTIONS: &[Function] = &[
    Function {
        name: "Help",
        signature: &["string"],
        help: "Help(): what all functions do.",
        kind: Kind::Ask(|_, _| Ok(json!(help()))),
    },
    Function {
        name: "Ticket",
        signature: &["int", "string"],
        help: "Ticket(ticket): delivers a slice's record.",
        kind: Kind::Lacking(NO_TICKETS),
    },
    Function {
        name: "AdminTicket",
        signature: &["int", "string"],
        help: "AdminTicket(ticket): delivers records, unsigned.",
        kind: Kind::Lacking(NO_TICKETS),
    },
    Function {
        name: "GetXIDs",
        signature: &["struct"],
        help: "GetXIDs(): for each slice the number by which the node marks its packets, the vm_id of its sliver.",
        kind: Kind::Ask(|core, _| by_slice(core, |sliver| json!(sliver.event.vm_id))),
    },
    Function {
        name: "GetSSHKeys",
        signature: &["struct"],
        help: "GetSSHKeys(): for each slice the public keys of its users, one a line.",
        kind: Kind::Ask(|core, _| by_slice(core, |sliver| json!(sliver.rspec.keys().join("\n")))),
    },
    Function {
        name: "Create",
        signature: &["int", "string"],
        help: "Create(sliver_name): makes the sliver from a pool with a vm_type that its slice holds on this node.",
        kind: Kind::Create,
    },
    Function {
        name: "Destroy",
        signature: &["int", "string"],
        help: "Destroy(sliver_name): ends a sliver and all that it has.",
        kind: Kind::Change(Operation::Destroy),
    },
    Function {
        name: "Start",
        signature: &["int", "string"],
        help: "Start(sliver_name): lets a sliver run.",
        kind: Kind::Change(Operation::Start),
    },
    Function {
        name: "Stop",
        signature: &["int", "string"],
        help: "Stop(sliver_name): ends all processes of a sliver; its disk stays.",
        kind: Kind::Change(Operation::Stop),
    },
    Function {
        name: "ReCreate",
        signature: &["int", "string"],
        help: "ReCreate(sliver_name): stops a sliver and starts it again.",
        kind: Kind::Change(Operation::Restart),
    },
    Function {
        name: "GetEffectiveRSpec",
        signature: &["struct", "string"],
        help: "GetEffectiveRSpec(sliver_name): what a sliver has in all.",
        kind: Kind::Tell(rspec),
    },
    Function {
        name: "GetRSpec",
        signature: &["struct", "string"],
        help: "GetRSpec(sliver_name): what a sliver has without loans.",
        kind: Kind::Loans(|_, answer| serde_json::to_value(&answer.rspec).unwrap_or_default()),
    },
    Function {
        name: "GetLoans",
        signature: &["array", "string"],
        help: "GetLoans(sliver_name): [recipient, resource, amount] for each loan.",
        kind: Kind::Loans(loans),
    },
    Function {
        name: "SetLoans",
        signature: &["int", "string", "array"],
        help: "SetLoans(sliver_name, [[recipient, resource, amount], ...]): lends resources.",
        kind: Kind::SetLoans,
    },
    Function {
        name: "GetRecord",
        signature: &["struct"],
        help: "GetRecord(): all that is recorded of the caller's own sliver.",
        kind: Kind::Ask(record),
    },
];

pub(super) fn find(name: &str) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|function| function.name == name)
}

impl Function {
    pub(super) fn call<'a>(
        &'static self,
        core: &'a Arc<Core>,
        caller: &'a Caller,
        args: &'a [Value],
    ) -> Work<'a> {
        Box::pin(async move {
            let wanted = self.signature.len() - 1;
            if args.len() != wanted {
                return Err(fault::count(args.len(), wanted));
            }
            let name = match args.first() {
                None => "",
                Some(Value::String(name)) => name,
                Some(_) => return Err(no_sliver()),
            };
            let outcome = match &self.kind {
                Kind::Ask(ask) => ask(core, caller),
                Kind::Lacking(why) => Err(ErrorBody::new(ErrorKind::Unavailable, *why)),
                Kind::Tell(tell) => sliver(core, caller, name)?.map(|sliver| tell(&sliver)),
                Kind::Loans(tell) => match sliver(core, caller, name)? {
                    Ok(_) => core.loans(caller, name).map(|answer| tell(core, answer)),
                    Err(error) => Err(error),
                },
                Kind::SetLoans => match (sliver(core, caller, name)?, wanted_loans(args.get(1))?) {
                    (Ok(_), loans) => {
                        let operation = Operation::SetLoans(name.to_owned(), loans);
                        change(core, caller, self.name, operation).await
                    }
                    (Err(error), _) => Err(error),
                },
                Kind::Change(operation) => match sliver(core, caller, name)? {
                    Ok(sliver) => change(core, caller, self.name, operation(sliver.rcap)).await,
                    Err(error) => Err(error),
                },
                Kind::Create => match pool(core, caller, name) {
                    Ok(rcap) => change(core, caller, self.name, Operation::Bind(rcap, name.to_owned()))
                        .await
                        .map(|_| json!(1)),
                    Err(error) => Err(error),
                },
            };
            finish(caller, self.name, outcome)
        })
    }
}

async fn change(core: &Arc<Core>, caller: &Caller, name: &str, operation: Operation) -> OpResult<Json> {
    methods::perform(core, caller, name, Step::Change(operation), None)
        .await?
        .bare()
}

/// Loans by the names that shipped clients know: those of accounts.
fn loans(core: &Core, answer: LoansAnswer) -> Json {
    let loans = answer.loans.iter();
    let one = |loan: &Loan| json!([core.rules.account(&loan.recipient), loan.resource, loan.amount]);
    Json::Array(loans.map(one).collect())
}

fn wanted_loans(argument: Option<&Value>) -> Result<Vec<(String, String, u64)>, Fault> {
    let json = argument.map(to_json).unwrap_or_default();
    serde_json::from_value(json)
        .map_err(|_| fault::argument("the second argument must be a list of [recipient, resource, amount]."))
}

fn no_sliver() -> Fault {
    fault::argument("the first argument must be a sliver name.")
}

/// A sliver that the caller may change: its own, or one whose pool it holds. That there is none is the fault that
/// shipped clients know; that it is somebody else's is a refusal.
fn sliver(core: &Core, caller: &Caller, name: &str) -> Result<OpResult<SliverInfo>, Fault> {
    let slice = core.rules.slice(name).map_err(|_| no_sliver())?.to_string();
    let find = |caller: &Caller| -> OpResult<Option<SliverInfo>> {
        Ok(core
            .list(caller)?
            .slivers
            .into_iter()
            .rfind(|sliver| sliver.event.slice == slice))
    };
    match (find(&Caller::Owner), core.acts_for(caller, name)) {
        (Ok(None), _) => Err(no_sliver()),
        (Ok(Some(sliver)), Ok(true)) => Ok(Ok(sliver)),
        (Ok(_), Ok(false)) => Ok(Err(ErrorBody::new(
            ErrorKind::Forbidden,
            format!("sliver {slice} is not the caller's"),
        )
        .allowed(
            "the slice itself, who holds the pool that it was made from, and its `delegations`",
        ))),
        (Err(error), _) | (_, Err(error)) => Ok(Err(error)),
    }
}

/// The oldest pool from which the slice's sliver can be made.
fn pool(core: &Core, caller: &Caller, name: &str) -> OpResult<Rcap> {
    let slice = core.rules.slice(name)?.to_string();
    let pools = core.list(caller)?.pools;
    let found = pools
        .into_iter()
        .find(|pool| pool.holder == slice && !pool.retired && pool.granted.vm_type().is_some());
    found.map(|pool| pool.rcap).ok_or_else(|| {
        let error = ErrorBody::new(ErrorKind::Conflict, "Only PLC can create non delegated slivers.");
        error.allowed(format!(
            "a slice that holds a pool with a vm_type on this node, which {slice} does not"
        ))
    })
}

fn by_slice(core: &Core, value: fn(&SliverInfo) -> Json) -> OpResult<Json> {
    let slivers = core.list(&Caller::Owner)?.slivers;
    let members = slivers
        .iter()
        .map(|sliver| (sliver.account.clone(), value(sliver)));
    Ok(Json::Object(members.collect::<Map<_, _>>()))
}

fn rspec(sliver: &SliverInfo) -> Json {
    serde_json::to_value(&sliver.rspec).unwrap_or_default()
}

fn record(core: &Core, caller: &Caller) -> OpResult<Json> {
    let Caller::Slice(slice) = caller else {
        return Err(ErrorBody::new(ErrorKind::NotFound, "the caller is no slice")
            .allowed("a sliver, or a service that acts as a slice"));
    };
    let name = slice.to_string();
    let own = core
        .list(caller)?
        .slivers
        .into_iter()
        .rfind(|sliver| sliver.event.slice == name);
    let Some(own) = own else {
        return Err(ErrorBody::new(
            ErrorKind::NotFound,
            format!("slice {name} has no sliver on this node"),
        ));
    };
    Ok(json!({
        "name": own.account,
        "slice": own.event.slice,
        "vm_id": own.event.vm_id,
        "type": format!("sliver.{}", own.event.vm_type),
        "state": own.event.state,
        "keys": own.rspec.keys().join("\n"),
        "initscript": own.rspec.text("initscript").unwrap_or(""),
        "rspec": rspec(&own),
    }))
}

fn help() -> String {
    let lines: Vec<_> = FUNCTIONS.iter().map(|function| function.help).collect();
    lines.join("\n")
}
