//! Principals, their keys and sites.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A principal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Person {
    /// PLCAPI's number.
    pub id: i64,
    /// E-mail address, lower case; the name to sign in with.
    pub email: String,
    /// First name.
    pub first_name: String,
    /// Last name.
    pub last_name: String,
    /// Whether the person may sign in.
    pub enabled: bool,
    /// `admin`, `pi`, `user`, `tech`.
    pub roles: Vec<String>,
    /// `login_base` of each site.
    pub sites: Vec<String>,
    /// Names of the slices.
    pub slices: Vec<String>,
}

/// A person to add.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPerson {
    /// E-mail address.
    pub email: String,
    /// First name.
    pub first_name: String,
    /// Last name.
    pub last_name: String,
    /// Password; without one the person cannot sign in by password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// `login_base` of each site to join.
    #[serde(default)]
    pub sites: Vec<String>,
    /// Roles to give.
    #[serde(default)]
    pub roles: Vec<String>,
    /// Whether the person may sign in at once.
    #[serde(default)]
    pub enabled: bool,
}

/// Never prints the password.
impl fmt::Debug for NewPerson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewPerson")
            .field("email", &self.email)
            .finish_non_exhaustive()
    }
}

/// What to change in a person; what is absent stays.
#[derive(Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PersonChange {
    /// First name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_name: Option<String>,
    /// Last name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_name: Option<String>,
    /// New password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Whether the person may sign in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
}

/// Never prints the password.
impl fmt::Debug for PersonChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PersonChange")
            .field("enabled", &self.enabled)
            .finish_non_exhaustive()
    }
}

/// A person's public ssh key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// PLCAPI's number.
    pub id: i64,
    /// E-mail address of its person.
    pub email: String,
    /// One line: algorithm, base64, comment.
    pub key: String,
}

/// A public ssh key to add.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// One line of an OpenSSH `.pub` file.
    pub key: String,
    /// Whose; absent = the caller's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

/// A site: an organisation's place, with its PIs and nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Site {
    /// PLCAPI's number.
    pub id: i64,
    /// Full name.
    pub name: String,
    /// Prefix of its slices' names.
    pub login_base: String,
    /// Short name.
    pub abbreviated_name: String,
    /// Whether its people may make slices.
    pub enabled: bool,
    /// How many slices it may have.
    pub max_slices: i64,
    /// Hostnames of its nodes.
    pub nodes: Vec<String>,
}

/// A site to add.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSite {
    /// Full name.
    pub name: String,
    /// Prefix of its slices' names: lower case letters, digits, dots.
    pub login_base: String,
    /// Short name; absent = login_base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abbreviated_name: Option<String>,
    /// How many slices it may have; absent = 10, the first PlanetLab's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_slices: Option<i64>,
}
