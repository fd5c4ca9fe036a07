//! Any sequence of operations, with the state read back from disk now and then, leaves pools that add up.

use std::collections::{BTreeMap, BTreeSet};

use mandoline_rspec::{AuthorityName, Rcap, Rspec, SliceId};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::state::{Delta, Wanted};
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
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let amounts = || [0u64..300, 0u64..300, 0u64..300];
    prop_oneof![
        1 => (amounts(), 1u16..60).prop_map(|(amounts, port)| Step::Root { amounts, port }),
        4 => (any::<usize>(), amounts(), 1u16..60, any::<bool>())
            .prop_map(|(pool, amounts, port, vm)| Step::Split { pool, amounts, port, vm }),
        4 => (any::<usize>(), 0u8..5).prop_map(|(pool, slice)| Step::Bind { pool, slice }),
        2 => any::<usize>().prop_map(|pool| Step::Release { pool }),
        2 => any::<usize>().prop_map(|pool| Step::Destroy { pool }),
        2 => any::<usize>().prop_map(|nth| Step::Teardown { nth }),
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
            now: Timestamp::now(),
            used: None,
            change: self.state.change(),
        };
        let outcome = op.perform(operation)?;
        let delta = op.change.into_delta();
        self.write(delta);
        if let Outcome::Rcap { pool, epoch } = &outcome {
            self.rcaps.push(self.secret.rcap(*pool, *epoch));
        }
        Ok(outcome)
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
            } => rcap(pool).map(|rcap| Operation::SplitPool(rcap, want(amounts, *port, *vm))),
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
                    let mut change = self.state.change();
                    gone(&mut change, dying[nth % dying.len()]);
                    let delta = change.into_delta();
                    self.write(delta);
                }
                None
            }
            Step::Reopen => {
                self.store = None;
                let (store, loaded) = Store::open(&self.dir.path().join("db"), capacity(), 0).unwrap();
                assert_eq!(loaded.state.pools, self.state.pools);
                assert_eq!(loaded.state.slivers, self.state.slivers);
                assert_eq!(
                    (loaded.state.next_pool, loaded.state.next_vm),
                    (self.state.next_pool, self.state.next_vm)
                );
                self.store = Some(store);
                self.state = loaded.state;
                None
            }
        };
        if let Some(operation) = operation {
            let before = (self.state.pools.clone(), self.state.slivers.clone());
            if self.perform(&operation).is_err() {
                assert_eq!(
                    before,
                    (self.state.pools.clone(), self.state.slivers.clone()),
                    "a refusal changed something"
                );
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
                1000,
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
