//! The way into a sliver: OpenSSH's own `ssh`, through the node's ssh server.
//!
//! ```text
//!   ssh root@10.128.0.5 ──ProxyCommand──► ssh -W 10.128.0.5:22 slice@node ──► sliver's sshd
//! ```
//!
//! Both hops are checked against host keys that came through the authority: there is no trust on first use,
//! and sliver addresses, which repeat from node to node, never get into the user's own `known_hosts`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use mandoline_api::authority::{Sliver, SliverState};

use crate::config::{base_dir, write_private};
use crate::error::{About, Error, Exit, Result};

/// What the user passes through to `ssh`.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct SshOptions {
    /// Private key to log in with, on the node and in the sliver.
    #[arg(short = 'i', value_name = "FILE")]
    pub(crate) identity: Vec<PathBuf>,
    /// User in the sliver.
    #[arg(short = 'l', value_name = "USER", default_value = "root")]
    pub(crate) login: String,
    /// ssh option, for both hops.
    #[arg(short = 'o', value_name = "OPTION")]
    pub(crate) option: Vec<String>,
    /// ssh configuration file, for both hops.
    #[arg(short = 'F', value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// Picks the sliver to log in to: the only one, or the one on `node`.
pub(crate) fn choose<'s>(slice: &str, slivers: &'s [Sliver], node: Option<&str>) -> Result<&'s Sliver> {
    let names = || {
        slivers
            .iter()
            .map(|sliver| sliver.hostname.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match (node, slivers) {
        (Some(node), _) => slivers
            .iter()
            .find(|sliver| sliver.hostname == node)
            .ok_or_else(|| {
                Error::new(
                    Exit::NotFound,
                    format!(
                        "slice {slice} has no sliver on {node}; it has slivers on: {}",
                        names()
                    ),
                )
            }),
        (None, [only]) => Ok(only),
        (None, []) => Err(
            Error::new(Exit::NotFound, format!("slice {slice} has no slivers"))
                .advise(format!("add one with `mandoline slice add-nodes {slice} NODE`")),
        ),
        (None, _) => {
            let running: Vec<_> = slivers
                .iter()
                .filter(|sliver| sliver.state == SliverState::Reachable)
                .collect();
            match running.as_slice() {
                [only] => Ok(only),
                _ => Err(Error::usage(format!("slice {slice} has slivers on: {}", names()))
                    .advise(format!("name one: mandoline ssh {slice} NODE"))),
            }
        }
    }
}

/// The `ssh` that logs in to `sliver` and runs `command` there (a shell, when it is empty). The host keys that it
/// checks against are written to `known_hosts`, or to the user's cache.
pub(crate) fn command(
    sliver: &Sliver,
    options: &SshOptions,
    command: &[String],
    known_hosts: Option<&Path>,
) -> Result<Command> {
    let text = known_hosts_text(sliver)?;
    let known_hosts =
        known_hosts.map_or_else(|| known_hosts_path(sliver, &text), |path| Ok(path.to_owned()))?;
    write_private(&known_hosts, text.as_bytes()).about(known_hosts.display())?;
    build(sliver, options, command, &known_hosts)
}

/// A file of its own for each set of host keys: authorities may name slices and nodes alike, and a login at one must
/// not change what another, at the same time, is checked against.
fn known_hosts_path(sliver: &Sliver, text: &str) -> Result<PathBuf> {
    let mut keys = DefaultHasher::new();
    text.hash(&mut keys);
    let plain = |text: &str| text.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "_");
    let (slice, host, keys) = (plain(&sliver.slice), plain(&sliver.hostname), keys.finish());
    let name = format!("{slice}@{host}-{keys:016x}");
    Ok(base_dir("XDG_CACHE_HOME", ".cache")?
        .join("mandoline/known_hosts")
        .join(name))
}

fn node_alias(sliver: &Sliver) -> String {
    format!("mandoline-node-{}", sliver.hostname)
}

fn sliver_alias(sliver: &Sliver) -> String {
    format!("mandoline-sliver-{}-{}", sliver.slice, sliver.hostname)
}

fn known_hosts_text(sliver: &Sliver) -> Result<String> {
    let mut text = String::new();
    for (what, alias, keys) in [
        ("node", node_alias(sliver), &sliver.node_host_keys),
        ("sliver", sliver_alias(sliver), &sliver.ssh_host_keys),
    ] {
        let mut any = false;
        for (algorithm, key) in keys.iter().filter_map(|line| host_key(line)) {
            text.push_str(&format!("{alias} {algorithm} {key}\n"));
            any = true;
        }
        if !any {
            let message = format!(
                "the authority knows no ssh host key of the {what} ({})",
                sliver.hostname
            );
            return Err(Error::new(Exit::Unavailable, message)
                .advise("without it nobody can tell whom you would reach; is the sliver reachable yet?"));
        }
    }
    Ok(text)
}

