//! `nodemgr.toml`: everything has a default that fits a packaged node, so an empty file is a good one.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};
use mandoline_limits::Rate;
use mandoline_rspec::{
    AuthorityName, KVM_MICROVM, MANDOLINE, Profile, Rspec, SliceId, SliceName, parse_rate,
};
use serde::Deserialize;

use crate::caller::{Service, Services};
use crate::host_service::{HOST_SERVICE, Program};
use crate::kvm;
use crate::net::NetworkConfig;
use crate::ops::Overbook;
use crate::owner::Entry;
use crate::policy::SITE_ADMIN;
use crate::pressure::PressureConfig;
use crate::qemu::{QEMU_MICROVM, QemuConfig};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a setting that does not exist.
    #[error("configuration {}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A setting has a value that it cannot have.
    #[error("configuration: {setting} = {value}: {message}")]
    Value {
        /// The setting.
        setting: String,
        /// Its value.
        value: String,
        /// What is wrong, and what is allowed.
        message: String,
    },
}

/// The configuration as it stands in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What must survive a power cut: state, disks, templates.
    pub state_dir: PathBuf,
    /// Sockets, and what lives as long as the machine runs.
    pub run_dir: PathBuf,
    /// Logs and consoles of slivers.
    pub log_dir: PathBuf,
    /// The owner's script, applied at each start.
    pub owner_script: PathBuf,
    /// The authority of slice names that name none.
    pub default_authority: AuthorityName,
    /// Names of the node beside `site_admin` and `pl_conf`.
    pub local_names: Vec<SliceName>,
    /// Services of the host: the slice that they act as, to who they are.
    pub services: BTreeMap<SliceName, ServiceConfig>,
    /// Names of virtualisations that are accepted for another: `linux_vserver = "kvm-microvm"`.
    pub vm_type_names: BTreeMap<String, String>,
    /// What the node has: attributes that replace what was found out.
    pub capacity: toml::Table,
    /// How far limits may be overbooked.
    pub overbook: OverbookConfig,
    /// The defaults of what a sliver's pools do not name: a profile of `docs/rspec.md`.
    pub default_profile: String,
    /// The owner's own sliver.
    pub site_admin: SiteAdminConfig,
    /// CPU shares of 1000 that are kept for the node's own services.
    pub host_cpu_shares: u64,
    /// The slivers' network.
    pub network: NetConfig,
    /// The `kvm-microvm` backend.
    pub kvm: kvm::KvmConfig,
    /// The `qemu-microvm` backend.
    pub qemu: QemuConfig,
    /// Accounts for ssh through the node.
    pub accounts: AccountsConfig,
    /// When the node is short of memory or disk.
    pub pressure: PressureConfig,
    /// The sensors.
    pub sensors: SensorsConfig,
}

/// The sensors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SensorsConfig {
    /// Where they listen on the node, an address of its loopback; `""`: nowhere. Slivers reach them over vsock.
    #[serde(deserialize_with = "address_or_off")]
    pub listen: Option<SocketAddr>,
}

impl Default for SensorsConfig {
    /// The papers' port (OS paper, section 4.4.1).
    fn default() -> Self {
        Self {
            listen: Some((Ipv4Addr::LOCALHOST, 33080).into()),
        }
    }
}

/// An address, or `""` for none.
fn address_or_off<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    match text.as_str() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// A service of the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// The user that it runs as, by name.
    #[serde(default)]
    pub user: Option<String>,
    /// The user that it runs as, by number.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Authorities whose slices it may make slivers for.
    #[serde(default)]
    pub authorities: Vec<AuthorityName>,
    /// The Unix socket on which slivers reach it, by its name here.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// The program with its arguments, by which `host-service` runs it when a pool is bound to it; empty: the host
    /// runs it by other means.
    #[serde(default)]
    pub command: Vec<String>,
    /// What root runs before each start of `command`.
    #[serde(default)]
    pub prepare: Vec<String>,
}

/// How far limits may be overbooked: the sum of all slivers' over what the node has.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OverbookConfig {
    /// Of memory.
    pub memory: f64,
    /// Of disk.
    pub disk: f64,
}

impl Default for OverbookConfig {
    /// Guests rarely touch all their memory, and sparse disks stay small: PlanetLab overbooked both far more.
    fn default() -> Self {
        Self {
            memory: 2.0,
            disk: 10.0,
        }
    }
}

/// `site_admin`, the owner's own sliver (architecture paper, section 5.2.3): there is one when there is a key
/// that can log in to it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteAdminConfig {
    /// Keys of the site's technical and administrative contacts, as in an authorized_keys file.
    pub keys: PathBuf,
    /// Its resources, in per cent of the node where wanted.
    pub rspec: toml::Table,
}

