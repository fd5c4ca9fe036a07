//! What is to be done so that the node runs what its authority wants. Pure: the whole set of wanted slivers
//! and the node manager's list in, actions out. Nothing is kept between two runs: what the service has to
//! know of a sliver is written into the sliver's own rspec ([`Tag`]), so that a restart loses nothing.
//!
//! ```text
//!   wanted, not there, or there for another slice of that name ──► Destroy (of the other), Create
//!   wanted, there, something is different                      ──► Update: a further pool; stop, start
//!   not wanted, or expired, there, made by this service        ──► Destroy
//! ```

use std::collections::{BTreeMap, BTreeSet};

use mandoline_api::authority::{DesiredSliver, Instantiation};
use mandoline_api::nodemgr::{FailureClass, SliverInfo, SliverState};
use mandoline_rspec::{KVM_MICROVM, Kind, Rcap, Rspec, RspecError, Value, attribute};
use serde::{Deserialize, Serialize};

/// The attribute of a sliver's rspec that carries this service's [`Tag`].
pub const TAG: &str = "x-scs";

/// Attributes whose names start so belong to the authority alone and do not reach the node manager.
pub const AUTHORITY_PREFIX: &str = "x-authority-";

/// What this service notes in a sliver's rspec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tag {
    /// The slice's name at the authority.
    pub slice: String,
    /// The slice's uuid: a slice made anew under an old name has another.
    pub id: String,
    /// When the slice ends, Unix seconds.
    pub expires: i64,
    /// Whether the sliver was last told to run.
    pub enabled: bool,
    /// Rises with every update, which makes the update's idempotency key its own.
    pub rev: u64,
    /// The wanted rspec that has been put into effect.
    pub applied: Rspec,
}

impl Tag {
    /// The tag of a sliver, if this service made it.
    pub fn of(rspec: &Rspec) -> Option<Self> {
        match rspec.get(TAG) {
            Some(Value::Foreign(json)) => serde_json::from_value(json.clone()).ok(),
            _ => None,
        }
    }

    fn write(&self, rspec: &mut Rspec) -> Result<(), RspecError> {
        // A map of plain values always has a JSON form.
        let json = serde_json::to_value(self).unwrap_or_default();
        rspec.set_json(TAG, &json)
    }
}

/// Something to do, in the node manager's terms.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Split this off the service's pool and bind it.
    Create {
        /// The slice.
        slice: SliceRef,
        /// The sliver's rspec, tag and all.
        rspec: Rspec,
    },
    /// Split this off, bind it to the sliver that is there, then stop or start it.
    Update {
        /// The slice.
        slice: SliceRef,
        /// The sliver.
        rcap: Rcap,
        /// What is added or replaced.
        more: Rspec,
        /// What is done to the machine beside it.
        power: Option<Power>,
    },
    /// Take it away.
    Destroy {
        /// The slice.
        slice: SliceRef,
        /// The sliver.
        rcap: Rcap,
        /// For the log.
        why: &'static str,
    },
}

/// Which slice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SliceRef {
    /// Its name at the authority.
    pub name: String,
    /// Its uuid.
    pub id: String,
}

/// What to do to a sliver's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Let it run.
    Start,
    /// Stop it, keep its disk.
    Stop,
}

/// Why a wanted sliver is not what was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The slice.
    pub slice: SliceRef,
    /// For people.
    pub reason: String,
    /// What can be done about it.
    pub class: FailureClass,
    /// The state of the sliver that is there; none is `failed`.
    pub state: Option<SliverState>,
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// In this order: what goes makes room for what comes.
    pub actions: Vec<Action>,
    /// What cannot be done at all.
    pub failures: Vec<Failure>,
    /// When the next sliver expires, Unix seconds.
    pub next_expiry: Option<i64>,
}

