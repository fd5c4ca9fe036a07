//! Any sequence of operations, with the state read back from disk now and then, leaves pools that add up.

use std::collections::{BTreeMap, BTreeSet};

use mandoline_rspec::{AuthorityName, Rcap, Rspec, SliceId};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::state::{Change, Delta, PoolId, State, Wanted};
use crate::store::{Loaded, Store};

const RESERVED: [&str; 3] = ["cpu_guarantee", "mem_reserve", "base_rate"];

#[derive(Debug, Clone)]
enum Step {
    Root {
        amounts: [u64; 3],
        port: u16,
    },
    Split {
        pool: usize,
        amounts: [u64; 3],
        port: u16,
        vm: bool,
        /// Hours from now.
        end: Option<i64>,
    },
    Bind {
        pool: usize,
        slice: u8,
    },
    Release {
        pool: usize,
    },
    Destroy {
        pool: usize,
    },
    Teardown {
        nth: usize,
    },
    Resize {
        pool: usize,
        amounts: [u64; 3],
    },
    /// The node as a whole: of each reservation so much.
    Limit {
        amount: u64,
    },
    /// The owner's script: so many per cent for each of three slices, the last one bound.
    Script {
        percent: [u64; 3],
    },
    Deny {
        slice: u8,
        back: bool,
    },
    Lend {
        from: u8,
        to: u8,
        percent: u64,
    },
    /// Hours pass.
    Wait {
        hours: i64,
    },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let amounts = || [0u64..300, 0u64..300, 0u64..300];
    prop_oneof![
        1 => (amounts(), 1u16..60).prop_map(|(amounts, port)| Step::Root { amounts, port }),
        4 => (any::<usize>(), amounts(), 1u16..60, any::<bool>(), proptest::option::of(1i64..20))
            .prop_map(|(pool, amounts, port, vm, end)| Step::Split { pool, amounts, port, vm, end }),
        4 => (any::<usize>(), 0u8..5).prop_map(|(pool, slice)| Step::Bind { pool, slice }),
        2 => any::<usize>().prop_map(|pool| Step::Release { pool }),
        2 => any::<usize>().prop_map(|pool| Step::Destroy { pool }),
        2 => any::<usize>().prop_map(|nth| Step::Teardown { nth }),
        2 => (any::<usize>(), amounts()).prop_map(|(pool, amounts)| Step::Resize { pool, amounts }),
        1 => (0u64..1200).prop_map(|amount| Step::Limit { amount }),
        1 => [0u64..50, 0u64..50, 0u64..50].prop_map(|percent| Step::Script { percent }),
        1 => (0u8..5, any::<bool>()).prop_map(|(slice, back)| Step::Deny { slice, back }),
        1 => (0u8..5, 0u8..5, 0u64..20).prop_map(|(from, to, percent)| Step::Lend { from, to, percent }),
        1 => (1i64..8).prop_map(|hours| Step::Wait { hours }),
        1 => Just(Step::Reopen),
    ]
}

fn capacity() -> Rspec {
    let json = json!({"cpu_guarantee": 1000, "mem_reserve": 1000, "base_rate": 1000, "ports": "tcp/1-59"});
    Rspec::from_json(&json).unwrap()
}

fn want(amounts: &[u64; 3], port: u16, vm: bool) -> Rspec {
    let mut json = json!({"ports": format!("tcp/{port}")});
    for (name, amount) in RESERVED.iter().zip(amounts) {
        json[name] = json!(amount);
    }
    if port.is_multiple_of(3) {
        json["ports"] = json!([]);
    }
    if vm {
        json["vm_type"] = json!("test-vm");
    }
    Rspec::from_json(&json).unwrap()
}

pub(crate) fn rules() -> Rules {
    Rules {
        default_authority: AuthorityName::new("plc").unwrap(),
        local_names: Vec::new(),
        services: Services::default(),
        vm_types: BTreeMap::from([("test-vm".to_owned(), "test-vm".to_owned())]),
        default_vm_types: BTreeMap::new(),
        profile: mandoline_rspec::MANDOLINE,
        owner_script: PathBuf::new(),
        site_admin: None,
        overbook: Overbook {
            memory: 1.0,
            disk: 1.0,
        },
        max_slivers: 4,
    }
}

