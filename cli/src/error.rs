//! What goes wrong, and the exit code that says so to scripts.

use std::fmt;
use std::process::ExitCode;

use mandoline_api::authority_client::{ClientError, ErrorClass};

/// Exit codes; `mandoline help` documents them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Something did not work.
    Failure = 1,
    /// The command was given wrongly.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// Refused: not logged in, or not allowed.
    Refused = 4,
    /// Something that is needed does not answer; trying again later may help.
    Unavailable = 5,
}

/// An error that ends the command.
#[derive(Debug)]
pub(crate) struct Error {
    pub(crate) exit: Exit,
    message: String,
    /// What to do next.
    advice: Option<String>,
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            advice: None,
        }
    }

    pub(crate) fn failure(message: impl Into<String>) -> Self {
        Self::new(Exit::Failure, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// With a hint what to do.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice.get_or_insert(advice.into());
        self
    }

    /// With what was being done.
    pub(crate) fn during(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The process's end.
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.advice {
            Some(advice) => write!(f, "\n  {advice}"),
            None => Ok(()),
        }
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        let unauthenticated = matches!(&error, ClientError::Refused { status: 401, .. });
        let out = match error.class() {
            ErrorClass::NotFound => Self::new(Exit::NotFound, error.to_string()),
            ErrorClass::Forbidden => Self::new(Exit::Refused, error.to_string()),
            ErrorClass::Retryable => Self::new(Exit::Unavailable, error.to_string()),
            ErrorClass::Fatal => Self::new(Exit::Failure, error.to_string()),
        };
        match &error {
            _ if unauthenticated => out.advise("log in with `mandoline login`"),
            ClientError::Unavailable { .. } => {
                out.advise("is it running, and is --authority (or MANDOLINE_AUTHORITY) right?")
            }
            _ => out,
        }
    }
}

/// Gives an I/O error the name of the thing that it is about.
pub(crate) trait About<T> {
    fn about(self, thing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> About<T> for Result<T, E> {
    fn about(self, thing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::failure(format!("{thing}: {error}")))
    }
}
