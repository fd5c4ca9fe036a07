//! `node`, `site`, `person`, `key`.

use mandoline_api::authority::{NewKey, NewNode, NewPerson, NewSite, Node, NodeAdded};
use mandoline_api::authority_client::AuthorityClient;

use crate::args;
use crate::error::{About, Error, Result};
use crate::output::{Output, or_dash, table, time};
use crate::rspec_args::people;
use crate::session::password;

/// Nodes that the command line adds are ready to run slivers; there is nothing of ours to reinstall on them.
const BOOT_STATE: &str = "boot";

pub(crate) async fn node(client: &AuthorityClient, output: Output, command: &args::Node) -> Result<()> {
    match command {
        args::Node::List => {
            let nodes = client.nodes().await?;
            output.show(&nodes, |nodes| {
                let rows = nodes.iter().map(|node| {
                    [
                        node.hostname.clone(),
                        node.site.clone(),
                        node.boot_state.clone(),
                        vm_types(node),
                        or_dash(node.last_contact.map(time)),
                    ]
                });
                table(
                    ["NODE", "SITE", "BOOT STATE", "VM_TYPES", "LAST CONTACT"],
                    rows,
                    "no nodes",
                )
            })
        }
        args::Node::Show { hostname } => {
            let node = client.node(hostname).await?;
            output.show(&node, |node| {
                format!(
                    "node {} ({}), site {}\n  boot state    {}\n  vm_types      {}\n  ssh           {}\n  last contact  {}\n  capacity      {}",
                    node.hostname,
                    node.id,
                    node.site,
                    node.boot_state,
                    vm_types(node),
                    or_dash(node.ssh_endpoint.as_ref().map(|e| format!("{}:{}", e.host, e.port))),
                    or_dash(node.last_contact.map(time)),
                    people(&node.capacity)
                )
            })
        }
        // The node that this runs on needs no authority: see `crate::node`.
        args::Node::Local(_) => Ok(()),
        args::Node::Add(args) => {
            let new = NewNode {
                hostname: args.hostname.clone(),
                site: args.site.clone(),
                boot_state: Some(BOOT_STATE.into()),
            };
            let added = client.add_node(&new).await?;
            let plc_url = args.plc_url.as_deref().unwrap_or(client.base());
            output.show(&added, |added| {
                node_file(added, plc_url, args.ssh_endpoint.as_deref())
            })
        }
    }
}

fn vm_types(node: &Node) -> String {
    match node.registered {
        false => "(not registered yet)".into(),
        true => node
            .vm_types
            .iter()
            .map(|vm_type| vm_type.name.as_str())
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// `pl_node.txt`, as the architecture paper has it (section 5.2.2).
pub(crate) fn node_file(added: &NodeAdded, plc_url: &str, ssh_endpoint: Option<&str>) -> String {
    let mut text = format!(
        "NODE_ID=\"{}\"\nNODE_KEY=\"{}\"\nHOST_NAME=\"{}\"\nPLC_URL=\"{plc_url}\"\nIP_METHOD=\"dhcp\"\n",
        added.node.id, added.node_key, added.node.hostname
    );
    if let Some(endpoint) = ssh_endpoint {
        text.push_str(&format!("SSH_ENDPOINT=\"{endpoint}\"\n"));
    }
    text + "SERVICES=\"nodemgr scs\""
}

pub(crate) async fn site(client: &AuthorityClient, output: Output, command: &args::Site) -> Result<()> {
    match command {
        args::Site::List => {
            let sites = client.sites().await?;
            output.show(&sites, |sites| {
                let rows = sites.iter().map(|site| {
                    [
                        site.login_base.clone(),
                        site.name.clone(),
                        site.nodes.len().to_string(),
                        site.max_slices.to_string(),
                    ]
                });
                table(["LOGIN_BASE", "NAME", "NODES", "MAX SLICES"], rows, "no sites")
            })
        }
        args::Site::Add { login_base, name } => {
            let new = NewSite {
                name: name.clone().unwrap_or_else(|| login_base.clone()),
                login_base: login_base.clone(),
                ..NewSite::default()
            };
            let site = client.add_site(&new).await?;
            output.show(&site, |site| {
                format!(
                    "site {}: its slices are named {}_<name>",
                    site.name, site.login_base
                )
            })
        }
    }
}

pub(crate) async fn person(client: &AuthorityClient, output: Output, command: &args::Person) -> Result<()> {
    match command {
        args::Person::List => {
            let persons = client.persons().await?;
            output.show(&persons, |persons| {
                let rows = persons.iter().map(|person| {
                    [
                        person.email.clone(),
                        format!("{} {}", person.first_name, person.last_name),
                        person.roles.join(", "),
                        person.sites.join(", "),
                        if person.enabled { "yes".into() } else { "no".into() },
                    ]
                });
                table(
                    ["E-MAIL", "NAME", "ROLES", "SITES", "ENABLED"],
                    rows,
                    "no persons",
                )
            })
        }
        args::Person::Add(args) => {
            let new = NewPerson {
                email: args.email.clone(),
                first_name: args.first.clone(),
                last_name: args.last.clone(),
                password: Some(password(
                    args.password_file.as_deref(),
                    "New person's password",
                    true,
                )?),
                sites: args.sites.clone(),
                roles: args.roles.clone(),
                enabled: true,
            };
            let person = client.add_person(&new).await?;
            output.show(&person, |person| format!("{} may log in", person.email))
        }
    }
}

pub(crate) async fn key(client: &AuthorityClient, output: Output, command: &args::Key) -> Result<()> {
    match command {
        args::Key::List => {
            let keys = client.keys().await?;
            output.show(&keys, |keys| {
                let rows = keys.iter().map(|key| {
                    let mut words = key.key.split_ascii_whitespace();
                    let (kind, data) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                    let end: String = data
                        .chars()
                        .rev()
                        .take(12)
                        .collect::<Vec<_>>()
                        .into_iter()
                        .rev()
                        .collect();
                    [
                        key.id.to_string(),
                        key.email.clone(),
                        kind.to_owned(),
                        format!("...{end}"),
                        words.collect::<Vec<_>>().join(" "),
                    ]
                });
                table(
                    ["ID", "PERSON", "KIND", "KEY", "COMMENT"],
                    rows,
                    "no keys; add one: mandoline key add FILE.pub",
                )
            })
        }
        args::Key::Add { file } => {
            let text = std::fs::read_to_string(file).about(file.display())?;
            if text.contains("PRIVATE KEY") {
                return Err(Error::usage(format!(
                    "{} is a private key, which must never leave your machine",
                    file.display()
                ))
                .advise(format!("the public half is usually {}.pub", file.display())));
            }
            let key = client
                .add_key(&NewKey {
                    key: text.trim().to_owned(),
                    email: None,
                })
                .await?;
            output.show(&key, |key| format!("key {} is added", key.id))
        }
        args::Key::Delete { id } => {
            client.delete_key(*id).await?;
            output.show(&serde_json::json!({"deleted": id}), |_| {
                format!("key {id} is deleted")
            })
        }
    }
}
