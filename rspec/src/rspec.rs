//! An rspec: an ordered map of attributes to typed values, and its JSON form.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value as Json};

use crate::attributes::{ATTRIBUTES, Kind, attribute, attribute_names};
use crate::profile::{MANDOLINE, Profile};
use crate::{PortSet, RspecError, Value};

/// What a pool or a sliver may use: a set of typed (attribute, value) pairs.
#[derive(Clone, PartialEq, Default)]
pub struct Rspec {
    values: BTreeMap<String, Value>,
}

impl Rspec {
    /// An rspec without attributes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a JSON object. `null`, and `"none"` for an attribute whose absence has a meaning, leave the
    /// attribute out, as the papers write `burst_rate = none`.
    pub fn from_json(json: &Json) -> Result<Self, RspecError> {
        let found = match json {
            Json::Object(map) => return Self::from_map(map),
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "a number",
            Json::String(_) => "text",
            Json::Array(_) => "a list",
        };
        Err(RspecError::NotAnObject { found })
    }

    /// Reads a JSON object's members.
    pub fn from_map(map: &Map<String, Json>) -> Result<Self, RspecError> {
        let mut rspec = Self::new();
        for (name, json) in map {
            rspec.set_json(name, json)?;
        }
        Ok(rspec)
    }

    /// Sets one attribute from JSON. The same attribute under two names is refused.
    pub fn set_json(&mut self, name: &str, json: &Json) -> Result<(), RspecError> {
        if name.starts_with("x-") && name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.values.insert(name.to_owned(), Value::Foreign(json.clone()));
            return Ok(());
        }
        let Some(attribute) = attribute(name) else {
            return Err(RspecError::Unknown {
                attribute: name.chars().take(64).collect(),
                value: json.to_string().chars().take(80).collect(),
                allowed: attribute_names(),
            });
        };
        // Of the attributes without a default, `share_memory` has a word "none" that means something else.
        let none_is_absence = attribute.default.is_none() && attribute.name != "share_memory";
        let absent = json.is_null() || (none_is_absence && json.as_str() == Some("none"));
        if absent {
            self.values.remove(attribute.name);
            return Ok(());
        }
        let value = Value::parse(attribute, json)?;
        if self.values.contains_key(attribute.name) && attribute.alias.is_some() {
            return Err(RspecError::Invalid {
                attribute: name.to_owned(),
                value: json.to_string(),
                problem: "given under two names",
                allowed: format!("`{}` once", attribute.name),
            });
        }
        self.values.insert(attribute.name.to_owned(), value);
        Ok(())
    }

    /// The JSON form; what it gives, [`Rspec::from_json`] takes.
    pub fn to_json(&self) -> Json {
        Json::Object(
            self.values
                .iter()
                .map(|(name, value)| (name.clone(), value.to_json()))
                .collect(),
        )
    }

    /// The value of an attribute, if it is named here.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// The number of a count, bytes or rate attribute, if it is named here.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name).and_then(Value::as_number)
    }

    /// The text of a label, if it is named here.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_text)
    }

    /// A switch; false where it is not named.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some(Value::Bool(true)))
    }

    /// The virtualisation, or none for a pool that makes no VM.
    pub fn vm_type(&self) -> Option<&str> {
        self.text("vm_type")
    }

    /// The owned ports.
    pub fn ports(&self) -> PortSet {
        match self.get("ports") {
            Some(Value::Ports(ports)) => ports.clone(),
            _ => PortSet::default(),
        }
    }

    /// The key lines.
    pub fn keys(&self) -> &[String] {
        match self.get("keys") {
            Some(Value::Keys(keys)) => keys,
            _ => &[],
        }
    }

    /// Sets an attribute to a value that is already typed, as the table has it.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.values.insert(name.to_owned(), value);
    }

    /// Takes an attribute out and returns what stood there.
    pub fn remove(&mut self, name: &str) -> Option<Value> {
        self.values.remove(name)
    }

    /// All attributes in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// True if no attribute is named.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// With the table's defaults; see [`Rspec::with_profile`].
    pub fn with_defaults(self, bounds: &Rspec) -> Self {
        self.with_profile(&MANDOLINE, bounds)
    }

    /// With a profile's defaults for every limit, weight, reservation and switch that is not named, none of
    /// them above `bounds` (a pool that allows only 128 MiB makes slivers of 128 MiB, not none).
    pub fn with_profile(mut self, profile: &Profile, bounds: &Rspec) -> Self {
        for (attribute, value) in ATTRIBUTES.iter().zip(profile.values()) {
            if self.values.contains_key(attribute.name) {
                continue;
            }
            let Some(value) = value else {
                // No default: the pool's bound, where it has one.
                if let (Kind::Limit, Some(bound)) = (attribute.kind, bounds.get(attribute.name)) {
                    self.put(attribute.name, bound.clone());
                }
                continue;
            };
            let value = match (attribute.kind, value, bounds.number(attribute.name)) {
                (Kind::Limit | Kind::Weight, Value::Number(number), Some(bound)) => {
                    Value::Number(bound.min(*number))
                }
                _ => value.clone(),
            };
            self.put(attribute.name, value);
        }
        self
    }

    /// Checks what only shows when all attributes of a sliver are seen together: nothing is reserved beyond
    /// its limit, and a cap leaves something to run on.
    pub fn check_sliver(&self) -> Result<(), RspecError> {
        for (reserved, limit) in [
            ("mem_reserve", "mem_limit"),
            ("disk_reserve", "disk_quota"),
            ("base_rate", "burst_rate"),
        ] {
            let (Some(row), Some(value), Some(bound)) =
                (attribute(reserved), self.number(reserved), self.number(limit))
            else {
                continue;
            };
            if value > bound {
                let bound = Value::Number(bound).display(row);
                return Err(RspecError::Invalid {
                    attribute: reserved.to_owned(),
                    value: Value::Number(value).display(row),
                    problem: "more than the sliver's own limit",
                    allowed: format!("at most {bound}, its {limit}"),
                });
            }
        }
        if self.flag("cpu_capped") && self.number("cpu_guarantee").unwrap_or(0) == 0 {
            return Err(RspecError::Invalid {
                attribute: "cpu_capped".to_owned(),
                value: "true".to_owned(),
                problem: "a cap at a cpu_guarantee of 0: the sliver could never run",
                allowed: "true with a cpu_guarantee of at least 1".to_owned(),
            });
        }
        Ok(())
    }

    /// With every named limit, weight and interval brought within `bounds`; what is not named stays so.
    pub fn clipped(&self, bounds: &Rspec) -> Self {
        let bounded = self.clone().bounded_by(bounds);
        let mut clipped = self.clone();
        for (name, value) in bounded.iter().filter(|(name, _)| self.get(name).is_some()) {
            clipped.put(name, value.clone());
        }
        clipped
    }

    /// What is left of a node of this rspec under its owner's `limit`: no more of anything than it names, and
    /// no more guaranteed bandwidth than may be sent at all.
    pub fn limited(&self, limit: &Rspec) -> Self {
        let mut limited = self.clone();
        for attribute in ATTRIBUTES {
            let value = match (self.get(attribute.name), limit.get(attribute.name)) {
                (Some(Value::Number(have)), Some(Value::Number(most))) => Value::Number(*have.min(most)),
                (Some(Value::Ports(have)), Some(Value::Ports(most))) => {
                    let (mut kept, mut beyond) = (have.clone(), have.clone());
                    beyond.subtract(most);
                    kept.subtract(&beyond);
                    Value::Ports(kept)
                }
                (None, Some(most)) if matches!(attribute.kind, Kind::Limit | Kind::Weight) => most.clone(),
                _ => continue,
            };
            limited.put(attribute.name, value);
        }
        if let (Some(base), Some(burst)) = (limited.number("base_rate"), limited.number("burst_rate")) {
            limited.put("base_rate", Value::Number(base.min(burst)));
        }
        limited
    }

    /// What binds this rspec when `outer` binds it too: the smaller of each limit and weight, the inner
    /// interval. An attribute that only `outer` names is taken from there.
    pub fn bounded_by(mut self, outer: &Rspec) -> Self {
        for attribute in ATTRIBUTES {
            let Some(bound) = outer.get(attribute.name) else {
                continue;
            };
            let merged = match (attribute.kind, self.get(attribute.name), bound) {
                (Kind::Limit | Kind::Weight, Some(Value::Number(a)), Value::Number(b)) => {
                    Value::Number(*a.min(b))
                }
                (Kind::Interval, Some(Value::Time(a)), Value::Time(b)) => {
                    Value::Time(if attribute.name == "start_time" {
                        *a.max(b)
                    } else {
                        *a.min(b)
                    })
                }
                (Kind::Limit | Kind::Weight | Kind::Interval, None, bound) => bound.clone(),
                _ => continue,
            };
            self.put(attribute.name, merged);
        }
        self
    }
}

