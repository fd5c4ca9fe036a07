//! Users' ssh keys: what comes in is parsed, judged and written anew, so that nothing but one key of one
//! line can reach an `authorized_keys` file.

use ssh_key::{Algorithm, PublicKey};

use crate::error::{Error, Result};

/// Smallest RSA modulus, bits (NIST SP 800-57: 112 bits of strength).
const RSA_MIN_BITS: usize = 2048;
/// Longest line that is looked at, bytes: RSA of 16384 bits fits.
const LINE_MAX: usize = 4096;
/// Longest comment that is kept, characters.
const COMMENT_MAX: usize = 100;

const ALLOWED: &str =
    "one line with an ed25519, ecdsa or RSA (2048 bits and more) public key, or a security key (sk-)";

/// Checks a public key line and writes it anew.
pub fn check(line: &str) -> Result<String> {
    let refuse = |why: &str| {
        Error::invalid(format!(
            "Invalid SSH version 2 public key: {why}; allowed is {ALLOWED}"
        ))
    };
    let line = line.trim();
    if line.len() > LINE_MAX {
        return Err(refuse("too long"));
    }
    // The parser takes a line feed for a part of the comment: that would smuggle a second line in.
    if line.chars().any(char::is_control) {
        return Err(refuse("control characters"));
    }
    let mut key = PublicKey::from_openssh(line).map_err(|_| refuse("not a public key line"))?;
    match key.algorithm() {
        Algorithm::Ed25519
        | Algorithm::SkEd25519
        | Algorithm::Ecdsa { .. }
        | Algorithm::SkEcdsaSha2NistP256 => {}
        Algorithm::Rsa { .. } => {
            let modulus = key
                .key_data()
                .rsa()
                .and_then(|rsa| rsa.n.as_positive_bytes())
                .unwrap_or_default();
            let bits = modulus
                .first()
                .map_or(0, |top| modulus.len() * 8 - top.leading_zeros() as usize);
            if bits < RSA_MIN_BITS {
                return Err(refuse(&format!("RSA of {bits} bits")));
            }
        }
        other => return Err(refuse(&format!("algorithm {}", other.as_str()))),
    }
    let comment: String = key
        .comment()
        .chars()
        .filter(|c| c.is_ascii_graphic() || *c == ' ')
        .take(COMMENT_MAX)
        .collect();
    key.set_comment(comment.trim());
    key.to_openssh().map_err(|_| refuse("cannot be written"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";

    fn rsa(bytes: usize) -> String {
        use base64::Engine as _;
        let mut blob = Vec::new();
        let mut part = |data: &[u8]| {
            blob.extend((data.len() as u32).to_be_bytes());
            blob.extend(data);
        };
        part(b"ssh-rsa");
        part(&[1, 0, 1]);
        let mut modulus = vec![0u8, 0x80];
        modulus.resize(bytes + 1, 1);
        part(&modulus);
        format!(
            "ssh-rsa {}",
            base64::engine::general_purpose::STANDARD.encode(blob)
        )
    }

    #[test]
    fn good_keys_come_back_in_one_clean_line() {
        assert_eq!(
            check(&format!("  {ED25519} me@home\n")).unwrap(),
            format!("{ED25519} me@home")
        );
        assert_eq!(check(ED25519).unwrap().trim(), ED25519);
        assert!(check(&rsa(256)).is_ok());
    }

    #[test]
    fn a_second_line_cannot_hide_in_the_comment() {
        for bad in [
            format!("{ED25519} x\n{ED25519} y"),
            format!("{ED25519} x\r{ED25519}"),
            format!("{ED25519} \0"),
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn weak_odd_and_broken_keys_are_refused() {
        let options = format!("command=\"sh\" {ED25519}");
        let dss = "ssh-dss AAAAB3NzaC1kc3MAAACBAKK";
        for bad in [
            rsa(128).as_str(),
            options.as_str(),
            dss,
            "",
            "ssh-ed25519",
            "ssh-ed25519 AAAA",
            "hello",
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        assert!(check(&rsa(128)).unwrap_err().to_string().contains("1024 bits"));
    }

    #[test]
    fn comments_are_cut_to_plain_text() {
        let long = "c".repeat(500);
        assert!(check(&format!("{ED25519} {long}")).unwrap().len() < 200);
        assert_eq!(
            check(&format!("{ED25519} m\u{e9}@h")).unwrap(),
            format!("{ED25519} m@h")
        );
    }
}
