//! `mandoline demo`: from nothing to a sliver that one can ssh into, through every layer, and back to nothing.
//!
//! ```text
//!   authority ──► people, site, node ──► lab node ──► registered ──► slice ──► reachable ──► ssh ──► limits
//!       └────────────────────────── everything ends when this ends ──────────────────────────────────┘
//! ```
//!
//! It uses nothing that a user has not: the authority's REST interface, and the code of `mandoline slice create
//! --wait` and `mandoline ssh`. Only reading limits back from the node's kernel needs root on the node, which
//! the lab gives.

mod authority;
mod children;
mod limits;
mod node;
mod report;
mod workdir;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mandoline_api::authority::{NewSlice, Sliver};
use mandoline_api::authority_client::AuthorityClient;
use tokio::signal::unix::{SignalKind, signal};

use self::authority::Authority;
use self::node::LabNode;
use self::report::Report;
use self::workdir::WorkDir;
use crate::args;
use crate::error::{About, Error, Exit, Result};
use crate::output::Output;
use crate::rspec_args;
use crate::ssh::{self, SshOptions};
use crate::wait::{self, Progress};

/// The demo's names.
const SITE: &str = "demo";
const SLICE: &str = "demo_first";
const HOSTNAME: &str = "node1.demo.example";
const PERSON: &str = "alice@demo.example";

/// What is run in the sliver: which kernel, which system, how much of the machine.
const COMMAND: &str = "echo \"$(uname -srm), Debian $(cat /etc/debian_version), $(nproc) CPU, \
     $(awk '/^MemTotal/ {printf \"%d MiB\", $2 / 1024}' /proc/meminfo) memory, \
     disk $(df -h --output=size / | tail -n 1 | tr -d ' ')\"";

/// How long a sliver may take, under emulation and with everything cold.
const SLIVER_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs the demo; Ctrl-C ends it and cleans up.
pub(crate) async fn demo(output: Output, args: &args::Demo) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).about("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).about("signals")?;
    // What is dropped takes its programs and directories with it.
    let kept = Cell::new(false);
    let ended = |how: &str| match kept.get() {
        // That is how `--keep` ends.
        true => Ok(()),
        false => Err(Error::failure(format!("{how}; everything is taken down"))),
    };
    tokio::select! {
        result = play(output, args, &kept) => result,
        _ = terminate.recv() => ended("asked to end"),
        _ = interrupt.recv() => ended("interrupted"),
    }
}

