//! Who the node is to its authority: the secret of `pl_node.txt` for the registration, an Ed25519 key of
//! the node's own, made here and never leaving its file, for everything after it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signer, SigningKey};
use hmac::{Hmac, KeyInit, Mac};
use mandoline_api::authority::{NodeAuthAlgorithm, NodeAuthorization, signing_string};
use mandoline_api::authority_client::Sign;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

const KEY_FILE: &str = "node-key";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or made.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others could have read it.
    #[error("{}: mode is {mode:04o}; allowed: 0600 (a key that others could read is not to be trusted: remove it, and the node makes a new one)", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Not what was written.
    #[error("{}: {length} bytes; allowed: the 32 of an Ed25519 key (remove it, and the node makes a new one)", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Its length, bytes.
        length: usize,
    },
    /// No entropy.
    #[error("the kernel gives no random bytes: {0}")]
    Random(getrandom::Error),
}

/// Reads the node's key from `state_dir`, or makes it there. It is whole or not there at all.
pub fn load_or_create(state_dir: &Path) -> Result<SigningKey, IdentityError> {
    let path = state_dir.join(KEY_FILE);
    match fs::read(&path).map(Zeroizing::new) {
        Ok(bytes) => {
            let mode = fs::metadata(&path).map_err(file(&path))?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(IdentityError::Exposed { path, mode });
            }
            let secret: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| IdentityError::Broken {
                path,
                length: bytes.len(),
            })?;
            Ok(SigningKey::from_bytes(secret))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(state_dir, &path),
        Err(source) => Err(IdentityError::File { path, source }),
    }
}

fn create(state_dir: &Path, path: &Path) -> Result<SigningKey, IdentityError> {
    let mut secret = Zeroizing::new([0; 32]);
    getrandom::fill(secret.as_mut()).map_err(IdentityError::Random)?;
    fs::create_dir_all(state_dir).map_err(file(state_dir))?;
    let part = path.with_extension("part");
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file(&part)(error)),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    let mut out = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&part)
        .map_err(file(&part))?;
    out.write_all(secret.as_ref())
        .and_then(|()| out.sync_all())
        .map_err(file(&part))?;
    fs::rename(&part, path).map_err(file(path))?;
    // The name has to survive a power cut too: the authority will know the node by this key.
    fs::File::open(state_dir)
        .and_then(|dir| dir.sync_all())
        .map_err(file(state_dir))?;
    Ok(SigningKey::from_bytes(&secret))
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    |source| IdentityError::File { path, source }
}

/// Signs under `NODE_KEY`, for the registration.
pub struct HmacSigner {
    /// `NODE_ID`.
    pub node_id: i64,
    /// `NODE_KEY`, as written.
    pub node_key: Zeroizing<String>,
}

/// Signs with the node's own key.
pub struct KeySigner {
    /// `NODE_ID`.
    pub node_id: i64,
    /// The key that was registered.
    pub key: SigningKey,
}

impl Sign for HmacSigner {
    fn authorization(&self, method: &str, path: &str, body: &[u8]) -> String {
        sign_call(
            self.node_id,
            NodeAuthAlgorithm::HmacSha256,
            method,
            path,
            body,
            |text| {
                // HMAC takes keys of every length.
                match Hmac::<Sha256>::new_from_slice(self.node_key.as_bytes()) {
                    Ok(mut mac) => {
                        mac.update(text);
                        mac.finalize().into_bytes().to_vec()
                    }
                    Err(_) => Vec::new(),
                }
            },
        )
    }
}

impl Sign for KeySigner {
    fn authorization(&self, method: &str, path: &str, body: &[u8]) -> String {
        sign_call(
            self.node_id,
            NodeAuthAlgorithm::Ed25519,
            method,
            path,
            body,
            |text| self.key.sign(text).to_bytes().to_vec(),
        )
    }
}

fn sign_call(
    node_id: i64,
    algorithm: NodeAuthAlgorithm,
    method: &str,
    path: &str,
    body: &[u8],
    sign: impl FnOnce(&[u8]) -> Vec<u8>,
) -> String {
    // A clock before 1970, or a kernel without entropy, gives a call that the authority refuses; it says why.
    let timestamp = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut nonce = [0; 16];
    if getrandom::fill(&mut nonce).is_err() {
        tracing::error!("no random bytes for a nonce: the authority will take the call for a replay");
    }
    let nonce = hex::encode(nonce);
    let text = signing_string(
        method,
        path,
        timestamp,
        &nonce,
        &hex::encode(Sha256::digest(body)),
    );
    let signature = BASE64.encode(sign(text.as_bytes()));
    NodeAuthorization {
        node_id,
        timestamp,
        nonce,
        algorithm,
        signature,
    }
    .to_string()
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::Signature;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("scs");
        let first = load_or_create(&state).unwrap();
        assert_eq!(first.to_bytes(), load_or_create(&state).unwrap().to_bytes());
        let path = state.join(KEY_FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            load_or_create(&state),
            Err(IdentityError::Exposed { mode: 0o640, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"half").unwrap();
        assert!(matches!(
            load_or_create(&state),
            Err(IdentityError::Broken { length: 4, .. })
        ));
    }

    #[test]
    fn a_half_made_key_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node-key.part"), b"half").unwrap();
        load_or_create(dir.path()).unwrap();
        assert!(!dir.path().join("node-key.part").exists());
    }

    #[test]
    fn signatures_bind_method_path_and_body() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let signer = KeySigner {
            node_id: 3,
            key: key.clone(),
        };
        let header: NodeAuthorization = signer
            .authorization("POST", "/v1/node/status?x=1", b"{}")
            .parse()
            .unwrap();
        let verify = |method, path, body: &[u8]| {
            let digest = hex::encode(Sha256::digest(body));
            let text = signing_string(method, path, header.timestamp, &header.nonce, &digest);
            let signature: [u8; 64] = BASE64.decode(&header.signature).unwrap().try_into().unwrap();
            key.verifying_key()
                .verify_strict(text.as_bytes(), &Signature::from_bytes(&signature))
                .is_ok()
        };
        assert!(verify("POST", "/v1/node/status?x=1", b"{}"));
        assert!(!verify("GET", "/v1/node/status?x=1", b"{}"));
        assert!(!verify("POST", "/v1/node/status", b"{}"));
        assert!(!verify("POST", "/v1/node/status?x=1", b"{ }"));
    }

    #[test]
    fn nonces_are_fresh() {
        let signer = HmacSigner {
            node_id: 3,
            node_key: Zeroizing::new("key".into()),
        };
        let nonce = || {
            signer
                .authorization("GET", "/", b"")
                .parse::<NodeAuthorization>()
                .unwrap()
                .nonce
        };
        assert_ne!(nonce(), nonce());
    }
}
