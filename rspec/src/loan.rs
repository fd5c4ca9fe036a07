//! Loans: what one slice of a node lends to another, as the shipped node manager had them.
//!
//! A loan names one of seven resources in units of its own. What a slice has in effect is what it was given,
//! less what it lends, with what it is lent:
//!
//! ```text
//!   effective = own − Σ lent + Σ borrowed        own − Σ lent ≥ floor
//! ```
//!
//! Only what was given can be lent, never what was borrowed. A loan that cannot be honoured now (the
//! recipient is not on the node, or the lender has less than it promised) waits: nothing moves, and it is
//! looked at again whenever something changes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Rspec, RspecError, SliceId, Value};

/// What can be lent, under the shipped node manager's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoanResource {
    /// Per cent of the CPU.
    CpuPct,
    /// Share of the CPU.
    CpuShare,
    /// Guaranteed bandwidth, kbit/s.
    NetMinRate,
    /// Bound of the bandwidth, kbit/s.
    NetMaxRate,
    /// Guaranteed bandwidth to destinations without limits, kbit/s.
    NetI2MinRate,
    /// Bound of the bandwidth to destinations without limits, kbit/s.
    NetI2MaxRate,
    /// Weight by which spare bandwidth is shared.
    NetShare,
}

impl LoanResource {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::CpuPct,
        Self::CpuShare,
        Self::NetMinRate,
        Self::NetMaxRate,
        Self::NetI2MinRate,
        Self::NetI2MaxRate,
        Self::NetShare,
    ];

    /// The shipped node manager's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuPct => "cpu_pct",
            Self::CpuShare => "cpu_share",
            Self::NetMinRate => "net_min_rate",
            Self::NetMaxRate => "net_max_rate",
            Self::NetI2MinRate => "net_i2_min_rate",
            Self::NetI2MaxRate => "net_i2_max_rate",
            Self::NetShare => "net_share",
        }
    }

    /// The attribute that it stands for, and how much of that one unit of it is. The other three have no
    /// counterpart: no destination is without limits, and spare bandwidth is shared by `base_rate`.
    pub fn attribute(self) -> Option<(&'static str, u64)> {
        match self {
            Self::CpuPct => Some(("cpu_guarantee", 10)),
            Self::CpuShare => Some(("cpu_share", 1)),
            Self::NetMinRate => Some(("base_rate", 1000)),
            Self::NetMaxRate => Some(("burst_rate", 1000)),
            Self::NetI2MinRate | Self::NetI2MaxRate | Self::NetShare => None,
        }
    }

    /// What a lender keeps at least, in units of the resource.
    pub fn floor(self) -> u64 {
        match self {
            Self::CpuPct | Self::NetMinRate | Self::NetI2MinRate => 0,
            Self::CpuShare | Self::NetShare => 1,
            Self::NetMaxRate | Self::NetI2MaxRate => 8,
        }
    }
}

impl fmt::Display for LoanResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LoanResource {
    type Err = RspecError;

    fn from_str(text: &str) -> Result<Self, RspecError> {
        Self::ALL
            .into_iter()
            .find(|resource| resource.name() == text)
            .ok_or_else(|| RspecError::Invalid {
                attribute: "resource".to_owned(),
                value: format!("{:?}", text.chars().take(64).collect::<String>()),
                problem: "nothing that can be lent",
                allowed: Self::ALL.map(Self::name).join(", "),
            })
    }
}

