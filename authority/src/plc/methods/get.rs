//! The Get* methods: one function over the descriptions of the objects, and who may see what.

use serde_json::{Value as Json, json};

use crate::db::Conn;
use crate::domain::{Caller, Role, persons};
use crate::error::Result;
use crate::in_read;
use crate::plc::fault::Fault;
use crate::plc::method::{Arg, Args, Ctx, Method, Ty, opt};
use crate::plc::objects::{self, GetError, Object, Sight};
use crate::plc::value::to_json;

const FILTERED: &[Arg] = &[opt("filter", Ty::Filter), opt("return_fields", Ty::Fields)];
const ALL: &[Role] = &[Role::Admin, Role::Pi, Role::User, Role::Tech, Role::Node];
const ALL_AND_ANONYMOUS: &[Role] = &[
    Role::Admin,
    Role::Pi,
    Role::User,
    Role::Tech,
    Role::Node,
    Role::Anonymous,
];

macro_rules! get {
    ($name:literal, $object:ident, $roles:expr, $help:literal) => {
        Method {
            name: $name,
            roles: $roles,
            args: FILTERED,
            returns: "array",
            help: $help,
            run: |ctx, args| Box::pin(get(ctx, args, &objects::$object)),
        }
    };
}

pub(super) static METHODS: &[Method] = &[
    get!(
        "GetPersons",
        PERSON,
        ALL,
        "Persons: admins and nodes see all, others those of their sites and slices."
    ),
    get!("GetKeys", KEY, ALL, "Keys: admins see all, others their own."),
    get!("GetSites", SITE, ALL_AND_ANONYMOUS, "Sites."),
    get!(
        "GetNodes",
        NODE,
        ALL_AND_ANONYMOUS,
        "Nodes; key, session and boot_nonce for admins only."
    ),
    get!(
        "GetSlices",
        SLICE,
        ALL,
        "Slices; tags may be asked for and filtered by as fields."
    ),
    get!("GetSliceTags", SLICE_TAG, ALL, "Tags of slices and slivers."),
    get!(
        "GetInitScripts",
        INITSCRIPT,
        ALL,
        "Boot scripts that slices may name."
    ),
];

async fn get(ctx: &Ctx, args: &Args, object: &'static Object) -> std::result::Result<Json, Fault> {
    let (filter, fields) = (to_json(args.get(0)), to_json(args.get(1)));
    // A fault of the caller's goes through the transaction as a value: there is nothing to run again.
    let outcome = in_read!(ctx.service.db, |c| {
        let sight = sight(c, &ctx.caller, object).await?;
        match object.get(c, &sight, &filter, &fields).await {
            Ok(records) => Ok(Ok(records)),
            Err(GetError::Fault(fault)) => Ok(Err(fault)),
            Err(GetError::Error(error)) => Err(error),
        }
    })?;
    Ok(json!(outcome?))
}

async fn sight(conn: &mut Conn, caller: &Caller, object: &Object) -> Result<Sight> {
    let all = Sight {
        secrets: caller.is_admin(),
        only: None,
    };
    if caller.is_admin() {
        return Ok(all);
    }
    match (object.name, caller.person_id()) {
        ("Person", Some(_)) => Ok(Sight {
            only: persons::seen_by(conn, caller).await?,
            ..all
        }),
        ("Key", Some(me)) => {
            let own: Vec<i64> = sqlx::query_scalar("SELECT key_id FROM keys WHERE person_id = $1")
                .bind(me)
                .fetch_all(conn)
                .await?;
            Ok(Sight {
                only: Some(own.into_iter().collect()),
                ..all
            })
        }
        _ => Ok(all),
    }
}
