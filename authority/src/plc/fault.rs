//! PLCAPI's faults: codes and texts.

use crate::error::Error;

/// A fault before caller and method are put in front of its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: i32,
    pub(super) text: String,
    /// Whether `<caller>: <method>: ` goes in front.
    prefixed: bool,
}

impl Fault {
    fn new(code: i32, text: String) -> Self {
        Self {
            code,
            text,
            prefixed: true,
        }
    }

    pub(super) fn no_method(name: &str) -> Self {
        let name: String = name.chars().take(100).collect();
        Self {
            code: 100,
            text: format!("Invalid method {name}"),
            prefixed: false,
        }
    }

    pub(super) fn argument_count(least: usize, most: usize, got: usize) -> Self {
        let range = if least == most {
            most.to_string()
        } else {
            format!("{least}-{most}")
        };
        Self::new(101, format!("Expected {range} arguments, got {got}"))
    }

    /// A value of the wrong shape, by the argument's name.
    pub(super) fn argument(name: &str, why: &str) -> Self {
        Self::new(102, format!("Invalid {name} value: {why}"))
    }

    pub(super) fn invalid(why: impl std::fmt::Display) -> Self {
        Self::new(102, format!("Invalid argument: {why}"))
    }

    pub(super) fn authentication(why: impl std::fmt::Display) -> Self {
        Self::new(103, format!("Failed to authenticate call: {why}"))
    }

    pub(super) fn denied(why: impl std::fmt::Display) -> Self {
        Self::new(108, format!("Permission denied: {why}"))
    }

    pub(super) fn recursive_multicall() -> Self {
        Self {
            code: -507,
            text: "Recursive system.multicall forbidden".into(),
            prefixed: false,
        }
    }

    /// A request that is no method call. The parser's own text would repeat the body, passwords and all.
    pub(super) fn unreadable() -> Self {
        Self {
            code: -32700,
            text: "not an XML-RPC method call".into(),
            prefixed: false,
        }
    }

    /// With caller (`person_id 2`, `node_id 7` or nothing) and method in front, as clients see it.
    pub(super) fn for_call(mut self, caller: &str, method: &str) -> Self {
        if self.prefixed {
            self.text = format!("{caller}: {method}: {}", self.text);
            self.prefixed = false;
        }
        self
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(_) | Error::NoSuch(_) | Error::Conflict(_) => Self::invalid(error),
            Error::Denied(why) => Self::denied(why),
            Error::Unauthenticated(_) | Error::RateLimited { .. } => Self::authentication(error),
            Error::Unavailable => Self::new(106, format!("Database error: {error}")),
            Error::Database(error) => {
                tracing::error!(%error, "database");
                Self::new(106, "Database error: the authority's log has the details".into())
            }
            Error::Internal(why) => {
                tracing::error!(%why, "internal");
                Self::new(
                    111,
                    "Internal API error: the authority's log has the details".into(),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_planetlabs() {
        let text = |fault: Fault, caller| fault.for_call(caller, "AddSlice").text;
        assert_eq!(
            text(Fault::argument_count(2, 2, 1), ""),
            ": AddSlice: Expected 2 arguments, got 1"
        );
        assert_eq!(
            text(Fault::argument_count(1, 3, 0), ""),
            ": AddSlice: Expected 1-3 arguments, got 0"
        );
        assert_eq!(text(Fault::no_method("NoSuch"), ""), "Invalid method NoSuch");
        assert_eq!(
            text(Error::NoSuch("slice".into()).into(), "person_id 2"),
            "person_id 2: AddSlice: Invalid argument: No such slice"
        );
    }
}
