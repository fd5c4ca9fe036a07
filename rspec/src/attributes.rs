//! The attribute table: the one place from which parsing, documentation, command-line help and the
//! authority's checks come.

/// Version of [`ATTRIBUTES`], which nodes announce. It grows when an attribute is added or changes its meaning.
pub const ATTRIBUTE_TABLE_VERSION: u32 = 2;

/// How an attribute behaves when a pool is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Conserved: what a child gets is subtracted from its pool.
    Reservation,
    /// A child's never exceeds its pool's; not subtracted.
    Limit,
    /// Relative to others of its sort, bounded by the pool.
    Weight,
    /// Disjoint: what a child owns, its pool and its siblings do not.
    Set,
    /// Contained: a child's lies within its pool's.
    Interval,
    /// Checked and carried.
    Label,
}

impl Kind {
    /// The kind's name, as documentation and interfaces write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reservation => "reservation",
            Self::Limit => "limit",
            Self::Weight => "weight",
            Self::Set => "set",
            Self::Interval => "interval",
            Self::Label => "label",
        }
    }
}

/// What values an attribute takes. The unit is part of the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A whole number between the two bounds, both included.
    Count {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// Bytes: a number, or text with a unit (`"256 MiB"`), not below `min`.
    Bytes {
        /// Smallest, in bytes.
        min: u64,
    },
    /// Bits a second: a number, or text with a unit (`"1.5 Mbit/s"`), not below `min`.
    Rate {
        /// Smallest, in bit/s.
        min: u64,
    },
    /// `true` or `false`.
    Bool,
    /// The name of a virtualisation: 1 to 32 of `a-z`, `0-9`, `-`, `_`.
    VmType,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A name, or `name@sha256:<64 hexadecimal digits>`.
    Image,
    /// A list of `tcp/80` or `udp/5000-5010`.
    Ports,
    /// An instant by RFC 3339.
    Time,
    /// Text of at most this many bytes.
    Text(usize),
    /// OpenSSH authorized_keys lines, as a list or joined by newlines.
    Keys,
}

impl Type {
    /// What is allowed, for people.
    pub fn allowed(self) -> String {
        match self {
            Self::Count { min, max } => format!("a whole number from {min} to {max}"),
            Self::Bytes { min } => {
                format!(
                    "bytes, at least {}, as a number or like \"256 MiB\"",
                    crate::format_bytes(min)
                )
            }
            Self::Rate { min } => {
                format!(
                    "bit/s, at least {}, as a number or like \"1.5 Mbit/s\"",
                    crate::format_rate(min)
                )
            }
            Self::Bool => "true or false".to_owned(),
            Self::VmType => "1 to 32 of a-z, 0-9, '-' and '_'".to_owned(),
            Self::Word(words) => words.join(", "),
            Self::Image => "a name, or name@sha256:<64 hexadecimal digits>".to_owned(),
            Self::Ports => "a list of items like \"tcp/80\" or \"udp/5000-5010\"".to_owned(),
            Self::Time => "a time by RFC 3339, like \"2026-11-20T12:00:00Z\"".to_owned(),
            Self::Text(max) => format!("text of at most {max} bytes"),
            Self::Keys => "a list of OpenSSH public key lines".to_owned(),
        }
    }

    /// The unit of its numbers, empty where there is none.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bytes { .. } => "bytes",
            Self::Rate { .. } => "bit/s",
            _ => "",
        }
    }
}

/// The least role that may set an attribute; the node's owner may set them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setter {
    /// A user of the slice.
    User,
    /// The principal investigator of the slice's site.
    Pi,
    /// Who runs the authority.
    Admin,
}

