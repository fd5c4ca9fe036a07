//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::node::Local;
use crate::ssh::SshOptions;

/// Slices of microVMs over many nodes.
///
/// A slice is a named set of slivers, at most one on each node; a sliver is a virtual machine with its own
/// kernel and its share of the node's CPU, memory, disk and bandwidth.
#[derive(Debug, Parser)]
#[command(name = "mandoline", version, propagate_version = true, after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The authority's address (also in the configuration file, once logged in).
    #[arg(long, global = true, env = "MANDOLINE_AUTHORITY", value_name = "URL")]
    pub(crate) authority: Option<String>,
    /// A session's token, in place of logging in.
    #[arg(
        long,
        global = true,
        env = "MANDOLINE_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        hide = true
    )]
    pub(crate) token: Option<String>,
    /// JSON for programs instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
First steps:
  mandoline login --authority https://plc.example.org alice@example.org
  mandoline key add ~/.ssh/id_ed25519.pub
  mandoline slice create demo_first --node n1.example.org --rspec mem_limit=128MiB --wait
  mandoline ssh demo_first
  mandoline slice delete demo_first

Exit codes:
  0  done          1  failed             2  wrong usage
  3  not found     4  refused, forbidden 5  unavailable: try again later
  `mandoline ssh` gives the exit code of the remote command (255: ssh itself failed).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Log in at an authority; the session is kept in ~/.config/mandoline/config.toml
    #[command(
        after_help = "Examples:\n  mandoline login --authority http://127.0.0.1:8080 alice@example.org\n  mandoline login alice@example.org --password-file ~/.plc-password"
    )]
    Login(Login),
    /// Log out: end the session and forget it
    Logout,
    /// Who is logged in
    Whoami,
    /// Slices: make, list, show, change, delete
    #[command(subcommand)]
    Slice(Slice),
    /// Slivers: where each is in its life
    #[command(subcommand)]
    Sliver(Sliver),
    /// Log in to a sliver, or run a command in it
    #[command(
        after_help = "Examples:\n  mandoline ssh demo_first                      a shell, if the slice has one sliver\n  mandoline ssh demo_first n1.example.org       on that node\n  mandoline ssh demo_first n1.example.org -- uname -a\n  mandoline ssh -i ~/.ssh/key demo_first\n\nIt goes through the node's ssh server and checks the host keys of both hops against those that the authority\nhas from the node: no trust on first use."
    )]
    Ssh(Ssh),
    /// Nodes: list, show, add; and the node that this runs on: status, pools, slivers, logs, console, top
    #[command(subcommand)]
    Node(Node),
    /// Sites: list, add
    #[command(subcommand)]
    Site(Site),
    /// Persons: list, add
    #[command(subcommand)]
    Person(Person),
    /// Your ssh keys: list, add, delete
    #[command(subcommand)]
    Key(Key),
    /// The virtualisations that nodes offer
    VmTypes,
    /// Whether this machine can build Mandoline, run the lab, and be a node; and what to do about it
    Doctor {
        /// Whether it can be a node (on a node this is what is asked)
        #[arg(long)]
        node: bool,
    },
    /// From nothing to a sliver that you can ssh into: an authority, a node, a slice
    Demo(Demo),
}

