//! The documentation page of the attributes, written from the table.

use std::fmt::Write;

use crate::attributes::{ATTRIBUTE_TABLE_VERSION, ATTRIBUTES, Kind};
use crate::loan::LoanResource;
use crate::profile::PROFILES;

const HEAD: &str = "\
<!-- Written by `cargo run -p mandoline-rspec --example attributes-page`; do not edit. -->
# rspec attributes

An rspec is a set of (attribute, value) pairs that says what a pool or a sliver may use. In JSON it is an
object: `{\"vm_type\": \"kvm-microvm\", \"mem_limit\": \"256 MiB\", \"ports\": [\"tcp/80\"]}`. Memory and disk take
IEC and SI units, rates take SI units; a number alone is in the unit of the table. Names that start with
`x-` are kept and ignored. In XML the same is
`<rspec><attribute name=\"mem_limit\">256 MiB</attribute><attribute name=\"ports\"><item>tcp/80</item></attribute></rspec>`.
A value that is not allowed is refused with the attribute, the value, and what
would have been allowed.

";

const KINDS: [(Kind, &str); 6] = [
    (
        Kind::Reservation,
        "conserved: what a child gets is subtracted from its pool",
    ),
    (Kind::Limit, "a child's never exceeds its pool's; not subtracted"),
    (
        Kind::Weight,
        "relative to others of its sort, bounded by the pool",
    ),
    (
        Kind::Set,
        "disjoint: what a child owns, its pool and its siblings do not",
    ),
    (Kind::Interval, "contained: a child's lies within its pool's"),
    (Kind::Label, "checked and carried"),
];

const POOLS: &str = "
A limit, weight or interval that a pool does not name is that of the pool above it, up to what the node has;
a reservation or set that it does not name is empty. Of a sliver, `mem_reserve` may not pass `mem_limit`,
`disk_reserve` not `disk_quota`, `base_rate` not `burst_rate`, and `cpu_capped` wants a `cpu_guarantee`.
Every sliver gets the default `base_rate` even where its pools have none left: it is a floor of the node's.
";

/// The page as Markdown.
pub fn attributes_page() -> String {
    let mut page = HEAD.to_owned();
    let _ = writeln!(
        page,
        "This is version {ATTRIBUTE_TABLE_VERSION} of the table; nodes announce theirs.\n"
    );
    page.push_str("| attribute | kind | allowed | default | set by | enforced by |\n");
    page.push_str("| --- | --- | --- | --- | --- | --- |\n");
    for a in ATTRIBUTES {
        let name = match a.alias {
            Some(alias) => format!("`{}`, `{alias}`", a.name),
            None => format!("`{}`", a.name),
        };
        let _ = writeln!(
            page,
            "| {name} | {} | {} | {} | {} | {} |",
            a.kind.name(),
            a.value.allowed(),
            a.default.unwrap_or("none"),
            a.setter.name(),
            a.enforced_by
        );
    }
    page.push_str(
        "\n\"Set by\" is the least role of the authority that may set it; a node's owner may set all.\n\n",
    );
    for a in ATTRIBUTES {
        let _ = writeln!(page, "* `{}`: {}", a.name, a.doc);
    }
    page.push_str("\n## Kinds\n\n");
    for (kind, meaning) in KINDS {
        let _ = writeln!(page, "* *{}*: {meaning}.", kind.name());
    }
    page.push_str(POOLS);
    page.push_str("\n## Profiles of defaults\n\n`default_profile` in `nodemgr.toml` picks one.\n\n");
    for profile in PROFILES {
        let _ = write!(page, "* `{}`: {}", profile.name, profile.doc);
        let differ: Vec<String> = profile
            .differences()
            .map(|(attribute, text)| format!("`{}` {text}", attribute.name))
            .collect();
        match differ.is_empty() {
            true => page.push('\n'),
            false => {
                let _ = writeln!(page, " Other than the table: {}.", differ.join(", "));
            }
        }
    }
    page.push_str(
        "\n## Loans\n\nWhat one slice of a node can lend to another, as in the shipped node manager:\n\n",
    );
    page.push_str("| resource | of | one is | the lender keeps |\n| --- | --- | --- | --- |\n");
    for resource in LoanResource::ALL {
        let (of, unit) = match resource.attribute() {
            Some((attribute, unit)) => (format!("`{attribute}`"), unit.to_string()),
            None => ("nothing: accepted and kept".to_owned(), "".to_owned()),
        };
        let _ = writeln!(page, "| `{resource}` | {of} | {unit} | {} |", resource.floor());
    }
    page
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_in_docs_is_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rspec.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == super::attributes_page(),
            "docs/rspec.md is not what the table says; write it with\n  \
             cargo run -p mandoline-rspec --example attributes-page > docs/rspec.md"
        );
    }
}
