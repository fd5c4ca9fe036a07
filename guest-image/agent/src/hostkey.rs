//! The sliver's ssh host key, made in the agent at the first start on a disk: starting `ssh-keygen` would
//! cost a sliver's birth more than all its other steps. Ed25519, in OpenSSH's `openssh-key-v1` format
//! (PROTOCOL.key of OpenSSH), unencrypted, as `ssh-keygen -t ed25519 -N ''` writes it.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::SigningKey;

use crate::error::{Context as _, Error};
use crate::files;
use crate::identity::random;

const KIND: &[u8] = b"ssh-ed25519";

/// Makes `ssh_host_ed25519_key` in `directory` unless a whole one is there, and answers the public halves of
/// all host keys there.
pub(crate) fn ensure(directory: &Path, hostname: &str) -> Result<Vec<String>, Error> {
    let private = directory.join("ssh_host_ed25519_key");
    let public = directory.join("ssh_host_ed25519_key.pub");
    // The public half is written last: if it's there, the private one is whole.
    let whole = fs::metadata(&private).is_ok_and(|file| file.len() > 0)
        && fs::read_to_string(&public).is_ok_and(|text| text.starts_with("ssh-ed25519 "));
    if !whole {
        let _ = fs::remove_file(&public);
        let key = SigningKey::from_bytes(&random()?);
        let comment = format!("root@{hostname}");
        let check = u32::from_ne_bytes(random()?);
        files::replace(&private, private_file(&key, check, &comment).as_bytes(), 0o600)
            .context(|| format!("writing {}", private.display()))?;
        files::replace(&public, public_line(&key, &comment).as_bytes(), 0o644)
            .context(|| format!("writing {}", public.display()))?;
    }
    let mut keys = Vec::new();
    for entry in fs::read_dir(directory)
        .context(|| format!("listing {}", directory.display()))?
        .flatten()
    {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("ssh_host_") && name.ends_with("_key.pub") {
            let text = fs::read_to_string(entry.path()).context(|| format!("reading {name}"))?;
            keys.push(text.trim().to_owned());
        }
    }
    keys.sort();
    Ok(keys)
}

/// A string of the ssh protocol (RFC 4251 section 5): its length, then its bytes.
fn string(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend_from_slice(bytes);
}

fn public_blob(key: &SigningKey) -> Vec<u8> {
    let mut blob = Vec::new();
    string(&mut blob, KIND);
    string(&mut blob, key.verifying_key().as_bytes());
    blob
}

fn public_line(key: &SigningKey, comment: &str) -> String {
    format!("ssh-ed25519 {} {comment}\n", STANDARD.encode(public_blob(key)))
}

fn private_file(key: &SigningKey, check: u32, comment: &str) -> String {
    let mut secret = Vec::new();
    // Twice the same number: how a reader knows that it decrypted well.
    secret.extend_from_slice(&check.to_be_bytes());
    secret.extend_from_slice(&check.to_be_bytes());
    string(&mut secret, KIND);
    string(&mut secret, key.verifying_key().as_bytes());
    string(&mut secret, &key.to_keypair_bytes());
    string(&mut secret, comment.as_bytes());
    for pad in 1u8..8 {
        if secret.len().is_multiple_of(8) {
            break;
        }
        secret.push(pad);
    }

    let mut blob = b"openssh-key-v1\0".to_vec();
    string(&mut blob, b"none");
    string(&mut blob, b"none");
    string(&mut blob, b"");
    blob.extend_from_slice(&1u32.to_be_bytes());
    string(&mut blob, &public_blob(key));
    string(&mut blob, &secret);

    let mut text = String::from("-----BEGIN OPENSSH PRIVATE KEY-----\n");
    let encoded = STANDARD.encode(blob);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at_checked(70).unwrap_or((rest, ""));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END OPENSSH PRIVATE KEY-----\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn openssh_reads_the_key_and_finds_the_same_public_half() {
        let dir = tempfile::tempdir().expect("a directory");
        for hostname in ["n", "codeen.node-1", "a.much.longer.name.example.org"] {
            let _ = fs::remove_file(dir.path().join("ssh_host_ed25519_key"));
            let keys = ensure(dir.path(), hostname).expect("made");
            assert_eq!(keys.len(), 1);
            let private = dir.path().join("ssh_host_ed25519_key");
            assert_eq!(
                fs::metadata(&private).expect("is there").permissions().mode() & 0o777,
                0o600
            );
            let out = match std::process::Command::new("ssh-keygen")
                .arg("-y")
                .arg("-f")
                .arg(&private)
                .output()
            {
                Ok(out) => out,
                Err(e) => {
                    eprintln!("skipped: ssh-keygen (package openssh-client): {e}");
                    return;
                }
            };
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), keys[0]);
        }
    }

    #[test]
    fn a_key_that_is_there_is_kept_and_all_are_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = ensure(dir.path(), "n").expect("made");
        fs::write(dir.path().join("ssh_host_rsa_key.pub"), "ssh-rsa AAAA root@n\n").expect("written");
        let second = ensure(dir.path(), "other").expect("kept");
        assert_eq!(second, [first[0].clone(), "ssh-rsa AAAA root@n".to_owned()]);
        fs::write(dir.path().join("ssh_host_ed25519_key"), "").expect("emptied");
        let third = ensure(dir.path(), "n").expect("made again");
        assert_ne!(third[0], first[0], "half a key is no key");
    }
}
