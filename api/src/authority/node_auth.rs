//! How a node signs its calls: the header, and the string that the signature covers.

use std::fmt;
use std::str::FromStr;

/// Scheme of the node's `Authorization` header.
pub const NODE_AUTH_SCHEME: &str = "Mandoline-Node";

/// How far a node's clock may be from the authority's, and for how long nonces are remembered. Seconds.
pub const NODE_AUTH_WINDOW_S: u64 = 300;

/// How a node signed a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeAuthAlgorithm {
    /// HMAC-SHA256, key = the text of `NODE_KEY`: registration only.
    HmacSha256,
    /// The key that was announced at registration: everything else.
    Ed25519,
}

impl NodeAuthAlgorithm {
    /// The word in the header.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HmacSha256 => "hmac-sha256",
            Self::Ed25519 => "ed25519",
        }
    }
}

/// The `Authorization` header of a node's call:
/// `Mandoline-Node id=<node_id>,ts=<unix>,nonce=<hex>,alg=hmac-sha256|ed25519,sig=<base64>`.
///
/// `sig` covers [`signing_string`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAuthorization {
    /// `NODE_ID`.
    pub node_id: i64,
    /// The node's clock, Unix seconds; within [`NODE_AUTH_WINDOW_S`] of the authority's.
    pub timestamp: u64,
    /// Fresh for each call: 32 lower-case hex digits from 16 random bytes (16 to 64 digits are taken).
    pub nonce: String,
    /// How it was signed.
    pub algorithm: NodeAuthAlgorithm,
    /// Base64 (standard, padded) of the signature.
    pub signature: String,
}

/// The string that a node signs: method, path with query exactly as sent, timestamp, nonce and the
/// lower-case hex SHA-256 of the body (of nothing, if there is none), joined by single line feeds.
pub fn signing_string(
    method: &str,
    path_and_query: &str,
    timestamp: u64,
    nonce: &str,
    body_sha256_hex: &str,
) -> String {
    format!("{method}\n{path_and_query}\n{timestamp}\n{nonce}\n{body_sha256_hex}")
}

/// Why a node's `Authorization` header cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeAuthorizationError {
    /// Another scheme, or none.
    #[error("expected an Authorization header of scheme {NODE_AUTH_SCHEME}")]
    Scheme,
    /// A part is not there.
    #[error("Authorization: part '{0}' is missing")]
    Missing(&'static str),
    /// A part is there twice, or is not known.
    #[error("Authorization: unexpected part '{0}' (allowed, once each: id, ts, nonce, alg, sig)")]
    Unexpected(String),
    /// A part has a value that it cannot have.
    #[error("Authorization: '{part}' is '{value}', must be {allowed}")]
    Value {
        /// Which part.
        part: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
}

impl fmt::Display for NodeAuthorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{NODE_AUTH_SCHEME} id={},ts={},nonce={},alg={},sig={}",
            self.node_id,
            self.timestamp,
            self.nonce,
            self.algorithm.as_str(),
            self.signature
        )
    }
}

impl FromStr for NodeAuthorization {
    type Err = NodeAuthorizationError;

    fn from_str(header: &str) -> Result<Self, Self::Err> {
        use NodeAuthorizationError as E;
        let (scheme, rest) = header.trim().split_once(' ').ok_or(E::Scheme)?;
        if !scheme.eq_ignore_ascii_case(NODE_AUTH_SCHEME) {
            return Err(E::Scheme);
        }
        let mut parts: [(&'static str, Option<&str>); 5] = [
            ("id", None),
            ("ts", None),
            ("nonce", None),
            ("alg", None),
            ("sig", None),
        ];
        for part in rest.split(',') {
            let (name, value) = part
                .trim()
                .split_once('=')
                .ok_or_else(|| E::Unexpected(part.to_owned()))?;
            match parts
                .iter_mut()
                .find(|(known, seen)| *known == name && seen.is_none())
            {
                Some((_, slot)) => *slot = Some(value),
                None => return Err(E::Unexpected(name.to_owned())),
            }
        }
        let get = |index: usize| parts[index].1.ok_or(E::Missing(parts[index].0));
        let bad = |part, value: &str, allowed| E::Value {
            part,
            value: value.to_owned(),
            allowed,
        };
        let (id, ts, nonce, alg, sig) = (get(0)?, get(1)?, get(2)?, get(3)?, get(4)?);
        let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if !(16..=64).contains(&nonce.len()) || !nonce.bytes().all(hex) {
            return Err(bad("nonce", nonce, "16 to 64 lower-case hex digits"));
        }
        Ok(Self {
            node_id: id.parse().map_err(|_| bad("id", id, "the node's number"))?,
            timestamp: ts.parse().map_err(|_| bad("ts", ts, "Unix seconds"))?,
            nonce: nonce.to_owned(),
            algorithm: match alg {
                "hmac-sha256" => NodeAuthAlgorithm::HmacSha256,
                "ed25519" => NodeAuthAlgorithm::Ed25519,
                other => return Err(bad("alg", other, "hmac-sha256 or ed25519")),
            },
            signature: sig.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> NodeAuthorization {
        NodeAuthorization {
            node_id: 7,
            timestamp: 1_700_000_000,
            nonce: "00112233445566778899aabbccddeeff".into(),
            algorithm: NodeAuthAlgorithm::Ed25519,
            signature: "c2ln+/==".into(),
        }
    }

    #[test]
    fn header_survives_the_wire() {
        assert_eq!(sample().to_string().parse(), Ok(sample()));
    }

    #[test]
    fn header_with_a_part_missing_twice_or_unknown_is_refused() {
        let text = sample().to_string();
        for (from, to) in [
            ("id=7,", ""),
            ("id=7,", "id=7,id=8,"),
            ("id=7,", "id=7,x=1,"),
            ("id=7,", "id=seven,"),
            ("alg=ed25519", "alg=none"),
            ("nonce=00112233445566778899aabbccddeeff", "nonce=00"),
            (
                "nonce=00112233445566778899aabbccddeeff",
                "nonce=../../../../../../../",
            ),
            ("Mandoline-Node ", "Bearer "),
        ] {
            let bad = text.replace(from, to);
            assert_ne!(bad, text);
            assert!(bad.parse::<NodeAuthorization>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signing_string_has_five_lines() {
        assert_eq!(
            signing_string("GET", "/v1/node/slivers", 5, "ab", "e3"),
            "GET\n/v1/node/slivers\n5\nab\ne3"
        );
    }
}