#[derive(Debug, Args)]
pub(crate) struct Login {
    /// Your e-mail address; asked for when it is absent
    pub(crate) email: Option<String>,
    /// Read the password from this file's first line instead of asking
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Slice {
    /// Make a slice, with a sliver on each node that is named
    #[command(
        after_help = "Example:\n  mandoline slice create demo_first --node n1.lab --node n2.lab \\\n      --rspec vm_type=kvm-microvm --rspec mem_limit=128MiB --rspec cpu_share=10 --wait"
    )]
    Create(SliceCreate),
    /// Your slices
    List,
    /// One slice and its slivers
    Show {
        /// Its name
        name: String,
    },
    /// Give a slice slivers on further nodes
    AddNodes {
        /// Its name
        name: String,
        /// The nodes
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Delete a slice and its slivers, with all that is on their disks
    Delete {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SliceCreate {
    /// <login_base of your site>_<name>: lower case letters and digits after the underscore
    pub(crate) name: String,
    /// A node that gets a sliver (repeat for more)
    #[arg(long = "node", value_name = "HOSTNAME")]
    pub(crate) nodes: Vec<String>,
    /// What each sliver may use (repeat for more)
    #[arg(long = "rspec", value_name = "NAME=VALUE")]
    pub(crate) rspec: Vec<String>,
    /// A JSON object of attributes; --rspec comes on top of it
    #[arg(long, value_name = "FILE")]
    pub(crate) rspec_file: Option<PathBuf>,
    /// What the slice is for
    #[arg(long, default_value = "")]
    pub(crate) description: String,
    /// A page about it
    #[arg(long, default_value = "")]
    pub(crate) url: String,
    /// Wait until every sliver is reachable
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "wait")]
    pub(crate) timeout: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Sliver {
    /// The slivers of one slice, or of all yours
    List {
        /// The slice
        slice: Option<String>,
        /// Wait until every sliver is reachable
        #[arg(long, requires = "slice")]
        wait: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Ssh {
    #[command(flatten)]
    pub(crate) options: SshOptions,
    /// The slice
    pub(crate) slice: String,
    /// The node; not needed when only one sliver is reachable
    pub(crate) node: Option<String>,
    /// A command to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) run: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// All nodes
    List,
    /// One node
    Show {
        /// Its name
        hostname: String,
    },
    /// Add a node and print its pl_node.txt (the key in it is secret)
    #[command(
        after_help = "Example:\n  mandoline node add n1.example.org --site demo --ssh-endpoint n1.example.org:22 > pl_node.txt"
    )]
    Add(NodeAdd),
    #[command(flatten)]
    Local(Local),
}

#[derive(Debug, Args)]
pub(crate) struct NodeAdd {
    /// Its name
    pub(crate) hostname: String,
    /// login_base of its site
    #[arg(long)]
    pub(crate) site: String,
    /// The authority's address as the node reaches it; absent = as you reach it
    #[arg(long, value_name = "URL")]
    pub(crate) plc_url: Option<String>,
    /// Where outsiders reach the node's ssh server; absent = its name, port 22
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) ssh_endpoint: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Site {
    /// All sites
    List,
    /// Add a site (admins)
    Add {
        /// Prefix of its slices' names
        login_base: String,
        /// Full name; absent = login_base
        #[arg(long)]
        name: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Person {
    /// The persons that you may see
    List,
    /// Add a person who may log in at once (admins, PIs)
    #[command(
        after_help = "Example:\n  mandoline person add bob@example.org --first Bob --last Jones --site demo --role user --role pi"
    )]
    Add(PersonAdd),
}

#[derive(Debug, Args)]
pub(crate) struct PersonAdd {
    /// E-mail address
    pub(crate) email: String,
    /// First name
    #[arg(long)]
    pub(crate) first: String,
    /// Last name
    #[arg(long)]
    pub(crate) last: String,
    /// login_base of a site to join (repeat for more)
    #[arg(long = "site", value_name = "LOGIN_BASE")]
    pub(crate) sites: Vec<String>,
    /// admin, pi, user or tech (repeat for more)
    #[arg(long = "role", value_name = "ROLE", default_value = "user")]
    pub(crate) roles: Vec<String>,
    /// Read the new password from this file's first line instead of asking
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Your ssh keys
    List,
    /// Add a public key; slivers of your slices get it
    Add {
        /// The public half, such as ~/.ssh/id_ed25519.pub
        file: PathBuf,
    },
    /// Delete a key
    Delete {
        /// Its number, from `key list`
        id: i64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave it up until Ctrl-C, and say how to use it
    #[arg(long)]
    pub(crate) keep: bool,
    /// Memory of the sliver
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    pub(crate) mem_limit: String,
    /// Share of the CPU, relative to other slivers, 1 to 1000
    #[arg(long, value_name = "SHARE", default_value = "20")]
    pub(crate) cpu_share: String,
    /// The most that the sliver may send
    #[arg(long, value_name = "RATE", default_value = "10Mbit/s")]
    pub(crate) burst_rate: String,
}
