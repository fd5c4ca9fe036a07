//! Who calls, and the questions that the rules ask of a caller.

use sqlx::Row;

use crate::db::Conn;
use crate::error::{Error, Result};

/// PLCAPI's roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs the authority.
    Admin,
    /// Answers for a site, its people and slices.
    Pi,
    /// Uses slices.
    User,
    /// Cares for a site's nodes.
    Tech,
    /// A node.
    Node,
    /// Nobody in particular.
    Anonymous,
}

impl Role {
    /// The roles that a person can have.
    pub const OF_PERSONS: [Role; 4] = [Role::Admin, Role::Pi, Role::User, Role::Tech];

    /// PLCAPI's number.
    pub fn id(self) -> i64 {
        match self {
            Role::Admin => 10,
            Role::Pi => 20,
            Role::User => 30,
            Role::Tech => 40,
            Role::Node => 50,
            Role::Anonymous => 60,
        }
    }

    /// PLCAPI's word.
    pub fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Pi => "pi",
            Role::User => "user",
            Role::Tech => "tech",
            Role::Node => "node",
            Role::Anonymous => "anonymous",
        }
    }

    /// The role of a person with this number.
    pub fn from_id(id: i64) -> Option<Role> {
        Self::OF_PERSONS.into_iter().find(|role| role.id() == id)
    }

    /// The role of a person with this name.
    pub fn from_name(name: &str) -> Option<Role> {
        Self::OF_PERSONS.into_iter().find(|role| role.name() == name)
    }
}

/// Who.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A person.
    Person {
        /// Its number.
        id: i64,
        /// Its e-mail address.
        email: String,
    },
    /// A node.
    Node {
        /// Its number.
        id: i64,
    },
    /// Nobody in particular.
    Anonymous,
    /// The authority itself: expiry and the like.
    Authority,
}

/// A caller with what the rules need to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who.
    pub who: Who,
    /// Its roles.
    pub roles: Vec<Role>,
    /// The sites that it belongs to.
    pub sites: Vec<i64>,
}

impl Caller {
    /// The authority itself.
    pub fn authority() -> Self {
        Self {
            who: Who::Authority,
            roles: vec![Role::Admin],
            sites: Vec::new(),
        }
    }

    /// Nobody in particular.
    pub fn anonymous() -> Self {
        Self {
            who: Who::Anonymous,
            roles: vec![Role::Anonymous],
            sites: Vec::new(),
        }
    }

    /// An enabled person of this authority.
    pub async fn load_person(conn: &mut Conn, id: i64) -> Result<Option<Self>> {
        let row = sqlx::query(
            "SELECT email FROM persons WHERE person_id = $1 AND enabled = 1 AND deleted = 0 AND peer_id IS NULL",
        )
        .bind(id)
        .fetch_optional(&mut *conn)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let email = row.try_get(0)?;
        let roles =
            sqlx::query_scalar("SELECT role_id FROM person_role WHERE person_id = $1 ORDER BY role_id")
                .bind(id)
                .fetch_all(&mut *conn)
                .await?;
        let sites =
            sqlx::query_scalar("SELECT site_id FROM person_site WHERE person_id = $1 ORDER BY site_id")
                .bind(id)
                .fetch_all(&mut *conn)
                .await?;
        let roles = roles.into_iter().filter_map(Role::from_id).collect();
        Ok(Some(Self {
            who: Who::Person { id, email },
            roles,
            sites,
        }))
    }

    /// A node of this authority.
    pub async fn load_node(conn: &mut Conn, id: i64) -> Result<Option<Self>> {
        let site: Option<i64> = sqlx::query_scalar(
            "SELECT site_id FROM nodes WHERE node_id = $1 AND deleted = 0 AND peer_id IS NULL",
        )
        .bind(id)
        .fetch_optional(conn)
        .await?;
        Ok(site.map(|site| Self {
            who: Who::Node { id },
            roles: vec![Role::Node],
            sites: vec![site],
        }))
    }

    /// Whether it has a role.
    pub fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// Whether it runs the authority.
    pub fn is_admin(&self) -> bool {
        self.has(Role::Admin)
    }

    /// Whether it answers for the site.
    pub fn is_pi_of(&self, site: i64) -> bool {
        self.has(Role::Pi) && self.sites.contains(&site)
    }

    /// Whether it may change the site's nodes.
    pub fn manages_nodes_of(&self, site: i64) -> bool {
        self.is_admin() || ((self.has(Role::Pi) || self.has(Role::Tech)) && self.sites.contains(&site))
    }

    /// The person's number.
    pub fn person_id(&self) -> Option<i64> {
        match &self.who {
            Who::Person { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// The node's number.
    pub fn node_id(&self) -> Option<i64> {
        match &self.who {
            Who::Node { id } => Some(*id),
            _ => None,
        }
    }

    /// Fails unless it runs the authority.
    pub fn must_be_admin(&self, what: &str) -> Result<()> {
        match self.is_admin() {
            true => Ok(()),
            false => Err(Error::denied(format!("only an admin may {what}"))),
        }
    }
}
