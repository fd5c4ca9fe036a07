//! PLCAPI's objects: one description of each one's fields, from which reading, filters and return fields come.

mod table;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use super::fault::Fault;
use super::filter::{self, Record, Which};
use crate::db::Conn;
use crate::error::Error;

pub(super) use table::{INITSCRIPT, KEY, NODE, PERSON, SITE, SLICE, SLICE_TAG};

/// Where a field's value is.
#[derive(Clone, Copy, Debug)]
enum From {
    Int(&'static str),
    Bool(&'static str),
    Double(&'static str),
    Text(&'static str),
    /// A list: SQL that gives (number of the object, number) in order.
    Ints(&'static str),
    /// A list: SQL that gives (number of the object, text) in order.
    Texts(&'static str),
    /// Known to PLCAPI, not kept here.
    Nil,
    /// A list of what is not kept here.
    Empty,
}

#[derive(Clone, Copy, Debug)]
struct Field {
    name: &'static str,
    from: From,
    /// Shown to admins only, and to others neither as a field nor through a filter.
    secret: bool,
}

const fn f(name: &'static str, from: From) -> Field {
    Field {
        name,
        from,
        secret: false,
    }
}

/// A kind of object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Object {
    /// PLCAPI's name.
    pub(super) name: &'static str,
    table: &'static str,
    alive: &'static str,
    key: &'static str,
    /// The field that names it, if it has one.
    named: Option<&'static str>,
    /// Names are lower case.
    folded: bool,
    fields: &'static [Field],
    /// SQL that gives (number, tag, value): tags that may be asked for as fields.
    tags: Option<&'static str>,
}

/// What a caller may see of a kind of object.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    /// Secret fields too.
    pub(super) secrets: bool,
    /// Only these objects, if there is a bound.
    pub(super) only: Option<BTreeSet<i64>>,
}

impl Object {
    fn field(&self, name: &str, secrets: bool) -> Option<&'static Field> {
        self.fields
            .iter()
            .find(|field| field.name == name && (secrets || !field.secret))
    }

    /// The objects that pass the filter, with the wanted fields (nil: all of its own that may be seen).
    pub(super) async fn get(
        &self,
        conn: &mut Conn,
        sight: &Sight,
        filter: &Json,
        return_fields: &Json,
    ) -> Result<Vec<Record>, GetError> {
        let tags = self.tag_names(conn).await?;
        let is_array = |field: &Field| matches!(field.from, From::Ints(_) | From::Texts(_) | From::Empty);
        let known = |name: &str| match self.field(name, sight.secrets) {
            Some(field) => Some(is_array(field)),
            None => tags.contains(name).then_some(false),
        };
        let filter = filter::parse(filter, &known)?;
        let wanted: Vec<String> = match return_fields {
            Json::Array(names) => names
                .iter()
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect(),
            _ => self
                .fields
                .iter()
                .filter(|x| sight.secrets || !x.secret)
                .map(|x| x.name.to_owned())
                .collect(),
        };
        // A secret field that was asked for is left out without a word, as in PlanetLab's server.
        let (wanted, unknown): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|name| self.field(name, true).is_some() || tags.contains(name));
        if !unknown.is_empty() {
            let names: Vec<_> = unknown.iter().map(|name| format!("'{name}'")).collect();
            let names = names.join(", ");
            return Err(
                Fault::invalid(format!("unknown column(s) specified [{names}] in {}", self.name)).into(),
            );
        }
        let needed: BTreeSet<&str> = filter.fields().chain(wanted.iter().map(String::as_str)).collect();
        let records = self.load(conn, &filter.which, &needed, &tags, sight).await?;
        let kept = filter.apply(records);
        Ok(kept
            .into_iter()
            .map(|mut record| {
                record.retain(|name, _| wanted.iter().any(|w| w == name));
                record
            })
            .collect())
    }

    async fn tag_names(&self, conn: &mut Conn) -> Result<BTreeSet<String>, GetError> {
        if self.tags.is_none() {
            return Ok(BTreeSet::new());
        }
        let names: Vec<String> = sqlx::query_scalar("SELECT tagname FROM tag_types")
            .fetch_all(conn)
            .await?;
        Ok(names
            .into_iter()
            .filter(|name| self.field(name, true).is_none())
            .collect())
    }

    async fn load(
        &self,
        conn: &mut Conn,
        which: &Which,
        needed: &BTreeSet<&str>,
        tags: &BTreeSet<String>,
        sight: &Sight,
    ) -> Result<Vec<Record>, GetError> {
        let columns: Vec<(&Field, &str)> = self
            .fields
            .iter()
            .filter(|field| needed.contains(field.name) && (sight.secrets || !field.secret))
            .filter_map(|field| match field.from {
                From::Int(sql) | From::Bool(sql) | From::Double(sql) | From::Text(sql) => Some((field, sql)),
                _ => None,
            })
            .collect();
        let mut sql = format!("SELECT {}", self.key);
        for (_, column) in &columns {
            sql.push_str(", ");
            sql.push_str(column);
        }
        sql.push_str(&format!(" FROM {} WHERE {}", self.table, self.alive));
        // Asked for by number or name, only those are read.
        let mut ids: &[i64] = &[];
        let mut names: Vec<String> = Vec::new();
        if let Which::Listed(by_id, by_name) = which {
            ids = by_id;
            names = match (self.named, self.folded) {
                (None, _) => Vec::new(),
                (_, true) => by_name.iter().map(|name| name.to_lowercase()).collect(),
                (_, false) => by_name.clone(),
            };
            if ids.len() + names.len() > MAX_LISTED {
                return Err(Fault::invalid(format!("more than {MAX_LISTED} in a filter's list")).into());
            }
            let marks = |from: usize, n: usize| {
                (from..from + n)
                    .map(|i| format!("${i}"))
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let mut either = vec!["1 = 0".to_owned()];
            if !ids.is_empty() {
                either.push(format!("{} IN ({})", self.key, marks(1, ids.len())));
            }
            if let (Some(named), false) = (self.named, names.is_empty()) {
                either.push(format!("{named} IN ({})", marks(1 + ids.len(), names.len())));
            }
            sql.push_str(&format!(" AND ({})", either.join(" OR ")));
        }
        sql.push_str(&format!(" ORDER BY {}", self.key));
        // Every part is a constant of this file or a placeholder: nothing of a request is in the text.
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for id in ids {
            query = query.bind(*id);
        }
        for name in names {
            query = query.bind(name);
        }
        let rows = query.fetch_all(&mut *conn).await?;
        let mut records: BTreeMap<i64, Record> = BTreeMap::new();
        for row in &rows {
            let id: i64 = row.try_get(0)?;
            if sight.only.as_ref().is_some_and(|only| !only.contains(&id)) {
                continue;
            }
            let mut record = Record::new();
            for (index, (field, _)) in columns.iter().enumerate() {
                record.insert(field.name.to_owned(), value(row, index + 1, field.from)?);
            }
            records.insert(id, record);
        }
        self.fill_lists(conn, needed, &mut records).await?;
        self.fill_tags(conn, needed, tags, &mut records).await?;
        Ok(records.into_values().collect())
    }

    async fn fill_lists(
        &self,
        conn: &mut Conn,
        needed: &BTreeSet<&str>,
        records: &mut BTreeMap<i64, Record>,
    ) -> Result<(), GetError> {
        for field in self.fields.iter().filter(|field| needed.contains(field.name)) {
            let (sql, text, empty) = match field.from {
                From::Ints(sql) => (sql, false, Json::Array(Vec::new())),
                From::Texts(sql) => (sql, true, Json::Array(Vec::new())),
                From::Empty => ("", false, Json::Array(Vec::new())),
                From::Nil => ("", false, Json::Null),
                _ => continue,
            };
            for record in records.values_mut() {
                record.insert(field.name.to_owned(), empty.clone());
            }
            if sql.is_empty() || records.is_empty() {
                continue;
            }
            for row in sqlx::query(sql).fetch_all(&mut *conn).await? {
                let item = if text {
                    Json::from(row.try_get::<String, _>(1)?)
                } else {
                    Json::from(row.try_get::<i64, _>(1)?)
                };
                let list = records
                    .get_mut(&row.try_get::<i64, _>(0)?)
                    .and_then(|record| record.get_mut(field.name));
                if let Some(Json::Array(items)) = list {
                    items.push(item);
                }
            }
        }
        Ok(())
    }

    async fn fill_tags(
        &self,
        conn: &mut Conn,
        needed: &BTreeSet<&str>,
        tags: &BTreeSet<String>,
        records: &mut BTreeMap<i64, Record>,
    ) -> Result<(), GetError> {
        let wanted: Vec<_> = tags
            .iter()
            .filter(|name| needed.contains(name.as_str()))
            .collect();
        let (Some(sql), false) = (self.tags, wanted.is_empty()) else {
            return Ok(());
        };
        for record in records.values_mut() {
            record.extend(wanted.iter().map(|name| ((*name).clone(), Json::Null)));
        }
        for row in sqlx::query(sql).fetch_all(conn).await? {
            let name: String = row.try_get(1)?;
            if let (true, Some(record)) = (
                wanted.contains(&&name),
                records.get_mut(&row.try_get::<i64, _>(0)?),
            ) {
                record.insert(name, Json::from(row.try_get::<String, _>(2)?));
            }
        }
        Ok(())
    }
}

/// Numbers and names in one filter: the databases bound the parameters of a statement.
const MAX_LISTED: usize = 10_000;

fn value(row: &AnyRow, index: usize, from: From) -> Result<Json, sqlx::Error> {
    Ok(match from {
        From::Int(_) => Json::from(row.try_get::<Option<i64>, _>(index)?),
        From::Bool(_) => Json::from(row.try_get::<i64, _>(index)? != 0),
        From::Double(_) => Json::from(row.try_get::<Option<f64>, _>(index)?),
        _ => Json::from(row.try_get::<Option<String>, _>(index)?),
    })
}

/// A fault, or an error that a transaction may be run again for.
#[derive(Debug)]
pub(super) enum GetError {
    Fault(Fault),
    Error(Error),
}

impl std::convert::From<Fault> for GetError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl std::convert::From<sqlx::Error> for GetError {
    fn from(error: sqlx::Error) -> Self {
        Self::Error(error.into())
    }
}
