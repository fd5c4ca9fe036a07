//! `mandoline node status`, `pools`, `slivers`, `logs`, `console`, `top`: the node that this runs on, through the
//! owner's socket of its node manager.

mod follow;
mod top;
mod view;

use std::io::ErrorKind as Io;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use mandoline_api::nodemgr::{ClientError, ErrorKind, NodeManager, OWNER_SOCKET, SliverInfo};
use mandoline_api::unix::UnixError;
use serde_json::json;

use crate::error::{Error, Exit, Result};
use crate::output::Output;

/// Which node manager.
#[derive(Debug, Args)]
pub(crate) struct Socket {
    /// The owner's socket of the node manager
    #[arg(long, env = "MANDOLINE_NM_SOCKET", value_name = "PATH", default_value = OWNER_SOCKET)]
    socket: PathBuf,
}

/// Commands about the node that this runs on.
#[derive(Debug, Subcommand)]
pub(crate) enum Local {
    /// This node: what it has, what is left, what is wrong
    Status(Socket),
    /// The pools of this node as a tree, with their slivers
    Pools(Socket),
    /// The slivers of this node: what they use against what they may
    Slivers(Socket),
    /// What the monitor of a sliver has logged
    Logs {
        /// Its slice, or its vm_id
        sliver: String,
        /// Go on with what comes, until Ctrl-C
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        socket: Socket,
    },
    /// What a sliver's serial port says, as it comes; Ctrl-] leaves
    Console {
        /// Its slice, or its vm_id
        sliver: String,
        /// Only what is there already
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        socket: Socket,
    },
    /// A live view of the node's slivers; q leaves
    Top {
        /// Seconds between two looks
        #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// Look this often and end
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        #[command(flatten)]
        socket: Socket,
    },
}

/// Runs one of the commands.
pub(crate) async fn local(output: Output, command: &Local) -> Result<()> {
    let nm = |socket: &Socket| NodeManager::new(&socket.socket);
    match command {
        Local::Status(socket) => {
            let nm = nm(socket);
            let (node, usage, list) = (nm.node().await?, nm.usage().await?, nm.list().await?);
            let all = json!({"node": node, "usage": usage, "pools": list.pools.len()});
            output.show(&all, |_| view::status(&node, &usage, &list))
        }
        Local::Pools(socket) => {
            let nm = nm(socket);
            let (node, list) = (nm.node().await?, nm.list().await?);
            let mut all = json!({"capacity": node.capacity, "available": node.available});
            all["pools"] = list.pools.iter().map(view::without_rcap).collect();
            output.show(&all, |_| view::pools(&node, &list))
        }
        Local::Slivers(socket) => {
            let usage = nm(socket).usage().await?;
            output.show(&usage.slivers, |slivers| view::slivers(slivers))
        }
        Local::Logs {
            sliver,
            follow,
            socket,
        } => {
            let nm = nm(socket);
            let vm_id = find(&nm, sliver).await?;
            follow::log(&nm, output, vm_id, *follow).await
        }
        Local::Console { sliver, once, socket } => {
            let nm = nm(socket);
            let vm_id = find(&nm, sliver).await?;
            follow::console(&nm, output, vm_id, *once).await
        }
        Local::Top {
            interval,
            count,
            socket,
        } => top::top(&nm(socket), output, *interval, *count).await,
    }
}

/// The sliver that a person means: by vm_id, or by its slice with or without the authority.
async fn find(nm: &NodeManager, wanted: &str) -> Result<u32> {
    let slivers = nm.list().await?.slivers;
    let is_meant = |sliver: &&SliverInfo| {
        sliver.event.slice == wanted || sliver.account == wanted || sliver.event.vm_id.to_string() == wanted
    };
    // While a sliver is being destroyed its slice may have a new one, which comes later.
    match slivers.iter().rfind(is_meant) {
        Some(sliver) => Ok(sliver.event.vm_id),
        None => {
            let known: Vec<_> = slivers.iter().map(|sliver| sliver.account.as_str()).collect();
            let error = Error::new(Exit::NotFound, format!("this node has no sliver {wanted}"));
            Err(match known.is_empty() {
                true => {
                    error.advise("it has none at all; `mandoline node pools` shows what could become one")
                }
                false => error.advise(format!("it has: {}", known.join(", "))),
            })
        }
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Transport(UnixError::Connect { source, .. }) => {
                let error = Self::new(Exit::Unavailable, message);
                match source.kind() {
                    Io::PermissionDenied => error.advise("this socket is the owner's: run the command as root (sudo)"),
                    Io::NotFound => error.advise(
                        "is this machine a node? These commands run on the node itself; `mandoline doctor --node` says what it lacks",
                    ),
                    _ => error.advise(
                        "is the node manager running? systemctl status mandoline-nodemgr, or sv status mandoline-nodemgr",
                    ),
                }
            }
            ClientError::Transport(_) => Self::new(Exit::Unavailable, message),
            ClientError::Refused(body) => {
                let exit = match body.kind {
                    ErrorKind::NotFound => Exit::NotFound,
                    ErrorKind::Forbidden => Exit::Refused,
                    ErrorKind::Unavailable => Exit::Unavailable,
                    _ => Exit::Failure,
                };
                let error = Self::new(exit, message);
                match body.allowed {
                    Some(allowed) => error.advise(format!("allowed: {allowed}")),
                    None => error,
                }
            }
            ClientError::Unexpected { .. } => Self::failure(message),
        }
    }
}
