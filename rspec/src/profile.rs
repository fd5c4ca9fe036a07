//! Named sets of defaults: what a sliver gets of an attribute that its pools do not name.
//!
//! A node has one of them. The table's own defaults are `mandoline`; the others are the policies of the
//! papers and of the node manager that PlanetLab shipped, so that an experiment can be repeated under them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::Value as Json;

use crate::attributes::{ATTRIBUTES, Attribute, attribute};
use crate::{RspecError, Value};

/// A named set of defaults: one of [`PROFILES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Profile {
    /// Its name.
    pub name: &'static str,
    /// Where its values come from.
    pub doc: &'static str,
    /// Attributes whose default is not the table's, with their value as an rspec takes it; `none` is no
    /// default: what the pool allows.
    pub defaults: &'static [(&'static str, &'static str)],
}

/// The table's own defaults.
pub const MANDOLINE: Profile = Profile {
    name: "mandoline",
    doc: "The defaults of the table above.",
    defaults: &[],
};

/// Every profile.
pub const PROFILES: [Profile; 4] = [
    MANDOLINE,
    Profile {
        name: "planetlab-paper",
        doc: "Architecture paper (2005), section 5.1.3. It gives memory no default; a virtual machine must be \
              booted with some, so the table's stays.",
        defaults: &[
            ("cpu_share", "1"),
            ("disk_quota", "5 GB"),
            ("base_rate", "1 kbit/s"),
            ("burst_rate", "none"),
            ("sustained_rate", "1.5 Mbit/s"),
        ],
    },
    Profile {
        name: "planetlab-2004",
        doc: "NSDI paper (2004), section 4.2.2: a cap of 10 Mbit/s, 5 kbit/s for fair best effort, no mean \
              over a day.",
        defaults: &[
            ("cpu_share", "1"),
            ("base_rate", "5 kbit/s"),
            ("burst_rate", "10 Mbit/s"),
            ("sustained_rate", "none"),
        ],
    },
    Profile {
        name: "planetlab-shipped",
        doc: "The shipped node manager's DEFAULT_ALLOCATION: net_min_rate 1 kbit/s, net_max_rate 1 Gbit/s, \
              net_max_kbyte 10546875 a day (1 Mbit/s), disk_max 10000000 blocks of 1 KiB.",
        defaults: &[
            ("cpu_share", "1"),
            ("disk_quota", "10240000000"),
            ("base_rate", "1 kbit/s"),
            ("burst_rate", "1 Gbit/s"),
            ("sustained_rate", "1 Mbit/s"),
        ],
    },
];

impl Profile {
    /// The profile of that name.
    pub fn named(name: &str) -> Result<Self, RspecError> {
        PROFILES
            .into_iter()
            .find(|profile| profile.name == name)
            .ok_or_else(|| RspecError::Invalid {
                attribute: "default_profile".to_owned(),
                value: format!("{name:?}"),
                problem: "no profile",
                allowed: PROFILES.map(|profile| profile.name).join(", "),
            })
    }

    /// The default of an attribute, as an rspec takes it.
    pub fn text(&self, attribute: &Attribute) -> Option<&'static str> {
        match self.defaults.iter().find(|(name, _)| *name == attribute.name) {
            Some((_, "none")) => None,
            Some((_, text)) => Some(text),
            None => attribute.default,
        }
    }

    /// The default of an attribute.
    pub fn value(&self, attribute: &Attribute) -> Option<Value> {
        let text = self.text(attribute)?;
        let json = serde_json::from_str(text).unwrap_or_else(|_| Json::from(text));
        Value::parse(attribute, &json).ok()
    }

    /// The defaults of all attributes, in the table's order; parsed once.
    pub(crate) fn values(&self) -> &'static [Option<Value>] {
        static VALUES: LazyLock<BTreeMap<&str, Vec<Option<Value>>>> = LazyLock::new(|| {
            let values = |profile: &Profile| ATTRIBUTES.iter().map(|a| profile.value(a)).collect();
            PROFILES
                .iter()
                .map(|profile| (profile.name, values(profile)))
                .collect()
        });
        VALUES.get(self.name).map_or(&[], Vec::as_slice)
    }

    /// Every default that differs from the table's, for people.
    pub fn differences(&self) -> impl Iterator<Item = (&'static Attribute, &'static str)> {
        self.defaults
            .iter()
            .filter_map(|(name, text)| Some((attribute(name)?, *text)))
            .filter(|(attribute, text)| attribute.default.unwrap_or("none") != *text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rspec;

    #[test]
    fn every_default_is_a_value_of_the_table() {
        for profile in PROFILES {
            assert_eq!(Profile::named(profile.name).unwrap(), profile);
            for (name, _) in profile.defaults {
                assert!(attribute(name).is_some(), "{}: {name}", profile.name);
            }
            for attribute in ATTRIBUTES {
                assert_eq!(
                    profile.text(attribute).is_some(),
                    profile.value(attribute).is_some()
                );
            }
            assert_eq!(profile.values().len(), ATTRIBUTES.len(), "{}", profile.name);
        }
        let error = Profile::named("plc").unwrap_err();
        assert_eq!(error.attribute(), Some("default_profile"));
        assert!(
            error
                .allowed()
                .is_some_and(|allowed| allowed.contains("planetlab-paper"))
        );
    }

    #[test]
    fn the_numbers_of_the_papers_and_of_the_shipped_node_manager() {
        let of = |name| Rspec::new().with_profile(&Profile::named(name).unwrap(), &Rspec::new());
        let paper = of("planetlab-paper");
        assert_eq!(paper.number("sustained_rate"), Some(1_500_000));
        assert_eq!(paper.number("burst_rate"), None);
        let nsdi = of("planetlab-2004");
        assert_eq!(
            (nsdi.number("base_rate"), nsdi.number("burst_rate")),
            (Some(5_000), Some(10_000_000))
        );
        assert_eq!(nsdi.number("sustained_rate"), None);
        let shipped = of("planetlab-shipped");
        // 10 546 875 KB a day are 1 Mbit/s: × 8 × 1024 / 86 400.
        assert_eq!(
            shipped.number("sustained_rate"),
            Some(10_546_875 * 8 * 1024 / 86_400)
        );
        assert_eq!(shipped.number("disk_quota"), Some(10_000_000 << 10));
    }
}
