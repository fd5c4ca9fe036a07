//! The command line of a node's QEMU.

use crate::Accel;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// MAC address of a node's uplink: the n-th node of a lab.
pub(crate) fn uplink_mac(n: u8) -> String {
    format!("52:54:00:4d:00:{n:02x}")
}

/// MAC address of a node's interface in the joint network.
pub(crate) fn joint_mac(n: u8) -> String {
    format!("52:54:00:4d:01:{n:02x}")
}

/// The QEMU that nodes run on: `MANDOLINE_QEMU` (see guest-image/node/qemu), else the installed one.
pub(crate) fn program() -> OsString {
    std::env::var_os("MANDOLINE_QEMU")
        .filter(|program| !program.is_empty())
        .unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// What goes into the machine.
pub(crate) struct Machine<'a> {
    pub(crate) accel: Accel,
    /// Which node of the lab, from 1.
    pub(crate) number: u8,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u8,
    pub(crate) image: &'a Path,
    /// Where sockets and logs go.
    pub(crate) dir: &'a Path,
    /// (serial, image, writable)
    pub(crate) disks: Vec<(&'static str, PathBuf, bool)>,
    pub(crate) ssh_port: u16,
    pub(crate) join_socket: PathBuf,
    /// `mandoline-lab`, and the host's service that the node reaches at 10.0.2.100:80.
    pub(crate) service: Option<(PathBuf, SocketAddr)>,
    pub(crate) extra_append: &'a str,
}

/// QEMU's syntax for a value in a comma-separated option: commas are doubled.
fn quoted(path: &Path) -> OsString {
    path.to_string_lossy().replace(',', ",,").into()
}

fn with(prefix: &str, path: &Path, suffix: &str) -> OsString {
    let mut option = OsString::from(prefix);
    option.push(quoted(path));
    option.push(suffix);
    option
}

impl Machine<'_> {
    /// The whole command.
    pub(crate) fn command(&self) -> Command {
        let mut c = Command::new(program());
        // `kvm` machines keep the whole CPU. Emulated ones: la57 off, since a fifth level of page tables makes every
        // nested walk longer; pku off, since its XSAVE leaf is inconsistent there and slivers' kernels warn at length.
        let (accel, cpu) = match self.accel {
            Accel::Kvm => ("kvm", "host"),
            Accel::TcgSvm => ("tcg,thread=multi,tb-size=512", "max,+svm,+npt,-pku,-la57"),
        };
        c.args(["-name", &format!("mandoline-lab-node{}", self.number)])
            .args([
                "-machine",
                "pc,usb=off,vmport=off,hpet=off",
                "-accel",
                accel,
                "-cpu",
                cpu,
            ])
            .args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-chardev")
            .arg(with("file,id=console,path=", &self.dir.join("console.log"), ""))
            .args(["-serial", "chardev:console"])
            .arg("-qmp")
            .arg(with("unix:", &self.dir.join("qmp"), ",server=on,wait=off"));
        c.arg("-kernel")
            .arg(self.image.join("vmlinux"))
            .arg("-initrd")
            .arg(self.image.join("initrd"));
        // The calibrations and mitigations that are left out cost an emulated node seconds and protect nobody there.
        let append = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 tsc=reliable no_timer_check mitigations=off audit=0 \
             random.trust_cpu=on rcupdate.rcu_expedited=1 {}",
            self.extra_append
        );
        c.args(["-append", append.trim()]);
        for (n, (serial, image, writable)) in self.disks.iter().enumerate() {
            // The state disk is gone with the lab, so flushing it to the host's disk would protect nothing.
            let mode = if *writable {
                ",cache=unsafe,discard=unmap,detect-zeroes=off"
            } else {
                ",readonly=on"
            };
            c.arg("-drive")
                .arg(with(&format!("if=none,id=disk{n},format=raw,file="), image, mode));
            c.args([
                "-device",
                &format!("virtio-blk-pci,drive=disk{n},serial={serial},romfile="),
            ]);
        }
        c.args(["-device", "virtio-rng-pci"]);
        // Restricted: no packet of a node leaves this machine, and it reaches only what is forwarded here.
        let mut net = OsString::from(format!(
            "user,id=uplink,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{}-10.0.2.15:22",
            self.ssh_port
        ));
        if let Some((program, address)) = &self.service {
            net.push(with(
                ",guestfwd=tcp:10.0.2.100:80-cmd:",
                program,
                &format!(" connect {address}"),
            ));
        }
        c.arg("-netdev").arg(net);
        c.args([
            "-device",
            &format!(
                "virtio-net-pci,netdev=uplink,mac={},romfile=",
                uplink_mac(self.number)
            ),
        ]);
        c.arg("-netdev").arg(with(
            "stream,id=joint,server=off,addr.type=unix,addr.path=",
            &self.join_socket,
            "",
        ));
        c.args([
            "-device",
            &format!(
                "virtio-net-pci,netdev=joint,mac={},romfile=",
                joint_mac(self.number)
            ),
        ]);
        c
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(accel: Accel) -> String {
        let machine = Machine {
            accel,
            number: 2,
            memory_mib: 1024,
            cpus: 2,
            image: Path::new("/i"),
            dir: Path::new("/d,x"),
            disks: vec![
                ("mandoline-root", "/i/node.erofs".into(), false),
                ("mandoline-state", "/d/s".into(), true),
            ],
            ssh_port: 2222,
            join_socket: "/d/join".into(),
            service: Some(("/bin/mandoline-lab".into(), ([127, 0, 0, 1], 80).into())),
            extra_append: "",
        };
        let command = machine.command();
        command
            .get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn nothing_listens_or_leaves_beyond_loopback() {
        let line = machine(Accel::TcgSvm);
        assert!(line.contains("restrict=on"));
        for forward in line.split("hostfwd=").skip(1) {
            assert!(forward.starts_with("tcp:127.0.0.1:"), "{forward}");
        }
    }

    #[test]
    fn disks_are_found_by_serial_and_only_the_state_is_writable() {
        let line = machine(Accel::TcgSvm);
        assert!(line.contains("file=/i/node.erofs,readonly=on"));
        assert!(line.contains("serial=mandoline-state"));
        assert_eq!(line.matches("cache=unsafe").count(), 1);
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert!(machine(Accel::Kvm).contains("path=/d,,x/console.log"));
    }
}
