//! What can go wrong in the agent, and how it is told to the host.

use std::io;

use mandoline_api::agent::{ErrorBody, ErrorKind};

/// An error of the agent. It goes to the host as an [`ErrorBody`]; PID 1 itself never ends of one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A value of the request is out of bounds.
    #[error("{0}")]
    BadRequest(String),
    /// The operation is unknown.
    #[error("unknown op `{0}`; this agent knows {1}")]
    Unsupported(String, String),
    /// Not in this phase.
    #[error("{0}")]
    WrongPhase(String),
    /// Joined as another sliver.
    #[error("{0}")]
    AlreadyJoined(String),
    /// At a bound.
    #[error("{0}")]
    Busy(String),
    /// A thing that isn't there.
    #[error("{0}")]
    NotFound(String),
    /// A system call that failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A step of the join that failed.
    #[error("{step}: {error}")]
    Step {
        /// The step, a field of `JoinTimings`.
        step: &'static str,
        /// Why.
        error: Box<Error>,
    },
}

impl Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::BadRequest(_) => ErrorKind::BadRequest,
            Error::Unsupported(..) => ErrorKind::Unsupported,
            Error::WrongPhase(_) => ErrorKind::WrongPhase,
            Error::AlreadyJoined(_) => ErrorKind::AlreadyJoined,
            Error::Busy(_) => ErrorKind::Busy,
            Error::NotFound(_) => ErrorKind::NotFound,
            Error::System { .. } => ErrorKind::Failed,
            Error::Step { error, .. } => error.kind(),
        }
    }

    /// The error as the host sees it.
    pub(crate) fn body(&self) -> ErrorBody {
        match self {
            Error::Step { step, error } => ErrorBody {
                kind: error.kind(),
                message: error.to_string(),
                step: Some((*step).to_owned()),
            },
            other => ErrorBody {
                kind: other.kind(),
                message: other.to_string(),
                step: None,
            },
        }
    }

    /// Names the step of the join in which this happened.
    pub(crate) fn in_step(self, step: &'static str) -> Error {
        Error::Step {
            step,
            error: Box::new(self),
        }
    }
}

/// Names what was tried when a system call failed.
pub(crate) trait Context<T> {
    /// `what` is "mounting /dev/vdb on /mnt" or the like.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System {
            what: what(),
            source: source.into(),
        })
    }
}
