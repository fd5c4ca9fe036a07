//! Opens what a configuration names.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use mandoline_api::monitor::{
    CacheType, NetworkInterface, Park as ParkConfig, Pmem as PmemConfig, VSOCK_OUT_FD, VmConfig,
};

use super::command_line::{DEFAULT_COMMAND_LINE, add_words, has_word, root};
use super::{Drive, Error, Interface, Park, Pmem, Spec, Vsock, check, check_balloon, parse_mac, value};
use crate::devices::net::tap;
use crate::devices::pmem::file_system::knows_dax;
use crate::devices::vsock::outward::Outward;
use crate::devices::{blk, net};
use crate::fds::{self, Inherited};

/// Shortest time after which an idle VM parks by itself, in ms.
const MIN_IDLE_MS: u64 = 100;

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

/// Opens persistent memory, and names the root on the command line if it is there.
pub(super) fn open_pmem(
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

pub(super) fn open_vhost(
    interface: &NetworkInterface,
    inherited: &mut Inherited,
) -> Result<Option<File>, Error> {
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

fn open_park(park: &ParkConfig, inherited: &mut Inherited) -> Result<Park, Error> {
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
