//! Tickets: a slice authority's signed word that a slice may have an rspec on some nodes for some time
//! (architecture paper, section 5.3.2). Here they are data: read, checked and narrowed, without I/O.
//!
//! A ticket can name a *holder*, an Ed25519 key. Who has the other half may hand the ticket on and narrow it,
//! never widen it, without asking the authority; each link names the next holder. A node takes it only
//! *sealed*: the last link names no holder. So nobody can leave a narrowing out: what stood before it names
//! a holder, who is somebody else. A holder who redeems a ticket seals it, best for the one node and a minute.
//!
//! ```text
//!   issuer's key            holder's key           next holder's key
//!       │ signs                 │ signs                 │ signs
//!       ▼                       ▼                       ▼
//!   claims ───────────────► narrowing ────────────► narrowing
//!   slice, rspec, nodes,    less of the same,       less of that,
//!   time, serial, holder    next holder             no holder: sealed
//!
//!   text:  claims.signature[.narrowing.signature …]     base64url, without padding
//! ```
//!
//! A node verifies it offline, with the keys of the issuers that its owner trusts and the list of revoked
//! serials: a signature covers the bytes of its part and the signature before it.

mod error;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, VerifyingKey};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::attributes::{Kind, attribute};
use crate::{AuthorityName, Rspec, RspecError, SliceId, Value};

pub use error::TicketError;

/// Longest text of a ticket, in bytes.
pub const TICKET_MAX: usize = 1 << 20;
/// Most times that a ticket can be handed on.
pub const TICKET_LINKS_MAX: usize = 16;

/// Keeps a signature of a ticket from being one of anything else.
const CONTEXT: &[u8] = b"mandoline ticket 1\0";

/// The public half of an Ed25519 key; 64 hexadecimal digits in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// From its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        VerifyingKey::from_bytes(&self.0)
            .and_then(|key| key.verify_strict(message, &Signature::from_bytes(signature)))
            .is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut bytes = [0u8; 32];
        hex::decode_to_slice(String::deserialize(deserializer)?, &mut bytes)
            .map_err(|_| serde::de::Error::custom("not a public key; allowed: 64 hexadecimal digits"))?;
        Ok(Self(bytes))
    }
}

/// What an authority says of a slice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// The authority.
    pub issuer: AuthorityName,
    /// The key that it signs with; it changes its keys now and then.
    pub key: PublicKey,
    /// Its number among the issuer's tickets, by which it is revoked.
    pub serial: u64,
    /// The slice.
    pub slice: SliceId,
    /// What the slice may have on each node.
    pub rspec: Rspec,
    /// Ids of the nodes that it is for; none given: every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<BTreeSet<String>>,
    /// From when it holds.
    pub not_before: Timestamp,
    /// Until when it holds.
    pub not_after: Timestamp,
    /// Who may hand it on, and must seal it; none: whoever has it may redeem it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<PublicKey>,
}

/// What a holder leaves of a ticket. What is not named stays as it is, but for the next holder: without one
/// the ticket is sealed, and cannot be handed on again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Narrowing {
    /// Attributes of which less is left.
    #[serde(default, skip_serializing_if = "Rspec::is_empty")]
    pub rspec: Rspec,
    /// Nodes that are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<BTreeSet<String>>,
    /// A later beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
    /// An earlier end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
    /// Who may hand it on from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<PublicKey>,
}

/// A key of an authority, and while it is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustedKey {
    /// The key.
    pub key: PublicKey,
    /// Until when; none: until it is taken away. A key that is being replaced has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// The authorities that a node's owner trusts, and what they have revoked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// Keys by authority.
    pub keys: BTreeMap<AuthorityName, Vec<TrustedKey>>,
    /// Serial numbers that are revoked, by authority.
    pub revoked: BTreeMap<AuthorityName, BTreeSet<u64>>,
}

/// A ticket as it was read; [`Ticket::verify`] says whether it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Ticket {
    claims: Claims,
    narrowings: Vec<Narrowing>,
    /// The bytes and signature of each part.
    parts: Vec<(Vec<u8>, [u8; 64])>,
}

fn form(problem: impl Into<String>, allowed: impl Into<String>) -> TicketError {
    TicketError::Form {
        problem: problem.into(),
        allowed: allowed.into(),
    }
}

impl Claims {
    /// The ticket with these claims; `sign` signs with the issuer's key.
    pub fn issue(&self, sign: impl FnOnce(&[u8]) -> [u8; 64]) -> Ticket {
        // Claims have no map with keys that are not text, so they can be written.
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        let signature = sign(&message(None, &bytes));
        Ticket {
            claims: self.clone(),
            narrowings: Vec::new(),
            parts: vec![(bytes, signature)],
        }
    }

