//! The node's secret, and the rcaps that are derived from it.
//!
//! An rcap is HMAC-SHA256(secret, object id ‖ epoch), cut to 128 bits: the state file alone gives none away,
//! an answer can be repeated without being stored, and a new epoch revokes.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use mandoline_rspec::Rcap;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::state::{Pool, PoolId, State};

/// Bytes of the secret.
const LENGTH: usize = 32;

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read or made.
    #[error("node secret {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file does not hold a secret.
    #[error("node secret {} holds {length} bytes; allowed: {LENGTH}. Remove it only if every rcap of this node may become void", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// What it holds.
        length: usize,
    },
    /// The file can be read by others.
    #[error("node secret {} has mode {mode:o}; allowed: 600. Others may have read it: remove it, and every rcap of this node becomes void", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The kernel gave no random bytes.
    #[error("no random bytes from the kernel: {0}")]
    Random(getrandom::Error),
}

/// The node's secret.
pub struct Secret(Zeroizing<[u8; LENGTH]>);

impl Secret {
    /// Reads the secret, or makes it when there is none.
    pub fn open(path: &Path) -> Result<Self, SecretError> {
        let file = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        match fs::File::open(path) {
            Ok(mut found) => {
                let mode = found.metadata().map_err(file)?.permissions().mode() & 0o777;
                if mode & 0o077 != 0 {
                    return Err(SecretError::Mode {
                        path: path.to_owned(),
                        mode,
                    });
                }
                let mut bytes = Zeroizing::new(Vec::new());
                found.read_to_end(&mut bytes).map_err(file)?;
                let secret = <[u8; LENGTH]>::try_from(bytes.as_slice()).map_err(|_| SecretError::Length {
                    path: path.to_owned(),
                    length: bytes.len(),
                })?;
                Ok(Self(Zeroizing::new(secret)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path),
            Err(error) => Err(file(error)),
        }
    }

    fn make(path: &Path) -> Result<Self, SecretError> {
        let file = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        let mut secret = Zeroizing::new([0u8; LENGTH]);
        getrandom::fill(secret.as_mut()).map_err(SecretError::Random)?;
        // Whole or not at all, even when the power goes: a lost secret voids every rcap.
        let temporary = path.with_extension("new");
        let _ = fs::remove_file(&temporary);
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(file)?;
        out.write_all(secret.as_ref()).map_err(file)?;
        out.sync_all().map_err(file)?;
        fs::rename(&temporary, path).map_err(file)?;
        if let Some(parent) = path.parent() {
            fs::File::open(parent)
                .and_then(|dir| dir.sync_all())
                .map_err(file)?;
        }
        Ok(Self(secret))
    }

    fn mac(&self, purpose: &[u8], data: &[&[u8]]) -> [u8; 32] {
        let mut mac = match Hmac::<Sha256>::new_from_slice(self.0.as_ref()) {
            Ok(mac) => mac,
            // HMAC takes keys of every length.
            Err(_) => unreachable!("HMAC refused a key of {LENGTH} bytes"),
        };
        mac.update(purpose);
        for part in data {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// The rcap of a pool in one of its epochs.
    pub fn rcap(&self, id: PoolId, epoch: u32) -> Rcap {
        let mac = self.mac(b"mandoline rcap 1\0", &[&id.to_be_bytes(), &epoch.to_be_bytes()]);
        let mut bytes = [0u8; 16];
        bytes.copy_from_slice(&mac[..16]);
        Rcap::from_bytes(bytes)
    }

    /// Where to look an rcap up: a value that says nothing about the rcap to who times the look-up.
    fn slot(&self, rcap: &Rcap) -> u64 {
        let mac = self.mac(b"mandoline rcap index 1\0", &[rcap.as_bytes()]);
        u64::from_be_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], mac[6], mac[7]])
    }
}

/// Finds pools by rcap.
#[derive(Default)]
pub struct RcapIndex(HashMap<u64, Vec<PoolId>>);

impl RcapIndex {
    /// The index of all pools.
    pub fn new(secret: &Secret, state: &State) -> Self {
        let mut index = Self::default();
        for pool in state.pools.values() {
            index.insert(secret, pool);
        }
        index
    }

    /// Adds a pool.
    pub fn insert(&mut self, secret: &Secret, pool: &Pool) {
        let slot = self
            .0
            .entry(secret.slot(&secret.rcap(pool.id, pool.epoch)))
            .or_default();
        if !slot.contains(&pool.id) {
            slot.push(pool.id);
        }
    }

    /// Takes a pool out.
    pub fn remove(&mut self, secret: &Secret, pool: &Pool) {
        let slot = secret.slot(&secret.rcap(pool.id, pool.epoch));
        if let Some(pools) = self.0.get_mut(&slot) {
            pools.retain(|id| *id != pool.id);
            if pools.is_empty() {
                self.0.remove(&slot);
            }
        }
    }

    /// The pool that an rcap stands for.
    pub fn find<'a>(&self, secret: &Secret, state: &'a State, rcap: &Rcap) -> Option<&'a Pool> {
        let pools = self.0.get(&secret.slot(rcap))?;
        pools
            .iter()
            .filter_map(|id| state.pools.get(id))
            .find(|pool| secret.rcap(pool.id, pool.epoch) == *rcap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_stays_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let first = Secret::open(&path).unwrap();
        let again = Secret::open(&path).unwrap();
        assert_eq!(first.rcap(1, 0), again.rcap(1, 0));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Secret::open(&path),
            Err(SecretError::Mode { mode: 0o644, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"short").unwrap();
        assert!(matches!(
            Secret::open(&path),
            Err(SecretError::Length { length: 5, .. })
        ));
    }

    #[test]
    fn rcaps_differ_by_node_object_and_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let a = Secret::open(&dir.path().join("a")).unwrap();
        let b = Secret::open(&dir.path().join("b")).unwrap();
        let all = [a.rcap(1, 0), a.rcap(1, 1), a.rcap(2, 0), b.rcap(1, 0)];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one));
        }
    }
}
