//! AuthCheck and sessions.

use serde_json::json;

use crate::auth::session;
use crate::domain::Role;
use crate::in_write;
use crate::plc::fault::Fault;
use crate::plc::method::{Method, Ty, opt};

const ALL: &[Role] = &[Role::Admin, Role::Pi, Role::User, Role::Tech, Role::Node];

pub(super) static METHODS: &[Method] = &[
    Method {
        name: "AuthCheck",
        roles: ALL,
        args: &[],
        returns: "int",
        help: "Returns 1 if the auth struct is good, else faults.",
        run: |_, _| Box::pin(async { Ok(json!(1)) }),
    },
    Method {
        name: "BootCheckAuthentication",
        roles: &[Role::Node],
        args: &[],
        returns: "int",
        help: "Deprecated name of AuthCheck for nodes.",
        run: |_, _| Box::pin(async { Ok(json!(1)) }),
    },
    Method {
        name: "GetSession",
        roles: ALL,
        args: &[opt("expires", Ty::Int)],
        returns: "string",
        help: "Returns a session to put into auth structs with AuthMethod 'session'. It lasts 'expires' seconds \
               (default 24 h); a node's lasts until its next one. Called with a session, it returns that one.",
        run: |ctx, args| {
            Box::pin(async move {
                if let Some(session) = &ctx.session {
                    return Ok(json!(session));
                }
                let lasts = args.int(0);
                let (token, _) = in_write!(ctx.service.db, |c| session::open(c, &ctx.caller, lasts).await)?;
                Ok(json!(token))
            })
        },
    },
    Method {
        name: "DeleteSession",
        roles: ALL,
        args: &[],
        returns: "int",
        help: "Ends the session that the call is made with.",
        run: |ctx, _| {
            Box::pin(async move {
                let session = ctx.session.as_ref();
                let token =
                    session.ok_or_else(|| Fault::invalid("DeleteSession takes AuthMethod 'session'"))?;
                in_write!(ctx.service.db, |c| session::close(c, token).await)?;
                Ok(json!(1))
            })
        },
    },
];
