//! Rspecs of the owner's script in per cent of the node: `"10 %"`, `{"capacity": "10 %"}`,
//! `{"base_rate": "10 %"}`.

use mandoline_api::nodemgr::ErrorBody;
use mandoline_rspec::{ATTRIBUTES, Kind, Rspec, RspecError, attribute};
use serde_json::Value as Json;

use crate::ops::OpResult;

/// Stands for a part of every reservation of the node.
const CAPACITY: &str = "capacity";
/// Thousandths of a per cent in the whole.
const WHOLE: u64 = 100_000;
const ALLOWED: &str = "0 % to 100 %, with at most three decimals";

/// Reads an rspec; whether anything in it is in per cent.
pub(crate) fn resolve(written: &Json, node: &Rspec) -> OpResult<(Rspec, bool)> {
    let mut rspec = Rspec::new();
    let part = match written {
        Json::String(_) => Some(written),
        Json::Object(fields) => fields.get(CAPACITY),
        _ => None,
    };
    if let Some(part) = part {
        let part = percent(CAPACITY, part)?;
        for attribute in ATTRIBUTES.iter().filter(|a| a.kind == Kind::Reservation) {
            if let Some(whole) = node.number(attribute.name) {
                rspec.set_json(attribute.name, &of(part, whole).into())?;
            }
        }
    }
    let mut in_percent = part.is_some();
    let Json::Object(fields) = written else {
        return match part {
            Some(_) => Ok((rspec, true)),
            None => Ok((Rspec::from_json(written)?, false)),
        };
    };
    for (name, value) in fields.iter().filter(|(name, _)| *name != CAPACITY) {
        let is_percent = value.as_str().is_some_and(|text| text.trim_end().ends_with('%'));
        let Some(attribute) = attribute(name).filter(|_| is_percent) else {
            if let Some(attribute) = attribute(name) {
                rspec.remove(attribute.name);
            }
            rspec.set_json(name, value)?;
            continue;
        };
        let whole = node.number(attribute.name).ok_or_else(|| RspecError::Invalid {
            attribute: attribute.name.to_owned(),
            value: value.to_string(),
            problem: "a part of what this node has not",
            allowed: attribute.value.allowed(),
        })?;
        let part = percent(attribute.name, value)?;
        rspec.remove(attribute.name);
        rspec.set_json(attribute.name, &of(part, whole).into())?;
        in_percent = true;
    }
    Ok((rspec, in_percent))
}

/// A part of a whole, rounded down: parts that add up to the whole fit into it.
fn of(thousandths: u64, whole: u64) -> u64 {
    let part = u128::from(whole) * u128::from(thousandths) / u128::from(WHOLE);
    u64::try_from(part).unwrap_or(whole)
}

/// Thousandths of a per cent.
fn percent(name: &str, value: &Json) -> OpResult<u64> {
    let refuse = |problem| {
        Err(ErrorBody::from(RspecError::Invalid {
            attribute: name.to_owned(),
            value: value.to_string().chars().take(80).collect(),
            problem,
            allowed: ALLOWED.to_owned(),
        }))
    };
    let Some(number) = value.as_str().and_then(|text| text.trim().strip_suffix('%')) else {
        return refuse("not in per cent");
    };
    let (whole, decimals) = number.trim().split_once('.').unwrap_or((number.trim(), "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(decimals) || decimals.len() > 3 || whole.len() > 3 {
        return refuse("no such part");
    }
    match format!("{whole}{decimals:0<3}").parse::<u64>() {
        Ok(thousandths) if thousandths <= WHOLE => Ok(thousandths),
        _ => refuse("more than the node"),
    }
}
