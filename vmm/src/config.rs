//! From the configuration file to open descriptors and checked numbers: after this nothing is a path.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use mandoline_api::monitor::{
    Balloon, CacheType, Drive as DriveConfig, Hardware, HugePages, MAX_MEM_MIB, MAX_VCPUS, MIN_MEM_MIB,
    NetworkInterface, Pmem as PmemConfig, RateLimiter, VSOCK_OUT_FD, VmConfig,
};

use crate::boot::layout::MAX_DEVICES;
use crate::devices::net::tap;
use crate::devices::pmem::file_system::knows_dax;
use crate::devices::vsock::outward::Outward;
use crate::devices::{blk, net};
use crate::fds::{self, Inherited};

/// A configuration that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or not of this shape.
    #[error("configuration file: {0}")]
    Syntax(#[from] serde_json::Error),
    /// A value is out of its range.
    #[error("{name} is {value}; allowed: {allowed}")]
    Value {
        /// Which.
        name: String,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A descriptor or path cannot be had.
    #[error(transparent)]
    Fd(#[from] fds::Error),
    /// A tap cannot be used.
    #[error(transparent)]
    Tap(#[from] tap::Error),
}

fn value(name: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Error {
    Error::Value {
        name: name.into(),
        value: value.to_string(),
        allowed: allowed.into(),
    }
}

/// A drive, open.
pub struct Drive {
    /// Its file.
    pub file: File,
    /// How it behaves.
    pub options: blk::Options,
}

/// A network interface, open.
pub struct Interface {
    /// Its name.
    pub id: String,
    /// Its tap.
    pub tap: File,
    /// `/dev/vhost-net`, where the kernel shall move its frames.
    pub vhost: Option<File>,
    /// How it behaves.
    pub options: net::Options,
}

/// The stream socket device, open.
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u32,
    /// Where the host connects inwards.
    pub listener: UnixListener,
    /// Where streams of the guest go.
    pub outward: Outward,
}

/// A persistent memory device, open.
pub struct Pmem {
    /// Its name.
    pub id: String,
    /// Its file.
    pub file: File,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How often it may flush.
    pub limit: Option<RateLimiter>,
}

/// A VM to be built: everything open, everything checked.
pub struct Spec {
    /// vCPUs.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// How the guest is told of its hardware.
    pub hardware: Hardware,
    /// What backs guest memory.
    pub huge_pages: HugePages,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line, without the devices.
    pub command_line: String,
    /// Drives in order.
    pub drives: Vec<Drive>,
    /// Interfaces in order.
    pub interfaces: Vec<Interface>,
    /// The stream socket device.
    pub vsock: Option<Vsock>,
    /// The entropy device's limits; `None`: there is no such device.
    pub entropy: Option<RateLimiter>,
    /// The memory balloon.
    pub balloon: Option<Balloon>,
    /// Persistent memory in order.
    pub pmem: Vec<Pmem>,
    /// How an idle VM gives its memory back.
    pub park: Option<Park>,
}

/// How an idle VM gives its memory back.
pub struct Park {
    /// Where its memory goes.
    pub file: File,
    /// Park by itself after so long.
    pub idle: Option<Duration>,
}

/// Shortest time after which an idle VM parks by itself, in ms.
const MIN_IDLE_MS: u64 = 100;

/// The default command line: quiet, since a character on the console costs an exit.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 nomodule";

/// Reads a configuration file.
pub fn parse(text: &str) -> Result<VmConfig, Error> {
    let mut config: VmConfig = serde_json::from_str(text)?;
    order_drives(&mut config.drives);
    Ok(config)
}

/// Puts the root drive first, as Firecracker does: it is `vda` wherever it was listed.
pub fn order_drives(drives: &mut [mandoline_api::monitor::Drive]) {
    drives.sort_by_key(|drive| !drive.is_root_device);
}

/// Checks what can be checked without opening anything.
pub fn check(config: &VmConfig) -> Result<(), Error> {
    let machine = &config.machine_config;
    if machine.vcpu_count == 0 || machine.vcpu_count > MAX_VCPUS {
        return Err(value(
            "vcpu_count",
            machine.vcpu_count,
            format!("1 to {MAX_VCPUS}"),
        ));
    }
    if machine.mem_size_mib < MIN_MEM_MIB || machine.mem_size_mib > MAX_MEM_MIB {
        return Err(value(
            "mem_size_mib",
            machine.mem_size_mib,
            format!("{MIN_MEM_MIB} to {MAX_MEM_MIB}"),
        ));
    }
    for (name, set) in [
        ("smt", machine.smt),
        ("track_dirty_pages", machine.track_dirty_pages),
    ] {
        if set {
            return Err(value(name, true, "false"));
        }
    }
    let devices = config.drives.len()
        + config.network_interfaces.len()
        + usize::from(config.vsock.is_some())
        + usize::from(config.entropy.is_some())
        + usize::from(config.balloon.is_some())
        + config.pmem.len();
    if devices > MAX_DEVICES {
        return Err(value(
            "number of devices",
            devices,
            format!("up to {MAX_DEVICES}"),
        ));
    }
    let roots = config.drives.iter().filter(|drive| drive.is_root_device).count()
        + config.pmem.iter().filter(|pmem| pmem.root_device).count();
    if roots > 1 {
        return Err(value("number of root devices", roots, "up to 1"));
    }
    for (index, drive) in config.drives.iter().enumerate() {
        if config.drives[..index]
            .iter()
            .any(|other| other.drive_id == drive.drive_id)
        {
            return Err(value("drive_id", &drive.drive_id, "one that no other drive has"));
        }
    }
    for interface in &config.network_interfaces {
        interface.guest_mac.as_deref().map(parse_mac).transpose()?;
        if let Some(mtu) = interface.mtu
            && mtu < 68
        {
            return Err(value("mtu", mtu, "68 to 65535"));
        }
    }
    if let Some(vsock) = &config.vsock
        && (vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX)
    {
        return Err(value("guest_cid", vsock.guest_cid, "3 to 4294967294"));
    }
    if config
        .serial
        .as_ref()
        .is_some_and(|serial| serial.rate_limiter.is_some())
    {
        return Err(value("serial.rate_limiter", "there", "none"));
    }
    Ok(())
}

/// Checks a configuration and opens what it names.
pub fn open(config: &VmConfig, inherited: &mut Inherited) -> Result<Spec, Error> {
    check(config)?;
    let machine = &config.machine_config;
    let boot = &config.boot_source;
    let kernel = inherited.file("kernel_image_path", &boot.kernel_image_path, false)?;
    let initrd = boot
        .initrd_path
        .as_ref()
        .map(|path| inherited.file("initrd_path", path, false))
        .transpose()?;
    let mut command_line = boot
        .boot_args
        .clone()
        .unwrap_or_else(|| DEFAULT_COMMAND_LINE.to_owned());

    let mut drives = Vec::new();
    for (index, drive) in config.drives.iter().enumerate() {
        let what = format!("drive {}", drive.drive_id);
        let file = inherited.file(&what, &drive.path_on_host, !drive.is_read_only)?;
        let options = blk::Options {
            id: drive.drive_id.clone(),
            read_only: drive.is_read_only,
            flush: drive.cache_type == CacheType::Writeback,
            io_engine: drive.io_engine.unwrap_or(blk::DEFAULT_ENGINE),
            rate_limiter: drive.rate_limiter.unwrap_or_default(),
            on_full: blk::OnFull::Wait,
        };
        if drive.is_root_device
            && !command_line
                .split_whitespace()
                .any(|word| word.starts_with("root="))
        {
            add_words(&mut command_line, &root(index, drive)?);
        }
        drives.push(Drive { file, options });
    }

    let pmem = open_pmem(&config.pmem, &mut command_line, inherited)?;

    let interfaces = config
        .network_interfaces
        .iter()
        .map(|interface| open_interface(interface, inherited))
        .collect::<Result<_, _>>()?;

    let vsock = match &config.vsock {
        None => None,
        Some(vsock) => {
            let (listener, outward) = open_vsock(&vsock.uds_path, inherited)?;
            Some(Vsock {
                guest_cid: vsock.guest_cid,
                listener,
                outward,
            })
        }
    };

    Ok(Spec {
        vcpus: machine.vcpu_count,
        memory: machine.mem_size_mib << 20,
        hardware: machine.hardware,
        huge_pages: machine.huge_pages,
        kernel,
        initrd,
        command_line,
        drives,
        interfaces,
        vsock,
        entropy: config
            .entropy
            .as_ref()
            .map(|entropy| entropy.rate_limiter.unwrap_or_default()),
        balloon: check_balloon(config.balloon, machine.mem_size_mib)?,
        pmem,
        park: config
            .park
            .as_ref()
            .map(|park| open_park(park, inherited))
            .transpose()?,
    })
}

/// The words of the command line that name the root: the `index`th drive, or a partition of it.
fn root(index: usize, drive: &DriveConfig) -> Result<String, Error> {
    let mode = if drive.is_read_only { "ro" } else { "rw" };
    let Some(partuuid) = &drive.partuuid else {
        let letter = char::from(b'a' + index as u8);
        return Ok(format!(" root=/dev/vd{letter} {mode}"));
    };
    // Nothing that could be another word of the command line; 36 is a GPT's, an MBR's is shorter.
    let fits = |text: &str| {
        (1..=36).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
    };
    if !fits(partuuid) {
        let allowed = "1 to 36 hexadecimal digits and hyphens";
        return Err(value("partuuid", partuuid, allowed));
    }
    Ok(format!(" root=PARTUUID={partuuid} {mode}"))
}

/// Opens persistent memory, and names the root on the command line if it is there.
fn open_pmem(
    devices: &[PmemConfig],
    command_line: &mut String,
    inherited: &mut Inherited,
) -> Result<Vec<Pmem>, Error> {
    let mut open = Vec::with_capacity(devices.len());
    for (index, device) in devices.iter().enumerate() {
        if devices[..index].iter().any(|other| other.id == device.id) {
            return Err(value("pmem id", &device.id, "one that no other pmem has"));
        }
        let what = format!("pmem {}", device.id);
        let file = inherited.file(&what, &device.path_on_host, !device.read_only)?;
        if device.root_device && !has_word(command_line, "root=") {
            let mode = if device.read_only { "ro" } else { "rw" };
            add_words(command_line, &format!(" root=/dev/pmem{index} {mode}"));
            if knows_dax(&file) && !has_word(command_line, "rootflags=") {
                add_words(command_line, " rootflags=dax");
            }
        }
        open.push(Pmem {
            id: device.id.clone(),
            file,
            read_only: device.read_only,
            limit: device.rate_limiter,
        });
    }
    Ok(open)
}

/// Adds words (each with a space before it) to the kernel's part: what follows `--` is for init.
fn add_words(command_line: &mut String, words: &str) {
    let end = command_line.find(" -- ").unwrap_or(command_line.len());
    command_line.insert_str(end, words);
}

fn has_word(command_line: &str, start: &str) -> bool {
    command_line
        .split_whitespace()
        .any(|word| word.starts_with(start))
}

fn check_balloon(balloon: Option<Balloon>, memory_mib: u64) -> Result<Option<Balloon>, Error> {
    if let Some(balloon) = &balloon {
        if u64::from(balloon.amount_mib) > memory_mib {
            let allowed = format!("up to {memory_mib}, the guest's memory");
            return Err(value("amount_mib", balloon.amount_mib, allowed));
        }
        if balloon.free_page_hinting {
            return Err(value("free_page_hinting", true, "false"));
        }
    }
    Ok(balloon)
}

fn open_interface(interface: &NetworkInterface, inherited: &mut Inherited) -> Result<Interface, Error> {
    let name = &interface.host_dev_name;
    let what = format!("network interface {}", interface.iface_id);
    let tap = match inherited.named(&what, name)? {
        Some(fd) => fd.into(),
        None => tap::open(name)?,
    };
    tap::prepare(&tap, name)?;
    let mac = interface.guest_mac.as_deref().map(parse_mac).transpose()?;
    let vhost = open_vhost(interface, inherited)?;
    Ok(Interface {
        id: interface.iface_id.clone(),
        tap,
        vhost,
        options: net::Options {
            mac,
            mtu: interface.mtu,
            rx_rate_limiter: interface.rx_rate_limiter,
            tx_rate_limiter: interface.tx_rate_limiter,
        },
    })
}

fn open_vhost(interface: &NetworkInterface, inherited: &mut Inherited) -> Result<Option<File>, Error> {
    let Some(path) = &interface.vhost else {
        return Ok(None);
    };
    let what = format!("vhost of network interface {}", interface.iface_id);
    if interface.rx_rate_limiter.is_some() || interface.tx_rate_limiter.is_some() {
        let allowed = "absent where rx_rate_limiter or tx_rate_limiter is given: the kernel limits no frames";
        return Err(value(what, path, allowed));
    }
    Ok(Some(inherited.file(&what, path, true)?))
}

fn open_park(park: &mandoline_api::monitor::Park, inherited: &mut Inherited) -> Result<Park, Error> {
    if let Some(ms) = park.idle_ms
        && ms < MIN_IDLE_MS
    {
        return Err(value("park.idle_ms", ms, format!("{MIN_IDLE_MS} or more")));
    }
    let file = match inherited.named("park file", &park.mem_file_path)? {
        Some(fd) => fd.into(),
        // It will hold all that the guest has in memory: nobody else may read it.
        None => File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&park.mem_file_path)
            .map_err(|error| fds::open_error("park file", park.mem_file_path.as_ref(), error))?,
    };
    let idle = park.idle_ms.map(Duration::from_millis);
    Ok(Park { file, idle })
}

fn open_vsock(uds_path: &str, inherited: &mut Inherited) -> Result<(UnixListener, Outward), Error> {
    let (listener, by_path) = match inherited.named("vsock", uds_path)? {
        Some(fd) => (UnixListener::from(fd), Outward::None),
        None => {
            let path = PathBuf::from(uds_path);
            let listener =
                UnixListener::bind(&path).map_err(|error| fds::open_error("vsock", &path, error))?;
            (listener, Outward::Path(path))
        }
    };
    let outward = inherited.take(VSOCK_OUT_FD).map_or(by_path, Outward::Broker);
    Ok((listener, outward))
}

fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let error = || value("guest_mac", text, "a unicast address like 02:00:0a:80:00:02");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(error)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
    }
    // Multicast and zero addresses are no host's.
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(error());
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[0xe2, 0xe1, 0xf5, 0xe0], 1024)
                .unwrap();
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
}
