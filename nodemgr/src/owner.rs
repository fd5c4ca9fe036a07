//! The owner's script: the root pools that the owner wants, applied as one transaction at each boot.
//!
//! `owner.json` is a list of `{"slice": "pl_conf", "rspec": {…}}`. A pool is matched by (slice, ordinal): the
//! second entry for a slice is its second pool. Unchanged ones keep rcap and bindings, changed ones resize,
//! missing ones retire. If one entry cannot be had, nothing changes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mandoline_api::nodemgr::{ErrorBody, ErrorKind};
use mandoline_rspec::{Rspec, SliceId};

use crate::ops::{Op, OpResult, Rules};
use crate::state::Origin;

/// One root pool that the owner wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The slice that gets it.
    pub slice: SliceId,
    /// What it holds.
    pub rspec: Rspec,
}

/// Why the script cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The file cannot be read.
    #[error("owner's script {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("owner's script {}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// Reads the script. No file means that the owner wants nothing to change.
pub fn read(path: &Path, rules: &Rules) -> Result<Option<Vec<Entry>>, ScriptError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(ScriptError::File {
                path: path.to_owned(),
                source,
            });
        }
    };
    parse(&text, rules)
        .map(Some)
        .map_err(|message| ScriptError::Content {
            path: path.to_owned(),
            message,
        })
}

fn parse(text: &str, rules: &Rules) -> Result<Vec<Entry>, String> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        slice: String,
        rspec: serde_json::Value,
    }
    let list: Vec<Raw> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let entry = |(i, raw): (usize, Raw)| {
        let rspec = Rspec::from_json(&raw.rspec).map_err(|e| format!("entry {i}: {e}"))?;
        let slice = rules.slice(&raw.slice).map_err(|e| format!("entry {i}: {e}"))?;
        Ok(Entry { slice, rspec })
    };
    list.into_iter().enumerate().map(entry).collect()
}

/// Brings the script's root pools to what it says.
pub fn apply(op: &mut Op<'_>, entries: &[Entry]) -> OpResult<()> {
    let mut ordinals: BTreeMap<&SliceId, u32> = BTreeMap::new();
    let mut wanted = Vec::new();
    for entry in entries {
        let ordinal = ordinals.entry(&entry.slice).or_default();
        wanted.push((entry, *ordinal));
        *ordinal += 1;
    }
    retire(op, &wanted);
    // What shrinks comes first, so that one pool can grow by what another gives up.
    let mut later = Vec::new();
    for (entry, ordinal) in wanted {
        let found = op
            .change
            .all_pools()
            .find(|pool| pool.origin == Origin::Script(ordinal) && pool.holder == entry.slice)
            .cloned();
        match found {
            Some(mut pool) if pool.granted == entry.rspec => {
                if pool.retired {
                    pool.retired = false;
                    op.change.put_pool(pool);
                }
            }
            Some(pool) => {
                if resize(op, entry, ordinal).is_err() {
                    later.push((entry, ordinal, true));
                } else {
                    tracing::info!(slice = %entry.slice, ordinal, pool = pool.id, "root pool resized");
                }
            }
            None => later.push((entry, ordinal, false)),
        }
    }
    for (entry, ordinal, exists) in later {
        let result = match exists {
            true => resize(op, entry, ordinal),
            false => op
                .new_root_pool(&entry.rspec, entry.slice.clone(), Origin::Script(ordinal))
                .map(drop),
        };
        result.map_err(|mut error| {
            error.message = format!("root pool {ordinal} of slice {}: {}", entry.slice, error.message);
            error
        })?;
    }
    Ok(())
}

fn retire(op: &mut Op<'_>, wanted: &[(&Entry, u32)]) {
    let keep: BTreeSet<(&SliceId, u32)> = wanted.iter().map(|(entry, n)| (&entry.slice, *n)).collect();
    let missing: Vec<_> = op
        .change
        .all_pools()
        .filter(|pool| matches!(pool.origin, Origin::Script(n) if !keep.contains(&(&pool.holder, n))))
        .cloned()
        .collect();
    for mut pool in missing {
        if pool.bound.is_none() && op.change.children(pool.id).next().is_none() {
            op.change.remove_pool(pool.id);
        } else if !pool.retired {
            pool.retired = true;
            op.change.put_pool(pool);
        }
    }
}

/// Gives a root pool another size: what is split from it must still fit, and the node must have it.
fn resize(op: &mut Op<'_>, entry: &Entry, ordinal: u32) -> OpResult<()> {
    let found = op
        .change
        .all_pools()
        .find(|pool| pool.origin == Origin::Script(ordinal) && pool.holder == entry.slice)
        .cloned();
    let Some(mut pool) = found else {
        return Err(ErrorBody::new(ErrorKind::NotFound, "the root pool is gone"));
    };
    op.change.node_rest(Some(pool.id)).split(&entry.rspec)?;
    let mut rest = entry.rspec.clone();
    for child in op.change.children(pool.id) {
        // Limits may shrink below a child's: they are then bounded from above. Reservations may not.
        let mut reserved = child.granted.clone();
        for attribute in mandoline_rspec::ATTRIBUTES {
            use mandoline_rspec::Kind::{Reservation, Set};
            if !matches!(attribute.kind, Reservation | Set) {
                reserved.remove(attribute.name);
            }
        }
        rest.split(&reserved)?;
    }
    pool.granted = entry.rspec.clone();
    pool.retired = false;
    op.change.put_pool(pool);
    Ok(())
}
