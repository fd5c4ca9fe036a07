//! The owner's script: the root pools that the owner wants, applied as one transaction at each boot, and
//! whenever it comes over the owner's socket.
//!
//! It is written in JSON (a list of pools, or an [`OwnerScript`]), or as the architecture paper has it
//! (section 5.2.3), see [`language`]. A pool is matched by (slice, ordinal): the second entry for a slice is
//! its second pool. Unchanged ones keep rcap and bindings, changed ones resize, missing ones retire. If one
//! entry cannot be had, nothing changes.

pub(crate) mod language;
pub(crate) mod percent;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mandoline_api::nodemgr::{ErrorBody, ErrorKind, OwnerScript};
use mandoline_rspec::SliceId;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use crate::ops::{Op, OpResult, Rules};
use crate::policy::Policy;
use crate::state::{Origin, Pool, PoolId};

/// One root pool that the owner wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The slice that gets it.
    pub slice: SliceId,
    /// What it holds, perhaps in per cent of the node.
    pub rspec: Json,
    /// The slice that it is bound to at once.
    pub bind: Option<SliceId>,
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

/// The script to apply at the start: the one that came over the owner's socket, until the file changes. No
/// file means that the owner wants nothing to change.
pub fn at_start(path: &Path, policy: &Policy) -> Result<Option<OwnerScript>, ScriptError> {
    match &policy.posted {
        Some(posted) if posted.file == digest(path) => Ok(Some(posted.script.clone())),
        _ => read(path),
    }
}

fn read(path: &Path) -> Result<Option<OwnerScript>, ScriptError> {
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
    let content = |message: serde_json::Error| ScriptError::Content {
        path: path.to_owned(),
        message: message.to_string(),
    };
    match text.trim_start().chars().next() {
        Some('[') => Ok(Some(OwnerScript {
            pools: Some(serde_json::from_str(&text).map_err(content)?),
            ..OwnerScript::default()
        })),
        Some('{') => serde_json::from_str(&text).map(Some).map_err(content),
        _ => Ok(Some(OwnerScript {
            script: Some(text),
            ..OwnerScript::default()
        })),
    }
}

/// SHA-256 of the script's file, in hexadecimal; empty where there is none.
pub fn digest(path: &Path) -> String {
    std::fs::read(path).map_or_else(|_| String::new(), |bytes| hex::encode(Sha256::digest(bytes)))
}

/// What a script says, its names read.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Its pools, if it says anything of pools.
    pub(crate) pools: Option<Vec<Entry>>,
    /// Its denials, if it says anything of those.
    pub(crate) deny: Option<BTreeMap<String, String>>,
}

impl Plan {
    pub(crate) fn read(script: &OwnerScript, rules: &Rules) -> OpResult<Self> {
        if let Some(text) = &script.script {
            if script.pools.is_some() || script.deny.is_some() {
                return Err(ErrorBody {
                    attribute: Some("script".to_owned()),
                    ..ErrorBody::new(ErrorKind::BadRequest, "a script beside `pools` or `deny`")
                        .allowed("a script, or `pools` and `deny`")
                });
            }
            return language::parse(text, rules);
        }
        let entry = |pool: &mandoline_api::nodemgr::ScriptPool| {
            let slice = rules.slice(&pool.slice)?;
            Ok(Entry {
                bind: pool.bind.then(|| slice.clone()),
                slice,
                rspec: pool.rspec.clone(),
            })
        };
        let pools = script.pools.as_ref();
        Ok(Self {
            pools: pools
                .map(|pools| pools.iter().map(entry).collect::<OpResult<_>>())
                .transpose()?,
            deny: script.deny.clone(),
        })
    }
}

