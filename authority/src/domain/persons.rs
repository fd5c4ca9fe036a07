//! Principals: who they are, their roles, and who may change them.

use std::collections::BTreeSet;

use serde_json::json;

use super::events::Record;
use super::lookup::PersonRow;
use super::{Caller, Ref, Role, desired, lookup, sites};
use crate::auth::password::Hasher;
use crate::db::{Conn, next_id, now};
use crate::error::{Error, Result};

/// A person to add. The password comes hashed: hashing takes too long for a transaction.
#[derive(Clone, Debug, Default)]
pub struct NewPerson {
    /// First name.
    pub first_name: String,
    /// Last name.
    pub last_name: String,
    /// E-mail address.
    pub email: String,
    /// Title.
    pub title: Option<String>,
    /// Telephone.
    pub phone: Option<String>,
    /// A page about the person.
    pub url: Option<String>,
    /// A few words.
    pub bio: Option<String>,
    /// PHC string.
    pub password_hash: Option<String>,
    /// Whether it may sign in at once; PLCAPI adds disabled ones.
    pub enabled: bool,
    /// Roles to give.
    pub roles: Vec<Role>,
    /// Sites to join.
    pub sites: Vec<Ref>,
}

/// What to change in a person; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct PersonChange {
    /// First name.
    pub first_name: Option<String>,
    /// Last name.
    pub last_name: Option<String>,
    /// E-mail address.
    pub email: Option<String>,
    /// Title.
    pub title: Option<String>,
    /// Telephone.
    pub phone: Option<String>,
    /// A page about the person.
    pub url: Option<String>,
    /// A few words.
    pub bio: Option<String>,
    /// PHC string.
    pub password_hash: Option<String>,
    /// Whether it may sign in.
    pub enabled: Option<bool>,
}

/// Hashes a password that may be there.
pub async fn hash_password(hasher: &Hasher, password: Option<&str>) -> Result<Option<String>> {
    match password {
        Some(password) => Ok(Some(hasher.hash(password).await?)),
        None => Ok(None),
    }
}

fn check_email(email: &str) -> Result<String> {
    let refuse = || Error::invalid_value("email", email, "name@host, at most 254 bytes, no blanks");
    let (name, host) = email.rsplit_once('@').ok_or_else(refuse)?;
    let plain = email
        .chars()
        .all(|c| !c.is_whitespace() && !c.is_control() && !"<>\",;".contains(c));
    if name.is_empty() || host.is_empty() || email.len() > 254 || !plain {
        return Err(refuse());
    }
    Ok(email.to_lowercase())
}

/// Adds a person.
pub async fn add(conn: &mut Conn, caller: &Caller, person: &NewPerson) -> Result<i64> {
    if !caller.is_admin() && !caller.has(Role::Pi) {
        return Err(Error::denied("only admins and PIs may add persons"));
    }
    let email = check_email(&person.email)?;
    if lookup::exists(lookup::person(conn, &Ref::Name(email.clone())).await)? {
        return Err(Error::Conflict(format!(
            "email: account '{email}' already exists"
        )));
    }
    let id = next_id(conn, "person").await?;
    sqlx::query(
        "INSERT INTO persons (person_id, email, password_hash, first_name, last_name, title, phone, url, bio, enabled, \
         date_created, last_updated) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11)",
    )
    .bind(id)
    .bind(&email)
    .bind(person.password_hash.as_deref())
    .bind(&person.first_name)
    .bind(&person.last_name)
    .bind(person.title.as_deref())
    .bind(person.phone.as_deref())
    .bind(person.url.as_deref())
    .bind(person.bio.as_deref())
    .bind(i64::from(person.enabled))
    .bind(now())
    .execute(&mut *conn)
    .await?;
    let mut joined = Vec::new();
    for site in &person.sites {
        let site = lookup::site(conn, site).await?;
        if !caller.is_admin() && !caller.is_pi_of(site.id) {
            return Err(Error::denied(format!(
                "only admins and PIs of site '{}' may add persons to it",
                site.login_base
            )));
        }
        sites::join(conn, id, site.id).await?;
        joined.push(site.id);
    }
    // Who enables and gives roles must answer for the person, which is of no site before it has joined one.
    if !caller.is_admin() && joined.is_empty() && (person.enabled || !person.roles.is_empty()) {
        return Err(Error::denied(
            "a PI enables and gives roles only to persons of its own sites",
        ));
    }
    for role in &person.roles {
        check_may_give(caller, *role)?;
        give_role(conn, id, *role).await?;
    }
    let mut event = Record::new("person_added")
        .person(id)
        .data(json!({ "email": email }));
    if let Some(site) = joined.first() {
        event = event.site(*site);
    }
    event.save(conn, caller).await?;
    Ok(id)
}

