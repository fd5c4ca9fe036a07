//! Tickets hold where and when they should, and no holder can widen one.

use ed25519_dalek::{Signer, SigningKey};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

fn public(n: u8) -> PublicKey {
    PublicKey::from_bytes(key(n).verifying_key().to_bytes())
}

fn sign(n: u8) -> impl Fn(&[u8]) -> [u8; 64] {
    move |message| key(n).sign(message).to_bytes()
}

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn rspec(json: serde_json::Value) -> Rspec {
    Rspec::from_json(&json).unwrap()
}

fn plc() -> AuthorityName {
    "plc".parse().unwrap()
}

fn claims() -> Claims {
    Claims {
        issuer: plc(),
        key: public(1),
        serial: 7,
        slice: "plc.princeton_codeen".parse().unwrap(),
        rspec: rspec(json!({
            "vm_type": "kvm-microvm", "cpu_guarantee": 100, "mem_limit": "512 MiB", "ports": "tcp/80-90",
            "keys": ["ssh-ed25519 A", "ssh-ed25519 B"]
        })),
        nodes: Some(["n1", "n2"].map(str::to_owned).into()),
        not_before: time("2026-01-01T00:00:00Z"),
        not_after: time("2026-02-01T00:00:00Z"),
        holder: Some(public(2)),
    }
}

fn trust() -> Trust {
    let trusted = TrustedKey {
        key: public(1),
        until: None,
    };
    Trust {
        keys: BTreeMap::from([(plc(), vec![trusted])]),
        revoked: BTreeMap::new(),
    }
}

fn noon() -> Timestamp {
    time("2026-01-15T12:00:00Z")
}

/// Sealed by a holder.
fn seal(ticket: &Ticket, holder: u8) -> Ticket {
    read(&ticket.hand_on(&Narrowing::default(), sign(holder)).unwrap())
}

fn read(ticket: &Ticket) -> Ticket {
    Ticket::parse(&ticket.to_string()).unwrap()
}

#[test]
fn a_ticket_is_issued_handed_on_narrowed_and_verified_offline() {
    let ticket = read(&claims().issue(sign(1)));
    let sealed = seal(&ticket, 2).verify(&trust(), "n1", noon()).unwrap();
    assert_eq!(
        sealed,
        Claims {
            holder: None,
            ..claims()
        }
    );
    let bearer = Claims {
        holder: None,
        ..claims()
    };
    assert_eq!(
        bearer.issue(sign(1)).verify(&trust(), "n1", noon()).unwrap(),
        bearer
    );
    let less = Narrowing {
        rspec: rspec(
            json!({"cpu_guarantee": 40, "burst_rate": "1 Mbit/s", "ports": "tcp/81", "keys": ["ssh-ed25519 B"]}),
        ),
        nodes: Some(BTreeSet::from(["n2".to_owned()])),
        not_after: Some(time("2026-01-20T00:00:00Z")),
        holder: Some(public(3)),
        ..Narrowing::default()
    };
    let open = read(&ticket.hand_on(&less, sign(2)).unwrap());
    let handed = seal(&open, 3);
    let left = handed.verify(&trust(), "n2", noon()).unwrap();
    assert_eq!(
        (left.rspec.number("cpu_guarantee"), left.rspec.number("mem_limit")),
        (Some(40), Some(512 << 20))
    );
    assert_eq!(left.rspec.keys(), ["ssh-ed25519 B"]);
    assert_eq!((left.serial, left.holder), (7, None));
    // Without the narrowing it is a ticket that somebody else must seal.
    let unsealed = |holder| Err(TicketError::Unsealed { serial: 7, holder });
    assert_eq!(open.verify(&trust(), "n2", noon()), unsealed(public(3)));
    let text = handed.to_string();
    let pieces: Vec<&str> = text.split('.').collect();
    let cut = Ticket::parse(&pieces[..2].join(".")).unwrap();
    assert_eq!(cut.verify(&trust(), "n2", noon()), unsealed(public(2)));
    let skipped = Ticket::parse(&[&pieces[..2], &pieces[4..]].concat().join(".")).unwrap();
    assert_eq!(
        skipped.verify(&trust(), "n2", noon()),
        Err(TicketError::Signature { part: 1 })
    );
    assert!(matches!(
        handed.verify(&trust(), "n1", noon()),
        Err(TicketError::Node { .. })
    ));
    let late = time("2026-01-20T00:00:00Z");
    assert!(matches!(
        handed.verify(&trust(), "n2", late),
        Err(TicketError::Time { .. })
    ));
    assert!(seal(&ticket, 2).verify(&trust(), "n2", late).is_ok());
    let error = handed.hand_on(&Narrowing::default(), sign(3)).unwrap_err();
    assert_eq!(error, TicketError::NoHolder { part: 3 });
}

