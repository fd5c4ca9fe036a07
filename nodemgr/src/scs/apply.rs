//! Carries out a [`Plan`](super::plan::Plan) at the node manager, so that every step can be repeated:
//! after a lost answer, after a restart of either side.

use mandoline_api::nodemgr::{ClientError, ErrorKind, FailureClass, NodeManager};
use mandoline_rspec::{Rcap, Rspec};
use sha2::{Digest, Sha256};

use super::plan::{Action, Failure, Power, SliceRef};

/// How often in its life a sliver of one slice with one and the same rspec can be made and destroyed before
/// the service gives up to find an idempotency key that was not used yet.
const GENERATIONS: u32 = 10_000;

/// Does one thing.
pub async fn apply(nm: &NodeManager, action: &Action) -> Result<(), Failure> {
    let (slice, result) = match action {
        Action::Create { slice, rspec } => (slice, bind_new(nm, slice, rspec).await),
        Action::Update {
            slice,
            rcap,
            more,
            power,
        } => (slice, update(nm, slice, rcap, more, *power).await),
        Action::Destroy { slice, rcap, why } => {
            tracing::info!(slice = slice.name, why, "destroying the sliver");
            (slice, gone_is_done(nm.destroy(rcap, None).await))
        }
    };
    result.map_err(|error| Failure {
        slice: slice.clone(),
        reason: error.to_string(),
        class: class(&error),
        state: None,
    })
}

/// What can be done about a call that failed.
pub fn class(error: &ClientError) -> FailureClass {
    match error.kind() {
        // Not reached, or an answer that is none: the node manager restarts, say.
        None => FailureClass::Retryable,
        Some(ErrorKind::Unavailable | ErrorKind::Internal | ErrorKind::Conflict | ErrorKind::NotFound) => {
            FailureClass::Retryable
        }
        // Room may come when another sliver goes: the next poll tries again.
        Some(ErrorKind::Insufficient) => FailureClass::Fatal,
        Some(_) => FailureClass::Fatal,
    }
}

async fn update(
    nm: &NodeManager,
    slice: &SliceRef,
    sliver: &Rcap,
    more: &Rspec,
    power: Option<Power>,
) -> Result<(), ClientError> {
    tracing::info!(slice = slice.name, ?power, "updating the sliver");
    // First the machine, then the note that it is done: a crash between the two repeats what does no harm.
    match power {
        None => {}
        Some(Power::Stop) => nm.stop(sliver).await?,
        Some(Power::Start) => nm.start(sliver).await?,
    }
    bind_new(nm, slice, more).await
}

/// Splits a pool off the service's own and binds it to the slice.
///
/// The keys derive from slice and rspec, so that a repetition after a lost answer gets that answer and not a
/// second pool. But a slice may leave a node and come back with the same rspec; then the stored answer names
/// a pool that is gone, and the next generation of keys is tried.
async fn bind_new(nm: &NodeManager, slice: &SliceRef, rspec: &Rspec) -> Result<(), ClientError> {
    let root = nm.get_rcap().await?;
    let digest = hex::encode(Sha256::digest(rspec.to_json().to_string()));
    let mut last = None;
    for generation in 0..GENERATIONS {
        let key = |step: &str| format!("scs:{step}:{}:{}:{generation}", slice.id, &digest[..32]);
        let pool = nm.split_pool(&root, rspec, Some(&key("split"))).await?;
        match nm.get_rspec(&pool).await {
            // Bound by an earlier attempt whose answer was lost.
            Ok(answer) if answer.vm_id.is_some() => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == Some(ErrorKind::NotFound) => {
                last = Some(error);
                continue;
            }
            Err(error) => return Err(error),
        }
        let bound = nm.bind(&pool, &slice.name, Some(&key("bind"))).await;
        if let Err(ClientError::Refused(_)) = &bound {
            // A pool that cannot be bound must not hold on to what it was given.
            if let Err(error) = nm.release(&pool, None).await {
                tracing::warn!(slice = slice.name, %error, "cannot give an unbound pool back");
            }
        }
        let vm_id = bound?;
        tracing::info!(slice = slice.name, vm_id, "bound");
        return Ok(());
    }
    last.map_or(Ok(()), Err)
}

fn gone_is_done(result: Result<(), ClientError>) -> Result<(), ClientError> {
    match result {
        Err(error) if error.kind() == Some(ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}
