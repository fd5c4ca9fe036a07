//! Sites: organisations' places, the prefixes of slice names, and who belongs to them.

use super::events::Record;
use super::{Caller, Ref, lookup};
use crate::db::{Conn, next_id, now};
use crate::error::{Error, Result};

/// A site to add.
#[derive(Clone, Debug, Default)]
pub struct NewSite {
    /// Full name.
    pub name: String,
    /// Short name.
    pub abbreviated_name: String,
    /// Prefix of its slices' names.
    pub login_base: String,
    /// Whether strangers may see it.
    pub is_public: bool,
    /// Whether its people may make slices.
    pub enabled: bool,
    /// Degrees north.
    pub latitude: Option<f64>,
    /// Degrees east.
    pub longitude: Option<f64>,
    /// A page about it.
    pub url: Option<String>,
    /// How many slices it may have. PLCAPI's default is 0.
    pub max_slices: i64,
    /// How many slivers its slices may have.
    pub max_slivers: i64,
}

/// What to change in a site; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct SiteChange {
    /// Full name.
    pub name: Option<String>,
    /// Short name.
    pub abbreviated_name: Option<String>,
    /// Whether strangers may see it.
    pub is_public: Option<bool>,
    /// Whether its people may make slices. Admins only.
    pub enabled: Option<bool>,
    /// A page about it.
    pub url: Option<String>,
    /// How many slices it may have. Admins only.
    pub max_slices: Option<i64>,
}

fn check_login_base(login_base: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.';
    let first = login_base
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric());
    if login_base.len() > mandoline_rspec::LOGIN_BASE_MAX || !first || !login_base.chars().all(good) {
        return Err(Error::invalid_value(
            "login_base",
            login_base,
            "1 to 32 of a-z, 0-9 and '.', a letter or digit first",
        ));
    }
    Ok(())
}

/// Adds a site.
pub async fn add(conn: &mut Conn, caller: &Caller, site: &NewSite) -> Result<i64> {
    caller.must_be_admin("add sites")?;
    check_login_base(&site.login_base)?;
    if site.name.trim().is_empty() {
        return Err(Error::invalid("Invalid name '': a site has one"));
    }
    for (what, value, bound) in [
        ("latitude", site.latitude, 90.0),
        ("longitude", site.longitude, 180.0),
    ] {
        if value.is_some_and(|v| !(-bound..=bound).contains(&v)) {
            return Err(Error::invalid(format!(
                "Invalid {what}: allowed are -{bound} to {bound} degrees"
            )));
        }
    }
    if lookup::exists(lookup::site(conn, &Ref::Name(site.login_base.clone())).await)? {
        return Err(Error::Conflict(format!(
            "login_base already in use: site '{}' already exists",
            site.login_base
        )));
    }
    let id = next_id(conn, "site").await?;
    sqlx::query(
        "INSERT INTO sites (site_id, name, abbreviated_name, login_base, is_public, enabled, latitude, longitude, url, \
         max_slices, max_slivers, date_created, last_updated) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12)",
    )
    .bind(id)
    .bind(&site.name)
    .bind(&site.abbreviated_name)
    .bind(&site.login_base)
    .bind(i64::from(site.is_public))
    .bind(i64::from(site.enabled))
    .bind(site.latitude)
    .bind(site.longitude)
    .bind(site.url.as_deref())
    .bind(site.max_slices)
    .bind(site.max_slivers)
    .bind(now())
    .execute(&mut *conn)
    .await?;
    Record::new("site_added").site(id).save(conn, caller).await?;
    Ok(id)
}

/// Changes a site.
pub async fn update(conn: &mut Conn, caller: &Caller, key: &Ref, change: &SiteChange) -> Result<()> {
    let site = lookup::site(conn, key).await?;
    if !caller.is_admin() && !caller.is_pi_of(site.id) {
        return Err(Error::denied("Not allowed to update specified site"));
    }
    if !caller.is_admin() && (change.enabled.is_some() || change.max_slices.is_some()) {
        return Err(Error::denied(
            "only an admin may change enabled and max_slices of a site",
        ));
    }
    sqlx::query(
        "UPDATE sites SET name = COALESCE($2, name), abbreviated_name = COALESCE($3, abbreviated_name), \
         is_public = COALESCE($4, is_public), enabled = COALESCE($5, enabled), url = COALESCE($6, url), \
         max_slices = COALESCE($7, max_slices), last_updated = $8 WHERE site_id = $1",
    )
    .bind(site.id)
    .bind(change.name.as_deref())
    .bind(change.abbreviated_name.as_deref())
    .bind(change.is_public.map(i64::from))
    .bind(change.enabled.map(i64::from))
    .bind(change.url.as_deref())
    .bind(change.max_slices)
    .bind(now())
    .execute(&mut *conn)
    .await?;
    Record::new("site_changed").site(site.id).save(conn, caller).await
}

/// Makes a person one of a site's.
pub async fn add_person(conn: &mut Conn, caller: &Caller, person: &Ref, site: &Ref) -> Result<()> {
    caller.must_be_admin("add persons to sites")?;
    let person = lookup::person(conn, person).await?;
    let site = lookup::site(conn, site).await?;
    join(conn, person.id, site.id).await?;
    Record::new("person_joined_site")
        .person(person.id)
        .site(site.id)
        .save(conn, caller)
        .await
}

/// The row alone, for functions that have checked and that record the whole.
pub(super) async fn join(conn: &mut Conn, person: i64, site: i64) -> Result<()> {
    sqlx::query("INSERT INTO person_site (person_id, site_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(person)
        .bind(site)
        .execute(conn)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn login_bases() {
        for good in ["princeton", "mit.edu", "4lab"] {
            assert!(check_login_base(good).is_ok(), "{good}");
        }
        for bad in ["", "Princeton", "a_b", ".a", "a b", "ä", &"x".repeat(33)] {
            assert!(check_login_base(bad).is_err(), "{bad}");
        }
    }
}
