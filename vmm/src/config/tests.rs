use mandoline_api::monitor::{NetworkInterface, Pmem as PmemConfig};

use super::open::*;
use super::*;
use crate::fds::Inherited;

fn config(extra: &str) -> VmConfig {
    parse(&format!(
        r#"{{"boot-source": {{"kernel_image_path": "/dev/null"}}{extra}}}"#
    ))
    .unwrap()
}

fn refused(extra: &str) -> String {
    open(&config(extra), &mut Inherited::default())
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default()
}

#[test]
fn numbers_out_of_range_are_named_with_what_is_allowed() {
    let machine =
        |cpus, mib| format!(r#", "machine-config": {{"vcpu_count": {cpus}, "mem_size_mib": {mib}}}"#);
    assert_eq!(refused(&machine(0, 128)), "vcpu_count is 0; allowed: 1 to 32");
    assert_eq!(refused(&machine(33, 128)), "vcpu_count is 33; allowed: 1 to 32");
    assert_eq!(
        refused(&machine(1, 1)),
        "mem_size_mib is 1; allowed: 16 to 1048576"
    );
    assert!(refused(r#", "vsock": {"guest_cid": 2, "uds_path": "/x"}"#).starts_with("guest_cid is 2"));
    let balloon = |rest| format!(r#", "balloon": {{"deflate_on_oom": true, {rest}}}"#);
    assert_eq!(
        refused(&balloon(r#""amount_mib": 129"#)),
        "amount_mib is 129; allowed: up to 128, the guest's memory"
    );
    assert_eq!(
        refused(&balloon(r#""amount_mib": 1, "free_page_hinting": true"#)),
        "free_page_hinting is true; allowed: false"
    );
    assert_eq!(refused(&balloon(r#""amount_mib": 128"#)), "");
    assert_eq!(refused(""), "");
}

#[test]
fn the_root_drive_is_named_on_the_command_line_unless_it_is_already() {
    let drive = r#", "drives": [{"drive_id": "d", "path_on_host": "/dev/null", "is_root_device": true, "is_read_only": true}]"#;
    let spec = open(&config(drive), &mut Inherited::default()).unwrap();
    assert!(
        spec.command_line.ends_with(" root=/dev/vda ro"),
        "{}",
        spec.command_line
    );
    let mut own = config(drive);
    own.boot_source.boot_args = Some("root=/dev/vda rootfstype=erofs".into());
    assert_eq!(
        open(&own, &mut Inherited::default()).unwrap().command_line,
        "root=/dev/vda rootfstype=erofs"
    );
}

#[test]
fn vhost_has_no_rate_limits_and_its_device_is_named_when_it_is_not_there() {
    let mut interface = NetworkInterface {
        iface_id: "eth0".into(),
        vhost: Some("/nowhere/vhost-net".into()),
        ..NetworkInterface::default()
    };
    let message = |interface: &NetworkInterface| {
        let error = open_vhost(interface, &mut Inherited::default()).err();
        error.map(|error| error.to_string()).unwrap_or_default()
    };
    let missing = message(&interface);
    assert!(
        missing.contains("eth0") && missing.contains("/nowhere/vhost-net"),
        "{missing}"
    );
    interface.tx_rate_limiter = Some(mandoline_api::monitor::RateLimiter::default());
    let both = message(&interface);
    assert!(
        both.contains("vhost") && both.contains("tx_rate_limiter"),
        "{both}"
    );
}

#[test]
fn a_partition_may_be_the_root() {
    let drive = |partuuid| {
        format!(
            r#", "drives": [{{"drive_id": "d", "path_on_host": "/dev/null", "is_root_device": true,
                "is_read_only": true, "partuuid": "{partuuid}"}}]"#
        )
    };
    let spec = open(&config(&drive("0eaa91a0-01")), &mut Inherited::default()).unwrap();
    assert!(spec.command_line.ends_with(" root=PARTUUID=0eaa91a0-01 ro"));
    for wrong in ["", "a b", "1 init=/bin/sh", &"0".repeat(37)] {
        assert!(refused(&drive(wrong)).starts_with("partuuid is"), "{wrong}");
    }
}

#[test]
fn the_root_drive_is_the_first_wherever_it_is_listed() {
    let drive = |name: &str, root: bool| {
        format!(r#"{{"drive_id": "{name}", "path_on_host": "/dev/null", "is_root_device": {root}}}"#)
    };
    let two = format!(
        r#", "drives": [{}, {}]"#,
        drive("data", false),
        drive("root", true)
    );
    let names: Vec<_> = config(&two)
        .drives
        .into_iter()
        .map(|drive| drive.drive_id)
        .collect();
    assert_eq!(names, ["root", "data"]);
    let roots = format!(r#", "drives": [{}, {}]"#, drive("a", true), drive("b", true));
    assert_eq!(refused(&roots), "number of root devices is 2; allowed: up to 1");
    let twice = format!(r#", "drives": [{}, {}]"#, drive("a", false), drive("a", false));
    assert!(refused(&twice).starts_with("drive_id is a;"));
}

#[test]
fn the_root_in_memory_is_mounted_with_dax_where_the_file_system_can() {
    let line = |text: &str| {
        let mut config = config("");
        config.boot_source.boot_args = Some(text.into());
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[0xe2, 0xe1, 0xf5, 0xe0], 1024).unwrap();
        config.pmem = ["data", "root"]
            .map(|id| PmemConfig {
                id: id.into(),
                path_on_host: file.path().to_str().unwrap().into(),
                root_device: id == "root",
                read_only: true,
                rate_limiter: None,
            })
            .into();
        let line = open(&config, &mut Inherited::default()).unwrap().command_line;
        config.pmem[0].id = "root".into();
        assert!(open(&config, &mut Inherited::default()).is_err());
        line
    };
    assert_eq!(line("quiet"), "quiet root=/dev/pmem1 ro rootflags=dax");
    assert_eq!(line("rootflags=a"), "rootflags=a root=/dev/pmem1 ro");
    assert_eq!(line("root=/dev/vda"), "root=/dev/vda");
    assert_eq!(line("a -- -c b"), "a root=/dev/pmem1 ro rootflags=dax -- -c b");
}

#[test]
fn macs_are_unicast() {
    assert_eq!(parse_mac("02:00:0a:80:00:fe").unwrap(), [2, 0, 10, 128, 0, 254]);
    for text in [
        "",
        "02:00:0a:80:00",
        "02:00:0a:80:00:02:03",
        "01:00:00:00:00:01",
        "00:00:00:00:00:00",
        "+2:00:00:00:00:01",
    ] {
        assert!(parse_mac(text).is_err(), "{text}");
    }
}
