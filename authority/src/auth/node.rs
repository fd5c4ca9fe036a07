//! Calls that nodes sign: REST with the `Mandoline-Node` header, PLCAPI with auth structs of method `hmac`.
//!
//! A signature covers method, path, body, time and a nonce, so that a call can be neither altered nor
//! repeated. PlanetLab's own HMAC-SHA1 covers only the argument values; it exists beside it for old nodes,
//! off unless the operator turns it on.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature, VerifyingKey};
use hmac::{Hmac, KeyInit, Mac};
use mandoline_api::authority::{NODE_AUTH_WINDOW_S, NodeAuthAlgorithm, NodeAuthorization, signing_string};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use sqlx::Row;

use crate::db::{Conn, now};
use crate::domain::Caller;
use crate::error::{Error, Result};

/// A signed call, as it came in.
#[derive(Clone, Debug)]
pub struct SignedCall<'a> {
    /// HTTP method.
    pub method: &'a str,
    /// Path and query exactly as sent.
    pub path_and_query: &'a str,
    /// The body's bytes.
    pub body: &'a [u8],
}

fn refused(why: &str) -> Error {
    Error::Unauthenticated(format!("node signature: {why}"))
}

/// Which node made the call. `wanted` is the algorithm that the endpoint takes.
pub async fn verify(
    conn: &mut Conn,
    authorization: &NodeAuthorization,
    wanted: NodeAuthAlgorithm,
    call: &SignedCall<'_>,
) -> Result<Caller> {
    if authorization.algorithm != wanted {
        return Err(refused(&format!("this call is signed with {}", wanted.as_str())));
    }
    check_time(authorization.timestamp)?;
    let row = sqlx::query(
        "SELECT node_key, ed25519_key FROM nodes WHERE node_id = $1 AND deleted = 0 AND peer_id IS NULL",
    )
    .bind(authorization.node_id)
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| refused("unknown node, or wrong key"))?;
    let text = signing_string(
        call.method,
        call.path_and_query,
        authorization.timestamp,
        &authorization.nonce,
        &hex::encode(Sha256::digest(call.body)),
    );
    let signature = STANDARD
        .decode(&authorization.signature)
        .map_err(|_| refused("sig is not base64"))?;
    let right = match wanted {
        NodeAuthAlgorithm::HmacSha256 => {
            let key: String = row.try_get(0)?;
            hmac_sha256_is(&key, text.as_bytes(), &signature)
        }
        NodeAuthAlgorithm::Ed25519 => {
            let key: Option<String> = row.try_get(1)?;
            let key = key.ok_or_else(|| refused("the node has not registered"))?;
            verifying_key(&key).is_ok_and(|key| {
                Signature::from_slice(&signature)
                    .is_ok_and(|sig| key.verify_strict(text.as_bytes(), &sig).is_ok())
            })
        }
    };
    if !right {
        return Err(refused("unknown node, or wrong key"));
    }
    use_nonce(conn, authorization.node_id, &authorization.nonce).await?;
    Caller::load_node(conn, authorization.node_id)
        .await?
        .ok_or_else(|| refused("unknown node, or wrong key"))
}

/// Fails outside the window around the authority's clock.
pub fn check_time(timestamp: u64) -> Result<()> {
    let here = now().unsigned_abs();
    if here.abs_diff(timestamp) > NODE_AUTH_WINDOW_S {
        return Err(refused(&format!(
            "made at {timestamp}, the authority's clock says {here}: at most {NODE_AUTH_WINDOW_S} s apart are allowed"
        )));
    }
    Ok(())
}

/// Remembers a nonce; fails if it was used before. It must be called only after the signature was found right,
/// or anybody could use a node's nonces up.
pub async fn use_nonce(conn: &mut Conn, node_id: i64, nonce: &str) -> Result<()> {
    // A call from the far end of the window stays replayable until the near end has passed it.
    let expires = now() + 2 * NODE_AUTH_WINDOW_S as i64 + 1;
    let fresh = sqlx::query(
        "INSERT INTO nonces (node_id, nonce, expires) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
    )
    .bind(node_id)
    .bind(nonce)
    .bind(expires)
    .execute(conn)
    .await?
    .rows_affected();
    match fresh {
        0 => Err(refused("this call was made before (nonce used twice)")),
        _ => Ok(()),
    }
}

/// Whether `tag` is the HMAC-SHA256 of `message`, in constant time.
pub fn hmac_sha256_is(key: &str, message: &[u8], tag: &[u8]) -> bool {
    Hmac::<Sha256>::new_from_slice(key.as_bytes()).is_ok_and(|mut mac| {
        mac.update(message);
        mac.verify_slice(tag).is_ok()
    })
}

/// Whether `tag` is the HMAC-SHA1 of `message`, in constant time. PlanetLab's old nodes only.
pub fn hmac_sha1_is(key: &str, message: &[u8], tag: &[u8]) -> bool {
    Hmac::<Sha1>::new_from_slice(key.as_bytes()).is_ok_and(|mut mac| {
        mac.update(message);
        mac.verify_slice(tag).is_ok()
    })
}

/// Reads a node's public key.
pub fn verifying_key(base64: &str) -> Result<VerifyingKey> {
    let bytes: [u8; 32] = STANDARD
        .decode(base64)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::invalid_value("ed25519_public_key", base64, "base64 of 32 bytes"))?;
    match VerifyingKey::from_bytes(&bytes) {
        // A weak key verifies signatures that nobody made.
        Ok(key) if !key.is_weak() => Ok(key),
        _ => Err(Error::invalid_value(
            "ed25519_public_key",
            base64,
            "a point of the curve, not of small order",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_hmacs() {
        // RFC 2202 case 2, RFC 4231 case 2.
        let sha1 = hex::decode("effcdf6ae5eb2fa2d27416d5f184df9c259a7c79").unwrap();
        assert!(hmac_sha1_is("Jefe", b"what do ya want for nothing?", &sha1));
        let sha256 = hex::decode("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843").unwrap();
        assert!(hmac_sha256_is("Jefe", b"what do ya want for nothing?", &sha256));
        assert!(!hmac_sha256_is("Jefe", b"what do ya want for nothing!", &sha256));
        assert!(!hmac_sha256_is(
            "Jefe",
            b"what do ya want for nothing?",
            &sha256[..31]
        ));
    }

    #[test]
    fn weak_and_short_node_keys_are_refused() {
        assert!(verifying_key(&STANDARD.encode([0u8; 32])).is_err());
        assert!(verifying_key("AAAA").is_err());
        assert!(verifying_key("not base64").is_err());
    }

    #[test]
    fn clocks_may_be_five_minutes_apart() {
        let here = now().unsigned_abs();
        assert!(check_time(here - NODE_AUTH_WINDOW_S + 5).is_ok());
        assert!(check_time(here - NODE_AUTH_WINDOW_S - 5).is_err());
        assert!(check_time(here + NODE_AUTH_WINDOW_S + 5).is_err());
    }
}
