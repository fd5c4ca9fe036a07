//! What people call: sessions, slices, slivers, nodes, persons, keys, sites, events.

use super::{AuthorityClient, Caller, ClientError, EventStream};
use crate::authority::{
    Hostnames, Key, NewKey, NewNode, NewPerson, NewSession, NewSite, NewSlice, Node, NodeAdded, Person,
    Session, Site, Slice, SliceChange, Sliver,
};

impl AuthorityClient {
    /// Opens a session. The token is in the answer; see [`AuthorityClient::with_caller`].
    pub async fn sign_in(&self, session: &NewSession) -> Result<(Session, AuthorityClient), ClientError> {
        let session: Session = self
            .with_caller(Caller::Anonymous)
            .post(&["v1", "sessions"], session)
            .await?;
        let client = self.with_caller(Caller::Bearer(session.token.clone()));
        Ok((session, client))
    }

    /// Ends the caller's session.
    pub async fn sign_out(&self) -> Result<(), ClientError> {
        self.delete::<()>(&["v1", "session"], None).await
    }

    /// Who calls.
    pub async fn whoami(&self) -> Result<Person, ClientError> {
        self.get(&["v1", "session"]).await
    }

    /// The slices that the caller may see.
    pub async fn slices(&self) -> Result<Vec<Slice>, ClientError> {
        self.get(&["v1", "slices"]).await
    }

    /// One slice.
    pub async fn slice(&self, name: &str) -> Result<Slice, ClientError> {
        self.get(&["v1", "slices", name]).await
    }

    /// Makes a slice, with slivers on the nodes that it names.
    pub async fn create_slice(&self, slice: &NewSlice) -> Result<Slice, ClientError> {
        self.post(&["v1", "slices"], slice).await
    }

    /// Changes a slice.
    pub async fn change_slice(&self, name: &str, change: &SliceChange) -> Result<Slice, ClientError> {
        self.call(reqwest::Method::PATCH, &["v1", "slices", name], Some(change))
            .await
    }

    /// Deletes a slice and its slivers.
    pub async fn delete_slice(&self, name: &str) -> Result<(), ClientError> {
        self.delete::<()>(&["v1", "slices", name], None).await
    }

    /// Gives a slice slivers on further nodes.
    pub async fn add_slice_nodes(&self, name: &str, hostnames: Vec<String>) -> Result<Slice, ClientError> {
        self.post(&["v1", "slices", name, "nodes"], &Hostnames { hostnames })
            .await
    }

    /// Takes a slice's slivers off nodes.
    pub async fn remove_slice_nodes(&self, name: &str, hostnames: Vec<String>) -> Result<(), ClientError> {
        self.delete(&["v1", "slices", name, "nodes"], Some(&Hostnames { hostnames }))
            .await
    }

    /// The slivers of a slice.
    pub async fn slivers(&self, slice: &str) -> Result<Vec<Sliver>, ClientError> {
        self.get(&["v1", "slices", slice, "slivers"]).await
    }

    /// All nodes.
    pub async fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.get(&["v1", "nodes"]).await
    }

    /// One node.
    pub async fn node(&self, hostname: &str) -> Result<Node, ClientError> {
        self.get(&["v1", "nodes", hostname]).await
    }

    /// Adds a node; its key is in the answer.
    pub async fn add_node(&self, node: &NewNode) -> Result<NodeAdded, ClientError> {
        self.post(&["v1", "nodes"], node).await
    }

    /// Deletes a node.
    pub async fn delete_node(&self, hostname: &str) -> Result<(), ClientError> {
        self.delete::<()>(&["v1", "nodes", hostname], None).await
    }

    /// The persons that the caller may see.
    pub async fn persons(&self) -> Result<Vec<Person>, ClientError> {
        self.get(&["v1", "persons"]).await
    }

    /// Adds a person.
    pub async fn add_person(&self, person: &NewPerson) -> Result<Person, ClientError> {
        self.post(&["v1", "persons"], person).await
    }

    /// The ssh keys that the caller may see.
    pub async fn keys(&self) -> Result<Vec<Key>, ClientError> {
        self.get(&["v1", "keys"]).await
    }

    /// Adds an ssh key.
    pub async fn add_key(&self, key: &NewKey) -> Result<Key, ClientError> {
        self.post(&["v1", "keys"], key).await
    }

    /// Deletes an ssh key.
    pub async fn delete_key(&self, id: i64) -> Result<(), ClientError> {
        self.delete::<()>(&["v1", "keys", &id.to_string()], None).await
    }

    /// The sites.
    pub async fn sites(&self) -> Result<Vec<Site>, ClientError> {
        self.get(&["v1", "sites"]).await
    }

    /// Adds a site.
    pub async fn add_site(&self, site: &NewSite) -> Result<Site, ClientError> {
        self.post(&["v1", "sites"], site).await
    }

    /// The events that the caller may see: from `since` (exclusive) on, or from now on.
    pub async fn events(&self, since: Option<i64>) -> Result<EventStream, ClientError> {
        let since = since.map(|since| since.to_string());
        let query: Vec<_> = since.iter().map(|since| ("since", since.as_str())).collect();
        self.stream(&["v1", "events"], &query).await
    }
}
