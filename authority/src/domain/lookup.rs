//! Finding things by number or name, as PLCAPI's callers name them.

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::db::Conn;
use crate::error::{Error, Result};

/// A thing, by its number or its name (hostname, e-mail address, login_base).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ref {
    /// By number.
    Id(i64),
    /// By name.
    Name(String),
}

impl From<i64> for Ref {
    fn from(id: i64) -> Self {
        Self::Id(id)
    }
}

impl From<&str> for Ref {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

/// A person.
#[derive(Clone, Debug)]
pub struct PersonRow {
    /// Number.
    pub id: i64,
    /// E-mail address.
    pub email: String,
    /// Whether it may sign in.
    pub enabled: bool,
}

/// A site.
#[derive(Clone, Debug)]
pub struct SiteRow {
    /// Number.
    pub id: i64,
    /// Prefix of its slices' names.
    pub login_base: String,
    /// Whether its people may make slices.
    pub enabled: bool,
    /// How many slices it may have.
    pub max_slices: i64,
}

/// A node.
#[derive(Clone, Debug)]
pub struct NodeRow {
    /// Number.
    pub id: i64,
    /// Hostname.
    pub hostname: String,
    /// Its site.
    pub site_id: i64,
    /// PLCAPI's boot state.
    pub boot_state: String,
    /// Whether it has announced its key.
    pub registered: bool,
    /// JSON list of the `vm_type`s that it announced.
    pub vm_types: String,
}

/// A slice.
#[derive(Clone, Debug)]
pub struct SliceRow {
    /// Number.
    pub id: i64,
    /// This slice and no other of the same name.
    pub uuid: String,
    /// Name.
    pub name: String,
    /// Its site.
    pub site_id: i64,
    /// PLCAPI's word.
    pub instantiation: String,
    /// A page about it.
    pub url: String,
    /// What it is for.
    pub description: String,
    /// When it ends.
    pub expires: i64,
}

/// Whether a look-up found something; other errors than that it did not stay errors.
pub fn exists<T>(found: Result<T>) -> Result<bool> {
    match found {
        Ok(_) => Ok(true),
        Err(Error::NoSuch(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Runs one of two queries, by number or by name.
macro_rules! fetch {
    ($conn:expr, $key:expr, $sql:literal, $id:literal, $name:literal, $fold:expr) => {{
        let row = match $key {
            Ref::Id(id) => {
                sqlx::query(concat!($sql, " AND ", $id, " = $1"))
                    .bind(*id)
                    .fetch_optional(&mut *$conn)
                    .await?
            }
            Ref::Name(name) => {
                let name: String = $fold(name);
                sqlx::query(concat!($sql, " AND ", $name, " = $1"))
                    .bind(name)
                    .fetch_optional(&mut *$conn)
                    .await?
            }
        };
        row
    }};
}

/// The person, or "No such account".
pub async fn person(conn: &mut Conn, key: &Ref) -> Result<PersonRow> {
    let row: Option<AnyRow> = fetch!(
        conn,
        key,
        "SELECT person_id, email, enabled FROM persons WHERE deleted = 0 AND peer_id IS NULL",
        "person_id",
        "email",
        |name: &String| name.to_lowercase()
    );
    let row = row.ok_or_else(|| Error::NoSuch("account".into()))?;
    Ok(PersonRow {
        id: row.try_get(0)?,
        email: row.try_get(1)?,
        enabled: row.try_get::<i64, _>(2)? == 1,
    })
}

/// The site, or "No such site".
pub async fn site(conn: &mut Conn, key: &Ref) -> Result<SiteRow> {
    let row: Option<AnyRow> = fetch!(
        conn,
        key,
        "SELECT site_id, login_base, enabled, max_slices FROM sites WHERE deleted = 0 AND peer_id IS NULL",
        "site_id",
        "login_base",
        |name: &String| name.clone()
    );
    let row = row.ok_or_else(|| Error::NoSuch("site".into()))?;
    Ok(SiteRow {
        id: row.try_get(0)?,
        login_base: row.try_get(1)?,
        enabled: row.try_get::<i64, _>(2)? == 1,
        max_slices: row.try_get(3)?,
    })
}

/// The node, or "No such node".
pub async fn node(conn: &mut Conn, key: &Ref) -> Result<NodeRow> {
    let row: Option<AnyRow> = fetch!(
        conn,
        key,
        "SELECT node_id, hostname, site_id, boot_state, ed25519_key, vm_types FROM nodes WHERE deleted = 0 AND peer_id IS NULL",
        "node_id",
        "hostname",
        |name: &String| name.to_lowercase()
    );
    let row = row.ok_or_else(|| Error::NoSuch("node".into()))?;
    Ok(NodeRow {
        id: row.try_get(0)?,
        hostname: row.try_get(1)?,
        site_id: row.try_get(2)?,
        boot_state: row.try_get(3)?,
        registered: row.try_get::<Option<String>, _>(4)?.is_some(),
        vm_types: row.try_get(5)?,
    })
}

/// The slice, or "No such slice".
pub async fn slice(conn: &mut Conn, key: &Ref) -> Result<SliceRow> {
    let row: Option<AnyRow> = fetch!(
        conn,
        key,
        "SELECT slice_id, uuid, name, site_id, instantiation, url, description, expires FROM slices \
         WHERE deleted = 0 AND peer_id IS NULL",
        "slice_id",
        "name",
        |name: &String| name.clone()
    );
    let row = row.ok_or_else(|| Error::NoSuch("slice".into()))?;
    Ok(SliceRow {
        id: row.try_get(0)?,
        uuid: row.try_get(1)?,
        name: row.try_get(2)?,
        site_id: row.try_get(3)?,
        instantiation: row.try_get(4)?,
        url: row.try_get(5)?,
        description: row.try_get(6)?,
        expires: row.try_get(7)?,
    })
}

/// The numbers of a slice's nodes.
pub async fn nodes_of_slice(conn: &mut Conn, slice_id: i64) -> Result<Vec<i64>> {
    Ok(
        sqlx::query_scalar("SELECT node_id FROM slice_node WHERE slice_id = $1 ORDER BY node_id")
            .bind(slice_id)
            .fetch_all(conn)
            .await?,
    )
}

/// Whether a person is a user of a slice.
pub async fn is_member(conn: &mut Conn, slice_id: i64, person_id: i64) -> Result<bool> {
    let found: Option<i64> =
        sqlx::query_scalar("SELECT person_id FROM slice_person WHERE slice_id = $1 AND person_id = $2")
            .bind(slice_id)
            .bind(person_id)
            .fetch_optional(conn)
            .await?;
    Ok(found.is_some())
}
