//! Persons, keys, sites.

use serde_json::json;

use crate::domain::persons::{self, NewPerson, PersonChange, hash_password};
use crate::domain::sites::{self, NewSite, SiteChange};
use crate::domain::{Ref, Role, keys};
use crate::in_write;
use crate::plc::fault::Fault;
use crate::plc::method::{Args, Body, Ctx, FieldTy, Method, Ty, arg, field, needed};

const PERSON_FIELDS: &[FieldTy] = &[
    needed("first_name", Ty::Str(128)),
    needed("last_name", Ty::Str(128)),
    needed("email", Ty::Str(254)),
    field("title", Ty::Str(128)),
    field("phone", Ty::Str(64)),
    field("url", Ty::Str(254)),
    field("bio", Ty::Str(4096)),
    field("password", Ty::Str(1024)),
];
const PERSON_CHANGES: &[FieldTy] = &[
    field("first_name", Ty::Str(128)),
    field("last_name", Ty::Str(128)),
    field("email", Ty::Str(254)),
    field("title", Ty::Str(128)),
    field("phone", Ty::Str(64)),
    field("url", Ty::Str(254)),
    field("bio", Ty::Str(4096)),
    field("password", Ty::Str(1024)),
    field("enabled", Ty::Bool),
];
const KEY_FIELDS: &[FieldTy] = &[needed("key_type", Ty::Str(20)), needed("key", Ty::Str(4096))];
const SITE_FIELDS: &[FieldTy] = &[
    needed("name", Ty::Str(254)),
    needed("abbreviated_name", Ty::Str(50)),
    needed("login_base", Ty::Str(32)),
    field("is_public", Ty::Bool),
    field("enabled", Ty::Bool),
    field("latitude", Ty::Double),
    field("longitude", Ty::Double),
    field("url", Ty::Str(254)),
    field("max_slices", Ty::Int),
    field("max_slivers", Ty::Int),
];
const SITE_CHANGES: &[FieldTy] = &[
    field("name", Ty::Str(254)),
    field("abbreviated_name", Ty::Str(50)),
    field("is_public", Ty::Bool),
    field("enabled", Ty::Bool),
    field("url", Ty::Str(254)),
    field("max_slices", Ty::Int),
];

const PEOPLE: &[Role] = &[Role::Admin, Role::Pi, Role::User, Role::Tech];