impl Default for SiteAdminConfig {
    fn default() -> Self {
        Self {
            keys: "/etc/mandoline/node/site_admin.keys".into(),
            rspec: toml::Table::new(),
        }
    }
}

/// The slivers' network.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// Network of the slivers' addresses.
    pub net: Ipv4Net,
    /// Network of the slivers' IPv6 addresses, routed to the node; absent: they have none.
    pub net6: Option<Ipv6Net>,
    /// First port of the slivers' blocks of source ports.
    pub first_port: u16,
    /// Ports of one sliver.
    pub ports: u16,
    /// What all slivers together may send: `"100 Mbit/s"`.
    pub node_rate: String,
    /// Packets a second that one sliver may send of those that alarm the world: ICMP, IP options.
    pub alarms: u16,
    /// Flows that the node tracks at once; absent: as its memory allows.
    pub flows: Option<u32>,
    /// Links to the outside; empty: that of the default route.
    pub uplinks: Vec<String>,
    /// The node's address for its slivers' flows; absent: the first of the first uplink.
    pub node_address: Option<Ipv4Addr>,
    /// The program that loads the packet filter.
    pub nft: PathBuf,
    /// Largest packet of a sliver, in bytes.
    pub mtu: u32,
    /// Name servers of the slivers; empty: the node's own that are not on its loopback.
    pub dns: Vec<std::net::IpAddr>,
}

impl Default for NetConfig {
    fn default() -> Self {
        let network = NetworkConfig::default();
        Self {
            net: network.net,
            net6: network.net6,
            first_port: network.first_port,
            ports: network.ports,
            node_rate: "100 Mbit/s".to_owned(),
            alarms: network.alarms,
            flows: network.flows,
            uplinks: network.uplinks,
            node_address: network.node_address,
            nft: network.nft,
            mtu: network.mtu,
            dns: Vec::new(),
        }
    }
}

/// Accounts for ssh through the node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccountsConfig {
    /// Directory that libnss-extrausers reads.
    pub directory: PathBuf,
    /// User id of the sliver with index 0.
    pub first_uid: u32,
    /// Shell of the accounts: they only pass through to their sliver.
    pub shell: PathBuf,
}

