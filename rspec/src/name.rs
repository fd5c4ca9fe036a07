//! Names of slices and authorities, under PlanetLab's rules.
//!
//! A slice's name is the pair (slice authority, slice name); in text the authority is what stands before the
//! first dot: `plc.princeton_codeen`. PLCAPI and ssh use the bare name, `princeton_codeen`.
//! A few names belong to the node itself and have no authority.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::NameError;

/// Longest login base (site prefix) that PLCAPI takes, in bytes.
pub const LOGIN_BASE_MAX: usize = 32;
/// Longest slice name that PLCAPI takes, in bytes.
pub const SLICE_NAME_MAX: usize = 64;
/// Names of the node itself: the owner's own sliver and the slice creation service (architecture paper,
/// sections 5.2.3 and 5.3.2). The paper also writes `pl.conf`.
pub const LOCAL_NAMES: [&str; 2] = ["site_admin", "pl_conf"];

const SLICE_RULE: &str = "a login base of a-z, 0-9 and '.' (first a letter or digit, at most 32), '_', then \
                          letters, digits, '_' and '.'; at most 64 together";
const AUTHORITY_RULE: &str = "1 to 32 of a-z, 0-9 and '-', first a letter";

/// A bare slice name, `<login base>_<name>`, by the rule that PLCAPI checks:
/// `^[a-z0-9\.]+_[a-zA-Z0-9_\.]+$`, and a letter or digit first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceName(String);

impl SliceName {
    /// Checks a name against PlanetLab's rules.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let refuse = |problem| NameError {
            what: "slice name",
            value: name.chars().take(2 * SLICE_NAME_MAX).collect(),
            problem,
            allowed: SLICE_RULE,
        };
        if name.len() > SLICE_NAME_MAX {
            return Err(refuse("is too long"));
        }
        let (base, rest) = name
            .split_once('_')
            .ok_or_else(|| refuse("has no '_' after a login base"))?;
        if base.is_empty() || base.len() > LOGIN_BASE_MAX {
            return Err(refuse("has an empty or too long login base"));
        }
        if !base.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            return Err(refuse("does not start with a lower-case letter or digit"));
        }
        if !base
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.')
        {
            return Err(refuse(
                "has a character in its login base that is not allowed there",
            ));
        }
        if rest.is_empty() {
            return Err(refuse("has nothing after its login base"));
        }
        if !rest
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        {
            return Err(refuse("has a character that is not allowed"));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The site's prefix: what stands before the first `_`.
    pub fn login_base(&self) -> &str {
        self.0.split_once('_').map_or("", |(base, _)| base)
    }
}

/// The name of a slice authority, as it stands before the first dot of a slice's full name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuthorityName(String);

impl AuthorityName {
    /// Checks a name: it may hold no dot, since the first dot ends it.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let refuse = |problem| NameError {
            what: "authority name",
            value: name.chars().take(64).collect(),
            problem,
            allowed: AUTHORITY_RULE,
        };
        if name.is_empty() || name.len() > 32 {
            return Err(refuse("is empty or too long"));
        }
        if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Err(refuse("does not start with a lower-case letter"));
        }
        if !name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        {
            return Err(refuse("has a character that is not allowed"));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who a sliver belongs to: a slice of an authority, or a name of the node itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceId {
    authority: Option<AuthorityName>,
    name: SliceName,
}

impl SliceId {
    /// A slice of an authority.
    pub fn new(authority: AuthorityName, name: SliceName) -> Self {
        Self {
            authority: Some(authority),
            name,
        }
    }

    /// A name of the node itself. The caller decides which names those are; see [`LOCAL_NAMES`].
    pub fn local(name: SliceName) -> Self {
        Self {
            authority: None,
            name,
        }
    }

    /// Reads `authority.name`, a name of the node itself, or a bare name that is then taken to be of the
    /// authority `default`. `local` lists the names of the node beside [`LOCAL_NAMES`].
    pub fn parse(text: &str, default: &AuthorityName, local: &[SliceName]) -> Result<Self, NameError> {
        if let Some(found) = Self::parse_local(text) {
            return Ok(found);
        }
        if let Some(found) = local.iter().find(|name| name.as_str() == text) {
            return Ok(Self::local(found.clone()));
        }
        // A dot that comes before the first underscore ends an authority's name; later ones belong to the
        // slice's own part.
        match text.split_once('.') {
            Some((authority, name)) if !authority.contains('_') => {
                Ok(Self::new(AuthorityName::new(authority)?, SliceName::new(name)?))
            }
            _ => Ok(Self::new(default.clone(), SliceName::new(text)?)),
        }
    }

    fn parse_local(text: &str) -> Option<Self> {
        let name = if text == "pl.conf" { "pl_conf" } else { text };
        LOCAL_NAMES
            .contains(&name)
            .then(|| Self::local(SliceName(name.to_owned())))
    }

    /// The authority, or none for a name of the node itself.
    pub fn authority(&self) -> Option<&AuthorityName> {
        self.authority.as_ref()
    }

    /// The bare name, as ssh and PLCAPI use it.
    pub fn name(&self) -> &SliceName {
        &self.name
    }
}

impl fmt::Display for SliceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.authority {
            Some(authority) => write!(f, "{}.{}", authority.0, self.name.0),
            None => f.write_str(&self.name.0),
        }
    }
}

