//! Tables that services of the node publish as sensors: the slice creation service its list of nodes. Kept on
//! disk, so that a node without its authority still knows them after a reboot.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::table::SENSORS;

/// Largest table, in bytes: a hundred thousand nodes fit.
pub const TABLE_MAX: usize = 4 << 20;
/// Most tables.
const TABLES_MAX: usize = 16;

/// Why a table is not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Its name cannot be a sensor's.
    #[error(
        "a sensor cannot be called {0:?}; allowed: up to 32 of a-z, 0-9 and _, and no name of the node manager's own"
    )]
    Name(String),
    /// There are too many.
    #[error("{TABLES_MAX} sensors are published already")]
    Full,
    /// It is no table.
    #[error(
        "line {line}: {what}; allowed: first the columns' names, then as many values in each line, without quotes"
    )]
    Table {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// It cannot be kept.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// The published tables.
#[derive(Debug)]
pub struct Published {
    directory: PathBuf,
    tables: Mutex<BTreeMap<String, Table>>,
}

impl Published {
    /// The tables that are kept in a directory. What cannot be read is left out: it will be published again.
    pub fn open(directory: &Path) -> Self {
        let mut tables = BTreeMap::new();
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("");
            if path.extension().is_none_or(|extension| extension != "csv") || !may_be_called(name) {
                continue;
            }
            match fs::read_to_string(&path)
                .map_err(|e| e.to_string())
                .and_then(|text| parse(&text).map_err(|e| e.to_string()))
            {
                Ok(table) => drop(tables.insert(name.to_owned(), table)),
                Err(error) => tracing::warn!(path = %path.display(), error, "published sensor left out"),
            }
        }
        Self {
            directory: directory.to_owned(),
            tables: Mutex::new(tables),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a table under a name, in place of what was there. On disk before this returns.
    pub fn publish(&self, name: &str, text: &str) -> Result<(), PublishError> {
        if !may_be_called(name) {
            return Err(PublishError::Name(name.chars().take(64).collect()));
        }
        let table = parse(text)?;
        let mut tables = self.lock();
        match tables.get(name) {
            Some(old) if *old == table => return Ok(()),
            None if tables.len() >= TABLES_MAX => return Err(PublishError::Full),
            _ => {}
        }
        let path = self.directory.join(format!("{name}.csv"));
        let keep = || -> io::Result<()> {
            fs::create_dir_all(&self.directory)?;
            let temporary = path.with_extension("new");
            fs::write(&temporary, text)?;
            fs::File::open(&temporary)?.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.directory)?.sync_all()
        };
        keep().map_err(|source| PublishError::File {
            path: path.clone(),
            source,
        })?;
        tables.insert(name.to_owned(), table);
        Ok(())
    }

    /// The names of the tables, each with its columns.
    pub fn names(&self) -> Vec<(String, Vec<String>)> {
        let tables = self.lock();
        let each = tables
            .iter()
            .map(|(name, table)| (name.clone(), table.columns.clone()));
        each.collect()
    }

    /// A table: its columns, its rows.
    pub(super) fn get(&self, name: &str) -> Option<(Vec<String>, Vec<Vec<String>>)> {
        let tables = self.lock();
        tables
            .get(name)
            .map(|table| (table.columns.clone(), table.rows.clone()))
    }
}

fn may_be_called(name: &str) -> bool {
    let letters = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    let own = SENSORS.iter().any(|sensor| sensor.name == name) || name == "metrics";
    (1..=32).contains(&name.len()) && name.bytes().all(letters) && !own
}

fn parse(text: &str) -> Result<Table, PublishError> {
    let refuse = |line, what: String| Err(PublishError::Table { line, what });
    let mut lines = text.lines().enumerate();
    let Some((_, first)) = lines.next() else {
        return refuse(1, "nothing is there".to_owned());
    };
    let columns: Vec<String> = first.split(',').map(str::to_owned).collect();
    if columns
        .iter()
        .any(|name| name.is_empty() || name.contains(['/', '"']))
    {
        return refuse(1, format!("{first:?} does not name columns"));
    }
    let mut rows = Vec::new();
    for (number, line) in lines {
        let row: Vec<String> = line.split(',').map(str::to_owned).collect();
        if row.len() != columns.len() || line.contains('"') {
            return refuse(number + 1, format!("{line:?} has not {} values", columns.len()));
        }
        rows.push(row);
    }
    Ok(Table { columns, rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_outlives_its_publisher() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("sensors");
        let published = Published::open(&place);
        published
            .publish("nodes", "ip,name\n192.0.2.1,n1.example.org\n")
            .unwrap();
        published
            .publish("nodes", "ip,name\n192.0.2.2,n2.example.org\n")
            .unwrap();
        let again = Published::open(&place);
        let (columns, rows) = again.get("nodes").unwrap();
        assert_eq!(columns, ["ip", "name"]);
        assert_eq!(rows, [["192.0.2.2", "n2.example.org"]]);
        assert_eq!(again.names().len(), 1);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let published = Published::open(dir.path());
        for (name, text, word) in [
            ("load", "a\n", "own"),
            ("../x", "a\n", "a-z"),
            ("", "a\n", "a-z"),
            ("nodes", "", "line 1"),
            ("nodes", "ip,name\n1\n", "line 2"),
            ("nodes", "ip,name\n1,\"2\"\n", "line 2"),
            ("nodes", "ip,\n", "does not name"),
        ] {
            let error = published.publish(name, text).unwrap_err().to_string();
            assert!(error.contains(word), "{name} {text:?}: {error}");
        }
        for number in 0..TABLES_MAX {
            published.publish(&format!("t{number}"), "a\n").unwrap();
        }
        assert!(matches!(
            published.publish("late", "a\n"),
            Err(PublishError::Full)
        ));
    }
}