impl Default for AccountsConfig {
    fn default() -> Self {
        Self {
            directory: "/var/lib/extrausers".into(),
            first_uid: 200_000,
            shell: "/usr/sbin/nologin".into(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        // The names are constants that keep the rules; a test reads them.
        let authority = || AuthorityName::new("plc").ok();
        let scs = ServiceConfig {
            user: Some("pl_conf".to_owned()),
            uid: None,
            authorities: authority().into_iter().collect(),
            ..ServiceConfig::default()
        };
        Self {
            state_dir: "/var/lib/mandoline".into(),
            run_dir: "/run/mandoline".into(),
            log_dir: "/var/log/mandoline".into(),
            owner_script: "/etc/mandoline/node/owner.json".into(),
            default_authority: default_authority(),
            local_names: Vec::new(),
            services: SliceName::new("pl_conf")
                .ok()
                .map(|name| (name, scs))
                .into_iter()
                .collect(),
            vm_type_names: BTreeMap::new(),
            capacity: toml::Table::new(),
            overbook: OverbookConfig::default(),
            default_profile: MANDOLINE.name.to_owned(),
            site_admin: SiteAdminConfig::default(),
            host_cpu_shares: 100,
            network: NetConfig::default(),
            kvm: kvm::KvmConfig::default(),
            qemu: QemuConfig::default(),
            accounts: AccountsConfig::default(),
            sensors: SensorsConfig::default(),
            pressure: PressureConfig::default(),
        }
    }
}

fn default_authority() -> AuthorityName {
    match AuthorityName::new("plc") {
        Ok(name) => name,
        Err(error) => unreachable!("{error}"),
    }
}

impl Config {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::File {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |setting: &str, value: String, message: &str| {
            Err(ConfigError::Value {
                setting: setting.to_owned(),
                value,
                message: message.to_owned(),
            })
        };
        if let Some(name) = self.local_names.iter().find(|name| name.as_str().contains('.')) {
            let message =
                "a name of the node may hold no dot: what stands before the first dot is an authority";
            return refuse("local_names", name.to_string(), message);
        }
        if self.host_cpu_shares > mandoline_rspec::CPU_SHARES {
            return refuse(
                "host_cpu_shares",
                self.host_cpu_shares.to_string(),
                "allowed: 0 to 1000",
            );
        }
        for (setting, value) in [
            ("overbook.memory", self.overbook.memory),
            ("overbook.disk", self.overbook.disk),
        ] {
            if !(value > 0.0 && value <= 1000.0) {
                return refuse(setting, value.to_string(), "allowed: above 0, at most 1000");
            }
        }
        for (setting, value) in [
            ("pressure.swap_percent", self.pressure.swap_percent),
            ("pressure.memory_percent", self.pressure.memory_percent),
        ] {
            if !(1..=100).contains(&value) {
                return refuse(setting, value.to_string(), "allowed: 1 to 100");
            }
        }
        for (name, backend) in &self.vm_type_names {
            if ![KVM_MICROVM, QEMU_MICROVM, HOST_SERVICE].contains(&backend.as_str()) {
                let setting = format!("vm_type_names.{name}");
                return refuse(
                    &setting,
                    backend.clone(),
                    "allowed: the name of a backend, kvm-microvm, qemu-microvm or host-service",
                );
            }
        }
        self.profile()?;
        self.site_admin()?;
        if let Some(listen) = self.sensors.listen.filter(|listen| !listen.ip().is_loopback()) {
            let message = "allowed: an address of the loopback, such as 127.0.0.1:33080, or \"\" for none";
            return refuse("sensors.listen", listen.to_string(), message);
        }
        self.node_rate()?;
        self.capacity()?;
        Ok(())
    }

    /// What all slivers together may send, in bit/s.
    pub fn node_rate(&self) -> Result<u64, ConfigError> {
        parse_rate(&self.network.node_rate).map_err(|problem| ConfigError::Value {
            setting: "network.node_rate".to_owned(),
            value: self.network.node_rate.clone(),
            message: format!("is {problem}; allowed: a rate like \"100 Mbit/s\""),
        })
    }

    /// The attributes of `[capacity]`.
    pub fn capacity(&self) -> Result<Rspec, ConfigError> {
        let value = |message: String| ConfigError::Value {
            setting: "capacity".to_owned(),
            value: "the table".to_owned(),
            message,
        };
        let json = serde_json::to_value(&self.capacity).map_err(|e| value(e.to_string()))?;
        Rspec::from_json(&json).map_err(|e| value(e.to_string()))
    }

    /// The settings of the slivers' network.
    pub fn network(&self) -> Result<NetworkConfig, ConfigError> {
        let network = &self.network;
        let node_rate = Rate::from_bits_per_second(self.node_rate()?).map_err(|e| ConfigError::Value {
            setting: "network.node_rate".to_owned(),
            value: network.node_rate.clone(),
            message: e.to_string(),
        })?;
        Ok(NetworkConfig {
            net: network.net,
            net6: network.net6,
            first_port: network.first_port,
            ports: network.ports,
            node_rate,
            alarms: network.alarms,
            flows: network.flows,
            uplinks: network.uplinks.clone(),
            node_address: network.node_address,
            nft: network.nft.clone(),
            mtu: network.mtu,
            ..NetworkConfig::default()
        })
    }

    /// The defaults of what a sliver's pools do not name.
    pub fn profile(&self) -> Result<Profile, ConfigError> {
        Profile::named(&self.default_profile).map_err(|error| ConfigError::Value {
            setting: "default_profile".to_owned(),
            value: self.default_profile.clone(),
            message: error.to_string(),
        })
    }

    /// The owner's own sliver, if there are keys for it.
    pub fn site_admin(&self) -> Result<Option<Entry>, ConfigError> {
        let admin = &self.site_admin;
        let text = match std::fs::read_to_string(&admin.keys) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(ConfigError::File {
                    path: admin.keys.clone(),
                    source,
                });
            }
        };
        let lines = text.lines().map(str::trim);
        let keys: Vec<&str> = lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        if keys.is_empty() {
            return Ok(None);
        }
        let value = |message: String| ConfigError::Value {
            setting: "site_admin".to_owned(),
            value: admin.keys.display().to_string(),
            message,
        };
        let mut rspec = serde_json::to_value(&admin.rspec).map_err(|e| value(e.to_string()))?;
        if let Some(fields) = rspec.as_object_mut() {
            fields.entry("vm_type").or_insert_with(|| KVM_MICROVM.into());
            fields.insert("keys".to_owned(), keys.into());
        }
        let slice: SliceId = SITE_ADMIN
            .parse()
            .map_err(|e: mandoline_rspec::NameError| value(e.to_string()))?;
        Ok(Some(Entry {
            bind: Some(slice.clone()),
            slice,
            rspec,
        }))
    }

    /// How far limits may be overbooked.
    pub fn overbook(&self) -> Overbook {
        Overbook {
            memory: self.overbook.memory,
            disk: self.overbook.disk,
        }
    }