impl Setter {
    /// PLCAPI's name for the role.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Pi => "pi",
            Self::Admin => "admin",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Attribute {
    /// Its name in an rspec.
    pub name: &'static str,
    /// A second name that is accepted, from the papers.
    pub alias: Option<&'static str>,
    /// How it behaves when a pool is split.
    pub kind: Kind,
    /// What values it takes, with the unit.
    pub value: Type,
    /// What a sliver gets that names none, in the form that an rspec takes; none means what `doc` says.
    pub default: Option<&'static str>,
    /// Who may set it.
    pub setter: Setter,
    /// The one place that enforces it.
    pub enforced_by: &'static str,
    /// What it means, in a sentence or two.
    pub doc: &'static str,
}

const fn row(
    name: &'static str,
    kind: Kind,
    value: Type,
    default: Option<&'static str>,
    setter: Setter,
    enforced_by: &'static str,
    doc: &'static str,
) -> Attribute {
    Attribute {
        name,
        alias: None,
        kind,
        value,
        default,
        setter,
        enforced_by,
        doc,
    }
}

const MIB: u64 = 1 << 20;

/// Every attribute, in the order in which documents list them.
pub static ATTRIBUTES: &[Attribute] = &[
    row(
        "vm_type",
        Kind::Label,
        Type::VmType,
        None,
        Setter::User,
        "node manager, choice of backend",
        "The virtualisation. Without it an rspec is a pool and makes no VM; slices get kvm-microvm from \
         their authority.",
    ),
    row(
        "cpu_share",
        Kind::Weight,
        Type::Count { min: 1, max: 1000 },
        Some("1"),
        Setter::Pi,
        "cgroup cpu.weight",
        "Share of the CPU among slivers that want it, work-conserving: 10 of 50 active is 20 %.",
    ),
    row(
        "cpu_guarantee",
        Kind::Reservation,
        Type::Count { min: 0, max: 1000 },
        Some("0"),
        Setter::Admin,
        "cgroup cpu.weight of the guaranteed part",
        "Of the node's 1000 shares; held under any load, since the sum never passes 1000.",
    ),
    row(
        "cpu_capped",
        Kind::Label,
        Type::Bool,
        Some("false"),
        Setter::User,
        "cgroup cpu.max",
        "True: no more CPU than cpu_guarantee, even where the node is idle.",
    ),
    row(
        "vcpus",
        Kind::Limit,
        Type::Count { min: 1, max: 32 },
        Some("1"),
        Setter::Pi,
        "monitor",
        "Virtual CPUs of the sliver.",
    ),
    row(
        "mem_limit",
        Kind::Limit,
        Type::Bytes { min: 32 * MIB },
        Some("256 MiB"),
        Setter::Pi,
        "monitor (guest memory) and cgroup memory.max",
        "Guest memory. The cgroup bounds guest and monitor together.",
    ),
    row(
        "mem_reserve",
        Kind::Reservation,
        Type::Bytes { min: 0 },
        Some("0"),
        Setter::Admin,
        "cgroup memory.min",
        "Memory that node pressure never takes away.",
    ),
    row(
        "disk_quota",
        Kind::Limit,
        Type::Bytes { min: 16 * MIB },
        Some("5 GB"),
        Setter::Pi,
        "length of the sliver's disk",
        "Size of the sliver's sparse disk.",
    ),
    row(
        "disk_reserve",
        Kind::Reservation,
        Type::Bytes { min: 0 },
        Some("0"),
        Setter::Admin,
        "allocation of the sliver's disk",
        "Disk space set aside.",
    ),
    row(
        "base_rate",
        Kind::Reservation,
        Type::Rate { min: 0 },
        Some("1 kbit/s"),
        Setter::Admin,
        "HTB rate",
        "Outgoing bandwidth that is guaranteed, and the weight by which spare bandwidth is shared.",
    ),
    Attribute {
        alias: Some("peak_rate"),
        ..row(
            "burst_rate",
            Kind::Limit,
            Type::Rate { min: 1_000 },
            None,
            Setter::Pi,
            "HTB ceil",
            "Upper bound of outgoing bandwidth at any moment; without it, the node's rate.",
        )
    },
    row(
        "sustained_rate",
        Kind::Limit,
        Type::Rate { min: 1_000 },
        Some("1.5 Mbit/s"),
        Setter::Admin,
        "HTB ceil after the day's bytes",
        "Mean outgoing bandwidth over 24 hours from the sliver's first start on the node.",
    ),
    row(
        "flow_limit",
        Kind::Reservation,
        Type::Count { min: 0, max: 1 << 24 },
        None,
        Setter::Admin,
        "connection tracking",
        "Tracked flows at once; without it, a share of the node's table.",
    ),
    row(
        "ports",
        Kind::Set,
        Type::Ports,
        None,
        Setter::Admin,
        "nftables",
        "Ports of the node's address that one sliver owns, in both directions.",
    ),
    row(
        "start_time",
        Kind::Interval,
        Type::Time,
        None,
        Setter::Pi,
        "node manager",
        "From when the resources may be used; without it, now.",
    ),
    row(
        "end_time",
        Kind::Interval,
        Type::Time,
        None,
        Setter::Pi,
        "node manager",
        "Until when the resources may be used; without it, the slice's expiry.",
    ),
    row(
        "image",
        Kind::Label,
        Type::Image,
        None,
        Setter::User,
        "node manager",
        "Root image; without it, the node's base.",
    ),
    row(
        "kernel",
        Kind::Label,
        Type::Image,
        None,
        Setter::User,
        "node manager",
        "Kernel; without it, the node's base.",
    ),
    row(
        "share_memory",
        Kind::Label,
        Type::Word(&["node", "slice", "none"]),
        None,
        Setter::User,
        "monitor",
        "With whom clean pages of images and templates may be shared; without it, as the owner says.",
    ),
    row(
        "initscript",
        Kind::Label,
        Type::Text(256 << 10),
        None,
        Setter::User,
        "guest agent",
        "Script that the sliver runs once it is reachable.",
    ),
    row(
        "keys",
        Kind::Label,
        Type::Keys,
        None,
        Setter::User,
        "guest agent and the node's sshd",
        "Public keys that may log in; the authority gives those of the slice's users.",
    ),
    row(
        "delegations",
        Kind::Label,
        Type::Text(256),
        None,
        Setter::User,
        "node manager",
        "Slices, separated by commas, that may start, stop and make this one on the node as if they were it.",
    ),
];

/// Looks an attribute up by its name or alias.
pub fn attribute(name: &str) -> Option<&'static Attribute> {
    ATTRIBUTES
        .iter()
        .find(|a| a.name == name || a.alias == Some(name))
}

/// All names, joined by commas, for messages.
pub fn attribute_names() -> String {
    ATTRIBUTES.iter().map(|a| a.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Value;

    #[test]
    fn names_are_unique_and_defaults_are_valid_values() {
        for (i, a) in ATTRIBUTES.iter().enumerate() {
            assert!(std::ptr::eq(attribute(a.name).unwrap(), a));
            assert!(
                ATTRIBUTES[..i]
                    .iter()
                    .all(|b| b.name != a.name && b.alias != Some(a.name))
            );
            if let Some(default) = a.default {
                let json = serde_json::from_str(default).unwrap_or_else(|_| default.into());
                Value::parse(a, &json).unwrap();
            }
        }
    }

    #[test]
    fn the_papers_alias() {
        assert_eq!(attribute("peak_rate").unwrap().name, "burst_rate");
    }
}
