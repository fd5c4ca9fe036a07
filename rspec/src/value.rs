//! A typed value of an attribute, and how it is read from and written to JSON.

use serde_json::Value as Json;

use crate::attributes::{Attribute, Type};
use crate::{PortSet, RspecError, units};

/// The value of one attribute. Numbers are in the attribute's base unit: bytes, bit/s, or a count.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A count, bytes or bit/s, by the attribute's type.
    Number(u64),
    /// A switch.
    Bool(bool),
    /// A name, word or text.
    Text(String),
    /// A set of ports.
    Ports(PortSet),
    /// An instant.
    Time(jiff::Timestamp),
    /// Public key lines.
    Keys(Vec<String>),
    /// The value of an `x-` attribute: kept, never looked at.
    Foreign(Json),
}

/// At most so many characters of a refused value are repeated in an error.
const ECHO: usize = 80;

fn echo(json: &Json) -> String {
    let text = match json {
        Json::String(text) => format!("{text:?}"),
        other => other.to_string(),
    };
    match text.char_indices().nth(ECHO) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl Value {
    /// Reads the value of `attribute`.
    pub fn parse(attribute: &Attribute, json: &Json) -> Result<Self, RspecError> {
        Self::read(attribute.value, json).map_err(|problem| RspecError::Invalid {
            attribute: attribute.name.to_owned(),
            value: echo(json),
            problem,
            allowed: attribute.value.allowed(),
        })
    }

    fn read(wanted: Type, json: &Json) -> Result<Self, &'static str> {
        const WRONG: &str = "of the wrong type";
        let in_range = |number: u64, min: u64, max: u64| {
            if number < min {
                Err("too small")
            } else if number > max {
                Err("too large")
            } else {
                Ok(Self::Number(number))
            }
        };
        match wanted {
            Type::Count { min, max } => {
                in_range(number(json, |text| text.parse().map_err(|_| WRONG))?, min, max)
            }
            Type::Bytes { min } => in_range(number(json, units::parse_bytes)?, min, i64::MAX as u64),
            Type::Rate { min } => in_range(number(json, units::parse_rate)?, min, i64::MAX as u64),
            // PLCAPI's tags are strings, and XML-RPC clients send 0 and 1 for booleans.
            Type::Bool => match json {
                Json::Bool(value) => Ok(Self::Bool(*value)),
                Json::String(text) if text == "true" || text == "1" => Ok(Self::Bool(true)),
                Json::String(text) if text == "false" || text == "0" => Ok(Self::Bool(false)),
                Json::Number(number) if number.as_u64() == Some(1) => Ok(Self::Bool(true)),
                Json::Number(number) if number.as_u64() == Some(0) => Ok(Self::Bool(false)),
                _ => Err(WRONG),
            },
            Type::VmType => {
                let text = json.as_str().ok_or(WRONG)?;
                let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
                match !text.is_empty() && text.len() <= 32 && text.chars().all(good) {
                    true => Ok(Self::Text(text.to_owned())),
                    false => Err("not a name"),
                }
            }
            Type::Word(words) => {
                let text = json.as_str().ok_or(WRONG)?;
                match words.contains(&text) {
                    true => Ok(Self::Text(text.to_owned())),
                    false => Err("not one of the words"),
                }
            }
            Type::Image => image(json.as_str().ok_or(WRONG)?),
            Type::Ports => ports(json),
            Type::Time => {
                let time = json.as_str().ok_or(WRONG)?.parse().map_err(|_| "not a time")?;
                Ok(Self::Time(time))
            }
            Type::Text(max) => {
                let text = json.as_str().ok_or(WRONG)?;
                match (text.len() <= max, text.contains('\0')) {
                    (true, false) => Ok(Self::Text(text.to_owned())),
                    (false, _) => Err("too long"),
                    (_, true) => Err("with a NUL in it"),
                }
            }
            Type::Keys => keys(json),
        }
    }

    /// The value as JSON: numbers in base units, so that a program needs no parser for units.
    pub fn to_json(&self) -> Json {
        match self {
            Self::Number(number) => Json::from(*number),
            Self::Bool(value) => Json::from(*value),
            Self::Text(text) => Json::from(text.as_str()),
            Self::Ports(ports) => Json::from(ports.items()),
            Self::Time(time) => Json::from(time.to_string()),
            Self::Keys(keys) => Json::from(keys.as_slice()),
            Self::Foreign(json) => json.clone(),
        }
    }

    /// The value for people, with its unit.
    pub fn display(&self, attribute: &Attribute) -> String {
        match (self, attribute.value) {
            (Self::Number(number), Type::Bytes { .. }) => units::format_bytes(*number),
            (Self::Number(number), Type::Rate { .. }) => units::format_rate(*number),
            (Self::Ports(ports), _) => ports.to_string(),
            (Self::Text(text), _) => text.clone(),
            (Self::Time(time), _) => time.to_string(),
            (Self::Keys(keys), _) => format!("{} keys", keys.len()),
            (other, _) => other.to_json().to_string(),
        }
    }

    /// The number, if it is one.
    pub fn as_number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// A whole number from JSON: an integer, a float that is one exactly (JavaScript and XML-RPC clients send
/// those), or text that `units` reads.
fn number(json: &Json, units: impl Fn(&str) -> Result<u64, &'static str>) -> Result<u64, &'static str> {
    match json {
        Json::String(text) if text.trim_start().starts_with('-') => Err("negative"),
        Json::String(text) => units(text),
        Json::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(value), _, _) => Ok(value),
            (_, Some(_), _) => Err("negative"),
            (_, _, Some(value)) if value < 0.0 => Err("negative"),
            (_, _, Some(value)) if value.fract() != 0.0 => Err("not a whole number"),
            // Above 2^53 a float does not say which integer it means.
            (_, _, Some(value)) if value <= 9_007_199_254_740_992.0 => Ok(value as u64),
            _ => Err("too large"),
        },
        _ => Err("of the wrong type"),
    }
}

