//! `mandoline node top`: who uses the node now.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use crossterm::event::{Event, KeyCode, KeyModifiers};
use crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{cursor, execute, queue};
use mandoline_api::nodemgr::{NodeManager, SliverUse, Usage, VmId};
use mandoline_rspec::format_rate;
use serde_json::json;

use super::view::{against, head, word};
use crate::error::{About, Result};
use crate::output::{Output, print, table};

/// The terminal in raw mode, until this is dropped.
pub(super) struct Raw(());

impl Raw {
    pub(super) fn enter() -> Result<Self> {
        crossterm::terminal::enable_raw_mode().about("terminal")?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

/// A screen of our own, until this is dropped.
struct Screen(Raw);

impl Screen {
    fn enter() -> Result<Self> {
        let raw = Raw::enter()?;
        execute!(std::io::stdout(), EnterAlternateScreen, cursor::Hide).about("terminal")?;
        Ok(Self(raw))
    }

    fn draw(&self, text: &str) -> std::io::Result<()> {
        let (columns, rows) = crossterm::terminal::size()?;
        let mut out = std::io::stdout().lock();
        queue!(out, cursor::MoveTo(0, 0))?;
        for line in text.lines().take(usize::from(rows.saturating_sub(1))) {
            let line: String = line.chars().take(usize::from(columns)).collect();
            write!(out, "{line}")?;
            queue!(out, Clear(ClearType::UntilNewLine))?;
            write!(out, "\r\n")?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = execute!(std::io::stdout(), cursor::Show, LeaveAlternateScreen);
    }
}

/// Shows the node's slivers until the person leaves, or `count` times.
pub(super) async fn top(nm: &NodeManager, output: Output, interval: u64, count: Option<u64>) -> Result<()> {
    let interval = Duration::from_secs(interval);
    let live =
        count.is_none() && !output.json && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let mut before = nm.usage().await?;
    // Rates need two looks; the first pair comes soon.
    tokio::time::sleep(interval.min(Duration::from_secs(1))).await;
    if live {
        let screen = Screen::enter()?;
        loop {
            let now = nm.usage().await?;
            screen.draw(&page(&before, &now)).about("terminal")?;
            before = now;
            if crossterm::event::poll(interval).about("terminal")?
                && leaves(&crossterm::event::read().about("terminal")?)
            {
                return Ok(());
            }
        }
    }
    for shown in 0..count.unwrap_or(1) {
        if shown > 0 {
            tokio::time::sleep(interval).await;
        }
        let now = nm.usage().await?;
        match output.json {
            true => print(&json!({"usage": now, "rates": rates(&before, &now)}).to_string())?,
            false => print(&page(&before, &now))?,
        }
        before = now;
    }
    Ok(())
}

fn leaves(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => key.modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

/// What a sliver did between two looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
struct Rates {
    /// CPU, in percent of one CPU.
    cpu_percent: f64,
    /// Sent, in bit/s.
    sent: u64,
    /// Received, in bit/s.
    received: u64,
}

fn rates(before: &Usage, now: &Usage) -> BTreeMap<VmId, Rates> {
    let elapsed_us = now.unix_ns.saturating_sub(before.unix_ns).max(1_000) / 1_000;
    let old: BTreeMap<VmId, &SliverUse> = before.slivers.iter().map(|of| (of.vm_id, of)).collect();
    let rate = |of: &SliverUse| {
        let Some(old) = old.get(&of.vm_id) else {
            return Rates::default();
        };
        // A sliver that was started again counts from 0.
        let bits = |new: u64, old: u64| {
            let bits = u128::from(new.saturating_sub(old)) * 8_000_000 / u128::from(elapsed_us);
            u64::try_from(bits).unwrap_or(u64::MAX)
        };
        Rates {
            cpu_percent: of.cpu_us.saturating_sub(old.cpu_us) as f64 * 100.0 / elapsed_us as f64,
            sent: bits(of.sent_bytes, old.sent_bytes),
            received: bits(of.received_bytes, old.received_bytes),
        }
    };
    now.slivers.iter().map(|of| (of.vm_id, rate(of))).collect()
}

fn page(before: &Usage, now: &Usage) -> String {
    let rates = rates(before, now);
    let of = |vm_id: VmId| rates.get(&vm_id).copied().unwrap_or_default();
    let mut slivers: Vec<_> = now.slivers.iter().collect();
    slivers.sort_by(|a, b| of(b.vm_id).cpu_percent.total_cmp(&of(a.vm_id).cpu_percent));
    let rows = slivers.into_iter().map(|sliver| {
        let rates = of(sliver.vm_id);
        [
            sliver.slice.clone(),
            sliver.vm_id.to_string(),
            word(sliver.state),
            format!("{:.1}", rates.cpu_percent),
            sliver.cpu_share.to_string(),
            against(sliver.memory, sliver.mem_limit),
            against(sliver.disk, sliver.disk_quota),
            format_rate(thousand(rates.sent)),
            format_rate(thousand(rates.received)),
        ]
    });
    let names = [
        "SLICE", "VM_ID", "STATE", "CPU %", "SHARE", "MEMORY", "DISK", "SENDS", "RECEIVES",
    ];
    format!("{}\n{}", head(&now.node), table(names, rows, "no slivers"))
}

/// Whole kbit/s: finer is noise.
fn thousand(rate: u64) -> u64 {
    rate / 1000 * 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(at_s: u64, cpu_us: u64, sent: u64) -> Usage {
        let of = |vm_id, factor| SliverUse {
            vm_id,
            slice: format!("plc.a_{vm_id}"),
            cpu_us: cpu_us * factor,
            sent_bytes: sent,
            ..SliverUse::default()
        };
        Usage {
            unix_ns: at_s * 1_000_000_000,
            node: Default::default(),
            slivers: vec![of(1, 1), of(2, 3)],
        }
    }

    #[test]
    fn rates_are_differences_and_the_busiest_comes_first() {
        let (before, now) = (usage(10, 0, 0), usage(12, 500_000, 2_000_000));
        let rates = rates(&before, &now);
        assert_eq!(rates[&1].cpu_percent, 25.0);
        assert_eq!((rates[&2].cpu_percent, rates[&2].sent), (75.0, 8_000_000));
        let text = page(&before, &now);
        let first = text.find("plc.a_2").unwrap();
        assert!(
            first < text.find("plc.a_1").unwrap() && text.contains("8 Mbit/s"),
            "{text}"
        );
    }

    #[test]
    fn a_sliver_that_was_started_again_has_no_negative_rate() {
        assert_eq!(
            rates(&usage(10, 900, 900), &usage(12, 0, 0))[&1],
            Rates::default()
        );
    }
}
