//! Loans between slivers of the node: a view on what they hold, see [`mandoline_rspec::Loan`].

use mandoline_api::nodemgr::{ErrorBody, ErrorKind, LoansAnswer};
use mandoline_rspec::Loan;

use super::{Op, OpResult, Rules, forbidden};
use crate::ops::slivers::no_sliver;
use crate::state::Sliver;
use crate::store::Outcome;

/// Most loans of one slice.
const MOST: usize = 100;

impl Op<'_> {
    pub(super) fn set_loans(&mut self, slice: &str, loans: &[(String, String, u64)]) -> OpResult<Outcome> {
        let mut sliver = self.lender(slice)?;
        sliver.loans = read(self.rules, loans)?;
        self.change.put_sliver(sliver);
        self.change.touch_changed();
        Ok(Outcome::Done)
    }

    /// What a sliver lends, and what that does now.
    pub(crate) fn loans_of(&self, slice: &str) -> OpResult<LoansAnswer> {
        let sliver = self.lender(slice)?;
        let (mut effective, unlent) = self.change.effective();
        let rspec = self.change.sliver_rspec(&sliver);
        let waiting = unlent.into_iter().filter(|unlent| unlent.lender == sliver.slice);
        Ok(LoansAnswer {
            waiting: waiting.map(|unlent| (unlent.loan, unlent.why)).collect(),
            effective: effective.remove(&sliver.slice).unwrap_or_else(|| rspec.clone()),
            loans: sliver.loans,
            rspec,
        })
    }

    fn lender(&self, slice: &str) -> OpResult<Sliver> {
        let slice = self.rules.slice(slice)?;
        let sliver = self.change.sliver_of(&slice);
        if !self.may_act_for(&slice, sliver) {
            return Err(
                forbidden(format!("{} may not act for slice {slice}", self.caller)).allowed(
                    "the slice itself, slices that its attribute `delegations` names, and the owner",
                ),
            );
        }
        sliver.cloned().ok_or_else(|| no_sliver(&slice))
    }
}

fn read(rules: &Rules, loans: &[(String, String, u64)]) -> OpResult<Vec<Loan>> {
    if loans.len() > MOST {
        return Err(ErrorBody {
            attribute: Some("loans".to_owned()),
            value: Some(format!("{} loans", loans.len())),
            ..ErrorBody::new(ErrorKind::BadRequest, "too many loans").allowed(format!("at most {MOST}"))
        });
    }
    let loan = |(recipient, resource, amount): &(String, String, u64)| {
        Ok(Loan {
            recipient: rules.slice(recipient)?,
            resource: resource.parse().map_err(ErrorBody::from)?,
            amount: *amount,
        })
    };
    loans.iter().map(loan).collect()
}
