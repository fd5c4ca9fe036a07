//! A client of the node manager over its Unix sockets.

use std::path::Path;

use mandoline_rspec::{Rcap, Rspec};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;
use crate::unix::{Client, EventStream, UnixError};

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The node manager could not be asked.
    #[error(transparent)]
    Transport(#[from] UnixError),
    /// The node manager refused.
    #[error("{0}")]
    Refused(ErrorBody),
    /// The node manager answered something that is no answer.
    #[error("node manager answered {status} with something else than an error: {body}")]
    Unexpected {
        /// HTTP status.
        status: u16,
        /// The beginning of the answer.
        body: String,
    },
}

impl ClientError {
    /// The refusal's kind, if it is one.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused(body) => Some(body.kind),
            _ => None,
        }
    }
}

/// A node manager, by its socket. Each call is a connection of its own, so a restarted node manager is
/// found again by itself.
#[derive(Debug, Clone)]
pub struct NodeManager {
    client: Client,
}

impl NodeManager {
    /// The node manager behind `socket`: [`SERVICE_SOCKET`] or [`OWNER_SOCKET`].
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            client: Client::new(socket),
        }
    }

    /// Calls an operation; `key` makes it safe to repeat.
    pub async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        operation: &str,
        request: &Q,
        key: Option<&str>,
    ) -> Result<A, ClientError> {
        let headers: Vec<(&str, &str)> = key.map(|key| (IDEMPOTENCY_KEY, key)).into_iter().collect();
        let answer = self
            .client
            .post(&format!("/v1/{operation}"), request, &headers)
            .await?;
        Self::read(answer.status, &answer.body)
    }

    fn read<A: DeserializeOwned>(status: u16, body: &[u8]) -> Result<A, ClientError> {
        let unexpected = || ClientError::Unexpected {
            status,
            body: String::from_utf8_lossy(body).chars().take(200).collect(),
        };
        if status == 200 {
            return serde_json::from_slice(body).map_err(|_| unexpected());
        }
        match serde_json::from_slice::<ErrorAnswer>(body) {
            Ok(answer) => Err(ClientError::Refused(answer.error)),
            Err(_) => Err(unexpected()),
        }
    }

    /// `create_root_pool`, for the owner.
    pub async fn create_root_pool(
        &self,
        rspec: &Rspec,
        slice_name: &str,
        key: Option<&str>,
    ) -> Result<Rcap, ClientError> {
        let request = CreateRootPool {
            rspec: rspec.clone(),
            slice_name: slice_name.to_owned(),
        };
        Ok(self
            .call::<_, RcapAnswer>("create_root_pool", &request, key)
            .await?
            .rcap)
    }

    /// `get_rcap`: the caller's oldest unbound pool.
    pub async fn get_rcap(&self) -> Result<Rcap, ClientError> {
        Ok(self.call::<_, RcapAnswer>("get_rcap", &Done {}, None).await?.rcap)
    }

    /// `get_rcaps`: all of the caller's unbound pools.
    pub async fn get_rcaps(&self) -> Result<Vec<Rcap>, ClientError> {
        Ok(self
            .call::<_, RcapsAnswer>("get_rcaps", &Done {}, None)
            .await?
            .rcaps)
    }

    /// `get_rspec`.
    pub async fn get_rspec(&self, rcap: &Rcap) -> Result<RspecAnswer, ClientError> {
        self.call("get_rspec", &RcapRequest { rcap: rcap.clone() }, None)
            .await
    }

    /// `split_pool`.
    pub async fn split_pool(
        &self,
        rcap: &Rcap,
        rspec: &Rspec,
        key: Option<&str>,
    ) -> Result<Rcap, ClientError> {
        let request = SplitPool {
            rcap: rcap.clone(),
            rspec: rspec.clone(),
        };
        Ok(self
            .call::<_, RcapAnswer>("split_pool", &request, key)
            .await?
            .rcap)
    }

    /// `acquire`.
    pub async fn acquire(&self, rspec: &Rspec, key: Option<&str>) -> Result<Rcap, ClientError> {
        Ok(self
            .call::<_, RcapAnswer>("acquire", &Acquire { rspec: rspec.clone() }, key)
            .await?
            .rcap)
    }

    /// `bind`.
    pub async fn bind(&self, rcap: &Rcap, slice_name: &str, key: Option<&str>) -> Result<VmId, ClientError> {
        let request = Bind {
            rcap: rcap.clone(),
            slice_name: slice_name.to_owned(),
        };
        Ok(self.call::<_, BindAnswer>("bind", &request, key).await?.vm_id)
    }

    /// `release`: gives a pool back to the one that it was split from.
    pub async fn release(&self, rcap: &Rcap, key: Option<&str>) -> Result<(), ClientError> {
        self.on("release", rcap, key).await
    }

    /// `start`.
    pub async fn start(&self, rcap: &Rcap) -> Result<(), ClientError> {
        self.on("start", rcap, None).await
    }

    /// `stop`.
    pub async fn stop(&self, rcap: &Rcap) -> Result<(), ClientError> {
        self.on("stop", rcap, None).await
    }

    /// `restart`.
    pub async fn restart(&self, rcap: &Rcap) -> Result<(), ClientError> {
        self.on("restart", rcap, None).await
    }

    /// `destroy`: the sliver goes, its resources return to the pools that they came from.
    pub async fn destroy(&self, rcap: &Rcap, key: Option<&str>) -> Result<(), ClientError> {
        self.on("destroy", rcap, key).await
    }

    async fn on(&self, operation: &str, rcap: &Rcap, key: Option<&str>) -> Result<(), ClientError> {
        self.change(operation, &RcapRequest { rcap: rcap.clone() }, key)
            .await
    }

    /// `resize`: other amounts of what `rspec` names, for a pool and the sliver that it is bound to.
    pub async fn resize(&self, rcap: &Rcap, rspec: &Rspec, key: Option<&str>) -> Result<(), ClientError> {
        let request = SplitPool {
            rcap: rcap.clone(),
            rspec: rspec.clone(),
        };
        self.change("resize", &request, key).await
    }

    /// `start_slice`, `stop_slice`, `restart_slice`, `destroy_slice`.
    pub async fn on_slice(&self, operation: &str, slice_name: &str) -> Result<(), ClientError> {
        self.change(operation, &slice_request(slice_name), None).await
    }

    /// `get_loans`.
    pub async fn loans(&self, slice_name: &str) -> Result<LoansAnswer, ClientError> {
        self.call("get_loans", &slice_request(slice_name), None).await
    }

    /// `set_loans`.
    pub async fn set_loans(&self, loans: &SetLoans) -> Result<(), ClientError> {
        self.change("set_loans", loans, None).await
    }

    /// `set_node_limit`.
    pub async fn set_node_limit(&self, rspec: &Rspec) -> Result<(), ClientError> {
        let request = Acquire { rspec: rspec.clone() };
        self.change("set_node_limit", &request, None).await
    }

    /// `deny`.
    pub async fn deny(&self, slice_name: &str, reason: &str) -> Result<(), ClientError> {
        let request = Deny {
            slice_name: slice_name.to_owned(),
            reason: reason.to_owned(),
        };
        self.change("deny", &request, None).await
    }

    /// `allow`.
    pub async fn allow(&self, slice_name: &str) -> Result<(), ClientError> {
        self.change("allow", &slice_request(slice_name), None).await
    }

    /// `grant`.
    pub async fn grant(&self, slice_name: &str, grant: &Grant) -> Result<(), ClientError> {
        let request = SetGrant {
            slice_name: slice_name.to_owned(),
            grant: grant.clone(),
        };
        self.change("grant", &request, None).await
    }

    /// `revoke`.
    pub async fn revoke(&self, slice_name: &str) -> Result<(), ClientError> {
        self.change("revoke", &slice_request(slice_name), None).await
    }

    /// `policy`.
    pub async fn policy(&self) -> Result<PolicyAnswer, ClientError> {
        self.call("policy", &Done {}, None).await
    }

    /// `owner_script`: the rcaps of its pools, in its order.
    pub async fn owner_script(
        &self,
        script: &OwnerScript,
        key: Option<&str>,
    ) -> Result<Vec<Rcap>, ClientError> {
        Ok(self
            .call::<_, RcapsAnswer>("owner_script", script, key)
            .await?
            .rcaps)
    }

    async fn change<Q: Serialize>(
        &self,
        operation: &str,
        request: &Q,
        key: Option<&str>,
    ) -> Result<(), ClientError> {
        self.call::<_, Done>(operation, request, key)
            .await
            .map(|Done {}| ())
    }

    /// `list`.
    pub async fn list(&self) -> Result<ListAnswer, ClientError> {
        self.call("list", &Done {}, None).await
    }

    /// `GET /v1/node`.
    pub async fn node(&self) -> Result<NodeInfo, ClientError> {
        let answer = self.client.get("/v1/node").await?;
        Self::read(answer.status, &answer.body)
    }

    /// `GET /v1/usage`.
    pub async fn usage(&self) -> Result<Usage, ClientError> {
        let answer = self.client.get("/v1/usage").await?;
        Self::read(answer.status, &answer.body)
    }

    /// What a sliver's serial port has said, from a place in it; without one, its last part.
    pub async fn console(&self, vm_id: VmId, from: Option<u64>) -> Result<Tail, ClientError> {
        self.tail(vm_id, "console", from).await
    }

    /// What a sliver's monitor has logged; for the owner.
    pub async fn log(&self, vm_id: VmId, from: Option<u64>) -> Result<Tail, ClientError> {
        self.tail(vm_id, "log", from).await
    }

    async fn tail(&self, vm_id: VmId, what: &str, from: Option<u64>) -> Result<Tail, ClientError> {
        let from = from.map_or_else(String::new, |from| format!("?from={from}"));
        let answer = self
            .client
            .get(&format!("/v1/slivers/{vm_id}/{what}{from}"))
            .await?;
        Self::read(answer.status, &answer.body)
    }

    /// Publishes a sensor: the columns' names in its first line, then its rows, without quotes.
    pub async fn publish(&self, sensor: &str, table: &str) -> Result<(), ClientError> {
        let target = format!("/v1/sensors/{sensor}");
        let answer = self.client.put_text(&target, table.to_owned()).await?;
        Self::read::<Done>(answer.status, &answer.body).map(|Done {}| ())
    }

    /// `GET /v1/ssh_keys/{account}`: lines for sshd's AuthorizedKeysCommand.
    pub async fn ssh_keys(&self, account: &str) -> Result<String, ClientError> {
        let answer = self.client.get(&format!("/v1/ssh_keys/{account}")).await?;
        match answer.status {
            200 => Ok(String::from_utf8_lossy(&answer.body).into_owned()),
            status => Self::read::<Done>(status, &answer.body).map(|_| String::new()),
        }
    }

    /// The events of the slivers that the caller may see. With `since`, the state of each sliver whose last
    /// event is later comes first; without, only what is new.
    pub async fn events(&self, since: Option<u64>) -> Result<Events, ClientError> {
        let path = match since {
            Some(seq) => format!("/v1/events?since={seq}"),
            None => "/v1/events".to_owned(),
        };
        let (status, stream) = self.client.events(&path).await?;
        match status {
            200 => Ok(Events { stream }),
            status => match Self::read::<Done>(status, &stream.into_body().await?) {
                Ok(_) => Err(ClientError::Unexpected {
                    status,
                    body: String::new(),
                }),
                Err(error) => Err(error),
            },
        }
    }
}

fn slice_request(slice_name: &str) -> SliceRequest {
    SliceRequest {
        slice_name: slice_name.to_owned(),
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct Events {
    stream: EventStream,
}

impl Events {
    /// The next event; none when the node manager ends the stream (it restarts, or this reader was too slow):
    /// ask again with the last `seq`. Events of a shape that this version does not know are skipped.
    pub async fn next(&mut self) -> Result<Option<SliverEvent>, ClientError> {
        while let Some(event) = self.stream.next().await? {
            if let Ok(event) = serde_json::from_str(&event.data) {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}