impl fmt::Debug for SliceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Reads a full name back: with an authority, or else a name of the node itself.
impl FromStr for SliceId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once('.') {
            Some((authority, name)) if !authority.contains('_') && text != "pl.conf" => {
                Ok(Self::new(AuthorityName::new(authority)?, SliceName::new(name)?))
            }
            _ => match Self::parse_local(text) {
                Some(found) => Ok(found),
                None => Ok(Self::local(SliceName::new(text)?)),
            },
        }
    }
}

impl Serialize for SliceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SliceId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

macro_rules! text_type {
    ($type:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_type!(SliceName);
text_type!(AuthorityName);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SliceId, NameError> {
        SliceId::parse(text, &AuthorityName::new("plc").unwrap(), &[])
    }

    #[test]
    fn planetlabs_rule() {
        for good in [
            "princeton_codeen",
            "a_b",
            "inria.sop_x_y",
            "0_0",
            "mit_Big.Name_2",
        ] {
            assert_eq!(SliceName::new(good).unwrap().as_str(), good);
        }
        let long = format!("a_{}", "b".repeat(63));
        for bad in [
            "",
            "_",
            "a_",
            "_a",
            "noscore",
            "Princeton_x",
            "a b_c",
            "a-b_c",
            "a_b-c",
            "a_b\n",
            ".._x",
            "a_é",
            "a/b_c",
            &long,
        ] {
            let error = SliceName::new(bad).unwrap_err();
            assert_eq!(error.what, "slice name");
            assert!(error.to_string().contains("allowed"), "{error}");
        }
    }

    #[test]
    fn the_pair_in_text() {
        let codeen = parse("plc.princeton_codeen").unwrap();
        assert_eq!(codeen.authority().unwrap().as_str(), "plc");
        assert_eq!(codeen.name().login_base(), "princeton");
        assert_eq!(parse("princeton_codeen").unwrap(), codeen);
        assert_eq!(parse("ple.a.b_c").unwrap().name().as_str(), "a.b_c");
        assert_eq!(parse("a_b.c").unwrap().to_string(), "plc.a_b.c");
        assert_eq!("plc.princeton_codeen".parse::<SliceId>().unwrap(), codeen);
    }

    #[test]
    fn the_nodes_own_names_have_no_authority() {
        for name in ["site_admin", "pl_conf", "pl.conf"] {
            assert_eq!(parse(name).unwrap().authority(), None);
        }
        assert_eq!(parse("pl.conf").unwrap().to_string(), "pl_conf");
        assert!(parse("plc.pl_conf").unwrap().authority().is_some());
        let listed = [SliceName::new("our_cdn").unwrap()];
        let plc = AuthorityName::new("plc").unwrap();
        assert_eq!(
            SliceId::parse("our_cdn", &plc, &listed).unwrap().authority(),
            None
        );
    }

    #[test]
    fn full_names_survive_json() {
        for text in ["site_admin", "plc.princeton_codeen", "our_cdn"] {
            let id: SliceId = text.parse().unwrap();
            let json = serde_json::to_string(&id).unwrap();
            assert_eq!(serde_json::from_str::<SliceId>(&json).unwrap(), id);
        }
    }
}