#[test]
fn no_node_takes_what_it_should_not() {
    let open = claims().issue(sign(1));
    let ticket = seal(&open, 2);
    let verify = |trust: &Trust| ticket.verify(trust, "n1", noon());
    assert!(matches!(
        verify(&Trust::default()),
        Err(TicketError::Untrusted { .. })
    ));
    let mut rotated = trust();
    rotated.keys.get_mut(&plc()).unwrap()[0].until = Some(noon());
    assert!(matches!(verify(&rotated), Err(TicketError::Untrusted { .. })));
    assert!(
        ticket
            .verify(&rotated, "n1", time("2026-01-15T11:59:59Z"))
            .is_ok()
    );
    let mut revoked = trust();
    revoked.revoked.insert(plc(), BTreeSet::from([7]));
    assert!(matches!(
        verify(&revoked),
        Err(TicketError::Revoked { serial: 7, .. })
    ));
    for early in ["2025-12-31T23:59:59Z", "2026-02-01T00:00:00Z"] {
        assert!(matches!(
            ticket.verify(&trust(), "n1", time(early)),
            Err(TicketError::Time { .. })
        ));
    }
    // Signed by another key than it names, by a holder that it is not, for another's slice.
    let forged = claims().issue(sign(9));
    assert_eq!(
        forged.verify(&trust(), "n1", noon()),
        Err(TicketError::Signature { part: 0 })
    );
    let stolen = open.hand_on(&Narrowing::default(), sign(9)).unwrap();
    assert_eq!(
        stolen.verify(&trust(), "n1", noon()),
        Err(TicketError::Signature { part: 1 })
    );
    let foreign = Claims {
        slice: "ple.inria_a".parse().unwrap(),
        ..claims()
    };
    let foreign = foreign.issue(sign(1)).verify(&trust(), "n1", noon());
    assert!(matches!(foreign, Err(TicketError::Slice { .. })));
    // A narrowing belongs to its ticket: it cannot be put behind another one of the same holder.
    let other = Claims {
        serial: 8,
        ..claims()
    }
    .issue(sign(1));
    let handed = ticket.to_string();
    let tail = handed.splitn(3, '.').last().unwrap();
    let moved = Ticket::parse(&format!("{other}.{tail}")).unwrap();
    assert_eq!(
        moved.verify(&trust(), "n1", noon()),
        Err(TicketError::Signature { part: 1 })
    );
    for text in ["", "a.b", "!.!", "e30.e30", "e30", &"a.".repeat(50)] {
        assert!(
            matches!(Ticket::parse(text), Err(TicketError::Form { .. })),
            "{text}"
        );
    }
}

