//! Two nodes share a network, and only that.

use mandoline_lab::{Lab, NodeSpec};

type Tested = Result<(), Box<dyn std::error::Error>>;

#[test]
#[ignore = "lab"]
fn nodes_reach_each_other_and_nothing_else() -> Tested {
    let mut lab = Lab::new()?;
    let nodes = lab.start_all(vec![NodeSpec::named("node1"), NodeSpec::named("node2")])?;
    let [one, two] = nodes.as_slice() else {
        panic!("two nodes were asked for")
    };
    let there = two.info().joint_address.to_string();

    one.shell(&format!("ping -c 2 -W 5 {there}"))?;
    let script = format!("ssh-keyscan -T 20 -t ed25519 {there} 2>/dev/null | wc -l");
    assert_eq!(one.shell(&script)?.trim(), "1", "no TCP between the nodes");

    // 192.0.2.1 is nobody's; 10.0.2.3 is where QEMU would answer names if it were let.
    for outside in ["192.0.2.1", "1.1.1.1"] {
        assert_ne!(
            one.exec(&["ping", "-c", "1", "-W", "1", outside])?.status,
            0,
            "{outside} answered"
        );
    }
    assert_ne!(one.exec(&["nc", "-z", "-w", "2", "1.1.1.1", "80"])?.status, 0);

    // The link can be cut and mended.
    two.set_joint_link(false);
    assert_ne!(one.exec(&["ping", "-c", "1", "-W", "1", &there])?.status, 0);
    two.set_joint_link(true);
    one.shell(&format!("ping -c 1 -W 10 {there}"))?;
    Ok(())
}