impl Serialize for LoanResource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for LoanResource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A loan; in JSON the shipped `[recipient, resource, amount]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(SliceId, LoanResource, u64)", into = "(SliceId, LoanResource, u64)")]
pub struct Loan {
    /// The slice that borrows.
    pub recipient: SliceId,
    /// What.
    pub resource: LoanResource,
    /// How much, in units of the resource.
    pub amount: u64,
}

impl From<(SliceId, LoanResource, u64)> for Loan {
    fn from((recipient, resource, amount): (SliceId, LoanResource, u64)) -> Self {
        Self {
            recipient,
            resource,
            amount,
        }
    }
}

impl From<Loan> for (SliceId, LoanResource, u64) {
    fn from(loan: Loan) -> Self {
        (loan.recipient, loan.resource, loan.amount)
    }
}

/// A loan that moves nothing now, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unlent {
    /// The lender.
    pub lender: SliceId,
    /// The loan.
    pub loan: Loan,
    /// Why it cannot be honoured.
    pub why: String,
}

/// What every slice of a node has in effect, from what each was given and what each lends. `loans` are taken
/// in order, each whole or not at all.
pub fn with_loans<'a>(
    own: &BTreeMap<SliceId, Rspec>,
    loans: impl IntoIterator<Item = (&'a SliceId, &'a Loan)>,
) -> (BTreeMap<SliceId, Rspec>, Vec<Unlent>) {
    let mut left = own.clone();
    let mut borrowed: Vec<(&SliceId, &'static str, u64)> = Vec::new();
    let mut unlent = Vec::new();
    for (lender, loan) in loans {
        match lend(&mut left, own, lender, loan) {
            Ok(Some((attribute, amount))) => borrowed.push((&loan.recipient, attribute, amount)),
            Ok(None) => {}
            Err(why) => unlent.push(Unlent {
                lender: lender.clone(),
                loan: loan.clone(),
                why,
            }),
        }
    }
    // Borrowed things come last, so that they are not lent on.
    for (recipient, attribute, amount) in borrowed {
        let Some(rspec) = left.get_mut(recipient) else {
            continue;
        };
        match rspec.number(attribute) {
            // A bound that is not named is no bound: it stays so.
            None if attribute == "burst_rate" => {}
            have => {
                let sum = have.unwrap_or(0).saturating_add(amount);
                rspec.put(attribute, Value::Number(sum));
            }
        }
    }
    (left, unlent)
}

/// Takes one loan from its lender. Nothing of the node moves for a resource without a counterpart.
fn lend(
    left: &mut BTreeMap<SliceId, Rspec>,
    own: &BTreeMap<SliceId, Rspec>,
    lender: &SliceId,
    loan: &Loan,
) -> Result<Option<(&'static str, u64)>, String> {
    if !own.contains_key(&loan.recipient) {
        return Err(format!("{} has no sliver on this node", loan.recipient));
    }
    if *lender == loan.recipient {
        return Err("a slice lends to itself".to_owned());
    }
    let Some((attribute, unit)) = loan.resource.attribute() else {
        return Ok(None);
    };
    let Some(rspec) = left.get_mut(lender) else {
        return Err(format!("{lender} has no sliver on this node"));
    };
    let floor = loan.resource.floor().saturating_mul(unit);
    let amount = loan.amount.saturating_mul(unit);
    let have = rspec.number(attribute).unwrap_or(0);
    let free = have.saturating_sub(floor);
    if amount > free {
        return Err(format!(
            "{lender} has {} of {} to lend, not {}",
            free / unit,
            loan.resource,
            loan.amount
        ));
    }
    if amount == 0 {
        return Ok(None);
    }
    rspec.put(attribute, Value::Number(have - amount));
    Ok(Some((attribute, amount)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn slice(n: u8) -> SliceId {
        format!("plc.a_{n}").parse().unwrap()
    }

    fn rspec(json: serde_json::Value) -> Rspec {
        Rspec::from_json(&json).unwrap()
    }

    fn loan(recipient: u8, resource: LoanResource, amount: u64) -> Loan {
        Loan {
            recipient: slice(recipient),
            resource,
            amount,
        }
    }

    #[test]
    fn the_shipped_form_and_its_refusals() {
        let loan: Loan = serde_json::from_value(json!(["plc.a_1", "cpu_pct", 5])).unwrap();
        assert_eq!((loan.resource, loan.amount), (LoanResource::CpuPct, 5));
        assert_eq!(
            serde_json::to_value(&loan).unwrap(),
            json!(["plc.a_1", "cpu_pct", 5])
        );
        for bad in [
            json!(["plc.a_1", "disk_max", 5]),
            json!(["plc.a_1", "cpu_pct", -1]),
            json!(["plc.a_1", "cpu_pct"]),
            json!(["", "cpu_pct", 1]),
        ] {
            assert!(serde_json::from_value::<Loan>(bad.clone()).is_err(), "{bad}");
        }
        let error = "disk_max".parse::<LoanResource>().unwrap_err();
        assert!(
            error
                .allowed()
                .is_some_and(|allowed| allowed.contains("net_i2_max_rate"))
        );
    }

    #[test]
    fn what_is_lent_moves_and_what_cannot_be_waits() {
        let own = BTreeMap::from([
            (
                slice(1),
                rspec(json!({"cpu_guarantee": 100, "cpu_share": 3, "burst_rate": "1 Mbit/s"})),
            ),
            (slice(2), rspec(json!({"cpu_share": 1}))),
        ]);
        let lender = slice(1);
        let loans = [
            loan(2, LoanResource::CpuPct, 4),
            loan(2, LoanResource::CpuShare, 2),
            // The floor is 1.
            loan(2, LoanResource::CpuShare, 1),
            loan(3, LoanResource::CpuPct, 1),
            loan(2, LoanResource::NetMaxRate, 992),
            loan(1, LoanResource::CpuPct, 1),
            loan(2, LoanResource::NetShare, 7),
        ];
        let (effective, unlent) = with_loans(&own, loans.iter().map(|loan| (&lender, loan)));
        let (one, two) = (&effective[&slice(1)], &effective[&slice(2)]);
        assert_eq!(
            (one.number("cpu_guarantee"), two.number("cpu_guarantee")),
            (Some(60), Some(40))
        );
        assert_eq!(
            (one.number("cpu_share"), two.number("cpu_share")),
            (Some(1), Some(3))
        );
        assert_eq!(
            (one.number("burst_rate"), two.number("burst_rate")),
            (Some(8_000), None)
        );
        let waiting: Vec<_> = unlent.iter().map(|unlent| &unlent.loan).collect();
        assert_eq!(waiting, [&loans[2], &loans[3], &loans[5]]);
        assert!(
            unlent[0].why.contains("has 0 of cpu_share to lend, not 1"),
            "{}",
            unlent[0].why
        );
    }

    proptest! {
        #[test]
        fn loans_move_and_never_make(
            given in proptest::collection::vec((0u64..200, 1u64..50, 0u64..20_000), 1..5),
            loans in proptest::collection::vec((0u8..6, 0u8..6, 0usize..7, 0u64..40), 0..20),
        ) {
            let own: BTreeMap<SliceId, Rspec> = given
                .iter()
                .enumerate()
                .map(|(n, (guarantee, share, rate))| {
                    let json = json!({"cpu_guarantee": guarantee, "cpu_share": share, "base_rate": rate});
                    (slice(n as u8), rspec(json))
                })
                .collect();
            let loans: Vec<(SliceId, Loan)> = loans
                .iter()
                .map(|(from, to, what, amount)| (slice(*from), loan(*to, LoanResource::ALL[*what], *amount)))
                .collect();
            let (effective, _) = with_loans(&own, loans.iter().map(|(lender, loan)| (lender, loan)));
            for name in ["cpu_guarantee", "cpu_share", "base_rate"] {
                let sum = |all: &BTreeMap<SliceId, Rspec>| -> u64 {
                    all.values().map(|r| r.number(name).unwrap_or(0)).sum()
                };
                prop_assert_eq!(sum(&own), sum(&effective), "{}", name);
            }
            for rspec in effective.values() {
                prop_assert!(rspec.number("cpu_share").unwrap() >= 1);
            }
        }
    }
}