/// Compares what is wanted with what is there.
pub fn plan(desired: &[DesiredSliver], have: &[SliverInfo], now: i64) -> Plan {
    let mut out = Plan::default();
    let mut creates = Vec::new();
    let ours: BTreeMap<String, (Tag, &SliverInfo)> = have
        .iter()
        .filter(|sliver| sliver.event.state != SliverState::Gone)
        .filter_map(|sliver| Tag::of(&sliver.rspec).map(|tag| (tag.slice.clone(), (tag, sliver))))
        .collect();
    // Whoever else makes slivers of a slice from this pool keeps them: only `not-instantiated` takes away.
    let mut kept = BTreeSet::new();

    for want in desired {
        let elsewhere = matches!(
            want.instantiation,
            Instantiation::Delegated | Instantiation::NmController
        );
        if want.expires <= now || want.instantiation == Instantiation::NotInstantiated {
            continue;
        }
        if elsewhere {
            kept.insert(want.slice.as_str());
            continue;
        }
        let slice = SliceRef {
            name: want.slice.clone(),
            id: want.slice_id.clone(),
        };
        let there = ours.get(&want.slice).filter(|(tag, _)| tag.id == want.slice_id);
        out.next_expiry = Some(
            out.next_expiry
                .map_or(want.expires, |next| next.min(want.expires)),
        );
        if there.is_some() {
            kept.insert(want.slice.as_str());
        }
        let rspec = match resources(want) {
            Ok(rspec) => rspec,
            Err(error) => {
                let state = there.map(|(_, sliver)| sliver.event.state);
                let class = if state.is_some() {
                    FailureClass::Continuable
                } else {
                    FailureClass::Fatal
                };
                out.failures.push(Failure {
                    slice,
                    reason: error.to_string(),
                    class,
                    state,
                });
                continue;
            }
        };
        match there {
            None if !want.enabled => {}
            None => match create(want, rspec) {
                Ok(rspec) => creates.push(Action::Create { slice, rspec }),
                Err(error) => {
                    let (reason, class) = (error.to_string(), FailureClass::Fatal);
                    out.failures.push(Failure {
                        slice,
                        reason,
                        class,
                        state: None,
                    });
                }
            },
            Some((tag, sliver)) => update(want, slice, rspec, tag, sliver, &mut out),
        }
    }

    for (name, (tag, sliver)) in &ours {
        if !kept.contains(name.as_str()) {
            let why = match desired.iter().find(|want| want.slice == *name) {
                None => "the authority does not want it",
                Some(want) if want.slice_id != tag.id => "it belongs to a deleted slice of that name",
                Some(want) if want.expires <= now => "its slice has expired",
                Some(_) => "its slice is not to be instantiated",
            };
            // What goes comes first: it gives back what the new ones may need.
            out.actions.insert(0, destroy(tag, sliver, why));
        }
    }
    out.actions.extend(creates);
    out
}

/// What has expired, by the slivers' own tags: what is done while the authority cannot be asked.
pub fn expired(have: &[SliverInfo], now: i64) -> Plan {
    let mut out = Plan::default();
    for sliver in have
        .iter()
        .filter(|sliver| sliver.event.state != SliverState::Gone)
    {
        let Some(tag) = Tag::of(&sliver.rspec) else {
            continue;
        };
        if tag.expires <= now {
            out.actions.push(destroy(&tag, sliver, "its slice has expired"));
        } else {
            out.next_expiry = Some(out.next_expiry.map_or(tag.expires, |next| next.min(tag.expires)));
        }
    }
    out
}

fn destroy(tag: &Tag, sliver: &SliverInfo, why: &'static str) -> Action {
    let slice = SliceRef {
        name: tag.slice.clone(),
        id: tag.id.clone(),
    };
    Action::Destroy {
        slice,
        rcap: sliver.rcap.clone(),
        why,
    }
}

/// The wanted rspec without what is the authority's own; without `keys` and `initscript`, which come beside it.
fn resources(want: &DesiredSliver) -> Result<Rspec, RspecError> {
    let mut rspec = Rspec::new();
    for (name, json) in &want.rspec {
        if !name.starts_with(AUTHORITY_PREFIX) && name != TAG {
            rspec.set_json(name, json)?;
        }
    }
    rspec.remove("keys");
    rspec.remove("initscript");
    if rspec.vm_type().is_none() {
        rspec.set_json("vm_type", &KVM_MICROVM.into())?;
    }
    Ok(rspec)
}

