//! Nodes, persons, keys and sites.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mandoline_api::authority::{
    ErrorBody, Key, NewKey, NewNode, NewPerson, NewSite, Node, NodeAdded, Person as PersonView, PersonChange,
    Site,
};

use super::error::Refusal;
use super::extract::{Body, Person};
use super::views;
use crate::domain::persons::hash_password;
use crate::domain::{Ref, Role, keys, lookup, nodes, persons, sites};
use crate::error::Error;
use crate::service::Service;
use crate::{in_read, in_write};

/// Slices that a new site may have unless said otherwise: PlanetLab's first number (PDN-02 kick-off).
const SITE_MAX_SLICES: i64 = 10;

/// All nodes
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", security(("session" = [])),
    responses((status = 200, body = Vec<Node>), (status = 401, body = ErrorBody)))]
pub(super) async fn list_nodes(
    State(service): State<Arc<Service>>,
    _: Person,
) -> Result<Json<Vec<Node>>, Refusal> {
    Ok(Json(in_read!(service.db, |c| views::nodes(c, None).await)?))
}

/// Add a node and make its key
#[utoipa::path(post, path = "/v1/nodes", tag = "nodes", security(("session" = [])), request_body = NewNode,
    responses((status = 201, body = NodeAdded), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
              (status = 409, body = ErrorBody)))]
pub(super) async fn add_node(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Body(new): Body<NewNode>,
) -> Result<(StatusCode, Json<NodeAdded>), Refusal> {
    let node = nodes::NewNode {
        hostname: new.hostname.clone(),
        boot_state: new.boot_state.clone(),
        ..Default::default()
    };
    let added = in_write!(service.db, |c| {
        let (id, node_key) = nodes::add(c, &caller, &Ref::Name(new.site.clone()), &node).await?;
        let node = views::nodes(c, Some(id))
            .await?
            .pop()
            .ok_or_else(|| Error::NoSuch("node".into()))?;
        Ok(NodeAdded { node, node_key })
    })?;
    Ok((StatusCode::CREATED, Json(added)))
}

/// A node
#[utoipa::path(get, path = "/v1/nodes/{hostname}", tag = "nodes", security(("session" = [])),
    params(("hostname" = String, Path, description = "The node's hostname")),
    responses((status = 200, body = Node), (status = 404, body = ErrorBody)))]
pub(super) async fn get_node(
    State(service): State<Arc<Service>>,
    _: Person,
    Path(hostname): Path<String>,
) -> Result<Json<Node>, Refusal> {
    Ok(Json(in_read!(service.db, |c| {
        let id = lookup::node(c, &Ref::Name(hostname.clone())).await?.id;
        views::nodes(c, Some(id))
            .await?
            .pop()
            .ok_or_else(|| Error::NoSuch("node".into()))
    })?))
}

/// Delete a node
#[utoipa::path(delete, path = "/v1/nodes/{hostname}", tag = "nodes", security(("session" = [])),
    params(("hostname" = String, Path, description = "The node's hostname")),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn delete_node(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(hostname): Path<String>,
) -> Result<StatusCode, Refusal> {
    in_write!(service.db, |c| nodes::delete(
        c,
        &caller,
        &Ref::Name(hostname.clone())
    )
    .await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The persons that the caller may see
#[utoipa::path(get, path = "/v1/persons", tag = "people", security(("session" = [])),
    responses((status = 200, body = Vec<PersonView>), (status = 401, body = ErrorBody)))]
pub(super) async fn list_persons(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
) -> Result<Json<Vec<PersonView>>, Refusal> {
    Ok(Json(in_read!(service.db, |c| {
        let all = views::persons(c, None).await?;
        let seen = persons::seen_by(c, &caller).await?;
        Ok(all
            .into_iter()
            .filter(|p| seen.as_ref().is_none_or(|seen| seen.contains(&p.id)))
            .collect())
    })?))
}

/// Add a person
#[utoipa::path(post, path = "/v1/persons", tag = "people", security(("session" = [])), request_body = NewPerson,
    responses((status = 201, body = PersonView), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
              (status = 409, body = ErrorBody)))]
pub(super) async fn add_person(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Body(new): Body<NewPerson>,
) -> Result<(StatusCode, Json<PersonView>), Refusal> {
    let role = |name: &String| {
        Role::from_name(name).ok_or_else(|| Error::invalid_value("role", name, "admin, pi, user, tech"))
    };
    let person = persons::NewPerson {
        first_name: new.first_name.clone(),
        last_name: new.last_name.clone(),
        email: new.email.clone(),
        password_hash: hash_password(&service.hasher, new.password.as_deref()).await?,
        enabled: new.enabled,
        roles: new.roles.iter().map(role).collect::<Result<_, _>>()?,
        sites: new.sites.iter().map(|site| Ref::Name(site.clone())).collect(),
        ..Default::default()
    };
    let added = in_write!(service.db, |c| {
        let id = persons::add(c, &caller, &person).await?;
        views::persons(c, Some(id))
            .await?
            .pop()
            .ok_or_else(|| Error::NoSuch("account".into()))
    })?;
    Ok((StatusCode::CREATED, Json(added)))
}