fn image(text: &str) -> Result<Value, &'static str> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (text, None),
    };
    let good = |c: char| c.is_ascii_alphanumeric() || "._-+:".contains(c);
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(good) {
        return Err("not a name");
    }
    if let Some(digest) = digest {
        let hex = digest.strip_prefix("sha256:").ok_or("without a sha256 digest")?;
        if hex.len() != 64 || !hex.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')) {
            return Err("with a digest that is not 64 hexadecimal digits");
        }
    }
    Ok(Value::Text(text.to_owned()))
}

fn items<'a>(json: &'a Json, separators: &'static [char]) -> Result<Vec<&'a str>, &'static str> {
    match json {
        Json::String(text) => Ok(text
            .split(separators)
            .map(str::trim)
            .filter(|s| !s.is_empty())
            .collect()),
        Json::Array(list) => list
            .iter()
            .map(|item| item.as_str().ok_or("of the wrong type"))
            .collect(),
        _ => Err("of the wrong type"),
    }
}

fn ports(json: &Json) -> Result<Value, &'static str> {
    let mut set = PortSet::default();
    for item in items(json, &[',', ' '])? {
        let (protocol, range) = PortSet::parse_item(item)?;
        set.insert(protocol, range);
    }
    Ok(Value::Ports(set))
}

/// Key lines are only kept from doing harm here (a line break would add a line of somebody's choosing to an
/// authorized_keys file); whether a key is well made is the authority's to check.
fn keys(json: &Json) -> Result<Value, &'static str> {
    let mut keys = Vec::new();
    for line in items(json, &['\n'])? {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        if line.len() > 16 << 10 {
            return Err("a key line that is too long");
        }
        if line.chars().any(char::is_control) {
            return Err("a key line with a control character");
        }
        if line.split_whitespace().count() < 2 {
            return Err("not a key line");
        }
        keys.push(line.to_owned());
    }
    match keys.len() {
        0..=1000 => Ok(Value::Keys(keys)),
        _ => Err("too many keys"),
    }
}
