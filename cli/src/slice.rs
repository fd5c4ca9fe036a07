//! `slice`, `sliver`, `ssh`, `vm-types`.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use mandoline_api::authority::{self, NewSlice, SliverState};
use mandoline_api::authority_client::{AuthorityClient, ErrorClass};

use crate::args;
use crate::error::{Error, Result};
use crate::output::{Output, millis, or_dash, table, time};
use crate::rspec_args;
use crate::ssh;
use crate::wait::{self, Progress};

pub(crate) async fn slice(client: &AuthorityClient, output: Output, command: &args::Slice) -> Result<()> {
    match command {
        args::Slice::Create(args) => create(client, output, args).await,
        args::Slice::List => {
            let slices = client.slices().await?;
            output.show(&slices, |slices| {
                let rows = slices.iter().map(|slice| {
                    [
                        slice.name.clone(),
                        if slice.enabled { "yes".into() } else { "no".into() },
                        slice.nodes.len().to_string(),
                        slice.persons.len().to_string(),
                        time(slice.expires),
                        slice.description.clone(),
                    ]
                });
                table(
                    ["NAME", "ENABLED", "NODES", "USERS", "EXPIRES", "DESCRIPTION"],
                    rows,
                    "no slices",
                )
            })
        }
        args::Slice::Show { name } => {
            let slice = client.slice(name).await?;
            let slivers = client.slivers(name).await?;
            output.show(&serde_json::json!({"slice": slice, "slivers": slivers}), |_| {
                format!("{}\n\n{}", describe(&slice), sliver_table(&slivers))
            })
        }
        args::Slice::AddNodes { name, nodes } => {
            let slice = client.add_slice_nodes(name, nodes.clone()).await?;
            output.show(&slice, |slice| {
                format!("{} is on {}", slice.name, slice.nodes.join(", "))
            })
        }
        args::Slice::Delete { name } => {
            client.delete_slice(name).await?;
            output.show(&serde_json::json!({"deleted": name}), |_| {
                format!("slice {name} is deleted")
            })
        }
    }
}

async fn create(client: &AuthorityClient, output: Output, args: &args::SliceCreate) -> Result<()> {
    let new = NewSlice {
        name: args.name.clone(),
        rspec: rspec_args::rspec(args.rspec_file.as_deref(), &args.rspec)?,
        nodes: args.nodes.clone(),
        url: args.url.clone(),
        description: args.description.clone(),
        ..NewSlice::default()
    };
    let slice = client.create_slice(&new).await?;
    if !args.wait {
        return output.show(&slice, |slice| {
            let next = match slice.nodes.is_empty() {
                true => format!("give it nodes: mandoline slice add-nodes {} NODE", slice.name),
                false => format!("watch it: mandoline sliver list {}", slice.name),
            };
            format!("{}\n\n{next}", describe(slice))
        });
    }
    let mut progress = Progress::new(output.json);
    let slivers = wait::until_reachable(
        client,
        &slice.name,
        Duration::from_secs(args.timeout),
        &mut progress,
    )
    .await
    .map_err(|error| error.during(&format!("slice {} is made, but not all of it runs", slice.name)))?;
    output.show(&serde_json::json!({"slice": slice, "slivers": slivers}), |_| {
        format!(
            "{}\n\nlog in: mandoline ssh {}",
            sliver_table(&slivers),
            slice.name
        )
    })
}

fn describe(slice: &authority::Slice) -> String {
    let rspec = rspec_args::people(&slice.rspec);
    format!(
        "slice {}{}\n  rspec    {rspec}\n  nodes    {}\n  users    {}\n  expires  {}",
        slice.name,
        if slice.enabled { "" } else { " (disabled)" },
        slice.nodes.join(", "),
        slice.persons.join(", "),
        time(slice.expires)
    )
}

pub(crate) async fn sliver(client: &AuthorityClient, output: Output, command: &args::Sliver) -> Result<()> {
    let args::Sliver::List { slice, wait } = command;
    let slivers = match slice {
        Some(slice) if *wait => {
            let mut progress = Progress::new(output.json);
            wait::until_reachable(client, slice, Duration::from_secs(600), &mut progress).await?
        }
        Some(slice) => client.slivers(slice).await?,
        None => {
            let mut all = Vec::new();
            for slice in client.slices().await? {
                match client.slivers(&slice.name).await {
                    Ok(slivers) => all.extend(slivers),
                    // Deleted since it was listed.
                    Err(error) if error.class() == ErrorClass::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
            all
        }
    };
    output.show(&slivers, |slivers| sliver_table(slivers))
}

pub(crate) fn sliver_table(slivers: &[authority::Sliver]) -> String {
    let rows = slivers.iter().map(|sliver| {
        [
            sliver.slice.clone(),
            sliver.hostname.clone(),
            sliver.state.as_str().to_owned(),
            or_dash(sliver.address.as_deref()),
            or_dash(sliver.vm_type.as_deref()),
            // Only what is up now has a start to speak of.
            or_dash(
                Some(sliver)
                    .filter(|s| s.state == SliverState::Reachable)
                    .and_then(|s| s.phases_us.values().max().map(|us| millis(*us))),
            ),
            sliver.reason.clone().unwrap_or_default(),
        ]
    });
    table(
        [
            "SLICE", "NODE", "STATE", "ADDRESS", "VM_TYPE", "START ms", "REASON",
        ],
        rows,
        "no slivers",
    )
}

pub(crate) async fn ssh(client: &AuthorityClient, args: &args::Ssh) -> Result<()> {
    let slivers = client.slivers(&args.slice).await?;
    let sliver = ssh::choose(&args.slice, &slivers, args.node.as_deref())?;
    let mut command = ssh::command(sliver, &args.options, &args.run, None)?;
    // Only comes back when it did not work.
    let error = command.exec();
    Err(Error::failure(format!("ssh: {error}")).advise("Debian has it in the package openssh-client"))
}

pub(crate) async fn vm_types(client: &AuthorityClient, output: Output) -> Result<()> {
    let mut types: BTreeMap<String, (Vec<String>, Vec<String>)> = BTreeMap::new();
    for node in client.nodes().await? {
        for vm_type in node.vm_types {
            let (nodes, capabilities) = types.entry(vm_type.name).or_default();
            nodes.push(node.hostname.clone());
            for capability in vm_type.capabilities {
                if !capabilities.contains(&capability) {
                    capabilities.push(capability);
                }
            }
        }
    }
    let list: Vec<_> = types
        .iter()
        .map(|(name, (nodes, capabilities))| serde_json::json!({"name": name, "nodes": nodes, "capabilities": capabilities}))
        .collect();
    output.show(&list, |_| {
        let rows = types
            .iter()
            .map(|(name, (nodes, can))| [name.clone(), nodes.join(", "), can.join(", ")]);
        table(
            ["VM_TYPE", "NODES", "CAN"],
            rows,
            "no node has announced what it offers",
        )
    })
}