async fn play(output: Output, args: &args::Demo, kept: &Cell<bool>) -> Result<()> {
    let rspec = rspec_args::rspec(
        None,
        &[
            "vm_type=kvm-microvm".to_owned(),
            format!("mem_limit={}", args.mem_limit),
            format!("cpu_share={}", args.cpu_share),
            format!("burst_rate={}", args.burst_rate),
        ],
    )?;
    let bin = programs()?;
    // Dropped in the reverse order: the node first, then the authority, then their directory.
    let dir = WorkDir::new()?;
    let say = |text: &str| eprintln!("demo: {text}");
    let start = Instant::now();

    say("starting an authority");
    let mut authority = Authority::start(&bin, dir.path()).await?;
    say(&format!(
        "authority at {} ({} ms)",
        authority.url,
        start.elapsed().as_millis()
    ));
    let people = authority.populate(dir.path()).await?;
    say(&format!("site {SITE}, {PERSON} with an ssh key, node {HOSTNAME}"));

    say("starting a node in the lab");
    let mut node = LabNode::start(&bin, dir.path(), &people.added, authority.port).await?;
    say(&format!(
        "node up in {} ms ({})",
        node.info.boot_ms, node.info.accel_words
    ));

    let work = async {
        node.wait_registered(&people.admin, HOSTNAME, &mut authority)
            .await?;
        say("the node has registered with the authority");

        let new = NewSlice {
            name: SLICE.into(),
            rspec: rspec.clone(),
            nodes: vec![HOSTNAME.into()],
            description: "the first slice".into(),
            ..NewSlice::default()
        };
        say(&format!("asking for slice {SLICE} with a sliver on {HOSTNAME}"));
        let (mut progress, request) = (Progress::new(output.json), Instant::now());
        people.user.create_slice(&new).await?;
        let created = request.elapsed();
        let slivers = tokio::select! {
            slivers = wait::until_reachable(&people.user, SLICE, SLIVER_TIMEOUT, &mut progress) => slivers?,
            error = authority.until_it_ends() => return Err(error),
        };
        let reachable = request.elapsed();
        let sliver = slivers
            .first()
            .ok_or_else(|| Error::failure("the slice has no sliver"))?;

        let options = ssh_options(people.key.clone());
        let said = run_in_sliver(sliver, &options, dir.path()).await?;
        let first_command = request.elapsed();
        say(&format!("in the sliver, over ssh: {said}"));

        let limits = limits::read_back(&node, sliver, &rspec).await?;
        Ok(Report::new(
            &node.info,
            sliver,
            said,
            limits,
            created,
            reachable,
            first_command,
            progress.history(request),
        ))
    };
    let report = match work.await {
        Ok(report) => report,
        // Now, while the node is there to be asked.
        Err(error) => return Err(error.advise(node.logs().await)),
    };
    report.check_limits()?;
    output.show(&report, Report::people)?;
    if args.keep {
        kept.set(true);
        keep(&people.user_token, &authority.url, &people.key, output).await?;
    }
    delete(&people.user).await
}

async fn keep(token: &str, url: &str, key: &std::path::Path, output: Output) -> Result<()> {
    output.say(&format!(
        "\nIt stays up until Ctrl-C. In another terminal:\n  export MANDOLINE_AUTHORITY={url} MANDOLINE_TOKEN={token}\n  mandoline slice show {SLICE}\n  mandoline ssh -i {} {SLICE}",
        key.display()
    ))?;
    std::future::pending().await
}

/// The slice goes as a user's would, so that its way out is walked too.
async fn delete(user: &AuthorityClient) -> Result<()> {
    user.delete_slice(SLICE).await?;
    eprintln!("demo: slice deleted; taking everything down");
    Ok(())
}

/// Where our programs are.
fn programs() -> Result<PathBuf> {
    let dir = match std::env::var_os("MANDOLINE_BIN").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe().about("the path of this program")?;
            own.parent().map(PathBuf::from).unwrap_or_default()
        }
    };
    for name in [
        "mandoline-authority",
        "mandoline-lab",
        "mandoline-nodemgr",
        "mandoline-scs",
        "mandoline-vmm",
    ] {
        if !dir.join(name).is_file() {
            return Err(Error::new(
                Exit::NotFound,
                format!("{} is not there", dir.join(name).display()),
            )
            .advise(
                "`make demo` builds all programs first; MANDOLINE_BIN names another directory with them",
            ));
        }
    }
    // The lab mounts and starts what is there, from other directories.
    dir.canonicalize().about(dir.display())
}

fn ssh_options(key: PathBuf) -> SshOptions {
    SshOptions {
        identity: vec![key],
        login: "root".into(),
        // Nothing of the user's own keys and settings.
        option: [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "LogLevel=VERBOSE",
        ]
        .map(str::to_owned)
        .into(),
        config: Some("none".into()),
    }
}

async fn run_in_sliver(sliver: &Sliver, options: &SshOptions, dir: &std::path::Path) -> Result<String> {
    let command = ssh::command(
        sliver,
        options,
        &[COMMAND.to_owned()],
        Some(&dir.join("known_hosts")),
    )?;
    let out = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .output()
        .await
        .about("ssh")?;
    if !out.status.success() {
        let errors = String::from_utf8_lossy(&out.stderr);
        return Err(Error::failure(format!(
            "ssh into the sliver: {}\n{}",
            out.status,
            children::tail(&errors)
        )));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}
