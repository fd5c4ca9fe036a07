//! What can go wrong in the authority, in the terms that both PLCAPI's faults and REST's errors are made from.

/// A refusal of a value, with what an interface has to report of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invalid {
    /// A sentence that names the thing, its value and what is allowed.
    pub message: String,
    /// The field or rspec attribute.
    pub attribute: Option<String>,
    /// The value that was refused.
    pub value: Option<String>,
    /// What would have been allowed.
    pub allowed: Option<String>,
    /// Hostname of the node that lacks what was asked for.
    pub node: Option<String>,
}

/// An error of the authority.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that the authority does not take.
    #[error("{}", .0.message)]
    Invalid(Box<Invalid>),
    /// There is no such thing, or the caller may not see it. The word is PLCAPI's name of the object.
    #[error("No such {0}")]
    NoSuch(String),
    /// There is one already, or its state does not allow the change.
    #[error("{0}")]
    Conflict(String),
    /// The caller is known but may not do this.
    #[error("{0}")]
    Denied(String),
    /// The caller is not who it says.
    #[error("{0}")]
    Unauthenticated(String),
    /// Too many failures to authenticate.
    #[error("too many failed attempts; try again in {retry_after_s} s")]
    RateLimited {
        /// When a try has a chance again.
        retry_after_s: u64,
    },
    /// A database that is busy or away: a retry may succeed.
    #[error("the database is busy or cannot be reached; try again")]
    Unavailable,
    /// The database said no.
    #[error("database: {0}")]
    Database(#[source] sqlx::Error),
    /// Something that should not be able to fail did.
    #[error("{0}")]
    Internal(String),
}

/// Result of the authority's own functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A refusal with a message alone.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(Box::new(Invalid {
            message: message.into(),
            ..Invalid::default()
        }))
    }

    /// A refusal of one field's value.
    pub fn invalid_value(attribute: &str, value: &str, allowed: &str) -> Self {
        Self::Invalid(Box::new(Invalid {
            message: format!("Invalid {attribute} '{value}': allowed is {allowed}"),
            attribute: Some(attribute.to_owned()),
            value: Some(value.to_owned()),
            allowed: Some(allowed.to_owned()),
            node: None,
        }))
    }

    /// A caller that may not do this.
    pub fn denied(message: impl Into<String>) -> Self {
        Self::Denied(message.into())
    }

    /// Something that should not be able to fail did.
    pub fn internal(what: impl std::fmt::Display) -> Self {
        Self::Internal(what.to_string())
    }
}

/// PostgreSQL: serialization failure, deadlock, lock not to be had. SQLite: busy, busy snapshot, busy recovery.
const TRANSIENT: [&str; 6] = ["40001", "40P01", "55P03", "5", "517", "261"];

/// Whether the same transaction may succeed when it is tried again.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => error
            .code()
            .is_some_and(|code| TRANSIENT.contains(&code.as_ref())),
        sqlx::Error::PoolTimedOut | sqlx::Error::Io(_) => true,
        _ => false,
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<mandoline_rspec::RspecError> for Error {
    fn from(error: mandoline_rspec::RspecError) -> Self {
        Self::Invalid(Box::new(Invalid {
            attribute: error.attribute().map(str::to_owned),
            value: error.value().map(str::to_owned),
            allowed: error.allowed().map(str::to_owned),
            node: None,
            message: error.to_string(),
        }))
    }
}

impl From<mandoline_rspec::NameError> for Error {
    fn from(error: mandoline_rspec::NameError) -> Self {
        Self::Invalid(Box::new(Invalid {
            message: format!("Invalid {error}"),
            attribute: Some("name".to_owned()),
            allowed: Some(error.allowed.to_owned()),
            value: Some(error.value),
            node: None,
        }))
    }
}
