//! What the owner decides: bounds of the node, who may do what, which slices may not run, the script.

use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind, Grant, OwnerScript};
use mandoline_rspec::{ATTRIBUTES, AuthorityName, Kind, Rspec, RspecError, SliceId};

use super::{Op, OpResult, forbidden};
use crate::caller::Caller;
use crate::owner;
use crate::policy::Policy;
use crate::state::{Pool, Sliver, Wanted};
use crate::store::Outcome;

/// Longest reason of a denial, in bytes.
const REASON_MAX: usize = 1024;

impl Op<'_> {
    /// Refuses what a denied slice may not have, with the owner's reason.
    pub(super) fn check_allowed(&self, slice: &SliceId) -> OpResult<()> {
        match self.change.policy().denial(slice) {
            Some(reason) => Err(ErrorBody {
                attribute: Some("slice_name".to_owned()),
                value: Some(slice.to_string()),
                ..forbidden(format!("the owner of this node denies slice {slice}: {reason}"))
                    .allowed("slices that the owner does not deny")
            }),
            None => Ok(()),
        }
    }

    /// `set_node_limit`: replaces the bounds of the node as a whole. Pools that the owner's script has in per
    /// cent follow; the others must fit.
    pub(super) fn set_node_limit(&mut self, limit: &Rspec) -> OpResult<Outcome> {
        self.needs(Actuator::NodeLimit, "bound the node")?;
        self.limit_node(limit)?;
        self.check_roots_fit()?;
        self.change.touch_changed();
        Ok(Outcome::Done)
    }

    /// Bounds the node and brings the pools that are in per cent of it along; whether all fit is not checked
    /// yet.
    fn limit_node(&mut self, limit: &Rspec) -> OpResult<()> {
        for (name, value) in limit.iter() {
            let kind = mandoline_rspec::attribute(name).map(|attribute| attribute.kind);
            if matches!(kind, None | Some(Kind::Label | Kind::Interval)) {
                return Err(RspecError::Invalid {
                    attribute: name.to_owned(),
                    value: value.to_json().to_string(),
                    problem: "nothing that a node has in all",
                    allowed: "reservations, limits, weights and ports".to_owned(),
                }
                .into());
            }
        }
        let mut policy = self.change.policy().clone();
        policy.node_limit = limit.clone();
        self.change.put_policy(policy);
        let written: Vec<Pool> = self
            .change
            .all_pools()
            .filter(|pool| pool.written.is_some() && !pool.retired)
            .cloned()
            .collect();
        written.iter().try_for_each(|pool| owner::rescale(self, pool))
    }

    /// Refuses root pools that hold more than the node has.
    fn check_roots_fit(&self) -> OpResult<()> {
        let capacity = self.change.capacity();
        let roots = || self.change.all_pools().filter(|pool| pool.parent().is_none());
        for attribute in ATTRIBUTES.iter().filter(|a| a.kind == Kind::Reservation) {
            let held = roots()
                .filter_map(|pool| pool.granted.number(attribute.name))
                .fold(0u64, u64::saturating_add);
            let has = capacity.number(attribute.name).unwrap_or(0);
            if held > has {
                let show = |number| mandoline_rspec::Value::Number(number).display(attribute);
                return Err(exceeds(
                    attribute.name,
                    format!("{} in all root pools together", show(held)),
                    format!("at most {}, what the node has", show(has)),
                ));
            }
        }
        let mut ports = capacity.ports();
        for pool in roots() {
            let own = pool.granted.ports();
            if !ports.contains_all(&own) {
                return Err(exceeds(
                    "ports",
                    format!("{own} in a root pool of slice {}", pool.holder),
                    format!("what the node has beside other root pools: {ports}"),
                ));
            }
            ports.subtract(&own);
        }
        Ok(())
    }

    /// The name of who is denied: a slice's full name, or an authority's.
    fn denied_name(&self, text: &str) -> OpResult<String> {
        if !text.contains('_')
            && text != "pl.conf"
            && let Ok(authority) = AuthorityName::new(text)
        {
            return Ok(authority.to_string());
        }
        self.rules.slice(text).map(|slice| slice.to_string())
    }

    /// `deny`: the slice's sliver is stopped, and nothing is bound or started for it.
    pub(super) fn deny(&mut self, slice: &str, reason: &str) -> OpResult<Outcome> {
        self.needs(Actuator::Deny, "deny slices")?;
        let mut policy = self.change.policy().clone();
        let name = self.denied_name(slice)?;
        policy.denials.insert(name, checked_reason(reason)?);
        self.change.put_policy(policy);
        self.follow_denials();
        Ok(Outcome::Done)
    }

    /// `allow`: takes a denial back; what it stopped runs again.
    pub(super) fn allow(&mut self, slice: &str) -> OpResult<Outcome> {
        self.needs(Actuator::Deny, "allow slices")?;
        let mut policy = self.change.policy().clone();
        let name = self.denied_name(slice)?;
        if policy.denials.remove(&name).is_some() {
            self.change.put_policy(policy);
            self.follow_denials();
        }
        Ok(Outcome::Done)
    }

    /// Stops the slivers that are denied and run, starts again those that only a denial had stopped.
    fn follow_denials(&mut self) {
        let policy = self.change.policy();
        let mut changed: Vec<Sliver> = Vec::new();
        for sliver in self.change.all_slivers() {
            let denial = policy.denial(&sliver.slice);
            let mut sliver = sliver.clone();
            match (denial, sliver.wanted) {
                (Some(reason), Wanted::Running) => {
                    sliver.wanted = Wanted::Stopped;
                    sliver.held = true;
                    sliver.note = Some(format!("denied by the owner: {reason}"));
                }
                (None, Wanted::Stopped) if sliver.held => {
                    sliver.wanted = Wanted::Running;
                    sliver.held = false;
                    sliver.note = None;
                }
                _ => continue,
            }
            changed.push(sliver);
        }
        for sliver in changed {
            self.change.put_sliver(sliver);
        }
    }

    /// `grant`: replaces what a slice is granted. The owner's alone: a grant must not make further ones.
    pub(super) fn grant(&mut self, slice: &str, grant: &Grant) -> OpResult<Outcome> {
        self.owner_only("grant")?;
        let slice = self.rules.slice(slice)?;
        let grant = self.checked_grant(grant)?;
        let mut policy = self.change.policy().clone();
        policy.grants.insert(slice, Some(grant));
        self.change.put_policy(policy);
        Ok(Outcome::Done)
    }

    /// `revoke`: takes away what a slice is granted, by the configuration too.
    pub(super) fn revoke(&mut self, slice: &str) -> OpResult<Outcome> {
        self.owner_only("revoke grants")?;
        let slice = self.rules.slice(slice)?;
        let mut policy = self.change.policy().clone();
        policy.grants.insert(slice, None);
        self.change.put_policy(policy);
        Ok(Outcome::Done)
    }

    fn owner_only(&self, what: &str) -> OpResult<()> {
        match self.caller {
            Caller::Owner => Ok(()),
            caller => {
                Err(forbidden(format!("{caller} may not {what}")).allowed("the owner, on the owner's socket"))
            }
        }
    }

    fn checked_grant(&self, grant: &Grant) -> OpResult<Grant> {
        let unknown = |name: &&String| !self.rules.vm_types.contains_key(*name);
        if let Some(name) = grant.vm_types.iter().flatten().find(unknown) {
            let names: Vec<&str> = self.rules.vm_types.keys().map(String::as_str).collect();
            return Err(ErrorBody {
                attribute: Some("vm_types".to_owned()),
                value: Some(name.clone()),
                ..ErrorBody::new(
                    ErrorKind::UnknownVmType,
                    format!("this node has no vm_type `{name}`"),
                )
                .allowed(names.join(", "))
            });
        }
        let mut grant = grant.clone();
        // A name that the operator maps to a backend stands for it.
        grant.vm_types = grant.vm_types.map(|names| {
            let backends = names.iter().filter_map(|name| self.rules.vm_types.get(name));
            backends.cloned().collect()
        });
        // A bare name in a grant is of the node's authority, as everywhere.
        grant.slices = grant
            .slices
            .iter()
            .map(|slice| self.rules.slice(&slice.to_string()))
            .collect::<OpResult<_>>()?;
        Ok(grant)
    }

    /// `owner_script`: the state that the owner wants, whole or not at all. It stands until the file with the
    /// script changes.
    pub(super) fn owner_script(&mut self, script: &OwnerScript) -> OpResult<Outcome> {
        self.needs(Actuator::RootPools, "run the owner's script")?;
        if script.grants.is_some() {
            self.owner_only("grant")?;
        }
        let pools = self.run_script(script)?;
        let mut policy = self.change.policy().clone();
        policy.posted = Some(crate::policy::Posted {
            script: script.clone(),
            file: owner::digest(&self.rules.owner_script),
        });
        self.change.put_policy(policy);
        Ok(Outcome::Rcaps { pools })
    }

    /// Without a script, only the owner's own sliver is seen to.
    pub(crate) fn owners_sliver(&mut self) -> OpResult<Vec<(u64, u32)>> {
        let made = owner::apply(self, &[], false)?;
        if !made.is_empty() {
            self.check_roots_fit()?;
            self.change.touch_changed();
        }
        Ok(made)
    }

    /// Brings the node to what a script says.
    pub(crate) fn run_script(&mut self, script: &OwnerScript) -> OpResult<Vec<(u64, u32)>> {
        let mut plan = owner::Plan::read(script, self.rules)?;
        let mut policy: Policy = self.change.policy().clone();
        if let Some(denials) = &plan.deny {
            policy.denials.clear();
            for (slice, reason) in denials {
                policy
                    .denials
                    .insert(self.denied_name(slice)?, checked_reason(reason)?);
            }
        }
        if let Some(grants) = &script.grants {
            policy.grants.clear();
            for (slice, grant) in grants {
                policy
                    .grants
                    .insert(self.rules.slice(slice)?, Some(self.checked_grant(grant)?));
            }
        }
        self.change.put_policy(policy);
        self.follow_denials();
        if let Some(limit) = &script.node_limit {
            self.limit_node(limit)?;
        }
        let made = match plan.pools.take() {
            Some(pools) => owner::apply(self, &pools, true)?,
            None => Vec::new(),
        };
        self.check_roots_fit()?;
        self.change.touch_changed();
        Ok(made)
    }
}

fn exceeds(attribute: &str, value: String, allowed: String) -> ErrorBody {
    RspecError::Exceeds {
        attribute: attribute.to_owned(),
        value,
        allowed,
    }
    .into()
}

fn checked_reason(reason: &str) -> OpResult<String> {
    match !reason.trim().is_empty() && reason.len() <= REASON_MAX && !reason.chars().any(char::is_control) {
        true => Ok(reason.to_owned()),
        false => Err(ErrorBody {
            attribute: Some("reason".to_owned()),
            value: Some(format!("{:?}", reason.chars().take(80).collect::<String>())),
            ..ErrorBody::new(ErrorKind::BadRequest, "the reason cannot be used").allowed(format!(
                "one line of 1 to {REASON_MAX} bytes, for those who are refused"
            ))
        }),
    }
}
