//! Durable state: one redb file. A change is on disk, together with the answer that a retry of its request
//! must get, before anybody hears of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mandoline_api::nodemgr::VmId;
use mandoline_rspec::Rspec;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::net::Spent;
use crate::policy::Policy;
use crate::state::{Delta, Pool, PoolId, Sliver, State};

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const POOLS: TableDefinition<u64, &[u8]> = TableDefinition::new("pools");
const SLIVERS: TableDefinition<u32, &[u8]> = TableDefinition::new("slivers");
const ANSWERS: TableDefinition<&str, &[u8]> = TableDefinition::new("answers");
const OWNER: TableDefinition<&str, &[u8]> = TableDefinition::new("owner");
/// What slices have sent in their days, by name.
const SPENT: TableDefinition<&str, &[u8]> = TableDefinition::new("spent");

/// Layout of the file; another one is refused rather than misread.
const FORMAT: u64 = 1;
/// How long the answer to an idempotency key is kept, in ns.
pub const ANSWER_LIFE_NS: u64 = 24 * 3600 * 1_000_000_000;
/// How many answers are kept at most; the oldest go first.
pub const ANSWERS_MAX: usize = 20_000;

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed.
    #[error("state {}: {message}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What happened.
        message: String,
    },
    /// The file is of another version.
    #[error("state {} has format {found}; allowed: {FORMAT}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// A record cannot be read.
    #[error("state {}: {table} {key} cannot be read: {message}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Which table.
        table: &'static str,
        /// Which record.
        key: String,
        /// What is wrong.
        message: String,
    },
}

/// What a repeated request gets. An rcap is not kept, only what it is derived from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The rcap of this pool in this epoch.
    Rcap {
        /// The pool.
        pool: PoolId,
        /// Its epoch then.
        epoch: u32,
    },
    /// A VM.
    Vm {
        /// Its id.
        vm_id: VmId,
    },
    /// The rcaps of these pools, each with its epoch then.
    Rcaps {
        /// Pool and epoch.
        pools: Vec<(PoolId, u32)>,
    },
    /// It is done.
    Done,
}

/// A stored answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredAnswer {
    /// SHA-256 of operation and request, in hexadecimal.
    pub request: String,
    /// The answer.
    pub outcome: Outcome,
    /// When it was stored, ns since 1970.
    pub unix_ns: u64,
}

/// The state file.
pub struct Store {
    path: PathBuf,
    database: Database,
}

/// All that a store holds.
pub struct Loaded {
    /// Pools and slivers.
    pub state: State,
    /// Answers by caller and key.
    pub answers: BTreeMap<String, StoredAnswer>,
    /// How often the node manager was started with this file, this time included.
    pub starts: u64,
}