/// Brings the script's root pools to what it says, and gives them in its order. With `retire`, those that it
/// does not name go. The owner's own sliver comes first.
pub(crate) fn apply(op: &mut Op<'_>, entries: &[Entry], retire: bool) -> OpResult<Vec<(PoolId, u32)>> {
    let admin = op.rules.site_admin.clone();
    let admin = admin.filter(|admin| entries.iter().all(|entry| entry.slice != admin.slice));
    let mut ordinals: BTreeMap<&SliceId, u32> = BTreeMap::new();
    let mut wanted = Vec::new();
    for entry in admin.iter().chain(entries) {
        let ordinal = ordinals.entry(&entry.slice).or_default();
        wanted.push((entry, *ordinal));
        *ordinal += 1;
    }
    if retire {
        retire_missing(op, &wanted);
    }
    // All take their place before anybody asks whether they fit: one may grow by what another gives up.
    for (entry, ordinal) in &wanted {
        place(op, entry, *ordinal).map_err(|error| at(entry, *ordinal, error))?;
    }
    let mut made = Vec::new();
    for (entry, ordinal) in &wanted {
        if let Some(slice) = &entry.bind {
            bind(op, entry, *ordinal, slice).map_err(|error| at(entry, *ordinal, error))?;
        }
        if let Some(pool) = find(op, &entry.slice, *ordinal) {
            made.push((pool.id, pool.epoch));
        }
    }
    Ok(made)
}

fn at(entry: &Entry, ordinal: u32, mut error: ErrorBody) -> ErrorBody {
    error.message = format!("root pool {ordinal} of slice {}: {}", entry.slice, error.message);
    error
}

fn find(op: &Op<'_>, slice: &SliceId, ordinal: u32) -> Option<Pool> {
    op.change
        .all_pools()
        .find(|pool| pool.origin == Origin::Script(ordinal) && pool.holder == *slice)
        .cloned()
}

fn retire_missing(op: &mut Op<'_>, wanted: &[(&Entry, u32)]) {
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

/// Makes one root pool, or brings the one that is there to what the entry says.
fn place(op: &mut Op<'_>, entry: &Entry, ordinal: u32) -> OpResult<()> {
    let (rspec, in_percent) = percent::resolve(&entry.rspec, op.change.capacity())?;
    op.change.capacity().check_within(&rspec)?;
    let written = in_percent.then(|| entry.rspec.clone());
    let id = match find(op, &entry.slice, ordinal) {
        None => op.put_new_pool(Origin::Script(ordinal), entry.slice.clone(), rspec),
        Some(pool) if pool.granted == rspec => pool.id,
        Some(pool) => {
            let id = pool.id;
            op.put_resized(pool, rspec, false)?;
            tracing::info!(slice = %entry.slice, ordinal, pool = id, "root pool resized");
            id
        }
    };
    match op.change.pool(id).cloned() {
        Some(mut pool) if pool.retired || pool.written != written => {
            pool.retired = false;
            pool.written = written;
            op.change.put_pool(pool);
        }
        _ => {}
    }
    Ok(())
}

/// Brings a pool that is in per cent of the node to what those are now.
pub(crate) fn rescale(op: &mut Op<'_>, pool: &Pool) -> OpResult<()> {
    let Some(written) = &pool.written else {
        return Ok(());
    };
    let (rspec, _) = percent::resolve(written, op.change.capacity())?;
    let (slice, id) = (pool.holder.clone(), pool.id);
    op.put_resized(pool.clone(), rspec, false).map_err(|mut error| {
        error.message = format!("root pool {id} of slice {slice}: {}", error.message);
        error
    })
}

/// Binds a pool of the script. A service that runs on the host beside the node manager has no VM to bind to:
/// its pool is set aside, so that nobody else gets it.
fn bind(op: &mut Op<'_>, entry: &Entry, ordinal: u32, slice: &SliceId) -> OpResult<()> {
    let Some(mut pool) = find(op, &entry.slice, ordinal).filter(|pool| pool.bound.is_none()) else {
        return Ok(());
    };
    let names_type = pool.granted.vm_type().is_some() || op.rules.default_vm_types.contains_key(slice);
    if op.change.policy().denial(slice).is_some() {
        // The pool stays unbound while the slice is denied.
        return Ok(());
    }
    let is_service = op.rules.services.grant(slice).is_some();
    pool.set_aside = !names_type && op.change.sliver_of(slice).is_none() && is_service;
    op.change.put_pool(pool.clone());
    match pool.set_aside {
        true => Ok(()),
        false => op.bind_pool(pool, slice.clone()).map(drop),
    }
}
