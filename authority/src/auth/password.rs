//! Passwords: argon2id, off the async threads, and no more at once than memory allows (19 MiB each).

use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// Shortest password, in characters (NIST SP 800-63B's minimum).
pub const PASSWORD_MIN: usize = 8;
/// Longest, in bytes: hashing must not become a way to burn CPU.
pub const PASSWORD_MAX: usize = 1024;

/// Computes and checks password hashes.
#[derive(Clone, Debug)]
pub struct Hasher {
    slots: Arc<Semaphore>,
    /// Hash of nothing that anybody knows: checked where there is no account, so that the time that an
    /// answer takes does not tell whether there is one.
    decoy: Arc<str>,
}

impl Hasher {
    /// One slot for each CPU.
    pub async fn new() -> Result<Self> {
        let slots = std::thread::available_parallelism().map_or(2, |n| n.get());
        let mut noise = [0u8; 32];
        getrandom::fill(&mut noise).map_err(Error::internal)?;
        let decoy = tokio::task::spawn_blocking(move || hash_now(&noise))
            .await
            .map_err(Error::internal)??;
        Ok(Self {
            slots: Arc::new(Semaphore::new(slots)),
            decoy: decoy.into(),
        })
    }

    /// Hash of a new password, as a PHC string with its own salt.
    pub async fn hash(&self, password: &str) -> Result<String> {
        check_rules(password)?;
        let password = password.to_owned();
        let _slot = self.slots.acquire().await.map_err(Error::internal)?;
        tokio::task::spawn_blocking(move || hash_now(password.as_bytes()))
            .await
            .map_err(Error::internal)?
    }

    /// Whether the password is the one behind the hash; without a hash it takes as long and is wrong.
    pub async fn verify(&self, password: &str, hash: Option<&str>) -> Result<bool> {
        if password.len() > PASSWORD_MAX {
            return Ok(false);
        }
        let known = hash.is_some();
        let hash = hash.unwrap_or(&self.decoy).to_owned();
        let password = password.to_owned();
        let _slot = self.slots.acquire().await.map_err(Error::internal)?;
        let right = tokio::task::spawn_blocking(move || {
            let hash = PasswordHash::new(&hash).map_err(Error::internal)?;
            Ok::<_, Error>(
                Argon2::default()
                    .verify_password(password.as_bytes(), &hash)
                    .is_ok(),
            )
        })
        .await
        .map_err(Error::internal)??;
        Ok(right && known)
    }
}

/// The rules for a new password.
pub fn check_rules(password: &str) -> Result<()> {
    if password.chars().count() < PASSWORD_MIN || password.len() > PASSWORD_MAX {
        return Err(Error::invalid(format!(
            "Invalid password: allowed are {PASSWORD_MIN} characters to {PASSWORD_MAX} bytes"
        )));
    }
    Ok(())
}

fn hash_now(password: &[u8]) -> Result<String> {
    Ok(Argon2::default()
        .hash_password(password)
        .map_err(Error::internal)?
        .to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_right_password_of_an_account_is_right() {
        let hasher = Hasher::new().await.unwrap();
        let hash = hasher.hash("correct horse").await.unwrap();
        assert!(hash.starts_with("$argon2id$"));
        assert!(hasher.verify("correct horse", Some(&hash)).await.unwrap());
        assert!(!hasher.verify("wrong horse", Some(&hash)).await.unwrap());
        assert!(!hasher.verify("correct horse", None).await.unwrap());
        assert_ne!(hash, hasher.hash("correct horse").await.unwrap());
    }

    #[test]
    fn short_and_endless_passwords_are_refused_without_repeating_them() {
        let error = check_rules("secret7").unwrap_err().to_string();
        assert!(!error.contains("secret7"));
        assert!(check_rules(&"x".repeat(PASSWORD_MAX + 1)).is_err());
        assert!(check_rules("longer than eight").is_ok());
    }
}
