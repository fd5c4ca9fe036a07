//! Watching slivers come up, on the authority's event stream: a line for each node, its state, its time.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mandoline_api::authority::{Event, FailureClass, Sliver, SliverState};
use mandoline_api::authority_client::{AuthorityClient, ErrorClass};

use crate::error::{Error, Exit, Result};

/// Pause before the event stream is opened again.
const RECONNECT: Duration = Duration::from_millis(500);

/// Waits until every sliver of `slice` is reachable, or one cannot become so. Gives the slivers as they are then.
pub(crate) async fn until_reachable(
    client: &AuthorityClient,
    slice: &str,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<Vec<Sliver>> {
    let deadline = Instant::now() + timeout;
    let mut slivers = BTreeMap::new();
    let watching = follow(client, slice, &mut slivers, progress);
    match tokio::time::timeout_at(deadline.into(), watching).await {
        Ok(result) => result?,
        Err(_) => {
            progress.finish();
            let rest: Vec<_> = slivers
                .values()
                .filter(|sliver: &&Sliver| sliver.state != SliverState::Reachable)
                .map(describe)
                .collect();
            let message = format!(
                "after {} s, not reachable: {}",
                timeout.as_secs(),
                rest.join("; ")
            );
            return Err(Error::new(Exit::Unavailable, message).advise(format!(
                "it may still come; watch it with `mandoline sliver list {slice}`"
            )));
        }
    }
    progress.finish();
    let failed: Vec<_> = slivers
        .values()
        .filter(|sliver| lost(sliver))
        .map(describe)
        .collect();
    match failed.is_empty() {
        true => Ok(slivers.into_values().collect()),
        false => Err(Error::failure(failed.join("; "))),
    }
}

async fn follow(
    client: &AuthorityClient,
    slice: &str,
    slivers: &mut BTreeMap<String, Sliver>,
    progress: &mut Progress,
) -> Result<()> {
    loop {
        // The stream first, then the list: so nothing falls between the two.
        let stream = client.events(None).await;
        for sliver in client.slivers(slice).await? {
            progress.show(&sliver);
            slivers.insert(sliver.hostname.clone(), sliver);
        }
        if settled(slivers) {
            return Ok(());
        }
        match stream {
            Err(error) if error.class() != ErrorClass::Retryable => return Err(error.into()),
            Err(error) => tracing::debug!(%error, "cannot follow events"),
            Ok(mut stream) => {
                while let Ok(Some(event)) = stream.next().await {
                    let Some(sliver) = sliver_of(&event.data, slice) else {
                        continue;
                    };
                    progress.show(&sliver);
                    slivers.insert(sliver.hostname.clone(), sliver);
                    if settled(slivers) {
                        return Ok(());
                    }
                }
            }
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

fn sliver_of(data: &str, slice: &str) -> Option<Sliver> {
    let event: Event = serde_json::from_str(data).ok()?;
    if event.kind != "sliver_state" || event.slice.as_deref() != Some(slice) {
        return None;
    }
    serde_json::from_value(event.data).ok()
}

fn settled(slivers: &BTreeMap<String, Sliver>) -> bool {
    slivers
        .values()
        .all(|sliver| sliver.state == SliverState::Reachable || lost(sliver))
}

/// Whether waiting is in vain. What is retryable the node tries again by itself.
fn lost(sliver: &Sliver) -> bool {
    sliver.state == SliverState::Failed && sliver.class != Some(FailureClass::Retryable)
}

/// Where a sliver stands, in a sentence.
pub(crate) fn describe(sliver: &Sliver) -> String {
    let reason = sliver
        .reason
        .as_deref()
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default();
    let updated = if sliver.updated == 0 {
        "; its node has not reported anything"
    } else {
        ""
    };
    format!(
        "{} is {}{reason}{updated}",
        sliver.hostname,
        sliver.state.as_str()
    )
}

/// What people see meanwhile, on standard error.
pub(crate) struct Progress {
    bars: Option<MultiProgress>,
    lines: BTreeMap<String, (ProgressBar, SliverState)>,
    seen: Vec<(SliverState, Instant)>,
    quiet: bool,
    start: Instant,
}

impl Progress {
    /// Moving lines on a terminal, one line for each change elsewhere, nothing when `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            bars: (!quiet && terminal).then(MultiProgress::new),
            lines: BTreeMap::new(),
            seen: Vec::new(),
            quiet,
            start: Instant::now(),
        }
    }

    fn show(&mut self, sliver: &Sliver) {
        let line = self.lines.get(&sliver.hostname);
        if line.is_some_and(|(_, state)| *state == sliver.state) {
            return;
        }
        self.seen.push((sliver.state, Instant::now()));
        let reason = sliver
            .reason
            .as_deref()
            .map(|reason| format!(" ({reason})"))
            .unwrap_or_default();
        let text = format!("{:<24} {}{reason}", sliver.hostname, sliver.state.as_str());
        let bar = match (line, &self.bars) {
            (Some((bar, _)), _) => bar.clone(),
            (None, None) => ProgressBar::hidden(),
            (None, Some(bars)) => {
                let bar = bars.add(ProgressBar::new_spinner());
                if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} {elapsed_precise:.dim}") {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(Duration::from_millis(200));
                bar
            }
        };
        if self.bars.is_none() && !self.quiet {
            eprintln!("  {text} after {} ms", self.start.elapsed().as_millis());
        }
        match sliver.state {
            SliverState::Reachable | SliverState::Failed => bar.finish_with_message(text),
            _ => bar.set_message(text),
        }
        self.lines.insert(sliver.hostname.clone(), (bar, sliver.state));
    }

    /// Which states were seen when, counted from `start`.
    pub(crate) fn history(&self, start: Instant) -> Vec<(SliverState, Duration)> {
        self.seen
            .iter()
            .map(|(state, at)| (*state, at.saturating_duration_since(start)))
            .collect()
    }

    fn finish(&mut self) {
        for (bar, _) in self.lines.values() {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::tests::sliver;

    #[test]
    fn settled_means_reachable_or_lost() {
        let of = |state, class| {
            let sliver = Sliver {
                class,
                ..sliver("n", state)
            };
            settled(&BTreeMap::from([("n".to_owned(), sliver)]))
        };
        assert!(of(SliverState::Reachable, None));
        assert!(of(SliverState::Failed, Some(FailureClass::Fatal)));
        assert!(!of(SliverState::Failed, Some(FailureClass::Retryable)));
        assert!(!of(SliverState::Starting, None));
        assert!(!of(SliverState::Pending, None));
    }

    #[test]
    fn only_this_slice_counts() {
        let event = |slice: &str, kind: &str| {
            let data = serde_json::to_value(sliver("n", SliverState::Up)).unwrap();
            serde_json::json!({"seq": 1, "time_us": 1, "kind": kind, "actor": "node 1", "slice": slice, "data": data}).to_string()
        };
        assert!(sliver_of(&event("a_b", "sliver_state"), "a_b").is_some());
        assert!(sliver_of(&event("a_c", "sliver_state"), "a_b").is_none());
        assert!(sliver_of(&event("a_b", "slice_changed"), "a_b").is_none());
        assert!(sliver_of("nonsense", "a_b").is_none());
    }
}