    /// What is left of these claims under a narrowing.
    fn narrowed(mut self, by: &Narrowing) -> Result<Self, RspecError> {
        self.rspec = narrow(&self.rspec, &by.rspec)?;
        if let Some(nodes) = &by.nodes {
            if let Some(have) = &self.nodes
                && let Some(node) = nodes.iter().find(|node| !have.contains(*node))
            {
                return Err(exceeds("nodes", node.clone(), list(have)));
            }
            self.nodes = Some(nodes.clone());
        }
        if let Some(time) = by.not_before {
            if time < self.not_before {
                let allowed = format!("not before {}", self.not_before);
                return Err(exceeds("not_before", time.to_string(), allowed));
            }
            self.not_before = time;
        }
        if let Some(time) = by.not_after {
            if time > self.not_after {
                let allowed = format!("not after {}", self.not_after);
                return Err(exceeds("not_after", time.to_string(), allowed));
            }
            self.not_after = time;
        }
        self.holder = by.holder;
        Ok(self)
    }
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

fn exceeds(attribute: &str, value: String, allowed: String) -> RspecError {
    RspecError::Exceeds {
        attribute: attribute.to_owned(),
        value,
        allowed,
    }
}

/// What is left of an rspec of which only `less` is wanted of some attributes. No more of anything than there
/// was: a reservation or set that was not named is empty; a limit, weight or interval that was not named is no
/// bound yet. Labels are the issuer's, but for keys, of which some may be left out.
fn narrow(have: &Rspec, less: &Rspec) -> Result<Rspec, RspecError> {
    have.check_within(less)?;
    let mut narrowed = have.clone();
    for (name, value) in less.iter() {
        let kind = attribute(name).map_or(Kind::Label, |attribute| attribute.kind);
        let allowed = match (kind, have.get(name), value) {
            (Kind::Reservation, Some(Value::Number(have)), Value::Number(less)) => less <= have,
            (Kind::Reservation, None, Value::Number(less)) => *less == 0,
            (Kind::Set, _, Value::Ports(less)) => have.ports().contains_all(less),
            // Checked above, where there is a bound.
            (Kind::Limit | Kind::Weight | Kind::Interval, _, _) => true,
            (Kind::Label, Some(Value::Keys(have)), Value::Keys(less)) => {
                less.iter().all(|key| have.contains(key))
            }
            (Kind::Label, have, less) => have == Some(less),
            _ => false,
        };
        if !allowed {
            let show = |value: &Value| match attribute(name) {
                Some(attribute) => value.display(attribute),
                None => value.to_json().to_string(),
            };
            let bound = have.get(name).map_or_else(|| "none".to_owned(), show);
            return Err(exceeds(
                name,
                show(value),
                format!("no more than the ticket's: {bound}"),
            ));
        }
        narrowed.put(name, value.clone());
    }
    Ok(narrowed)
}

/// What is signed: a part, and the signature of the part before it.
fn message(previous: Option<&[u8; 64]>, bytes: &[u8]) -> Vec<u8> {
    let mut message = CONTEXT.to_vec();
    message.extend_from_slice(previous.map_or(&[0u8; 64], |signature| signature));
    message.extend_from_slice(bytes);
    message
}

impl Ticket {
    /// Reads a ticket's text.
    pub fn parse(text: &str) -> Result<Self, TicketError> {
        const FORM: &str = "claims.signature[.narrowing.signature …] in base64url";
        let text = text.trim();
        if text.len() > TICKET_MAX {
            return Err(form(
                format!("{} bytes", text.len()),
                format!("at most {TICKET_MAX} bytes"),
            ));
        }
        let pieces: Vec<&str> = text.split('.').collect();
        if !pieces.len().is_multiple_of(2) || pieces.len() / 2 > TICKET_LINKS_MAX + 1 {
            return Err(form(
                format!("{} pieces", pieces.len()),
                format!("{FORM}, handed on at most {TICKET_LINKS_MAX} times"),
            ));
        }
        let decode = |piece: &str| {
            URL_SAFE_NO_PAD
                .decode(piece)
                .map_err(|e| form(e.to_string(), FORM))
        };
        let mut parts = Vec::with_capacity(pieces.len() / 2);
        for pair in pieces.chunks_exact(2) {
            let [bytes, signature] = pair else { continue };
            let signature = <[u8; 64]>::try_from(decode(signature)?)
                .map_err(|s| form(format!("a signature of {} bytes", s.len()), "64 bytes"))?;
            parts.push((decode(bytes)?, signature));
        }
        let content = |error: serde_json::Error| form(error.to_string(), "what the authority signed");
        let Some(((first, _), rest)) = parts.split_first() else {
            return Err(form("nothing", FORM));
        };
        let claims = serde_json::from_slice(first).map_err(content)?;
        let narrowings = rest
            .iter()
            .map(|(bytes, _)| serde_json::from_slice(bytes).map_err(content))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            claims,
            narrowings,
            parts,
        })
    }

    /// The ticket handed on, narrowed; `sign` signs with the key of the present holder. Refused is what no
    /// node would take.
    pub fn hand_on(
        &self,
        narrowing: &Narrowing,
        sign: impl FnOnce(&[u8]) -> [u8; 64],
    ) -> Result<Self, TicketError> {
        let part = self.parts.len();
        if part > TICKET_LINKS_MAX {
            return Err(form(
                "handed on too often",
                format!("at most {TICKET_LINKS_MAX} times"),
            ));
        }
        let claims = self.effective()?;
        if claims.holder.is_none() {
            return Err(TicketError::NoHolder { part });
        }
        claims
            .narrowed(narrowing)
            .map_err(|source| TicketError::Wider { part, source })?;
        let bytes = serde_json::to_vec(narrowing).unwrap_or_default();
        let signature = sign(&message(
            self.parts.last().map(|(_, signature)| signature),
            &bytes,
        ));
        let mut next = self.clone();
        next.narrowings.push(narrowing.clone());
        next.parts.push((bytes, signature));
        Ok(next)
    }

    /// What is left of the claims; nothing is verified yet.
    fn effective(&self) -> Result<Claims, TicketError> {
        let mut claims = self.claims.clone();
        for (i, narrowing) in self.narrowings.iter().enumerate() {
            claims = claims
                .narrowed(narrowing)
                .map_err(|source| TicketError::Wider { part: i + 1, source })?;
        }
        Ok(claims)
    }

    /// Verifies a sealed ticket at a node, and gives what is left of its claims.
    pub fn verify(&self, trust: &Trust, node: &str, now: Timestamp) -> Result<Claims, TicketError> {
        let (issuer, serial) = (&self.claims.issuer, self.claims.serial);
        let trusted = trust.keys.get(issuer).into_iter().flatten();
        if !trusted
            .into_iter()
            .any(|t| t.key == self.claims.key && t.until.is_none_or(|until| now < until))
        {
            return Err(TicketError::Untrusted {
                issuer: issuer.clone(),
                key: self.claims.key,
                serial,
            });
        }
        let mut signer = Some(self.claims.key);
        let mut previous = None;
        for (part, (bytes, signature)) in self.parts.iter().enumerate() {
            let key = signer.ok_or(TicketError::NoHolder { part })?;
            if !key.verify(&message(previous, bytes), signature) {
                return Err(TicketError::Signature { part });
            }
            previous = Some(signature);
            signer = match part {
                0 => self.claims.holder,
                _ => self
                    .narrowings
                    .get(part - 1)
                    .and_then(|narrowing| narrowing.holder),
            };
        }
        if self.claims.slice.authority() != Some(issuer) {
            return Err(TicketError::Slice {
                issuer: issuer.clone(),
                serial,
                slice: self.claims.slice.clone(),
            });
        }
        if trust
            .revoked
            .get(issuer)
            .is_some_and(|serials| serials.contains(&serial))
        {
            return Err(TicketError::Revoked {
                issuer: issuer.clone(),
                serial,
            });
        }
        let claims = self.effective()?;
        if let Some(holder) = claims.holder {
            return Err(TicketError::Unsealed { serial, holder });
        }
        if now < claims.not_before || now >= claims.not_after {
            return Err(TicketError::Time {
                serial,
                not_before: claims.not_before,
                not_after: claims.not_after,
                now,
            });
        }
        match &claims.nodes {
            Some(nodes) if !nodes.contains(node) => Err(TicketError::Node {
                serial,
                node: node.to_owned(),
                allowed: list(nodes),
            }),
            _ => Ok(claims),
        }
    }
}

/// The text that a ticket is handed on as.
impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (bytes, signature)) in self.parts.iter().enumerate() {
            let dot = if i == 0 { "" } else { "." };
            write!(
                f,
                "{dot}{}.{}",
                URL_SAFE_NO_PAD.encode(bytes),
                URL_SAFE_NO_PAD.encode(signature)
            )?;
        }
        Ok(())
    }
}