struct Machine {
    dir: tempfile::TempDir,
    store: Option<Store>,
    state: State,
    rules: Rules,
    secret: Secret,
    rcaps: Vec<Rcap>,
    /// Every rcap that was ever given out, and what for.
    given: BTreeMap<String, (PoolId, u32)>,
    now: Timestamp,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, Loaded { state, .. }) = Store::open(&dir.path().join("db"), capacity(), 0).unwrap();
        let secret = Secret::open(&dir.path().join("secret")).unwrap();
        Self {
            dir,
            store: Some(store),
            state,
            rules: rules(),
            secret,
            rcaps: Vec::new(),
            given: BTreeMap::new(),
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
        }
    }

    fn write(&mut self, delta: Delta) {
        self.store.as_ref().unwrap().commit(&delta, None, &[]).unwrap();
        self.state.apply(delta);
    }

    fn perform(&mut self, operation: &Operation) -> OpResult<Outcome> {
        let index = RcapIndex::new(&self.secret, &self.state);
        let mut op = Op {
            caller: &Caller::Owner,
            rules: &self.rules,
            secret: &self.secret,
            index: &index,
            state: &self.state,
            now: self.now,
            used: None,
            change: self.state.change(),
        };
        let outcome = op.perform(operation)?;
        let delta = op.change.into_delta();
        self.write(delta);
        match &outcome {
            Outcome::Rcap { pool, epoch } => self.give(*pool, *epoch),
            Outcome::Rcaps { pools } => pools.iter().for_each(|(pool, epoch)| self.give(*pool, *epoch)),
            _ => {}
        }
        Ok(outcome)
    }

    fn give(&mut self, pool: PoolId, epoch: u32) {
        let rcap = self.secret.rcap(pool, epoch);
        let before = self.given.insert(rcap.to_hex(), (pool, epoch));
        assert!(
            before.is_none_or(|before| before == (pool, epoch)),
            "an rcap twice"
        );
        if !self.rcaps.contains(&rcap) {
            self.rcaps.push(rcap);
        }
    }

    fn alter(&mut self, alter: impl FnOnce(&mut Change<'_>)) {
        let mut change = self.state.change();
        alter(&mut change);
        let delta = change.into_delta();
        self.write(delta);
    }

    /// As the core does it: the state is kept whatever the owner's script was, and time only goes on.
    fn reopen(&mut self) {
        self.store = None;
        let (store, loaded) = Store::open(&self.dir.path().join("db"), capacity(), 0).unwrap();
        assert_eq!(loaded.state.pools, self.state.pools);
        assert_eq!(loaded.state.slivers, self.state.slivers);
        assert_eq!(loaded.state.policy, self.state.policy);
        assert_eq!(loaded.state.capacity, self.state.capacity);
        assert_eq!(
            (loaded.state.next_pool, loaded.state.next_vm),
            (self.state.next_pool, self.state.next_vm)
        );
        self.store = Some(store);
        self.state = loaded.state;
    }

    fn step(&mut self, step: &Step) {
        let rcap = |n: &usize| (!self.rcaps.is_empty()).then(|| self.rcaps[n % self.rcaps.len()].clone());
        let operation = match step {
            Step::Root { amounts, port } => Some(Operation::CreateRootPool(
                want(amounts, *port, false),
                "pl_conf".to_owned(),
            )),
            Step::Split {
                pool,
                amounts,
                port,
                vm,
                end,
            } => rcap(pool).map(|rcap| {
                let mut want = want(amounts, *port, *vm);
                if let Some(hours) = end {
                    let end = self.now + jiff::SignedDuration::from_hours(*hours);
                    want.set_json("end_time", &end.to_string().into()).unwrap();
                }
                Operation::SplitPool(rcap, want)
            }),
            Step::Bind { pool, slice } => rcap(pool).map(|rcap| Operation::Bind(rcap, format!("a_s{slice}"))),
            Step::Release { pool } => rcap(pool).map(Operation::Release),
            Step::Destroy { pool } => rcap(pool).map(Operation::Destroy),
            Step::Teardown { nth } => {
                let dying: Vec<u32> = self
                    .state
                    .slivers
                    .values()
                    .filter(|s| s.wanted == Wanted::Destroyed)
                    .map(|s| s.vm_id)
                    .collect();
                if !dying.is_empty() {
                    self.alter(|change| gone(change, dying[nth % dying.len()]));
                }
                None
            }
            Step::Resize { pool, amounts } => {
                rcap(pool).map(|rcap| Operation::Resize(rcap, want(amounts, 3, false)))
            }
            Step::Limit { amount } => {
                let limit: serde_json::Map<String, serde_json::Value> = RESERVED
                    .iter()
                    .map(|name| ((*name).to_owned(), json!(amount.min(&1000))))
                    .collect();
                Some(Operation::SetNodeLimit(Rspec::from_map(&limit).unwrap()))
            }
            Step::Script { percent } => {
                let pool = |(n, percent): (usize, &u64)| mandoline_api::nodemgr::ScriptPool {
                    slice: format!("a_s{n}"),
                    rspec: json!({"capacity": format!("{percent} %"), "vm_type": "test-vm"}),
                    bind: n == 2,
                };
                Some(Operation::OwnerScript(OwnerScript {
                    pools: Some(percent.iter().enumerate().map(pool).collect()),
                    ..OwnerScript::default()
                }))
            }
            Step::Deny { slice, back: false } => {
                Some(Operation::Deny(format!("a_s{slice}"), "why not".to_owned()))
            }
            Step::Deny { slice, back: true } => Some(Operation::Allow(format!("a_s{slice}"))),
            Step::Lend { from, to, percent } => {
                let loan = (format!("a_s{to}"), "cpu_pct".to_owned(), *percent);
                Some(Operation::SetLoans(format!("a_s{from}"), vec![loan]))
            }
            Step::Wait { hours } => {
                self.now += jiff::SignedDuration::from_hours(*hours);
                let now = self.now;
                self.alter(|change| pass(change, now));
                None
            }
            Step::Reopen => {
                self.reopen();
                None
            }
        };
        if let Some(operation) = operation {
            let now = |state: &State| (state.pools.clone(), state.slivers.clone(), state.policy.clone());
            let before = now(&self.state);
            if self.perform(&operation).is_err() {
                assert_eq!(before, now(&self.state), "a refusal changed something");
            }
        }
    }

    fn check(&self) {
        let change = self.state.change();
        for name in RESERVED {
            let rests: u64 = change
                .all_pools()
                .map(|p| change.rest(p).number(name).unwrap_or(0))
                .sum();
            assert_eq!(
                rests + change.node_rest(None).number(name).unwrap(),
                change.capacity().number(name).unwrap(),
                "{name}"
            );
        }
        let mut ports = change.node_rest(None).ports();
        for pool in change.all_pools() {
            let own = change.rest(pool).ports();
            assert!(!ports.overlaps(&own), "a port has two owners");
            ports.union(&own);
        }
        assert_eq!(ports.len(), 59);

        // Loans move what slivers have, and make nothing.
        let living = |s: &&crate::state::Sliver| s.wanted != Wanted::Destroyed;
        let guarantee = |rspec: &Rspec| rspec.number("cpu_guarantee").unwrap_or(0);
        let own: u64 = self
            .state
            .slivers
            .values()
            .filter(living)
            .map(|s| guarantee(&change.sliver_rspec(s)))
            .sum();
        assert_eq!(change.effective().0.values().map(guarantee).sum::<u64>(), own);

        let mut indices = BTreeSet::new();
        let mut living: BTreeSet<&SliceId> = BTreeSet::new();
        for sliver in self.state.slivers.values() {
            assert!(
                indices.insert(sliver.index) && (1..=4).contains(&sliver.index),
                "an index twice"
            );
            assert!(
                sliver.wanted == Wanted::Destroyed || living.insert(&sliver.slice),
                "two slivers of a slice"
            );
            assert!(sliver.vm_id < self.state.next_vm && !sliver.pools.is_empty());
            for id in &sliver.pools {
                assert_eq!(self.state.pools[id].bound, Some(sliver.vm_id));
            }
            let denied = self.state.policy.denial(&sliver.slice).is_some();
            assert!(!denied || sliver.wanted != Wanted::Running, "a denied slice runs");
            assert!(!sliver.held || denied, "held without a denial");
        }
        for pool in self.state.pools.values() {
            if let Some(vm_id) = pool.bound {
                assert!(
                    self.state.slivers[&vm_id].pools.contains(&pool.id),
                    "bound to nothing"
                );
                assert_eq!(change.children(pool.id).count(), 0);
            }
            if let Some(parent) = pool.parent() {
                assert!(self.state.pools.contains_key(&parent), "an orphan");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn pools_add_up_whatever_is_done(steps in proptest::collection::vec(step(), 1..60)) {
        let mut machine = Machine::new();
        for step in &steps {
            machine.step(step);
            machine.check();
        }
    }
}
