//! Why a ticket is of no use.

use jiff::Timestamp;

use super::PublicKey;
use crate::{AuthorityName, RspecError, SliceId};

/// Why a ticket is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It is no ticket.
    #[error("not a ticket: {problem}; allowed: {allowed}")]
    Form {
        /// What is wrong.
        problem: String,
        /// What a ticket looks like.
        allowed: String,
    },
    /// Nobody trusts this issuer's key, or not any more.
    #[error("ticket {serial} is signed by {issuer} with the key {key}, which is not trusted here now")]
    Untrusted {
        /// The authority that it names.
        issuer: AuthorityName,
        /// The key that it names.
        key: PublicKey,
        /// Its serial number.
        serial: u64,
    },
    /// A signature does not hold.
    #[error("ticket: the signature of part {part} does not hold")]
    Signature {
        /// 0 for the claims, then the narrowings.
        part: usize,
    },
    /// A narrowing without a holder before it.
    #[error("ticket: part {part} narrows what names no holder, and cannot be handed on")]
    NoHolder {
        /// Which narrowing, from 1.
        part: usize,
    },
    /// Its holder has not sealed it.
    #[error(
        "ticket {serial} is not sealed; allowed: one whose last part, signed by its holder {holder}, names no holder"
    )]
    Unsealed {
        /// Its serial number.
        serial: u64,
        /// Who must seal it.
        holder: PublicKey,
    },
    /// A narrowing asks for more than what it narrows.
    #[error("ticket: part {part} asks for more than what it narrows: {source}")]
    Wider {
        /// Which narrowing, from 1.
        part: usize,
        /// The attribute, its value, and what would have been allowed.
        source: RspecError,
    },
    /// It is not for now.
    #[error("ticket {serial} holds from {not_before} to {not_after}, and it is {now}")]
    Time {
        /// Its serial number.
        serial: u64,
        /// From when it holds.
        not_before: Timestamp,
        /// Until when it holds.
        not_after: Timestamp,
        /// The time.
        now: Timestamp,
    },
    /// It is for other nodes.
    #[error("ticket {serial} is not for node {node}; allowed: {allowed}")]
    Node {
        /// Its serial number.
        serial: u64,
        /// This node.
        node: String,
        /// Those that it is for.
        allowed: String,
    },
    /// Its authority has taken it back.
    #[error("ticket {serial} of {issuer} is revoked")]
    Revoked {
        /// The authority.
        issuer: AuthorityName,
        /// Its serial number.
        serial: u64,
    },
    /// An authority speaks for its own slices only.
    #[error("ticket {serial}: {issuer} may not speak for slice {slice}; allowed: slices of {issuer}")]
    Slice {
        /// The authority.
        issuer: AuthorityName,
        /// Its serial number.
        serial: u64,
        /// The slice.
        slice: SliceId,
    },
}
