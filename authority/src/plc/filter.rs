//! PLCAPI's filters: which objects a Get* gives, in which order, how many.
//!
//! A filter is nil, a number, a name, a list of both, or a struct of conditions on fields. A field's name may
//! carry `~` (not), `<` `>` (less, greater), `[` `]` (at most, at least), `|` `&` (any of, all of an array
//! field). Control keys: `-SORT`, `-OFFSET`, `-LIMIT`, `-OR`, `-AND`.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::fault::Fault;

/// An object as PLCAPI shows it.
pub(super) type Record = BTreeMap<String, Json>;

/// A filter, read and checked against the fields that there are.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Filter {
    pub(super) which: Which,
    conditions: Vec<Condition>,
    any: bool,
    sort: Vec<(String, bool)>,
    offset: usize,
    limit: Option<usize>,
}

/// The objects to look at.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Which {
    All,
    /// By number or name.
    Listed(Vec<i64>, Vec<String>),
}

#[derive(Clone, Debug, PartialEq)]
struct Condition {
    field: String,
    not: bool,
    test: Test,
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    Less(Json),
    Greater(Json),
    AtMost(Json),
    AtLeast(Json),
    /// For arrays.
    AnyOf(Vec<Json>),
    /// For arrays.
    AllOf(Vec<Json>),
    Is(Json),
    In(Vec<Json>),
    Like(String),
}

fn bad_field(name: &str) -> Fault {
    let name: String = name.chars().take(100).collect();
    Fault::invalid(format!("Invalid filter field '{name}'"))
}

/// Reads a filter. `known` says whether a field may be filtered by, and whether it is an array.
pub(super) fn parse(value: &Json, known: &dyn Fn(&str) -> Option<bool>) -> Result<Filter, Fault> {
    let mut filter = Filter {
        which: Which::All,
        conditions: Vec::new(),
        any: false,
        sort: Vec::new(),
        offset: 0,
        limit: None,
    };
    match value {
        Json::Null => {}
        Json::Object(members) => conditions(members, known, &mut filter)?,
        Json::Array(items) => filter.which = listed(items),
        one => filter.which = listed(std::slice::from_ref(one)),
    }
    Ok(filter)
}

fn listed(items: &[Json]) -> Which {
    let mut ids = Vec::new();
    let mut names = Vec::new();
    for item in items {
        match item {
            Json::String(name) => names.push(name.clone()),
            Json::Bool(value) => ids.push(i64::from(*value)),
            other => ids.extend(other.as_i64()),
        }
    }
    Which::Listed(ids, names)
}

fn conditions(
    members: &Map<String, Json>,
    known: &dyn Fn(&str) -> Option<bool>,
    filter: &mut Filter,
) -> Result<(), Fault> {
    for (key, value) in members {
        if let Some(control) = key.strip_prefix('-') {
            match control {
                "SORT" => filter.sort = sort(value, known)?,
                "OFFSET" => filter.offset = count(key, value)?,
                "LIMIT" => filter.limit = Some(count(key, value)?),
                "OR" => filter.any = truth(value),
                "AND" => filter.any = !truth(value),
                _ => return Err(bad_field(key)),
            }
            continue;
        }
        filter.conditions.push(condition(key, value, known)?);
    }
    Ok(())
}

fn condition(key: &str, value: &Json, known: &dyn Fn(&str) -> Option<bool>) -> Result<Condition, Fault> {
    let field = key.trim_start_matches(['~', '<', '>', '[', ']', '|', '&']);
    let modifiers = &key[..key.len() - field.len()];
    let array = known(field).ok_or_else(|| bad_field(field))?;
    let not = modifiers.contains('~');
    let list = || match value {
        Json::Array(items) => items.clone(),
        one => vec![one.clone()],
    };
    let test = match modifiers.chars().find(|c| *c != '~') {
        Some('<') => Test::Less(value.clone()),
        Some('>') => Test::Greater(value.clone()),
        Some('[') => Test::AtMost(value.clone()),
        Some(']') => Test::AtLeast(value.clone()),
        Some('&') => Test::AllOf(list()),
        Some('|') => Test::AnyOf(list()),
        _ if array => Test::AnyOf(list()),
        _ => match value {
            Json::Array(items) => Test::In(items.clone()),
            Json::String(text) if text.contains(['*', '%']) => {
                Test::Like(text.to_lowercase().replace('*', "%"))
            }
            Json::Object(_) => {
                return Err(Fault::invalid(format!("Invalid value of filter field '{field}'")));
            }
            one => Test::Is(one.clone()),
        },
    };
    Ok(Condition {
        field: field.to_owned(),
        not,
        test,
    })
}