pub(super) static METHODS: &[Method] = &[
    Method {
        name: "AddPerson",
        roles: &[Role::Admin, Role::Pi],
        args: &[arg("person_fields", Ty::Struct(PERSON_FIELDS))],
        returns: "int",
        help: "Adds a person, disabled and without roles; returns its person_id.",
        run: |ctx, args| Box::pin(add_person(ctx, args)),
    },
    Method {
        name: "UpdatePerson",
        roles: PEOPLE,
        args: &[
            arg("person_id_or_email", Ty::Key),
            arg("person_fields", Ty::Struct(PERSON_CHANGES)),
        ],
        returns: "int",
        help: "Changes a person: oneself, a PI its site's people, an admin all. Only PIs and admins enable.",
        run: |ctx, args| Box::pin(update_person(ctx, args)),
    },
    Method {
        name: "DeletePerson",
        roles: PEOPLE,
        args: &[arg("person_id_or_email", Ty::Key)],
        returns: "int",
        help: "Deletes a person; its record is kept for audit.",
        run: |ctx, args| {
            Box::pin(async move {
                let person = args.key(0)?;
                in_write!(ctx.service.db, |c| persons::delete(c, &ctx.caller, &person).await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "AddRoleToPerson",
        roles: &[Role::Admin, Role::Pi],
        args: &[
            arg("role_id_or_name", Ty::Key),
            arg("person_id_or_email", Ty::Key),
        ],
        returns: "int",
        help: "Gives a person a role; nobody but an admin gives one like its own or above.",
        run: |ctx, args| {
            Box::pin(async move {
                let role = match args.key(0)? {
                    Ref::Id(id) => Role::from_id(id),
                    Ref::Name(name) => Role::from_name(&name),
                };
                let role = role.ok_or_else(|| Fault::invalid("Invalid role identifier or name"))?;
                let person = args.key(1)?;
                in_write!(ctx.service.db, |c| persons::add_role(
                    c,
                    &ctx.caller,
                    role,
                    &person
                )
                .await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "AddPersonKey",
        roles: PEOPLE,
        args: &[
            arg("person_id_or_email", Ty::Key),
            arg("key_fields", Ty::Struct(KEY_FIELDS)),
        ],
        returns: "int",
        help: "Adds a public ssh key to an account (one's own, or any by an admin); returns its key_id.",
        run: |ctx, args| {
            Box::pin(async move {
                let person = args.key(0)?;
                let mut fields = args.fields(1);
                let key_type = fields.text("key_type").unwrap_or_default();
                let key = fields.text("key").unwrap_or_default();
                fields.finish("add Key")?;
                let id = in_write!(ctx.service.db, |c| keys::add(
                    c,
                    &ctx.caller,
                    &person,
                    &key_type,
                    &key
                )
                .await)?;
                Ok(json!(id))
            })
        },
    },
    Method {
        name: "DeleteKey",
        roles: PEOPLE,
        args: &[arg("key_id", Ty::Int)],
        returns: "int",
        help: "Deletes a key (one's own, or any by an admin).",
        run: |ctx, args| {
            Box::pin(async move {
                let key = args.int(0).unwrap_or_default();
                in_write!(ctx.service.db, |c| keys::delete(c, &ctx.caller, key).await)?;
                Ok(json!(1))
            })
        },
    },
    Method {
        name: "AddSite",
        roles: &[Role::Admin],
        args: &[arg("site_fields", Ty::Struct(SITE_FIELDS))],
        returns: "int",
        help: "Adds a site; returns its site_id. max_slices is 0 unless given: raise it before AddSlice.",
        run: |ctx, args| Box::pin(add_site(ctx, args)),
    },
    Method {
        name: "UpdateSite",
        roles: &[Role::Admin, Role::Pi],
        args: &[
            arg("site_id_or_login_base", Ty::Key),
            arg("site_fields", Ty::Struct(SITE_CHANGES)),
        ],
        returns: "int",
        help: "Changes a site; only admins change enabled and max_slices.",
        run: |ctx, args| Box::pin(update_site(ctx, args)),
    },
    Method {
        name: "AddPersonToSite",
        roles: &[Role::Admin],
        args: &[
            arg("person_id_or_email", Ty::Key),
            arg("site_id_or_login_base", Ty::Key),
        ],
        returns: "int",
        help: "Makes a person one of a site's.",
        run: |ctx, args| {
            Box::pin(async move {
                let (person, site) = (args.key(0)?, args.key(1)?);
                in_write!(ctx.service.db, |c| sites::add_person(
                    c,
                    &ctx.caller,
                    &person,
                    &site
                )
                .await)?;
                Ok(json!(1))
            })
        },
    },
];

fn add_person<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let mut fields = args.fields(0);
        let password = fields.text("password");
        let mut person = NewPerson {
            first_name: fields.text("first_name").unwrap_or_default(),
            last_name: fields.text("last_name").unwrap_or_default(),
            email: fields.text("email").unwrap_or_default(),
            title: fields.text("title"),
            phone: fields.text("phone"),
            url: fields.text("url"),
            bio: fields.text("bio"),
            ..NewPerson::default()
        };
        fields.finish("add Person")?;
        person.password_hash = hash_password(&ctx.service.hasher, password.as_deref()).await?;
        let id = in_write!(ctx.service.db, |c| persons::add(c, &ctx.caller, &person).await)?;
        Ok(json!(id))
    })
}

fn update_person<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let key = args.key(0)?;
        let mut fields = args.fields(1);
        let password = fields.text("password");
        let mut change = PersonChange {
            first_name: fields.text("first_name"),
            last_name: fields.text("last_name"),
            email: fields.text("email"),
            title: fields.text("title"),
            phone: fields.text("phone"),
            url: fields.text("url"),
            bio: fields.text("bio"),
            enabled: fields.flag("enabled"),
            password_hash: None,
        };
        fields.finish("update Person")?;
        change.password_hash = hash_password(&ctx.service.hasher, password.as_deref()).await?;
        in_write!(ctx.service.db, |c| persons::update(c, &ctx.caller, &key, &change)
            .await)?;
        Ok(json!(1))
    })
}

fn add_site<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let mut fields = args.fields(0);
        let site = NewSite {
            name: fields.text("name").unwrap_or_default(),
            abbreviated_name: fields.text("abbreviated_name").unwrap_or_default(),
            login_base: fields.text("login_base").unwrap_or_default(),
            is_public: fields.flag("is_public").unwrap_or(true),
            enabled: fields.flag("enabled").unwrap_or(true),
            latitude: fields.double("latitude"),
            longitude: fields.double("longitude"),
            url: fields.text("url"),
            max_slices: fields.int("max_slices").unwrap_or(0),
            max_slivers: fields.int("max_slivers").unwrap_or(1000),
        };
        fields.finish("add Site")?;
        let id = in_write!(ctx.service.db, |c| sites::add(c, &ctx.caller, &site).await)?;
        Ok(json!(id))
    })
}

fn update_site<'a>(ctx: &'a Ctx, args: &'a Args) -> Body<'a> {
    Box::pin(async move {
        let key = args.key(0)?;
        let mut fields = args.fields(1);
        let change = SiteChange {
            name: fields.text("name"),
            abbreviated_name: fields.text("abbreviated_name"),
            is_public: fields.flag("is_public"),
            enabled: fields.flag("enabled"),
            url: fields.text("url"),
            max_slices: fields.int("max_slices"),
        };
        fields.finish("update Site")?;
        in_write!(ctx.service.db, |c| sites::update(c, &ctx.caller, &key, &change)
            .await)?;
        Ok(json!(1))
    })
}