/// Change a person
#[utoipa::path(patch, path = "/v1/persons/{email}", tag = "people", security(("session" = [])),
    params(("email" = String, Path, description = "The person's e-mail address")), request_body = PersonChange,
    responses((status = 200, body = PersonView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn change_person(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(email): Path<String>,
    Body(wanted): Body<PersonChange>,
) -> Result<Json<PersonView>, Refusal> {
    let change = persons::PersonChange {
        first_name: wanted.first_name.clone(),
        last_name: wanted.last_name.clone(),
        password_hash: hash_password(&service.hasher, wanted.password.as_deref()).await?,
        enabled: wanted.enabled,
        ..Default::default()
    };
    Ok(Json(in_write!(service.db, |c| {
        let person = Ref::Name(email.clone());
        persons::update(c, &caller, &person, &change).await?;
        let id = lookup::person(c, &person).await?.id;
        views::persons(c, Some(id))
            .await?
            .pop()
            .ok_or_else(|| Error::NoSuch("account".into()))
    })?))
}

/// Delete a person
#[utoipa::path(delete, path = "/v1/persons/{email}", tag = "people", security(("session" = [])),
    params(("email" = String, Path, description = "The person's e-mail address")),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn delete_person(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(email): Path<String>,
) -> Result<StatusCode, Refusal> {
    in_write!(service.db, |c| persons::delete(
        c,
        &caller,
        &Ref::Name(email.clone())
    )
    .await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The caller's keys; for admins all
#[utoipa::path(get, path = "/v1/keys", tag = "people", security(("session" = [])),
    responses((status = 200, body = Vec<Key>), (status = 401, body = ErrorBody)))]
pub(super) async fn list_keys(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
) -> Result<Json<Vec<Key>>, Refusal> {
    let only = if caller.is_admin() {
        None
    } else {
        caller.person_id()
    };
    Ok(Json(in_read!(service.db, |c| views::keys(c, only).await)?))
}

/// Add a key
#[utoipa::path(post, path = "/v1/keys", tag = "people", security(("session" = [])), request_body = NewKey,
    responses((status = 201, body = Key), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub(super) async fn add_key(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Body(new): Body<NewKey>,
) -> Result<(StatusCode, Json<Key>), Refusal> {
    let whose = match (&new.email, caller.person_id()) {
        (Some(email), _) => Ref::Name(email.clone()),
        (None, Some(me)) => Ref::Id(me),
        (None, None) => return Err(Error::invalid("email is missing").into()),
    };
    let added = in_write!(service.db, |c| {
        let id = keys::add(c, &caller, &whose, "ssh", &new.key).await?;
        let person = lookup::person(c, &whose).await?.id;
        let all = views::keys(c, Some(person)).await?;
        all.into_iter()
            .find(|key| key.id == id)
            .ok_or_else(|| Error::NoSuch("key".into()))
    })?;
    Ok((StatusCode::CREATED, Json(added)))
}

/// Delete a key
#[utoipa::path(delete, path = "/v1/keys/{id}", tag = "people", security(("session" = [])),
    params(("id" = i64, Path, description = "The key's number")),
    responses((status = 204), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn delete_key(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    let id: i64 = id
        .parse()
        .map_err(|_| Error::invalid_value("id", &id, "a key's number"))?;
    in_write!(service.db, |c| keys::delete(c, &caller, id).await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// All sites
#[utoipa::path(get, path = "/v1/sites", tag = "people", security(("session" = [])),
    responses((status = 200, body = Vec<Site>), (status = 401, body = ErrorBody)))]
pub(super) async fn list_sites(
    State(service): State<Arc<Service>>,
    _: Person,
) -> Result<Json<Vec<Site>>, Refusal> {
    Ok(Json(in_read!(service.db, |c| views::sites(c, None).await)?))
}

/// Add a site
#[utoipa::path(post, path = "/v1/sites", tag = "people", security(("session" = [])), request_body = NewSite,
    responses((status = 201, body = Site), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
              (status = 409, body = ErrorBody)))]
pub(super) async fn add_site(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Body(new): Body<NewSite>,
) -> Result<(StatusCode, Json<Site>), Refusal> {
    let site = sites::NewSite {
        name: new.name.clone(),
        abbreviated_name: new
            .abbreviated_name
            .clone()
            .unwrap_or_else(|| new.login_base.clone()),
        login_base: new.login_base.clone(),
        is_public: true,
        enabled: true,
        max_slices: new.max_slices.unwrap_or(SITE_MAX_SLICES),
        max_slivers: 1000,
        ..Default::default()
    };
    let added = in_write!(service.db, |c| {
        let id = sites::add(c, &caller, &site).await?;
        views::sites(c, Some(id))
            .await?
            .pop()
            .ok_or_else(|| Error::NoSuch("site".into()))
    })?;
    Ok((StatusCode::CREATED, Json(added)))
}