fn sort(value: &Json, known: &dyn Fn(&str) -> Option<bool>) -> Result<Vec<(String, bool)>, Fault> {
    let items = match value {
        Json::Array(items) => items.clone(),
        one => vec![one.clone()],
    };
    let mut keys = Vec::new();
    for item in &items {
        let text = item.as_str().ok_or_else(|| bad_field("-SORT"))?;
        let (descending, field) = match text.strip_prefix('-') {
            Some(field) => (true, field),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        known(field).ok_or_else(|| bad_field(field))?;
        keys.push((field.to_owned(), descending));
    }
    Ok(keys)
}

fn count(key: &str, value: &Json) -> Result<usize, Fault> {
    value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| Fault::invalid(format!("Invalid value of '{key}': a number, 0 and more")))
}

/// PlanetLab's: `-OR` and `-AND` count with any value but those that are false in Python.
fn truth(value: &Json) -> bool {
    !matches!(value, Json::Null | Json::Bool(false)) && value.as_i64() != Some(0)
}

impl Filter {
    /// The fields that it looks at.
    pub(super) fn fields(&self) -> impl Iterator<Item = &str> {
        let sort = self.sort.iter().map(|(field, _)| field.as_str());
        self.conditions
            .iter()
            .map(|condition| condition.field.as_str())
            .chain(sort)
    }

    /// Keeps what passes, sorted and cut.
    pub(super) fn apply(&self, records: Vec<Record>) -> Vec<Record> {
        let mut kept: Vec<_> = records.into_iter().filter(|record| self.passes(record)).collect();
        if !self.sort.is_empty() {
            kept.sort_by(|a, b| {
                self.sort
                    .iter()
                    .fold(Ordering::Equal, |so_far, (field, descending)| {
                        so_far.then_with(|| {
                            let order = compare(get(a, field), get(b, field)).unwrap_or(Ordering::Equal);
                            if *descending { order.reverse() } else { order }
                        })
                    })
            });
        }
        kept.into_iter()
            .skip(self.offset)
            .take(self.limit.unwrap_or(usize::MAX))
            .collect()
    }

    fn passes(&self, record: &Record) -> bool {
        let mut tests = self
            .conditions
            .iter()
            .map(|condition| condition.not != condition.test.holds(get(record, &condition.field)));
        match self.any && !self.conditions.is_empty() {
            true => tests.any(|passed| passed),
            false => tests.all(|passed| passed),
        }
    }
}

fn get<'a>(record: &'a Record, field: &str) -> &'a Json {
    record.get(field).unwrap_or(&Json::Null)
}

impl Test {
    fn holds(&self, value: &Json) -> bool {
        let ordered = |than: &Json| compare(value, than).filter(|_| !value.is_null() && !than.is_null());
        match self {
            Test::Less(than) => ordered(than) == Some(Ordering::Less),
            Test::Greater(than) => ordered(than) == Some(Ordering::Greater),
            Test::AtMost(than) => ordered(than).is_some_and(Ordering::is_le),
            Test::AtLeast(than) => ordered(than).is_some_and(Ordering::is_ge),
            Test::AnyOf(items) => items.iter().any(|item| holds_item(value, item)),
            Test::AllOf(items) => items.iter().all(|item| holds_item(value, item)),
            Test::Is(wanted) => same(value, wanted),
            Test::In(items) => items.iter().any(|item| same(value, item)),
            Test::Like(pattern) => value
                .as_str()
                .is_some_and(|text| like(pattern, &text.to_lowercase())),
        }
    }
}

fn holds_item(value: &Json, item: &Json) -> bool {
    match value {
        Json::Array(items) => items.iter().any(|have| same(have, item)),
        other => same(other, item),
    }
}

fn same(a: &Json, b: &Json) -> bool {
    compare(a, b) == Some(Ordering::Equal)
}

/// Numbers with numbers (booleans are 0 and 1, as in Python), text with text; nil comes last, as in SQL.
fn compare(a: &Json, b: &Json) -> Option<Ordering> {
    let number = |value: &Json| match value {
        Json::Bool(value) => Some(f64::from(u8::from(*value))),
        other => other.as_f64(),
    };
    match (a, b) {
        (Json::Null, Json::Null) => Some(Ordering::Equal),
        (Json::Null, _) => Some(Ordering::Greater),
        (_, Json::Null) => Some(Ordering::Less),
        (Json::String(a), Json::String(b)) => Some(a.cmp(b)),
        (a, b) => number(a)?.partial_cmp(&number(b)?),
    }
}