fn create(want: &DesiredSliver, resources: Rspec) -> Result<Rspec, RspecError> {
    let mut rspec = resources.clone();
    rspec.set_json("keys", &want.keys.clone().into())?;
    if let Some(script) = &want.initscript {
        rspec.set_json("initscript", &script.as_str().into())?;
    }
    let tag = Tag {
        slice: want.slice.clone(),
        id: want.slice_id.clone(),
        expires: want.expires,
        enabled: true,
        rev: 0,
        applied: resources,
    };
    tag.write(&mut rspec)?;
    Ok(rspec)
}

fn update(
    want: &DesiredSliver,
    slice: SliceRef,
    resources: Rspec,
    tag: &Tag,
    sliver: &SliverInfo,
    out: &mut Plan,
) {
    let mut more = Rspec::new();
    let mut applied = tag.applied.clone();
    let mut unmet = Vec::new();
    for (name, value) in resources
        .iter()
        .filter(|(name, value)| tag.applied.get(name) != Some(value))
    {
        match difference(name, value, tag, sliver, &mut more) {
            Ok(()) => {
                // The value has been read from JSON before, so it can be again.
                let _ = applied.set_json(name, &value.to_json());
            }
            Err(reason) => unmet.push(reason),
        }
    }
    let mut label = |name: &str, json: serde_json::Value| {
        if let Err(error) = more.set_json(name, &json) {
            unmet.push(error.to_string());
        }
    };
    if sliver.rspec.keys() != want.keys.as_slice() {
        label("keys", want.keys.clone().into());
    }
    if let Some(script) = &want.initscript
        && sliver.rspec.text("initscript") != Some(script)
    {
        label("initscript", script.as_str().into());
    }
    let power = match (tag.enabled, want.enabled) {
        (true, false) => Some(Power::Stop),
        (false, true) => Some(Power::Start),
        _ => None,
    };
    if !unmet.is_empty() {
        let (reason, class) = (unmet.join("; "), FailureClass::Continuable);
        out.failures.push(Failure {
            slice: slice.clone(),
            reason,
            class,
            state: Some(sliver.event.state),
        });
    }
    if more.is_empty() && power.is_none() && tag.expires == want.expires {
        return;
    }
    let tag = Tag {
        expires: want.expires,
        enabled: want.enabled,
        rev: tag.rev + 1,
        applied,
        ..tag.clone()
    };
    match tag.write(&mut more) {
        Ok(()) => out.actions.push(Action::Update {
            slice,
            rcap: sliver.rcap.clone(),
            more,
            power,
        }),
        Err(error) => tracing::error!(slice = slice.name, %error, "cannot note an update"),
    }
}

/// Puts into `more` what brings attribute `name` to `value`, or says why a further pool cannot do that.
fn difference(
    name: &str,
    value: &Value,
    tag: &Tag,
    sliver: &SliverInfo,
    more: &mut Rspec,
) -> Result<(), String> {
    let set =
        |more: &mut Rspec, json: &serde_json::Value| more.set_json(name, json).map_err(|e| e.to_string());
    let fixed = || {
        let was = tag
            .applied
            .get(name)
            .map_or("none".into(), |value| value.to_json().to_string());
        Err(format!(
            "{name} is {was} and cannot become {} while the sliver lives: delete it and make it again",
            value.to_json()
        ))
    };
    let Some(row) = attribute(name) else {
        return set(more, &value.to_json());
    };
    match row.kind {
        Kind::Label if name == "vm_type" => fixed(),
        Kind::Label => set(more, &value.to_json()),
        Kind::Reservation | Kind::Limit | Kind::Weight => {
            let old = tag.applied.number(name).or_else(|| sliver.rspec.number(name));
            match (value.as_number(), old) {
                (Some(new), Some(old)) if new > old => set(more, &(new - old).into()),
                (Some(new), Some(old)) if new == old => Ok(()),
                (Some(new), None) if row.kind == Kind::Reservation => set(more, &new.into()),
                // Pools are added to a sliver and never taken from it.
                _ => fixed(),
            }
        }
        Kind::Set => {
            let Value::Ports(ports) = value else {
                return fixed();
            };
            let (mut new, mut lost) = (ports.clone(), tag.applied.ports());
            new.subtract(&tag.applied.ports());
            lost.subtract(ports);
            if lost.is_empty() {
                set(more, &new.items().into())
            } else {
                fixed()
            }
        }
        Kind::Interval => fixed(),
    }
}
