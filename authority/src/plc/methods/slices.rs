//! Slices, their users, nodes and tags.

use mandoline_api::xmlrpc::Value;
use serde_json::{Value as Json, json};

use crate::domain::slices::{self, NewSlice, SliceChange};
use crate::domain::{Ref, Role, slice_members, tags};
use crate::in_write;
use crate::plc::fault::Fault;
use crate::plc::method::{
    Args, Body, Ctx, FieldTy, Fields, Method, Ty, arg, field, needed, opt, unknown_columns,
};
use crate::plc::value::to_json;

const SLICE_FIELDS: &[FieldTy] = &[
    needed("name", Ty::Str(64)),
    field("instantiation", Ty::Str(32)),
    field("url", Ty::Str(254)),
    field("description", Ty::Str(2048)),
    field("max_nodes", Ty::Int),
];
const SLICE_CHANGES: &[FieldTy] = &[
    field("instantiation", Ty::Str(32)),
    field("url", Ty::Str(254)),
    field("description", Ty::Str(2048)),
    field("max_nodes", Ty::Int),
    field("expires", Ty::Int),
];
const USERS: &[Role] = &[Role::Admin, Role::Pi, Role::User];

pub(super) static METHODS: &[Method] = &[
    Method {
        name: "AddSlice",
        roles: &[Role::Admin, Role::Pi],
        args: &[arg("slice_fields", Ty::Struct(SLICE_FIELDS))],
        returns: "int",
        help: "Adds a slice, named <login_base of its site>_<name>, for two weeks; returns its slice_id. Tags \
               (vm_type, mem_limit, ...) may be among the fields.",
        run: |ctx, args| Box::pin(add_slice(ctx, args)),
    },
    Method {
        name: "UpdateSlice",
        roles: USERS,
        args: &[
            arg("slice_id_or_name", Ty::Key),
            arg("slice_fields", Ty::Struct(SLICE_CHANGES)),
        ],
        returns: "int",
        help: "Changes or renews a slice: its users, the PIs of its site, admins. Renewal: at most eight weeks \
               ahead, with a url and a description.",
        run: |ctx, args| Box::pin(update_slice(ctx, args)),
    },
    Method {
        name: "DeleteSlice",
        roles: USERS,
        args: &[arg("slice_id_or_name", Ty::Key)],
        returns: "int",
        help: "Deletes a slice and its slivers; its record is kept for audit.",
        run: |ctx, args| {
            Box::pin(async move {
                let slice = args.key(0)?;
                in_write!(ctx.service.db, |c| slices::delete(c, &ctx.caller, &slice).await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "AddPersonToSlice",
        roles: &[Role::Admin, Role::Pi],
        args: &[
            arg("person_id_or_email", Ty::Key),
            arg("slice_id_or_name", Ty::Key),
        ],
        returns: "int",
        help: "Makes a person a user of a slice. Twice is no error.",
        run: |ctx, args| {
            Box::pin(async move {
                let (person, slice) = (args.key(0)?, args.key(1)?);
                in_write!(ctx.service.db, |c| slice_members::add_person(
                    c,
                    &ctx.caller,
                    &person,
                    &slice
                )
                .await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "DeletePersonFromSlice",
        roles: &[Role::Admin, Role::Pi],
        args: &[
            arg("person_id_or_email", Ty::Key),
            arg("slice_id_or_name", Ty::Key),
        ],
        returns: "int",
        help: "Ends a person's use of a slice.",
        run: |ctx, args| {
            Box::pin(async move {
                let (person, slice) = (args.key(0)?, args.key(1)?);
                in_write!(ctx.service.db, |c| slice_members::remove_person(
                    c,
                    &ctx.caller,
                    &person,
                    &slice
                )
                .await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "AddSliceToNodes",
        roles: USERS,
        args: &[
            arg("slice_id_or_name", Ty::Key),
            arg("node_id_or_hostname_list", Ty::Keys),
        ],
        returns: "int",
        help: "Gives a slice a sliver on each of the nodes. What a node lacks (vm_type) is refused, naming the \
               node and what it has; so are unknown nodes, unless the authority was told to skip them.",
        run: |ctx, args| Box::pin(change_nodes(ctx, args, true)),
    },
    Method {
        name: "DeleteSliceFromNodes",
        roles: USERS,
        args: &[
            arg("slice_id_or_name", Ty::Key),
            arg("node_id_or_hostname_list", Ty::Keys),
        ],
        returns: "int",
        help: "Ends a slice's slivers on the nodes.",
        run: |ctx, args| Box::pin(change_nodes(ctx, args, false)),
    },
    Method {
        name: "AddSliceTag",
        roles: USERS,
        args: &[
            arg("slice_id_or_name", Ty::Key),
            arg("tag_type_id_or_name", Ty::Key),
            arg("value", Ty::Str(65_536)),
            opt("node_id_or_hostname", Ty::Key),
            opt("nodegroup_id_or_name", Ty::Key),
        ],
        returns: "int",
        help: "Tags a slice, or its sliver on one node; returns the slice_tag_id. Tags that are attributes of the \
               rspec (vm_type, cpu_share, mem_limit, ...) are checked against its table.",
        run: |ctx, args| Box::pin(add_tag(ctx, args)),
    },
    Method {
        name: "UpdateSliceTag",
        roles: USERS,
        args: &[arg("slice_tag_id", Ty::Int), arg("value", Ty::Str(65_536))],
        returns: "int",
        help: "Changes a tag's value.",
        run: |ctx, args| {
            Box::pin(async move {
                let (tag, value) = (args.int(0).unwrap_or_default(), args.text(1).unwrap_or_default());
                in_write!(ctx.service.db, |c| tags::update(c, &ctx.caller, tag, value).await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "DeleteSliceTag",
        roles: USERS,
        args: &[arg("slice_tag_id", Ty::Int)],
        returns: "int",
        help: "Deletes a tag.",
        run: |ctx, args| {
            Box::pin(async move {
                let tag = args.int(0).unwrap_or_default();
                in_write!(ctx.service.db, |c| tags::delete(c, &ctx.caller, tag).await)?;
                Ok(json!(1))
            })
        },
    },
];

/// What is left of the fields must be tags; their values are text.
fn tags_of(fields: &mut Fields, what: &str) -> Result<Vec<(String, String)>, Fault> {
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    for (name, value) in fields.rest() {
        match (mandoline_rspec::attribute(&name).is_some(), value) {
            (_, Value::Nil) => {}
            (true, Value::String(text)) => found.push((name, text)),
            (true, other) => found.push((name, to_json(&other).to_string())),
            (false, _) => unknown.push(name),
        }
    }
    match unknown.is_empty() {
        true => Ok(found),
        false => Err(unknown_columns(what, unknown.iter())),
    }
}

fn add_slice<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let mut fields = args.fields(0);
        let slice = NewSlice {
            name: fields.text("name").unwrap_or_default(),
            instantiation: fields.text("instantiation"),
            url: fields.text("url"),
            description: fields.text("description"),
            max_nodes: fields.int("max_nodes"),
        };
        let with = tags_of(&mut fields, "add Slice")?;
        let id = in_write!(ctx.service.db, |c| {
            let id = slices::add(c, &ctx.caller, &slice).await?;
            for (name, value) in &with {
                tags::add(
                    c,
                    &ctx.caller,
                    &Ref::Id(id),
                    &Ref::Name(name.clone()),
                    value,
                    None,
                )
                .await?;
            }
            Ok(id)
        })?;
        Ok(json!(id))
    })
}

fn update_slice<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let key = args.key(0)?;
        let mut fields = args.fields(1);
        let change = SliceChange {
            instantiation: fields.text("instantiation"),
            url: fields.text("url"),
            description: fields.text("description"),
            max_nodes: fields.int("max_nodes"),
            expires: fields.int("expires"),
            enabled: None,
        };
        fields.finish("update Slice")?;
        in_write!(ctx.service.db, |c| slices::update(c, &ctx.caller, &key, &change)
            .await)?;
        Ok(json!(1))
    })
}

fn change_nodes<'a>(ctx: &'a Ctx, args: &'a Args, add: bool) -> Body<'a> {
    Box::pin(async move {
        let slice = args.key(0)?;
        let nodes = args.keys(1);
        let skip = ctx.service.config.compat_skip_unknown;
        in_write!(ctx.service.db, |c| match add {
            true => slice_members::add_nodes(c, &ctx.caller, &slice, &nodes, skip).await,
            false => slice_members::remove_nodes(c, &ctx.caller, &slice, &nodes, skip).await,
        })?;
        Ok(json!(1))
    })
}

fn add_tag<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        if args.opt_key(4).is_some() {
            return Err(Fault::invalid("No such node group: this authority has none"));
        }
        let (slice, tag, node) = (args.key(0)?, args.key(1)?, args.opt_key(3));
        let value = args.text(2).unwrap_or_default();
        let id: i64 = in_write!(ctx.service.db, |c| tags::add(
            c,
            &ctx.caller,
            &slice,
            &tag,
            value,
            node.as_ref()
        )
        .await)?;
        Ok(Json::from(id))
    })
}
