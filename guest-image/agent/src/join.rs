//! *Join*: an *up* guest becomes one sliver. Steps in an order that matters: entropy before anything that
//! draws random numbers, the disk before anything that is written, sshd's port last. Each can be repeated.

use std::sync::TryLockError;
use std::time::Instant;

use mandoline_api::agent::{Join, JoinReply, JoinTimings, Phase};

use crate::agent::{Agent, Command, Life};
use crate::error::Error;
use crate::{identity, initscript, network, root, services, sshd};

/// Joins, and answers once sshd's port listens. `true`: this was the join that made the sliver, so its boot
/// script is to be started.
pub(crate) fn join(agent: &Agent, join: Box<Join>) -> Result<(JoinReply, bool), Error> {
    let began = Instant::now();
    check(&join)?;
    let mut life = match agent.life.try_lock() {
        Ok(life) => life,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return Err(Error::Busy("a join is being done".into())),
    };
    if agent.phase() == Phase::Stopping {
        return Err(Error::WrongPhase("the sliver is being shut down".into()));
    }
    if let Some((done, reply)) = &life.joined {
        return again(done, &join).map(|()| (reply.clone(), false));
    }
    agent.enter(Phase::Joining);
    match steps(agent, &mut life, &join, began) {
        Ok(reply) => {
            agent.enter(Phase::Joined);
            life.joined = Some((join, reply.clone()));
            Ok((reply, true))
        }
        Err(e) => {
            agent.enter(Phase::Up);
            Err(e)
        }
    }
}

/// Refuses what can be seen to be wrong before anything is done.
fn check(join: &Join) -> Result<(), Error> {
    let bad = |text: String| Err(Error::BadRequest(text));
    identity::check_entropy(&join.entropy.0)?;
    identity::check_hostname(&join.hostname)?;
    identity::check_keys(&join.keys)?;
    if join.slice.is_empty() || join.slice.len() > 255 || join.slice.chars().any(char::is_control) {
        return bad(format!(
            "slice is {:?}; 1 to 255 bytes without control characters are allowed",
            join.slice
        ));
    }
    if join.dns.len() > 8 {
        return bad(format!(
            "dns has {} servers; at most 8 are allowed",
            join.dns.len()
        ));
    }
    if let Some(disk) = join.disk.as_deref()
        && (!disk.starts_with("/dev/")
            || disk.contains(['\0', '\n'])
            || disk.split('/').any(|part| part == ".."))
    {
        return bad(format!(
            "disk is {disk:?}; a block device such as /dev/vdb is wanted"
        ));
    }
    join.interface.as_ref().map_or(Ok(()), network::check)?;
    join.initscript.as_deref().map_or(Ok(()), initscript::check)
}

/// A further join: the same sliver has the same answer (and its keys and name servers brought up to date),
/// another is refused.
fn again(done: &Join, join: &Join) -> Result<(), Error> {
    if (&done.slice, &done.hostname, &done.interface, &done.disk)
        != (&join.slice, &join.hostname, &join.interface, &join.disk)
    {
        return Err(Error::AlreadyJoined(format!(
            "this guest is {} of slice {}; it cannot become {} of slice {}",
            done.hostname, done.slice, join.hostname, join.slice
        )));
    }
    identity::feed_entropy(&join.entropy.0).map_err(|e| e.in_step("entropy"))?;
    network::name_servers(&join.dns).map_err(|e| e.in_step("network"))?;
    identity::write_keys(&join.keys)
        .map_err(|e| e.in_step("keys"))
        .map(drop)
}

fn steps(agent: &Agent, life: &mut Life, join: &Join, began: Instant) -> Result<JoinReply, Error> {
    let entropy = timed("entropy", || identity::feed_entropy(&join.entropy.0))?.1;

    let clock = timed("clock", || {
        join.time_unix_ns.map_or(Ok(()), identity::set_clock)?;
        identity::set_hostname(&join.hostname)
    })?
    .1;

    let disk = timed("disk", || match &life.root {
        None => {
            root::enter(join.disk.as_deref())?;
            life.root = Some(join.disk.clone());
            Ok(())
        }
        Some(disk) if *disk == join.disk => Ok(()),
        Some(disk) => Err(Error::AlreadyJoined(format!(
            "the root is on {disk:?} already, not {:?}",
            join.disk
        ))),
    })?
    .1;

    let network = timed("network", || {
        join.interface.as_ref().map_or(Ok(()), network::configure)?;
        network::name_servers(&join.dns)
    })?
    .1;

    let keys = timed("keys", || {
        identity::write_names(&join.hostname)?;
        identity::write_keys(&join.keys)
    })?
    .1;

    let (ssh_host_keys, sshd) = timed("sshd", || {
        let keys = sshd::prepare(&join.hostname)?;
        if !life.listening {
            agent.ask(Command::Ssh(sshd::listen()?));
            agent.ask(Command::Services(services::listen()));
            life.listening = true;
        }
        Ok(keys)
    })?;
    let timings_us = JoinTimings {
        entropy,
        clock,
        disk,
        network,
        keys,
        sshd,
        total: micros(began),
    };
    Ok(JoinReply {
        ssh_host_keys,
        timings_us,
    })
}

fn timed<T>(step: &'static str, work: impl FnOnce() -> Result<T, Error>) -> Result<(T, u64), Error> {
    let began = Instant::now();
    let done = work().map_err(|e| e.in_step(step))?;
    Ok((done, micros(began)))
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_api::agent::Bytes;

    fn sample() -> Join {
        Join {
            entropy: Bytes(vec![7; 32]),
            slice: "plc.princeton_codeen".into(),
            hostname: "codeen.node1".into(),
            time_unix_ns: None,
            interface: None,
            dns: vec![],
            disk: Some("/dev/vdb".into()),
            keys: vec![],
            initscript: None,
        }
    }

    #[test]
    fn a_join_is_checked_before_anything_is_done() {
        assert!(check(&sample()).is_ok());
        let bad = [
            Join {
                slice: String::new(),
                ..sample()
            },
            Join {
                slice: "a\nb".into(),
                ..sample()
            },
            Join {
                hostname: "no spaces".into(),
                ..sample()
            },
            Join {
                disk: Some("/etc/passwd".into()),
                ..sample()
            },
            Join {
                disk: Some("/dev/../etc/passwd".into()),
                ..sample()
            },
            Join {
                dns: vec!["::1".parse().expect("valid"); 9],
                ..sample()
            },
            Join {
                entropy: Bytes(vec![]),
                ..sample()
            },
            Join {
                initscript: Some("x".repeat(256 * 1024 + 1)),
                ..sample()
            },
        ];
        for join in bad {
            assert!(matches!(check(&join), Err(Error::BadRequest(_))), "{join:?}");
        }
    }

    #[test]
    fn another_sliver_is_refused() {
        let other = Join {
            hostname: "other".into(),
            ..sample()
        };
        assert!(matches!(again(&sample(), &other), Err(Error::AlreadyJoined(_))));
    }
}
