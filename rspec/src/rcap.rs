//! The rcap: 128 bits that name a pool or a sliver on one node; who holds it may use it
//! (architecture paper, section 5.1.1).

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq;

use crate::RcapError;

/// A capability. Compared in constant time, never printed by `Debug`, without `Display`; who really wants
/// its text asks for it with [`Rcap::to_hex`].
#[derive(Clone)]
pub struct Rcap([u8; 16]);

impl Rcap {
    /// From its 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// 32 lower-case hexadecimal digits: a secret, keep it out of logs.
    pub fn to_hex(&self) -> String {
        self.0.iter().fold(String::with_capacity(32), |mut text, byte| {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
            }
            text
        })
    }

    /// From 32 hexadecimal digits of either case.
    pub fn from_hex(text: &str) -> Result<Self, RcapError> {
        let digits = text.as_bytes();
        if digits.len() != 32 {
            return Err(RcapError);
        }
        let mut bytes = [0u8; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16).ok_or(RcapError)?;
            let low = char::from(pair[1]).to_digit(16).ok_or(RcapError)?;
            *byte = (high * 16 + low) as u8;
        }
        Ok(Self(bytes))
    }
}

impl PartialEq for Rcap {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Rcap {}

impl fmt::Debug for Rcap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rcap(redacted)")
    }
}

impl Serialize for Rcap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for Rcap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_debug_hides_it() {
        let rcap = Rcap::from_bytes(*b"0123456789abcdef");
        assert_eq!(Rcap::from_hex(&rcap.to_hex()).unwrap(), rcap);
        assert_eq!(Rcap::from_hex(&rcap.to_hex().to_uppercase()).unwrap(), rcap);
        assert!(!format!("{rcap:?}").contains(&rcap.to_hex()[..8]));
    }

    #[test]
    fn anything_but_32_digits_is_refused_without_an_echo() {
        for text in [
            "",
            "0",
            &"0".repeat(31),
            &"0".repeat(33),
            &"g".repeat(32),
            &"é".repeat(16),
        ] {
            let error = Rcap::from_hex(text).unwrap_err();
            assert!(text.len() < 2 || !error.to_string().contains(text));
        }
    }
}
