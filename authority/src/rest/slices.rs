//! Slices and their slivers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mandoline_api::authority::{Emails, ErrorBody, Hostnames, NewSlice, Slice, SliceChange, Sliver};

use super::error::Refusal;
use super::extract::{Body, Person};
use super::views;
use crate::db::Conn;
use crate::domain::{Caller, Ref, lookup, slice_members, slices, slivers as reported, tags};
use crate::error::{Error, Result};
use crate::service::Service;
use crate::{in_read, in_write};

/// A slice that the caller may see: its users, the PIs of its site, admins. For others it is not there.
async fn visible(conn: &mut Conn, caller: &Caller, name: &str) -> Result<i64> {
    let slice = lookup::slice(conn, &name.into()).await?;
    match slices::may_change(conn, caller, &slice).await? {
        true => Ok(slice.id),
        false => Err(Error::NoSuch("slice".into())),
    }
}

async fn view(conn: &mut Conn, id: i64) -> Result<Slice> {
    views::slices(conn, &[id])
        .await?
        .pop()
        .ok_or_else(|| Error::NoSuch("slice".into()))
}

fn refs(names: &[String]) -> Vec<Ref> {
    names.iter().map(|name| Ref::Name(name.clone())).collect()
}

/// The slices that the caller may see
#[utoipa::path(get, path = "/v1/slices", tag = "slices", security(("session" = [])),
    responses((status = 200, body = Vec<Slice>), (status = 401, body = ErrorBody)))]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
) -> Result<Json<Vec<Slice>>, Refusal> {
    Ok(Json(in_read!(service.db, |c| {
        let ids = views::slice_ids(c, &caller).await?;
        views::slices(c, &ids).await
    })?))
}

/// Add a slice, with its rspec and slivers on nodes: all of it or nothing
#[utoipa::path(post, path = "/v1/slices", tag = "slices", security(("session" = [])), request_body = NewSlice,
    responses((status = 201, body = Slice), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
              (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn add(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Body(new): Body<NewSlice>,
) -> Result<(StatusCode, Json<Slice>), Refusal> {
    let slice = slices::NewSlice {
        name: new.name.clone(),
        instantiation: Some(new.instantiation.as_str().to_owned()),
        url: Some(new.url.clone()),
        description: Some(new.description.clone()),
        max_nodes: None,
    };
    let made = in_write!(service.db, |c| {
        let id = slices::add(c, &caller, &slice).await?;
        if let Some(me) = caller.person_id() {
            slice_members::add_person(c, &caller, &Ref::Id(me), &Ref::Id(id)).await?;
        }
        for person in refs(&new.persons) {
            slice_members::add_person(c, &caller, &person, &Ref::Id(id)).await?;
        }
        tags::set_rspec(c, &caller, &Ref::Id(id), &new.rspec).await?;
        slice_members::add_nodes(c, &caller, &Ref::Id(id), &refs(&new.nodes), false).await?;
        view(c, id).await
    })?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// A slice
#[utoipa::path(get, path = "/v1/slices/{name}", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")),
    responses((status = 200, body = Slice), (status = 404, body = ErrorBody)))]
pub(super) async fn get(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
) -> Result<Json<Slice>, Refusal> {
    Ok(Json(in_read!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        view(c, id).await
    })?))
}

/// Change or renew a slice
#[utoipa::path(patch, path = "/v1/slices/{name}", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")), request_body = SliceChange,
    responses((status = 200, body = Slice), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
              (status = 404, body = ErrorBody)))]
pub(super) async fn change(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
    Body(wanted): Body<SliceChange>,
) -> Result<Json<Slice>, Refusal> {
    let change = slices::SliceChange {
        instantiation: wanted.instantiation.map(|word| word.as_str().to_owned()),
        url: wanted.url.clone(),
        description: wanted.description.clone(),
        max_nodes: None,
        expires: wanted.expires,
        enabled: wanted.enabled,
    };
    Ok(Json(in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        slices::update(c, &caller, &Ref::Id(id), &change).await?;
        if let Some(rspec) = &wanted.rspec {
            tags::set_rspec(c, &caller, &Ref::Id(id), rspec).await?;
        }
        view(c, id).await
    })?))
}

/// Delete a slice and its slivers
#[utoipa::path(delete, path = "/v1/slices/{name}", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn delete(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
) -> Result<StatusCode, Refusal> {
    in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        slices::delete(c, &caller, &Ref::Id(id)).await
    })?;
    Ok(StatusCode::NO_CONTENT)
}

/// Give a slice slivers on nodes
#[utoipa::path(post, path = "/v1/slices/{name}/nodes", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")), request_body = Hostnames,
    responses((status = 200, body = Slice), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn add_nodes(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
    Body(nodes): Body<Hostnames>,
) -> Result<Json<Slice>, Refusal> {
    Ok(Json(in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        slice_members::add_nodes(c, &caller, &Ref::Id(id), &refs(&nodes.hostnames), false).await?;
        view(c, id).await
    })?))
}

/// Take a slice's slivers off nodes
#[utoipa::path(delete, path = "/v1/slices/{name}/nodes", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")), request_body = Hostnames,
    responses((status = 200, body = Slice), (status = 404, body = ErrorBody)))]
pub(super) async fn remove_nodes(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
    Body(nodes): Body<Hostnames>,
) -> Result<Json<Slice>, Refusal> {
    Ok(Json(in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        slice_members::remove_nodes(c, &caller, &Ref::Id(id), &refs(&nodes.hostnames), false).await?;
        view(c, id).await
    })?))
}

/// Make persons users of a slice
#[utoipa::path(post, path = "/v1/slices/{name}/persons", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")), request_body = Emails,
    responses((status = 200, body = Slice), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn add_persons(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
    Body(persons): Body<Emails>,
) -> Result<Json<Slice>, Refusal> {
    Ok(Json(in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        for person in refs(&persons.emails) {
            slice_members::add_person(c, &caller, &person, &Ref::Id(id)).await?;
        }
        view(c, id).await
    })?))
}

/// End persons' use of a slice
#[utoipa::path(delete, path = "/v1/slices/{name}/persons", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")), request_body = Emails,
    responses((status = 200, body = Slice), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn remove_persons(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
    Body(persons): Body<Emails>,
) -> Result<Json<Slice>, Refusal> {
    Ok(Json(in_write!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        for person in refs(&persons.emails) {
            slice_members::remove_person(c, &caller, &person, &Ref::Id(id)).await?;
        }
        view(c, id).await
    })?))
}

/// The slivers of a slice
#[utoipa::path(get, path = "/v1/slices/{name}/slivers", tag = "slices", security(("session" = [])),
    params(("name" = String, Path, description = "The slice's name")),
    responses((status = 200, body = Vec<Sliver>), (status = 404, body = ErrorBody)))]
pub(super) async fn slivers(
    State(service): State<Arc<Service>>,
    Person(caller, _): Person,
    Path(name): Path<String>,
) -> Result<Json<Vec<Sliver>>, Refusal> {
    Ok(Json(in_read!(service.db, |c| {
        let id = visible(c, &caller, &name).await?;
        reported::of_slice(c, id).await
    })?))
}