/// Algorithm and key of a public key line; nothing else of it gets into a file that ssh trusts.
fn host_key(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (algorithm, key) = (words.next()?, words.next()?);
    let plain = |text: &str, more: &str| {
        text.chars()
            .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    (plain(algorithm, "-@.") && plain(key, "+/=") && !key.is_empty()).then_some((algorithm, key))
}

fn build(sliver: &Sliver, options: &SshOptions, command: &[String], known_hosts: &Path) -> Result<Command> {
    let unready = |what: &str| {
        let reason = sliver
            .reason
            .as_deref()
            .map(|reason| format!(" ({reason})"))
            .unwrap_or_default();
        let message = format!(
            "the sliver of {} on {} is {}{reason}: {what}",
            sliver.slice,
            sliver.hostname,
            sliver.state.as_str()
        );
        Error::new(Exit::Unavailable, message)
            .advise(format!("watch it with `mandoline sliver list {}`", sliver.slice))
    };
    let endpoint = sliver
        .ssh_endpoint
        .as_ref()
        .ok_or_else(|| unready("its node has not said where to log in"))?;
    let address = sliver
        .address
        .as_deref()
        .ok_or_else(|| unready("it has no address yet"))?;
    let address: IpAddr = address
        .parse()
        .about(format_args!("address {address:?} of the sliver"))?;
    for (what, text) in [
        ("host", &endpoint.host),
        ("account", &endpoint.user),
        ("name", &sliver.hostname),
    ] {
        // What starts with a dash would be an option to ssh.
        if text.starts_with('-')
            || text.is_empty()
            || text.contains(|c: char| c.is_whitespace() || c.is_control())
        {
            return Err(Error::failure(format!(
                "the authority gives {text:?} as the node's {what}; that cannot be right"
            )));
        }
    }

    let mut common: Vec<String> = Vec::new();
    if let Some(config) = &options.config {
        common.extend(["-F".into(), config.display().to_string()]);
    }
    for identity in &options.identity {
        common.extend(["-i".into(), identity.display().to_string()]);
    }
    let known = known_hosts.display().to_string().replace('%', "%%");
    for option in [
        format!("UserKnownHostsFile=\"{known}\""),
        "GlobalKnownHostsFile=/dev/null".into(),
        "StrictHostKeyChecking=yes".into(),
        "CheckHostIP=no".into(),
        "UpdateHostKeys=no".into(),
    ] {
        common.extend(["-o".into(), option]);
    }
    for option in &options.option {
        common.extend(["-o".into(), option.clone()]);
    }

    let target = match address {
        IpAddr::V4(address) => format!("{address}:22"),
        IpAddr::V6(address) => format!("[{address}]:22"),
    };
    let mut hop: Vec<String> = vec!["ssh".into(), "-W".into(), target];
    hop.extend([
        "-p".into(),
        endpoint.port.to_string(),
        "-l".into(),
        endpoint.user.clone(),
    ]);
    hop.extend(common.iter().cloned());
    hop.extend([
        "-o".into(),
        format!("HostKeyAlias={}", node_alias(sliver)),
        endpoint.host.clone(),
    ]);
    // ssh expands percent signs in the command and then gives it to a shell.
    let proxy = hop
        .iter()
        .map(|word| shell_quote(&word.replace('%', "%%")))
        .collect::<Vec<_>>()
        .join(" ");

    let mut ssh = Command::new("ssh");
    ssh.args(&common)
        .args(["-o", &format!("HostKeyAlias={}", sliver_alias(sliver))])
        .args(["-o", &format!("ProxyCommand={proxy}")])
        .args(["-l", &options.login])
        .arg(address.to_string());
    if !command.is_empty() {
        // As ssh itself does it: one line for the remote shell.
        ssh.arg("--").arg(command.join(" "));
    }
    Ok(ssh)
}

/// The word as a shell reads it back.
fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mandoline_api::authority::SshLogin;

    use super::*;

    pub(crate) fn sliver(hostname: &str, state: SliverState) -> Sliver {
        Sliver {
            slice: "demo_first".into(),
            node: 1,
            hostname: hostname.into(),
            state,
            reason: None,
            class: None,
            vm_id: Some("7".into()),
            address: Some("10.128.0.5".into()),
            ssh_endpoint: Some(SshLogin {
                host: "127.0.0.1".into(),
                port: 2201,
                user: "demo_first".into(),
            }),
            ssh_host_keys: vec!["ssh-ed25519 AAAAsliver root@sliver".into()],
            node_host_keys: vec!["ssh-ed25519 AAAAnode root@node".into()],
            vm_type: None,
            initscript: None,
            phases_us: Default::default(),
            updated: 0,
        }
    }

    fn words(sliver: &Sliver, options: &SshOptions, run: &[&str]) -> Vec<String> {
        let run: Vec<_> = run.iter().map(|word| (*word).to_owned()).collect();
        let command = build(sliver, options, &run, Path::new("/c/known 100%")).unwrap();
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn both_hops_check_keys_and_carry_the_options() {
        let options = SshOptions {
            identity: vec!["/k/my key".into()],
            login: "root".into(),
            option: vec!["BatchMode=yes".into()],
            config: None,
        };
        let words = words(
            &sliver("n1.lab", SliverState::Reachable),
            &options,
            &["echo", "hello"],
        );
        let proxy = words
            .iter()
            .find(|word| word.starts_with("ProxyCommand="))
            .unwrap();
        for part in [
            "ssh -W 10.128.0.5:22 -p 2201 -l demo_first",
            "-i '/k/my key'",
            "-o BatchMode=yes",
            "-o StrictHostKeyChecking=yes",
            // Once for ssh's file name, once more for the outer ssh's proxy command.
            "'UserKnownHostsFile=\"/c/known 100%%%%\"'",
            "-o HostKeyAlias=mandoline-node-n1.lab 127.0.0.1",
        ] {
            assert!(proxy.contains(part), "{proxy} lacks {part}");
        }
        for part in [
            "StrictHostKeyChecking=yes",
            "HostKeyAlias=mandoline-sliver-demo_first-n1.lab",
            "BatchMode=yes",
        ] {
            assert!(words.iter().any(|word| word == part), "{words:?} lacks {part}");
        }
        assert_eq!(words[words.len() - 3..], ["10.128.0.5", "--", "echo hello"]);
    }

    #[test]
    fn host_keys_cannot_smuggle_lines() {
        let mut sliver = sliver("n1.lab", SliverState::Reachable);
        sliver.ssh_host_keys = vec![
            "ssh-ed25519 AAAA x\n* ssh-ed25519 EVIL".into(),
            "@cert-authority * ssh-rsa B".into(),
        ];
        let text = known_hosts_text(&sliver).unwrap();
        assert_eq!(
            text,
            "mandoline-node-n1.lab ssh-ed25519 AAAAnode\nmandoline-sliver-demo_first-n1.lab ssh-ed25519 AAAA\n"
        );
        sliver.ssh_host_keys.clear();
        assert_eq!(known_hosts_text(&sliver).unwrap_err().exit, Exit::Unavailable);
    }

    #[test]
    fn an_authority_cannot_smuggle_options() {
        let mut sliver = sliver("n1.lab", SliverState::Reachable);
        sliver.ssh_endpoint = Some(SshLogin {
            host: "-oProxyCommand=evil".into(),
            port: 22,
            user: "x".into(),
        });
        assert!(build(&sliver, &SshOptions::default(), &[], Path::new("/c")).is_err());
        sliver.ssh_endpoint = None;
        assert_eq!(
            build(&sliver, &SshOptions::default(), &[], Path::new("/c"))
                .unwrap_err()
                .exit,
            Exit::Unavailable
        );
    }

    #[test]
    fn choosing() {
        let two = [
            sliver("a", SliverState::Failed),
            sliver("b", SliverState::Reachable),
        ];
        assert_eq!(choose("s", &two, None).unwrap().hostname, "b");
        assert_eq!(choose("s", &two, Some("a")).unwrap().hostname, "a");
        assert_eq!(choose("s", &two, Some("c")).unwrap_err().exit, Exit::NotFound);
        assert_eq!(choose("s", &[], None).unwrap_err().exit, Exit::NotFound);
        let both = [
            sliver("a", SliverState::Reachable),
            sliver("b", SliverState::Reachable),
        ];
        assert_eq!(choose("s", &both, None).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn shell_quoting() {
        assert_eq!(shell_quote("a-b=c/d"), "a-b=c/d");
        assert_eq!(shell_quote("it's"), "'it'\\''s'");
        assert_eq!(shell_quote("[::1]:22"), "'[::1]:22'");
        assert_eq!(shell_quote(""), "''");
    }
}