/// Whether the caller may change the person: itself, its PI, or an admin.
async fn may_update(conn: &mut Conn, caller: &Caller, person: i64) -> Result<bool> {
    if caller.is_admin() || caller.person_id() == Some(person) {
        return Ok(true);
    }
    answers_for(conn, caller, person).await
}

/// Whether the caller is PI of a site of a person that is no admin.
async fn answers_for(conn: &mut Conn, caller: &Caller, person: i64) -> Result<bool> {
    if caller.is_admin() {
        return Ok(true);
    }
    if !caller.has(Role::Pi) {
        return Ok(false);
    }
    let admin: Option<i64> =
        sqlx::query_scalar("SELECT role_id FROM person_role WHERE person_id = $1 AND role_id = 10")
            .bind(person)
            .fetch_optional(&mut *conn)
            .await?;
    let sites: Vec<i64> = sqlx::query_scalar("SELECT site_id FROM person_site WHERE person_id = $1")
        .bind(person)
        .fetch_all(conn)
        .await?;
    Ok(admin.is_none() && sites.iter().any(|site| caller.is_pi_of(*site)))
}

/// Changes a person.
pub async fn update(conn: &mut Conn, caller: &Caller, key: &Ref, change: &PersonChange) -> Result<()> {
    let person = lookup::person(conn, key).await?;
    if !may_update(conn, caller, person.id).await? {
        return Err(Error::denied("Not allowed to update specified account"));
    }
    if change.enabled.is_some_and(|enabled| enabled != person.enabled)
        && !answers_for(conn, caller, person.id).await?
    {
        return Err(Error::denied(
            "Not allowed to enable or disable specified account",
        ));
    }
    let email = match &change.email {
        Some(email) => {
            let email = check_email(email)?;
            if email != person.email && lookup::exists(lookup::person(conn, &Ref::Name(email.clone())).await)?
            {
                return Err(Error::Conflict(format!(
                    "email: account '{email}' already exists"
                )));
            }
            Some(email)
        }
        None => None,
    };
    sqlx::query(
        "UPDATE persons SET first_name = COALESCE($2, first_name), last_name = COALESCE($3, last_name), \
         email = COALESCE($4, email), title = COALESCE($5, title), phone = COALESCE($6, phone), url = COALESCE($7, url), \
         bio = COALESCE($8, bio), password_hash = COALESCE($9, password_hash), enabled = COALESCE($10, enabled), \
         last_updated = $11 WHERE person_id = $1",
    )
    .bind(person.id)
    .bind(change.first_name.as_deref())
    .bind(change.last_name.as_deref())
    .bind(email)
    .bind(change.title.as_deref())
    .bind(change.phone.as_deref())
    .bind(change.url.as_deref())
    .bind(change.bio.as_deref())
    .bind(change.password_hash.as_deref())
    .bind(change.enabled.map(i64::from))
    .bind(now())
    .execute(&mut *conn)
    .await?;
    // Who was locked out, or changed its password because it leaked, must not live on in old sessions.
    if change.password_hash.is_some() || change.enabled == Some(false) {
        end_sessions(conn, person.id).await?;
    }
    changed(conn, caller, &person, "person_changed").await
}