/// Whether text matches a pattern with `%` for any number of characters. Linear for each `%`: no pattern
/// can make it slow.
fn like(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('%');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<_> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn records() -> Vec<Record> {
        let record = |id: i64, name: &str, last: Option<i64>, nodes: &[i64]| {
            Record::from([
                ("id".to_owned(), json!(id)),
                ("name".to_owned(), json!(name)),
                ("last".to_owned(), json!(last)),
                ("nodes".to_owned(), json!(nodes)),
            ])
        };
        vec![
            record(1, "node1.x.org", Some(10), &[1, 2]),
            record(2, "Node2.x.org", None, &[2, 3]),
            record(3, "other.y.org", Some(30), &[]),
        ]
    }

    fn known(name: &str) -> Option<bool> {
        match name {
            "id" | "name" | "last" => Some(false),
            "nodes" => Some(true),
            _ => None,
        }
    }

    fn ids(filter: Json) -> Vec<i64> {
        let filter = parse(&filter, &known).unwrap();
        filter
            .apply(records())
            .iter()
            .filter_map(|record| record["id"].as_i64())
            .collect()
    }

    #[test]
    fn every_operator() {
        for (filter, wanted) in [
            (json!({}), vec![1, 2, 3]),
            (json!({"id": 2}), vec![2]),
            (json!({"~id": 2}), vec![1, 3]),
            (json!({"id": [1, 3]}), vec![1, 3]),
            (json!({"id": []}), vec![]),
            (json!({"~id": []}), vec![1, 2, 3]),
            (json!({"name": "NODE*"}), vec![1, 2]),
            (json!({"name": "%.y.%"}), vec![3]),
            (json!({"~name": "node*"}), vec![3]),
            (json!({"last": null}), vec![2]),
            (json!({"~last": null}), vec![1, 3]),
            (json!({"<last": 30}), vec![1]),
            (json!({"[last": 30}), vec![1, 3]),
            (json!({">last": 10}), vec![3]),
            (json!({"]last": 10}), vec![1, 3]),
            (json!({"~]last": 11}), vec![1, 2]),
            (json!({"|nodes": [1, 3]}), vec![1, 2]),
            (json!({"&nodes": [1, 2]}), vec![1]),
            (json!({"nodes": 2}), vec![1, 2]),
            (json!({"id": 1, "name": "node*"}), vec![1]),
            (json!({"id": 1, "last": 30, "-OR": 1}), vec![1, 3]),
            (json!({"-SORT": "-id"}), vec![3, 2, 1]),
            (json!({"-SORT": ["last"], "-LIMIT": 1}), vec![1]),
            (json!({"-SORT": "+id", "-OFFSET": 1, "-LIMIT": 1}), vec![2]),
        ] {
            assert_eq!(ids(filter.clone()), wanted, "{filter}");
        }
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = |filter: Json| parse(&filter, &known).unwrap_err().text;
        assert_eq!(
            text(json!({"badfield": 1})),
            "Invalid argument: Invalid filter field 'badfield'"
        );
        assert_eq!(
            text(json!({"-WAT": 1})),
            "Invalid argument: Invalid filter field '-WAT'"
        );
        assert_eq!(
            text(json!({"-SORT": "wat"})),
            "Invalid argument: Invalid filter field 'wat'"
        );
    }

    #[test]
    fn lists_mix_numbers_and_names() {
        let filter = parse(&json!([1, "a", 2]), &known).unwrap();
        assert_eq!(filter.which, Which::Listed(vec![1, 2], vec!["a".into()]));
    }

    proptest! {
        #[test]
        fn a_condition_and_its_negation_part_the_records(op in "[<>\\[\\]|&]?", last in -5i64..40) {
            let yes = ids(json!({ (format!("{op}last")): last }));
            let no = ids(json!({ (format!("~{op}last")): last }));
            prop_assert_eq!(yes.len() + no.len(), 3);
            prop_assert!(yes.iter().all(|id| !no.contains(id)));
        }

        #[test]
        fn a_text_matches_itself_with_anything_replaced(a in "[a-c]{0,4}", b in "[a-c]{0,4}", c in "[a-c]{0,4}") {
            let pattern = format!("{a}%{c}");
            let text = format!("{a}{b}{c}");
            prop_assert!(like(&pattern, &text));
        }
    }
}