    /// The services that `host-service` runs, by the slice that they act as. None of them is root.
    pub fn programs(&self, passwd: &str) -> BTreeMap<SliceId, Program> {
        let found = self.services.iter().filter_map(|(name, service)| {
            if service.command.is_empty() {
                return None;
            }
            let by_name = service.user.as_deref().and_then(|user| uid_of(passwd, user));
            let Some(uid) = service.uid.or(by_name).filter(|uid| *uid != 0) else {
                tracing::warn!(%name, user = service.user, "service has no user but root on this node: it is not run");
                return None;
            };
            let program = Program {
                command: service.command.clone(),
                prepare: service.prepare.clone(),
                uid,
                // A number without an entry has the group of its own number, as user private groups have it.
                gid: gid_of(passwd, uid).unwrap_or(uid),
            };
            Some((SliceId::local(name.clone()), program))
        });
        found.collect()
    }

    /// The services of the host, by uid. A user that does not exist is left out with a warning: the service
    /// may not be installed.
    pub fn services(&self, passwd: &str) -> Services {
        let found = self.services.iter().filter_map(|(slice, service)| {
            let by_name = service.user.as_deref().and_then(|user| uid_of(passwd, user));
            let Some(uid) = service.uid.or(by_name) else {
                // One that slivers call need not call itself.
                if service.user.is_none() && service.socket.is_some() {
                    return None;
                }
                tracing::warn!(%slice, user = service.user, "service has no user on this node: it cannot call");
                return None;
            };
            let slice = SliceId::local(slice.clone());
            Some((uid, Service { slice, authorities: service.authorities.clone() }))
        });
        Services::new(found)
    }
}

impl Config {
    /// Sockets of the services that slivers reach, by name.
    pub fn service_sockets(&self) -> Vec<(String, PathBuf)> {
        let sockets = self.services.iter();
        sockets
            .filter_map(|(name, service)| Some((name.to_string(), service.socket.clone()?)))
            .collect()
    }
}

/// A user's group, from the text of `/etc/passwd`.
fn gid_of(passwd: &str, uid: u32) -> Option<u32> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse() == Ok(uid)).then(|| fields.next()?.parse().ok())?
    })
}

/// A user's number, from the text of `/etc/passwd`: services are local users, not a directory's.
fn uid_of(passwd: &str, user: &str) -> Option<u32> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == user).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_a_good_one() {
        let config: Config = toml::from_str("").unwrap();
        config.check().unwrap();
        assert_eq!(config.services.len(), 1);
        assert_eq!(config.node_rate().unwrap(), 100_000_000);
        assert_eq!(
            uid_of("root:x:0:0::/:\npl_conf:x:990:990::/:/bin/false\n", "pl_conf"),
            Some(990)
        );
    }

    #[test]
    fn services_with_a_command_run_as_their_user_and_never_as_root() {
        let text = "[services.pl_conf]\nuser = \"pl_conf\"\ncommand = [\"/bin/scs\", \"-v\"]\n[services.a_b]\nuid = 0\n\
                    command = [\"/bin/b\"]\n[services.c_d]\nuid = 7\n[services.e_f]\nuid = 8\ncommand = [\"/bin/e\"]";
        let config: Config = toml::from_str(text).unwrap();
        let programs = config.programs("root:x:0:0::/:\npl_conf:x:990:991::/:/bin/false\n");
        let named: Vec<_> = programs
            .iter()
            .map(|(slice, p)| (slice.to_string(), p.uid, p.gid))
            .collect();
        assert_eq!(
            named,
            [("e_f".to_owned(), 8, 8), ("pl_conf".to_owned(), 990, 991)]
        );
    }

    #[test]
    fn wrong_settings_are_named() {
        for (text, names) in [
            ("stat_dir = \"/x\"", "stat_dir"),
            ("host_cpu_shares = 1001", "host_cpu_shares"),
            ("[network]\nnode_rate = \"fast\"", "node_rate"),
            ("[capacity]\nmem_limit = -1", "mem_limit"),
            ("[vm_type_names]\nlinux_vserver = \"chroot\"", "chroot"),
            ("local_names = [\"a.b_c\"]", "a.b_c"),
            ("local_names = [\"A\"]", "slice name"),
            ("[sensors]\nlisten = \"0.0.0.0:33080\"", "sensors.listen"),
            ("[overbook]\nmemory = 0", "overbook.memory"),
            ("default_profile = \"plc\"", "planetlab-paper"),
            ("[pressure]\nswap_percent = 0", "pressure.swap_percent"),
        ] {
            let message = match toml::from_str::<Config>(text) {
                Ok(config) => config.check().unwrap_err().to_string(),
                Err(error) => error.to_string(),
            };
            assert!(message.contains(names), "{text}: {message}");
        }
    }
}