impl fmt::Debug for Rspec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// For people and logs: `cpu_share=10 mem_limit=256 MiB`, keys and scripts shortened.
impl fmt::Display for Rspec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, value)) in self.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            match attribute(name) {
                Some(a) if a.name == "initscript" => write!(f, "{space}{name}=…")?,
                Some(a) => write!(f, "{space}{name}={}", value.display(a))?,
                None => write!(f, "{space}{name}={}", value.to_json())?,
            }
        }
        Ok(())
    }
}

impl Serialize for Rspec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.values.iter().map(|(name, value)| (name, value.to_json())))
    }
}

/// Reads like [`Rspec::from_json`]. An interface that wants to report attribute, value and bound by
/// themselves takes a `serde_json::Value` and calls that.
impl<'de> Deserialize<'de> for Rspec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(&Json::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_papers_slice_reads() {
        let rspec = Rspec::from_json(&json!({
            "vm_type": "linux_vserver", "cpu_share": "10", "disk_quota": "5GB", "mem_limit": "256 MiB",
            "base_rate": "1Kbps", "burst_rate": "none", "sustained_rate": "1.5Mbps", "x-note": {"a": 1}
        }))
        .unwrap();
        assert_eq!(rspec.vm_type(), Some("linux_vserver"));
        assert_eq!(rspec.number("cpu_share"), Some(10));
        assert_eq!(rspec.number("disk_quota"), Some(5_000_000_000));
        assert_eq!(rspec.number("sustained_rate"), Some(1_500_000));
        assert_eq!(rspec.get("burst_rate"), None);
        assert_eq!(rspec.to_json()["x-note"], json!({"a": 1}));
        assert_eq!(Rspec::from_json(&rspec.to_json()).unwrap(), rspec);
        let text = serde_json::to_string(&rspec).unwrap();
        assert_eq!(serde_json::from_str::<Rspec>(&text).unwrap(), rspec);
    }

    #[test]
    fn every_refusal_names_attribute_value_and_what_is_allowed() {
        for (json, attribute, value) in [
            (json!({"cpu_shares": 1}), "cpu_shares", "1"),
            (json!({"cpu_share": -1}), "cpu_share", "-1"),
            (json!({"cpu_share": "-1"}), "cpu_share", "\"-1\""),
            (json!({"cpu_share": 0}), "cpu_share", "0"),
            (json!({"cpu_share": 1001}), "cpu_share", "1001"),
            (json!({"cpu_share": 1.5}), "cpu_share", "1.5"),
            (json!({"cpu_share": [1]}), "cpu_share", "[1]"),
            (json!({"mem_limit": "lots"}), "mem_limit", "\"lots\""),
            (
                json!({"mem_limit": "99999999999 TiB"}),
                "mem_limit",
                "\"99999999999 TiB\"",
            ),
            (json!({"mem_limit": "1 MiB"}), "mem_limit", "\"1 MiB\""),
            (json!({"burst_rate": 1e300}), "burst_rate", "1e+300"),
            (json!({"ports": ["tcp/0"]}), "ports", "[\"tcp/0\"]"),
            (json!({"vm_type": "KVM!"}), "vm_type", "\"KVM!\""),
            (json!({"share_memory": "all"}), "share_memory", "\"all\""),
            (
                json!({"image": "../../etc/passwd"}),
                "image",
                "\"../../etc/passwd\"",
            ),
            (json!({"image": "x@sha256:12"}), "image", "\"x@sha256:12\""),
            (json!({"end_time": "tomorrow"}), "end_time", "\"tomorrow\""),
            (
                json!({"keys": ["ssh-ed25519 AAAA a\nssh-rsa BBBB"]}),
                "keys",
                "[\"ssh-ed25519 AAAA a\\nssh-rsa BBBB\"]",
            ),
            (
                json!({"burst_rate": 10000, "peak_rate": 20000}),
                "peak_rate",
                "20000",
            ),
        ] {
            let error = Rspec::from_json(&json).unwrap_err();
            assert_eq!(error.attribute(), Some(attribute), "{error}");
            assert_eq!(error.value(), Some(value), "{error}");
            assert!(
                error.allowed().is_some_and(|allowed| !allowed.is_empty()),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains(attribute), "{text}");
        }
        assert!(
            Rspec::from_json(&json!([]))
                .unwrap_err()
                .to_string()
                .contains("a list")
        );
    }

    #[test]
    fn share_memory_none_is_a_word() {
        let rspec = Rspec::from_json(&json!({"share_memory": "none"})).unwrap();
        assert_eq!(rspec.text("share_memory"), Some("none"));
    }

    #[test]
    fn defaults_stay_within_the_pool() {
        let pool = Rspec::from_json(&json!({"mem_limit": "128 MiB", "burst_rate": "10 Mbit/s"})).unwrap();
        let sliver = Rspec::new().with_defaults(&pool);
        assert_eq!(sliver.number("mem_limit"), Some(128 << 20));
        assert_eq!(sliver.number("burst_rate"), Some(10_000_000));
        assert_eq!(sliver.number("disk_quota"), Some(5_000_000_000));
        assert_eq!(sliver.number("cpu_share"), Some(1));
        assert_eq!(sliver.vm_type(), None);
    }

    #[test]
    fn nothing_is_reserved_beyond_its_limit() {
        for (json, attribute, allowed) in [
            (
                json!({"mem_reserve": "1 GiB"}),
                "mem_reserve",
                "at most 256 MiB, its mem_limit",
            ),
            (
                json!({"disk_reserve": "6 GB"}),
                "disk_reserve",
                "at most 5 GB, its disk_quota",
            ),
            (
                json!({"base_rate": "2 Mbit/s", "burst_rate": "1 Mbit/s"}),
                "base_rate",
                "at most 1 Mbit/s, its burst_rate",
            ),
            (
                json!({"cpu_capped": true}),
                "cpu_capped",
                "true with a cpu_guarantee of at least 1",
            ),
        ] {
            let sliver = Rspec::from_json(&json).unwrap().with_defaults(&Rspec::new());
            let error = sliver.check_sliver().unwrap_err();
            assert_eq!(
                (error.attribute(), error.allowed()),
                (Some(attribute), Some(allowed))
            );
        }
        let capped = json!({"cpu_capped": true, "cpu_guarantee": 10});
        let capped = Rspec::from_json(&capped).unwrap().with_defaults(&Rspec::new());
        capped.check_sliver().unwrap();
    }
}
