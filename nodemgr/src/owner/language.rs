//! The owner's script as the architecture paper writes it (section 5.2.3):
//!
//! ```text
//! rcap10 = create_root_pool(rspec10, my_favorite_cdn)
//! rcap85 = create_root_pool(rspec85, pl.conf)
//! rcap5 = create_root_pool(rspec5, pl.conf)
//! bind(rcap5, pl.conf)
//! ```
//!
//! A name is given to an rspec by `name = {…}`, in JSON; `rspecN` that nobody named is N per cent of the node.
//! `deny(slice, "reason")` keeps a slice off. `#` begins a comment. Each statement stands on a line of its
//! own, but JSON may go over several.

use std::collections::BTreeMap;

use mandoline_api::nodemgr::{ErrorBody, ErrorKind};
use serde_json::{Value as Json, json};

use super::{Entry, Plan};
use crate::ops::{OpResult, Rules};

const STATEMENTS: &str = "name = {…}, rcap = create_root_pool(rspec, slice), bind(rcap, slice), \
                          deny(slice, \"reason\")";

/// Reads a script.
pub(crate) fn parse(text: &str, rules: &Rules) -> OpResult<Plan> {
    let mut parser = Parser { text, at: 0 };
    let mut rspecs: BTreeMap<&str, Json> = BTreeMap::new();
    let mut rcaps: BTreeMap<&str, usize> = BTreeMap::new();
    let mut pools: Vec<Entry> = Vec::new();
    let mut deny: Option<BTreeMap<String, String>> = None;
    while parser.next_statement() {
        let first = parser.name()?;
        let (target, called) = match parser.take('=') {
            false => (None, first),
            true if parser.peek() == Some('{') => {
                rspecs.insert(first, parser.json()?);
                parser.end()?;
                continue;
            }
            true => (Some(first), parser.name()?),
        };
        parser.expect('(')?;
        match called {
            "create_root_pool" => {
                let name = parser.name()?;
                let rspec = rspecs.get(name).cloned().or_else(|| of_the_node(name));
                let rspec = rspec.ok_or_else(|| {
                    parser.wrong(name, "no rspec of that name; allowed: rspecN, N per cent")
                })?;
                parser.expect(',')?;
                let slice = rules.slice(parser.name()?)?;
                if let Some(target) = target {
                    rcaps.insert(target, pools.len());
                }
                pools.push(Entry {
                    slice,
                    rspec,
                    bind: None,
                });
            }
            "bind" => {
                let name = parser.name()?;
                parser.expect(',')?;
                let slice = rules.slice(parser.name()?)?;
                let pool = rcaps.get(name).and_then(|pool| pools.get_mut(*pool));
                let pool = pool.ok_or_else(|| parser.wrong(name, "no rcap of that name"))?;
                pool.bind = Some(slice);
            }
            "deny" => {
                let slice = parser.name()?.to_owned();
                parser.expect(',')?;
                let Json::String(reason) = parser.json()? else {
                    return Err(parser.wrong("deny", "the reason is not text"));
                };
                deny.get_or_insert_default().insert(slice, reason);
            }
            other => return Err(parser.wrong(other, "no statement")),
        }
        parser.expect(')')?;
        parser.end()?;
    }
    Ok(Plan {
        pools: Some(pools),
        deny,
    })
}

/// `rspec10` that nobody named: 10 per cent of the node, as the paper means it.
fn of_the_node(name: &str) -> Option<Json> {
    let percent = name.strip_prefix("rspec")?;
    let is_number = !percent.is_empty() && percent.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| json!({ "capacity": format!("{percent} %") }))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Skips blanks within a line.
    fn blanks(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\r']).len();
    }

    fn peek(&mut self) -> Option<char> {
        self.blanks();
        self.rest().chars().next()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found) * wanted.len_utf8();
        found
    }

    fn expect(&mut self, wanted: char) -> OpResult<()> {
        match self.take(wanted) {
            true => Ok(()),
            false => Err(self.wrong(&self.found(), &format!("'{wanted}' is missing"))),
        }
    }

    /// Skips empty lines and comments; false at the end.
    fn next_statement(&mut self) -> bool {
        loop {
            match self.peek() {
                None => return false,
                Some('\n') => self.at += 1,
                Some('#') => self.at += self.rest().find('\n').unwrap_or(self.rest().len()),
                Some(_) => return true,
            }
        }
    }

    fn end(&mut self) -> OpResult<()> {
        match self.peek() {
            None | Some('\n' | '#') => Ok(()),
            Some(_) => Err(self.wrong(&self.found(), "more after a statement")),
        }
    }

    fn name(&mut self) -> OpResult<&'a str> {
        self.blanks();
        let rest = self.rest();
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        match rest.get(..end).filter(|name| !name.is_empty()) {
            Some(name) => {
                self.at += end;
                Ok(name)
            }
            None => Err(self.wrong(&self.found(), "a name is missing")),
        }
    }

    fn json(&mut self) -> OpResult<Json> {
        self.blanks();
        let mut values = serde_json::Deserializer::from_str(self.rest()).into_iter::<Json>();
        let value = values.next();
        let length = values.byte_offset();
        match value {
            Some(Ok(value)) => {
                self.at += length;
                Ok(value)
            }
            Some(Err(error)) => Err(self.wrong(&self.found(), &format!("not JSON: {error}"))),
            None => Err(self.wrong("the end", "JSON is missing")),
        }
    }

    fn found(&self) -> String {
        self.rest()
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(40)
            .collect()
    }

    fn wrong(&self, value: &str, problem: &str) -> ErrorBody {
        let before = self.text.get(..self.at).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        ErrorBody {
            attribute: Some("script".to_owned()),
            value: Some(value.to_owned()),
            ..ErrorBody::new(
                ErrorKind::BadRequest,
                format!("owner's script, line {line}: {value:?}: {problem}"),
            )
            .allowed(STATEMENTS)
        }
    }
}