#[test]
fn nobody_widens_a_ticket() {
    let ticket = claims().issue(sign(1));
    let to = |rspec_json| Narrowing {
        rspec: rspec(rspec_json),
        ..Narrowing::default()
    };
    let wider = [
        (to(json!({"cpu_guarantee": 101})), "cpu_guarantee"),
        (to(json!({"mem_reserve": 1})), "mem_reserve"),
        (to(json!({"mem_limit": "513 MiB"})), "mem_limit"),
        (to(json!({"ports": "tcp/79"})), "ports"),
        (to(json!({"keys": ["ssh-ed25519 C"]})), "keys"),
        (to(json!({"vm_type": "host-service"})), "vm_type"),
        (to(json!({"initscript": "x"})), "initscript"),
        (to(json!({"delegations": "me_too"})), "delegations"),
        (to(json!({"x-mine": 1})), "x-mine"),
        (
            Narrowing {
                nodes: Some(BTreeSet::from(["n3".to_owned()])),
                ..Narrowing::default()
            },
            "nodes",
        ),
        (
            Narrowing {
                not_after: Some(time("2026-02-02T00:00:00Z")),
                ..Narrowing::default()
            },
            "not_after",
        ),
        (
            Narrowing {
                not_before: Some(time("2025-02-02T00:00:00Z")),
                ..Narrowing::default()
            },
            "not_before",
        ),
    ];
    for (narrowing, attribute) in wider {
        let error = ticket.hand_on(&narrowing, sign(2)).unwrap_err();
        let TicketError::Wider { part: 1, source } = error else {
            panic!("{attribute}: {error}");
        };
        assert_eq!(source.attribute(), Some(attribute));
        assert!(source.allowed().is_some() && source.value().is_some());
        // Who signs it all the same gets nowhere.
        let mut forced = ticket.clone();
        let bytes = serde_json::to_vec(&narrowing).unwrap();
        let signature = sign(2)(&message(Some(&forced.parts[0].1), &bytes));
        forced.narrowings.push(narrowing);
        forced.parts.push((bytes, signature));
        let refused = read(&forced).verify(&trust(), "n1", noon());
        assert!(
            matches!(refused, Err(TicketError::Wider { part: 1, .. })),
            "{attribute}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a chain of holders asks for: what is left is within what the authority gave.
    #[test]
    fn what_is_left_is_never_more(
        steps in proptest::collection::vec((0u64..120, 32u64..600, 78u16..92, 0u64..9, 0usize..3), 0..5),
    ) {
        let mut ticket = claims().issue(sign(1));
        let mut signer = 2u8;
        for (guarantee, memory, port, reserve, nodes) in steps {
            let next = Narrowing {
                rspec: rspec(json!({
                    "cpu_guarantee": guarantee, "mem_limit": memory << 20, "ports": format!("tcp/{port}"),
                    "mem_reserve": reserve % 2,
                })),
                nodes: (nodes > 0).then(|| (1..=nodes).map(|n| format!("n{n}")).collect()),
                holder: Some(public(signer + 1)),
                ..Narrowing::default()
            };
            if let Ok(handed) = ticket.hand_on(&next, sign(signer)) {
                ticket = read(&handed);
                signer += 1;
            }
        }
        let left = seal(&ticket, signer).verify(&trust(), "n1", noon()).unwrap();
        let mut node = claims().rspec;
        prop_assert!(node.split(&left.rspec).is_ok(), "{}", left.rspec);
        prop_assert!(left.nodes.unwrap().is_subset(&claims().nodes.unwrap()));
    }

    #[test]
    fn no_text_makes_reading_panic(text in "[A-Za-z0-9_.-]{0,60}", flip in 0usize..400) {
        let _ = Ticket::parse(&text);
        let sealed = seal(&claims().issue(sign(1)), 2);
        let mut bytes = sealed.to_string().into_bytes();
        let at = flip % bytes.len();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        if let Ok(ticket) = Ticket::parse(&String::from_utf8(bytes).unwrap()) {
            // Base64 has spare bits at its end: a flip there may change nothing.
            if ticket != sealed {
                prop_assert!(ticket.verify(&trust(), "n1", noon()).is_err());
            }
        }
    }
}
