//! The owner's script is read as the papers write it, and in per cent.

use mandoline_rspec::{AuthorityName, Rspec};
use serde_json::json;

use super::percent::resolve;
use super::*;
use crate::ops::tests::rules;

const PAPERS: &str = "\
rcap10 = create_root_pool(rspec10, my_favorite_cdn)
rcap85 = create_root_pool(rspec85, pl.conf)
rcap5 = create_root_pool(rspec5, pl.conf)
bind(rcap5, pl.conf)
";

fn slice(text: &str) -> SliceId {
    SliceId::parse(text, &AuthorityName::new("plc").unwrap(), &[]).unwrap()
}

#[test]
fn the_papers_script_as_written() {
    let plan = language::parse(PAPERS, &rules()).unwrap();
    let part = |percent: u32| json!({"capacity": format!("{percent} %")});
    let entry = |name: &str, percent, bind: Option<&str>| Entry {
        slice: slice(name),
        rspec: part(percent),
        bind: bind.map(slice),
    };
    let wanted = vec![
        entry("my_favorite_cdn", 10, None),
        entry("pl_conf", 85, None),
        entry("pl_conf", 5, Some("pl_conf")),
    ];
    assert_eq!((plan.pools, plan.deny), (Some(wanted), None));
}

#[test]
fn rspecs_can_be_named_and_slices_denied() {
    let text = "# ours\nbig = {\n  \"capacity\": \"50 %\",\n  \"peak_rate\": \"10Mbps\"\n}\n\n\
                create_root_pool(big, pl_conf)   # no rcap kept\n\
                deny(evil_corp, \"spam, twice\")\n deny(plx, \"no contract\")";
    let plan = language::parse(text, &rules()).unwrap();
    let pools = plan.pools.unwrap();
    assert_eq!(pools[0].rspec, json!({"capacity": "50 %", "peak_rate": "10Mbps"}));
    assert_eq!(plan.deny.unwrap()["evil_corp"], "spam, twice");
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    for (text, line, names) in [
        ("fly(me)", 1, "fly"),
        ("\n\nx = create_root_pool(rspec, a_b)", 3, "no rspec"),
        ("x = create_root_pool(rspecx, a_b)", 1, "no rspec"),
        ("bind(x, a_b)", 1, "no rcap"),
        ("create_root_pool(rspec5 a_b)", 1, "','"),
        ("create_root_pool(rspec5, a_b) bind(x)", 1, "more after"),
        ("r = {\"a\": }", 1, "not JSON"),
        ("deny(a_b, [7])", 1, "not text"),
        ("deny(a_b, ", 1, "JSON is missing"),
        ("= 7", 1, "a name is missing"),
        ("x = create_root_pool(rspec5, a_b", 1, "')'"),
    ] {
        let error = language::parse(text, &rules()).unwrap_err();
        assert!(
            error.message.contains(&format!("line {line}:")),
            "{text}: {}",
            error.message
        );
        assert!(error.message.contains(names), "{text}: {}", error.message);
        assert!(error.allowed.is_some());
    }
    let error = language::parse("create_root_pool(rspec5, Nope)", &rules()).unwrap_err();
    assert_eq!(error.attribute.as_deref(), Some("slice_name"));
}

#[test]
fn parts_of_the_node() {
    let node = json!({"cpu_guarantee": 900, "base_rate": 1001, "mem_limit": 1 << 30, "vcpus": 4});
    let node = Rspec::from_json(&node).unwrap();
    let get = |written| resolve(&written, &node).unwrap();
    let (ten, in_percent) = get(json!("10 %"));
    assert!(in_percent);
    assert_eq!(
        (ten.number("cpu_guarantee"), ten.number("base_rate")),
        (Some(90), Some(100))
    );
    assert_eq!((ten.number("mem_limit"), ten.number("mem_reserve")), (None, None));
    let (mixed, _) =
        get(json!({"capacity": "0.5%", "peak_rate": "10Mbps", "base_rate": 7, "mem_limit": "50 %"}));
    assert_eq!(
        (mixed.number("cpu_guarantee"), mixed.number("base_rate")),
        (Some(4), Some(7))
    );
    assert_eq!(
        (mixed.number("burst_rate"), mixed.number("mem_limit")),
        (Some(10_000_000), Some(1 << 29))
    );
    assert!(!get(json!({"cpu_guarantee": 5})).1);
    for (bad, attribute) in [
        (json!("ten"), "capacity"),
        (json!("101 %"), "capacity"),
        (json!("100.001 %"), "capacity"),
        (json!("-1 %"), "capacity"),
        (json!("0.0001 %"), "capacity"),
        (json!({"capacity": 10}), "capacity"),
        (json!({"disk_quota": "1 %"}), "disk_quota"),
        (json!({"vm_type": "5 %"}), "vm_type"),
        (json!({"nothing": 1}), "nothing"),
    ] {
        let error = resolve(&bad, &node).unwrap_err();
        assert_eq!(error.attribute.as_deref(), Some(attribute), "{bad}: {error:?}");
        assert!(error.allowed.is_some());
    }
    assert!(resolve(&json!([]), &node).is_err());
}
