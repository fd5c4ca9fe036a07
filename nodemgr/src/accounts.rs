//! Accounts for ssh through the node: the files that libnss-extrausers reads, and the keys that sshd asks for.
//!
//! A slice's account may only open a stream to port 22 of its own sliver, so `ssh -J account@node
//! root@address` lands inside the sliver and nowhere else.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::config::AccountsConfig;
use crate::vm_type::SliverSpec;

/// Kinds of keys that sshd is told of. A line that starts with anything else could carry options of its
/// own, and is left out.
const KEY_TYPES: [&str; 8] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-dss",
];

/// The lines that sshd's AuthorizedKeysCommand prints for a sliver's account.
pub fn authorized_keys(sliver: &SliverSpec, address: IpAddr) -> String {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let options = format!("restrict,port-forwarding,permitopen=\"{host}:22\",command=\"/usr/sbin/nologin\"");
    let usable = |line: &&String| {
        let kind = line.split_whitespace().next().unwrap_or("");
        KEY_TYPES.contains(&kind) && !line.chars().any(char::is_control)
    };
    sliver
        .rspec
        .keys()
        .iter()
        .filter(usable)
        .map(|line| format!("{options} {line}\n"))
        .collect()
}

/// Writes the accounts of all slivers. A file is replaced in one step and only when it changes, so that who
/// logs in at that moment finds a whole one.
pub fn write(config: &AccountsConfig, slivers: &[SliverSpec]) -> io::Result<()> {
    let (mut passwd, mut group, mut shadow) = (String::new(), String::new(), String::new());
    let mut sorted: Vec<&SliverSpec> = slivers.iter().collect();
    sorted.sort_by_key(|sliver| (sliver.account.as_str(), sliver.vm_id));
    // While a sliver is being destroyed its slice may have a new one: the account is the new one's.
    let mut newest: Vec<&SliverSpec> = Vec::with_capacity(sorted.len());
    for sliver in sorted {
        match newest.last_mut() {
            Some(last) if last.account == sliver.account => *last = sliver,
            _ => newest.push(sliver),
        }
    }
    for sliver in newest {
        let (name, id) = (&sliver.account, config.first_uid + u32::from(sliver.index));
        let shell = config.shell.display();
        passwd.push_str(&format!("{name}:x:{id}:{id}:slice {}:/:{shell}\n", sliver.slice));
        group.push_str(&format!("{name}:x:{id}:\n"));
        // "*": no password opens it, but it is not locked, so keys do.
        shadow.push_str(&format!("{name}:*:19000:0:99999:7:::\n"));
    }
    fs::create_dir_all(&config.directory)?;
    for (file, text, mode) in [
        ("group", &group, 0o644),
        ("shadow", &shadow, 0o640),
        ("passwd", &passwd, 0o644),
    ] {
        replace(&config.directory.join(file), text, mode)?;
    }
    Ok(())
}

fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_rspec::Rspec;

    fn sliver(account: &str, vm_id: u32, keys: &[&str]) -> SliverSpec {
        SliverSpec {
            vm_id,
            index: vm_id as u16,
            slice: format!("plc.{account}").parse().unwrap(),
            vm_type: mandoline_rspec::KVM_MICROVM.to_owned(),
            account: account.to_owned(),
            rspec: Rspec::from_json(&serde_json::json!({ "keys": keys })).unwrap(),
        }
    }

    #[test]
    fn a_key_opens_nothing_but_the_sliver() {
        let keys = [
            "ssh-ed25519 AAAA me",
            "command=\"/bin/sh\" ssh-ed25519 BBBB",
            "permitopen=\"*:*\" x y",
        ];
        let text = authorized_keys(&sliver("a_b", 1, &keys), "10.128.0.3".parse().unwrap());
        assert_eq!(
            text,
            "restrict,port-forwarding,permitopen=\"10.128.0.3:22\",command=\"/usr/sbin/nologin\" \
             ssh-ed25519 AAAA me\n"
        );
    }

    #[test]
    fn files_hold_one_account_a_slice() {
        let dir = tempfile::tempdir().unwrap();
        let config = AccountsConfig {
            directory: dir.path().join("extra"),
            ..AccountsConfig::default()
        };
        write(
            &config,
            &[
                sliver("c_d", 3, &[]),
                sliver("a_b", 1, &[]),
                sliver("a_b", 4, &[]),
            ],
        )
        .unwrap();
        let passwd = fs::read_to_string(config.directory.join("passwd")).unwrap();
        assert_eq!(
            passwd,
            "a_b:x:200004:200004:slice plc.a_b:/:/usr/sbin/nologin\n\
             c_d:x:200003:200003:slice plc.c_d:/:/usr/sbin/nologin\n"
        );
        let shadow = fs::read_to_string(config.directory.join("shadow")).unwrap();
        assert!(shadow.starts_with("a_b:*:"));
        write(&config, &[]).unwrap();
        assert_eq!(fs::read_to_string(config.directory.join("passwd")).unwrap(), "");
    }
}