impl Store {
    /// Opens the file, or makes it, and reads all of it.
    pub fn open(path: &Path, capacity: Rspec, now_ns: u64) -> Result<(Self, Loaded), StoreError> {
        let failed = |error: &dyn std::fmt::Display| StoreError::Database {
            path: path.to_owned(),
            message: error.to_string(),
        };
        let database = Database::create(path).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                failed(&"another process has it open: is a node manager running already?")
            }
            error => failed(&error),
        })?;
        let store = Self {
            path: path.to_owned(),
            database,
        };
        let starts = store.prepare(now_ns)?;
        let loaded = store.load(capacity, starts)?;
        Ok((store, loaded))
    }

    /// Makes the tables, counts the start and forgets answers that are too old.
    fn prepare(&self, now_ns: u64) -> Result<u64, StoreError> {
        let transaction = self.database.begin_write().map_err(|e| self.failed(e))?;
        let starts;
        {
            let mut meta = transaction.open_table(META).map_err(|e| self.failed(e))?;
            transaction.open_table(POOLS).map_err(|e| self.failed(e))?;
            transaction.open_table(SLIVERS).map_err(|e| self.failed(e))?;
            transaction.open_table(OWNER).map_err(|e| self.failed(e))?;
            let get = |key| Ok(meta.get(key).map_err(|e| self.failed(e))?.map(|v| v.value()));
            let format: Option<u64> = get("format")?;
            if let Some(found) = format.filter(|found| *found != FORMAT) {
                return Err(StoreError::Format {
                    path: self.path.clone(),
                    found,
                });
            }
            starts = get("starts")?.unwrap_or(0) + 1;
            meta.insert("format", FORMAT).map_err(|e| self.failed(e))?;
            meta.insert("starts", starts).map_err(|e| self.failed(e))?;

            let mut answers = transaction.open_table(ANSWERS).map_err(|e| self.failed(e))?;
            let fresh = |bytes: &[u8]| {
                serde_json::from_slice::<StoredAnswer>(bytes)
                    .is_ok_and(|answer| now_ns.saturating_sub(answer.unix_ns) < ANSWER_LIFE_NS)
            };
            answers
                .retain(|_, value| fresh(value))
                .map_err(|e| self.failed(e))?;
        }
        transaction.commit().map_err(|e| self.failed(e))?;
        Ok(starts)
    }

    fn load(&self, capacity: Rspec, starts: u64) -> Result<Loaded, StoreError> {
        let transaction = self.database.begin_read().map_err(|e| self.failed(e))?;
        let meta = transaction.open_table(META).map_err(|e| self.failed(e))?;
        let get = |key| {
            Ok(meta
                .get(key)
                .map_err(|e| self.failed(e))?
                .map_or(0, |v| v.value()))
        };
        let next_pool = get("next_pool")?;
        let next_vm = get("next_vm")?;

        let mut pools: Vec<Pool> = Vec::new();
        let table = transaction.open_table(POOLS).map_err(|e| self.failed(e))?;
        for row in table.iter().map_err(|e| self.failed(e))? {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            pools.push(self.record("pool", key.value(), value.value())?);
        }
        let mut slivers: Vec<Sliver> = Vec::new();
        let table = transaction.open_table(SLIVERS).map_err(|e| self.failed(e))?;
        for row in table.iter().map_err(|e| self.failed(e))? {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            slivers.push(self.record("sliver", key.value(), value.value())?);
        }
        let mut answers = BTreeMap::new();
        let table = transaction.open_table(ANSWERS).map_err(|e| self.failed(e))?;
        for row in table.iter().map_err(|e| self.failed(e))? {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            answers.insert(
                key.value().to_owned(),
                self.record("answer", key.value(), value.value())?,
            );
        }
        let table = transaction.open_table(OWNER).map_err(|e| self.failed(e))?;
        let policy: Policy = match table.get("policy").map_err(|e| self.failed(e))? {
            Some(value) => self.record("owner", "policy", value.value())?,
            None => Policy::default(),
        };
        let next_vm = u32::try_from(next_vm).unwrap_or(u32::MAX);
        Ok(Loaded {
            state: State::new(capacity, policy, pools, slivers, (next_pool, next_vm)),
            answers,
            starts,
        })
    }

    fn record<T: DeserializeOwned>(
        &self,
        table: &'static str,
        key: impl ToString,
        value: &[u8],
    ) -> Result<T, StoreError> {
        serde_json::from_slice(value).map_err(|error| StoreError::Record {
            path: self.path.clone(),
            table,
            key: key.to_string(),
            message: error.to_string(),
        })
    }

    /// Writes a change and the answer that goes with it, and returns when both are on the disk.
    pub fn commit(
        &self,
        delta: &Delta,
        answer: Option<(&str, &StoredAnswer)>,
        forget: &[String],
    ) -> Result<(), StoreError> {
        let encode = |value: &dyn erased::Encode| value.encode().map_err(|e| self.failed(e));
        let transaction = self.database.begin_write().map_err(|e| self.failed(e))?;
        {
            let mut table = transaction.open_table(POOLS).map_err(|e| self.failed(e))?;
            for (id, pool) in &delta.pools {
                match pool {
                    Some(pool) => drop(table.insert(*id, &*encode(pool)?).map_err(|e| self.failed(e))?),
                    None => drop(table.remove(*id).map_err(|e| self.failed(e))?),
                }
            }
            let mut table = transaction.open_table(SLIVERS).map_err(|e| self.failed(e))?;
            for (id, sliver) in &delta.slivers {
                match sliver {
                    Some(sliver) => drop(table.insert(*id, &*encode(sliver)?).map_err(|e| self.failed(e))?),
                    None => drop(table.remove(*id).map_err(|e| self.failed(e))?),
                }
            }
            if let Some(policy) = &delta.policy {
                let mut table = transaction.open_table(OWNER).map_err(|e| self.failed(e))?;
                table
                    .insert("policy", &*encode(policy)?)
                    .map_err(|e| self.failed(e))?;
            }
            let mut table = transaction.open_table(ANSWERS).map_err(|e| self.failed(e))?;
            for key in forget {
                table.remove(key.as_str()).map_err(|e| self.failed(e))?;
            }
            if let Some((key, answer)) = answer {
                table.insert(key, &*encode(answer)?).map_err(|e| self.failed(e))?;
            }
            let mut meta = transaction.open_table(META).map_err(|e| self.failed(e))?;
            meta.insert("next_pool", delta.next_pool)
                .map_err(|e| self.failed(e))?;
            meta.insert("next_vm", u64::from(delta.next_vm))
                .map_err(|e| self.failed(e))?;
        }
        // redb's default durability: synced when this returns.
        transaction.commit().map_err(|e| self.failed(e))
    }

    /// What slices have sent in their days, as it was last kept.
    pub fn spent(&self) -> Result<BTreeMap<String, Spent>, StoreError> {
        let transaction = self.database.begin_read().map_err(|e| self.failed(e))?;
        let table = match transaction.open_table(SPENT) {
            Ok(table) => table,
            // Nothing was ever kept: a new node, or one of an earlier version.
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
            Err(error) => return Err(self.failed(error)),
        };
        let mut spent = BTreeMap::new();
        for row in table.iter().map_err(|e| self.failed(e))? {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            let slice = key.value().to_owned();
            let record = self.record("spent", &slice, value.value())?;
            spent.insert(slice, record);
        }
        Ok(spent)
    }

    /// Keeps what slices have sent; none for one of which nothing is kept.
    pub fn keep_spent(&self, changes: &BTreeMap<String, Option<Spent>>) -> Result<(), StoreError> {
        let transaction = self.database.begin_write().map_err(|e| self.failed(e))?;
        {
            let mut table = transaction.open_table(SPENT).map_err(|e| self.failed(e))?;
            for (slice, spent) in changes {
                match spent {
                    Some(spent) => {
                        let record = serde_json::to_vec(spent).map_err(|e| self.failed(e))?;
                        table
                            .insert(slice.as_str(), &*record)
                            .map_err(|e| self.failed(e))?;
                    }
                    None => drop(table.remove(slice.as_str()).map_err(|e| self.failed(e))?),
                }
            }
        }
        transaction.commit().map_err(|e| self.failed(e))
    }

    fn failed(&self, error: impl std::fmt::Display) -> StoreError {
        StoreError::Database {
            path: self.path.clone(),
            message: error.to_string(),
        }
    }
}

mod erased {
    /// What can be written as JSON.
    pub(super) trait Encode {
        fn encode(&self) -> serde_json::Result<Vec<u8>>;
    }

    impl<T: serde::Serialize> Encode for T {
        fn encode(&self) -> serde_json::Result<Vec<u8>> {
            serde_json::to_vec(self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_node_has_sent_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(&dir.path().join("nodemgr.redb"), Rspec::new(), 0).unwrap();
        assert!(store.spent().unwrap().is_empty());
    }
}
