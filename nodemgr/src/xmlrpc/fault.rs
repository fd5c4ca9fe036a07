//! Faults, with the codes and texts of the node manager that PlanetLab shipped (`api.py`).

use mandoline_api::nodemgr::{ErrorBody, ErrorKind};
use mandoline_api::xmlrpc::{Fault, Value, type_name};

use crate::caller::Caller;

fn new(code: i32, text: String) -> Fault {
    Fault { code, text }
}

pub(super) fn no_method(name: &str, known: &[&str]) -> Fault {
    let name: String = name.chars().take(100).collect();
    new(
        100,
        format!(
            "Invalid API method {name}.  Valid choices are {}",
            known.join(", ")
        ),
    )
}

pub(super) fn count(got: usize, wanted: usize) -> Fault {
    new(
        101,
        format!("Invalid argument count: got {got}, expecting {wanted}."),
    )
}

pub(super) fn argument(why: &str) -> Fault {
    new(102, format!("Invalid argument: {why}"))
}

pub(super) fn wrong_type(place: usize, wanted: &str, got: &Value) -> Fault {
    argument(&format!(
        "argument {place} is {}; allowed: {wanted}",
        type_name(got)
    ))
}

pub(super) fn count_or_type(args: &[Value], wanted: &[&str]) -> Fault {
    if args.len() != wanted.len() {
        return count(args.len(), wanted.len());
    }
    let wrong = args
        .iter()
        .zip(wanted)
        .enumerate()
        .find(|(_, (got, wanted))| type_name(got) != **wanted);
    match wrong {
        Some((place, (got, wanted))) => wrong_type(place + 1, wanted, got),
        None => argument("it cannot be used"),
    }
}

/// A refusal: its kind for programs first, then all that it says.
pub(super) fn of(caller: &Caller, error: &ErrorBody) -> Fault {
    let kind = serde_json::to_value(error.kind).unwrap_or_default();
    let mut text = format!("{}: {}", kind.as_str().unwrap_or("error"), error.message);
    let parts = [
        ("attribute", &error.attribute),
        ("value", &error.value),
        ("allowed", &error.allowed),
    ];
    for (name, part) in parts {
        if let Some(part) = part
            && !text.contains(part.as_str())
        {
            text.push_str(&format!("; {name}: {part}"));
        }
    }
    match error.kind {
        ErrorKind::Forbidden => new(108, format!("{caller}: Permission denied. {text}")),
        ErrorKind::BadRequest
        | ErrorKind::InvalidRspec
        | ErrorKind::InvalidName
        | ErrorKind::UnknownVmType => argument(&text),
        _ => new(104, format!("Error in call: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_says_all_that_the_refusal_says() {
        let error = ErrorBody {
            attribute: Some("cpu_share".to_owned()),
            value: Some("2000".to_owned()),
            ..ErrorBody::new(ErrorKind::InvalidRspec, "cpu_share cannot be 2000").allowed("1 to 1000")
        };
        let fault = of(&Caller::Owner, &error);
        assert_eq!(fault.code, 102);
        assert_eq!(
            fault.text,
            "Invalid argument: invalid_rspec: cpu_share cannot be 2000; allowed: 1 to 1000"
        );
        let fault = of(&Caller::Stranger(7), &ErrorBody::new(ErrorKind::Forbidden, "no"));
        assert_eq!(
            (fault.code, fault.text.as_str()),
            (108, "uid 7: Permission denied. forbidden: no")
        );
        assert_eq!(
            of(&Caller::Owner, &ErrorBody::new(ErrorKind::Insufficient, "x")).code,
            104
        );
    }
}
