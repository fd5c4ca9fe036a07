//! Errors which name the thing, the value that was given and what would have been allowed.

/// Why an rspec, or a change to one, was refused.
///
/// Each case can be asked for the three things that an interface has to report: [`RspecError::attribute`],
/// [`RspecError::value`] and [`RspecError::allowed`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RspecError {
    /// The whole is not a JSON object of attributes.
    #[error("an rspec is a JSON object of attributes, not {found}")]
    NotAnObject {
        /// The JSON type that stood there.
        found: &'static str,
    },
    /// The whole is not an rspec in XML.
    #[error("not an rspec in XML, at byte {at}: {problem}")]
    NotXml {
        /// Where.
        at: u64,
        /// What is wrong there.
        problem: String,
    },
    /// No attribute of that name is in the table.
    #[error("unknown attribute `{attribute}`: known are {allowed}, and names that start with `x-`")]
    Unknown {
        /// The name as given.
        attribute: String,
        /// The value as given.
        value: String,
        /// The names of the table, joined by commas.
        allowed: String,
    },
    /// The value is not of the attribute's type, or out of its range.
    #[error("attribute `{attribute}`: {value} is {problem}; allowed: {allowed}")]
    Invalid {
        /// The attribute's name.
        attribute: String,
        /// The value as given.
        value: String,
        /// What is wrong with it: `negative`, `too large`, `of the wrong type`, ...
        problem: &'static str,
        /// What the table allows.
        allowed: String,
    },
    /// The pool does not hold what is asked of it.
    #[error("attribute `{attribute}`: {value} is more than the pool has; allowed: {allowed}")]
    Exceeds {
        /// The attribute's name.
        attribute: String,
        /// What was asked for.
        value: String,
        /// What the pool could give.
        allowed: String,
    },
    /// An attribute that must be there is not.
    #[error("attribute `{attribute}` is missing; allowed: {allowed}")]
    Missing {
        /// The attribute's name.
        attribute: String,
        /// What could stand there.
        allowed: String,
    },
}

impl RspecError {
    /// The attribute that the error is about, if it is about one.
    pub fn attribute(&self) -> Option<&str> {
        match self {
            Self::NotAnObject { .. } | Self::NotXml { .. } => None,
            Self::Unknown { attribute, .. }
            | Self::Invalid { attribute, .. }
            | Self::Exceeds { attribute, .. }
            | Self::Missing { attribute, .. } => Some(attribute),
        }
    }

    /// The value that was refused.
    pub fn value(&self) -> Option<&str> {
        match self {
            Self::NotAnObject { found } => Some(found),
            Self::Unknown { value, .. } | Self::Invalid { value, .. } | Self::Exceeds { value, .. } => {
                Some(value)
            }
            Self::Missing { .. } | Self::NotXml { .. } => None,
        }
    }

    /// What would have been accepted.
    pub fn allowed(&self) -> Option<&str> {
        match self {
            Self::NotAnObject { .. } | Self::NotXml { .. } => None,
            Self::Unknown { allowed, .. }
            | Self::Invalid { allowed, .. }
            | Self::Exceeds { allowed, .. }
            | Self::Missing { allowed, .. } => Some(allowed),
        }
    }
}

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} {problem}; allowed: {allowed}")]
pub struct NameError {
    /// What was named: `slice name`, `authority name`.
    pub what: &'static str,
    /// The name as given.
    pub value: String,
    /// What is wrong with it.
    pub problem: &'static str,
    /// The rule.
    pub allowed: &'static str,
}

/// Why a text is not an rcap. It never repeats the text, which may be a mistyped secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an rcap; allowed: 32 hexadecimal digits (128 bits)")]
pub struct RcapError;