/// Deletes a person: the row stays, keys and memberships end.
pub async fn delete(conn: &mut Conn, caller: &Caller, key: &Ref) -> Result<()> {
    let person = lookup::person(conn, key).await?;
    if !may_update(conn, caller, person.id).await? {
        return Err(Error::denied("Not allowed to delete specified account"));
    }
    let wakes = desired::nodes_of_person(conn, person.id).await?;
    end_sessions(conn, person.id).await?;
    for sql in [
        "UPDATE keys SET deleted = 1 WHERE person_id = $1",
        "DELETE FROM slice_person WHERE person_id = $1",
        "DELETE FROM person_site WHERE person_id = $1",
        "DELETE FROM person_role WHERE person_id = $1",
        "UPDATE persons SET deleted = 1, enabled = 0, password_hash = NULL WHERE person_id = $1",
    ] {
        sqlx::query(sql).bind(person.id).execute(&mut *conn).await?;
    }
    Record::new("person_deleted")
        .person(person.id)
        .wakes(wakes)
        .save(conn, caller)
        .await
}

/// The persons that the caller may see: those of its sites and slices and itself. Nothing: all.
pub async fn seen_by(conn: &mut Conn, caller: &Caller) -> Result<Option<BTreeSet<i64>>> {
    let Some(me) = caller.person_id().filter(|_| !caller.is_admin()) else {
        return Ok(None);
    };
    let seen: Vec<i64> = sqlx::query_scalar(
        "SELECT person_id FROM person_site WHERE site_id IN (SELECT site_id FROM person_site WHERE person_id = $1) \
         UNION SELECT person_id FROM slice_person WHERE slice_id IN \
         (SELECT slice_id FROM slice_person WHERE person_id = $1)",
    )
    .bind(me)
    .fetch_all(conn)
    .await?;
    Ok(Some(seen.into_iter().chain([me]).collect()))
}

fn check_may_give(caller: &Caller, role: Role) -> Result<()> {
    // PLCAPI: nobody gives a role above its own.
    let highest = caller
        .roles
        .iter()
        .map(|role| role.id())
        .min()
        .unwrap_or(i64::MAX);
    match caller.is_admin() || (caller.has(Role::Pi) && role.id() > highest) {
        true => Ok(()),
        false => Err(Error::denied(format!(
            "Not allowed to grant role '{}'",
            role.name()
        ))),
    }
}

async fn give_role(conn: &mut Conn, person: i64, role: Role) -> Result<()> {
    sqlx::query("INSERT INTO person_role (person_id, role_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(person)
        .bind(role.id())
        .execute(conn)
        .await?;
    Ok(())
}

/// Gives a person a role.
pub async fn add_role(conn: &mut Conn, caller: &Caller, role: Role, key: &Ref) -> Result<()> {
    let person = lookup::person(conn, key).await?;
    if !answers_for(conn, caller, person.id).await? {
        return Err(Error::denied("Not allowed to update specified account"));
    }
    check_may_give(caller, role)?;
    give_role(conn, person.id, role).await?;
    Record::new("person_role_added")
        .person(person.id)
        .data(json!({ "role": role.name() }))
        .save(conn, caller)
        .await
}

async fn end_sessions(conn: &mut Conn, person: i64) -> Result<()> {
    sqlx::query("DELETE FROM sessions WHERE person_id = $1")
        .bind(person)
        .execute(conn)
        .await?;
    Ok(())
}

/// Records a change of a person that its slivers can notice (keys of disabled persons go).
async fn changed(conn: &mut Conn, caller: &Caller, person: &PersonRow, kind: &'static str) -> Result<()> {
    let wakes = desired::nodes_of_person(conn, person.id).await?;
    Record::new(kind)
        .person(person.id)
        .wakes(wakes)
        .save(conn, caller)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn email_addresses() {
        assert_eq!(check_email("Me@Host.Org").unwrap(), "me@host.org");
        for bad in [
            "",
            "me",
            "@host",
            "me@",
            "me @host",
            "me@host\n",
            "a,b@host",
            "<me@host>",
        ] {
            assert!(check_email(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn nobody_gives_a_role_above_or_like_its_own_but_admins() {
        let pi = Caller {
            roles: vec![Role::Pi, Role::User],
            ..Caller::anonymous()
        };
        let user = Caller {
            roles: vec![Role::User],
            ..Caller::anonymous()
        };
        assert!(check_may_give(&pi, Role::User).is_ok());
        assert!(check_may_give(&pi, Role::Pi).is_err());
        assert!(check_may_give(&pi, Role::Admin).is_err());
        assert!(check_may_give(&user, Role::Tech).is_err());
        assert!(check_may_give(&Caller::authority(), Role::Admin).is_ok());
    }
}
