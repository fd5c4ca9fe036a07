//! Nodes.

use serde_json::json;

use crate::domain::Role;
use crate::domain::nodes::{self, NewNode, NodeChange};
use crate::in_write;
use crate::plc::method::{Args, Body, Ctx, FieldTy, Method, Ty, arg, field, needed, opt};
use crate::plc::slivers::get_slivers;

const NODE_FIELDS: &[FieldTy] = &[
    needed("hostname", Ty::Str(253)),
    field("node_type", Ty::Str(20)),
    field("boot_state", Ty::Str(20)),
    field("model", Ty::Str(255)),
    field("version", Ty::Str(64)),
];
const NODE_CHANGES: &[FieldTy] = &[
    field("hostname", Ty::Str(253)),
    field("node_type", Ty::Str(20)),
    field("boot_state", Ty::Str(20)),
    field("model", Ty::Str(255)),
    field("version", Ty::Str(64)),
    field("key", Ty::Str(256)),
];
const NODE_PEOPLE: &[Role] = &[Role::Admin, Role::Pi, Role::Tech];

pub(super) static METHODS: &[Method] = &[
    Method {
        name: "AddNode",
        roles: NODE_PEOPLE,
        args: &[
            arg("site_id_or_login_base", Ty::Key),
            arg("node_fields", Ty::Struct(NODE_FIELDS)),
        ],
        returns: "int",
        help: "Adds a node to a site and makes its key; returns its node_id. Admins read the key with \
               GetNodes(auth, node_id, ['key']); it goes into the node's pl_node.txt as NODE_KEY.",
        run: |ctx, args| Box::pin(add_node(ctx, args)),
    },
    Method {
        name: "UpdateNode",
        roles: NODE_PEOPLE,
        args: &[
            arg("node_id_or_hostname", Ty::Key),
            arg("node_fields", Ty::Struct(NODE_CHANGES)),
        ],
        returns: "int",
        help: "Changes a node. With a new key (admins only) it has to register anew.",
        run: |ctx, args| Box::pin(update_node(ctx, args)),
    },
    Method {
        name: "DeleteNode",
        roles: NODE_PEOPLE,
        args: &[arg("node_id_or_hostname", Ty::Key)],
        returns: "int",
        help: "Deletes a node; its record is kept for audit.",
        run: |ctx, args| {
            Box::pin(async move {
                let node = args.key(0)?;
                in_write!(ctx.service.db, |c| nodes::delete(c, &ctx.caller, &node).await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "GetSlivers",
        roles: &[Role::Admin, Role::Node],
        args: &[opt("node_id_or_hostname", Ty::Key)],
        returns: "struct",
        help: "What a node should run (default: the calling node).",
        run: |ctx, args| Box::pin(get_slivers(ctx, args)),
    },
];

fn add_node<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let site = args.key(0)?;
        let mut fields = args.fields(1);
        let node = NewNode {
            hostname: fields.text("hostname").unwrap_or_default(),
            node_type: fields.text("node_type"),
            boot_state: fields.text("boot_state"),
            model: fields.text("model"),
            version: fields.text("version"),
        };
        fields.finish("add Node")?;
        let (id, _) = in_write!(ctx.service.db, |c| nodes::add(c, &ctx.caller, &site, &node).await)?;
        Ok(json!(id))
    })
}

fn update_node<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let key = args.key(0)?;
        let mut fields = args.fields(1);
        let change = NodeChange {
            hostname: fields.text("hostname"),
            node_type: fields.text("node_type"),
            boot_state: fields.text("boot_state"),
            model: fields.text("model"),
            version: fields.text("version"),
            key: fields.text("key"),
        };
        fields.finish("update Node")?;
        in_write!(ctx.service.db, |c| nodes::update(c, &ctx.caller, &key, &change)
            .await)?;
        Ok(json!(1))
    })
}
