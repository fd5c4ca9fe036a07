//! `--rspec NAME=VALUE` and `--rspec-file`: checked here against the attribute table, so that a typing error
//! costs no round trip and no half-made slice.

use std::path::Path;

use mandoline_api::authority::RspecObject;
use mandoline_rspec::{Rspec, Type, Value, attribute};
use serde_json::Value as Json;

use crate::error::{About, Error, Result};

/// Puts a file's object and single assignments together; later ones win.
pub(crate) fn rspec(file: Option<&Path>, assignments: &[String]) -> Result<RspecObject> {
    let mut map = match file {
        None => RspecObject::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path).about(path.display())?;
            serde_json::from_str(&text).about(path.display())?
        }
    };
    for text in assignments {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            Error::usage(format!("--rspec {text:?} is not NAME=VALUE"))
                .advise("for example: --rspec mem_limit=128MiB")
        })?;
        map.insert(name.trim().to_owned(), json(name.trim(), value.trim()));
    }
    let rspec = Rspec::from_map(&map).map_err(|error| {
        Error::usage(error.to_string()).advise("`mandoline help slice create` lists the attributes")
    })?;
    match rspec.to_json() {
        Json::Object(map) => Ok(map),
        _ => Ok(map),
    }
}

/// What a value typed on a command line means for this attribute.
fn json(name: &str, value: &str) -> Json {
    let list = |text: &str| {
        text.split(',')
            .map(|item| Json::from(item.trim()))
            .collect::<Vec<_>>()
            .into()
    };
    match attribute(name).map(|attribute| attribute.value) {
        Some(Type::Ports) if !value.starts_with('[') => list(value),
        // Words stay words: `share_memory=none` is no null, an `image=12` no number.
        Some(Type::VmType | Type::Word(_) | Type::Image | Type::Time | Type::Text(_)) => value.into(),
        Some(_) => serde_json::from_str(value).unwrap_or_else(|_| value.into()),
        None => value.into(),
    }
}

/// An rspec for people: values with their units.
pub(crate) fn people(object: &RspecObject) -> String {
    let Ok(rspec) = Rspec::from_map(object) else {
        // An authority that is newer than this program.
        return Json::from(object.clone()).to_string();
    };
    let value = |name: &str, value: &Value| {
        attribute(name).map_or_else(|| value.to_json().to_string(), |row| value.display(row))
    };
    rspec
        .iter()
        .map(|(name, it)| format!("{name} = {}", value(name, it)))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The attribute table for `--help`.
pub(crate) fn help() -> String {
    let mut text = String::from("rspec attributes (--rspec NAME=VALUE):\n");
    for row in mandoline_rspec::ATTRIBUTES {
        let default = row
            .default
            .map(|value| format!("; default {value}"))
            .unwrap_or_default();
        text.push_str(&format!("  {}: {}{default}\n", row.name, row.value.allowed()));
        for line in wrap(row.doc, 72) {
            text.push_str(&format!("      {line}\n"));
        }
    }
    text
}

/// Lines of at most `width` columns, broken between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_ascii_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(assignments: &[&str]) -> Result<RspecObject> {
        rspec(
            None,
            &assignments
                .iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn units_numbers_words_and_lists() {
        let map = parse(&[
            "vm_type=kvm-microvm",
            "mem_limit=128MiB",
            "cpu_share=10",
            "cpu_capped=true",
            "share_memory=none",
            "ports=tcp/80,udp/5000-5010",
            "x-note=12",
        ])
        .unwrap();
        assert_eq!(map["mem_limit"], 134_217_728);
        assert_eq!(map["cpu_share"], 10);
        assert_eq!(map["cpu_capped"], true);
        assert_eq!(map["share_memory"], "none");
        assert_eq!(map["x-note"], "12");
        assert!(map["ports"].as_array().is_some_and(|ports| ports.len() == 2));
    }

    #[test]
    fn errors_name_attribute_value_and_what_is_allowed() {
        for (text, part) in [
            ("mem_limit", "is not NAME=VALUE"),
            ("mem_limit=much", "mem_limit"),
            ("mem_limit=1", "at least 32 MiB"),
            ("memory=1", "unknown attribute `memory`"),
        ] {
            let message = parse(&[text]).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn help_has_every_attribute() {
        let help = help();
        assert!(
            mandoline_rspec::ATTRIBUTES
                .iter()
                .all(|row| help.contains(row.name))
        );
    }
}
