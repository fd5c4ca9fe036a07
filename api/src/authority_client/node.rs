//! What nodes call: registering, what they should run, what they have done.

use super::{AuthorityClient, ClientError, EventStream};
use crate::authority::{DesiredSlivers, NodeRegistered, NodeRegistration, NodeStatus};

impl AuthorityClient {
    /// Announces the node's key and what it offers; signed under `NODE_KEY`.
    pub async fn node_register(
        &self,
        registration: &NodeRegistration,
    ) -> Result<NodeRegistered, ClientError> {
        self.post(&["v1", "node", "register"], registration).await
    }

    /// What the node should run.
    pub async fn node_slivers(&self) -> Result<DesiredSlivers, ClientError> {
        self.get(&["v1", "node", "slivers"]).await
    }

    /// Tells when that changes.
    pub async fn node_events(&self) -> Result<EventStream, ClientError> {
        self.stream(&["v1", "node", "events"], &[]).await
    }

    /// Reports what has become of the slivers.
    pub async fn node_status(&self, status: &NodeStatus) -> Result<(), ClientError> {
        self.post::<_, serde_json::Value>(&["v1", "node", "status"], status)
            .await
            .map(drop)
    }
}
