//! The one shape in which every benchmark reports (DESIGN section 10): written as JSON for programs,
//! shown as tables for people.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table};
use serde::{Deserialize, Serialize};

/// One run of one benchmark.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The benchmark's name, as `make bench BENCH=<name>` takes it.
    pub name: String,
    /// When it ran, RFC 3339.
    pub when: String,
    pub machine: Machine,
    pub rows: Vec<Row>,
    pub targets: Vec<Target>,
}

/// Where it ran: what the measured programs saw, that is the lab node and not its host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub cpu: String,
    pub cores: u32,
    /// In bytes.
    pub memory: u64,
    pub kernel: String,
    pub kvm: Kvm,
}

/// What stands behind `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kvm {
    /// The CPU's own virtualisation.
    Hardware,
    /// SVM emulated by QEMU's TCG, one level up: relations hold, absolute times do not carry over.
    NestedTcg,
    /// Runs small payloads only; no Linux guest.
    PayloadOnly,
}

/// One measure of one subject.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub subject: String,
    pub measure: String,
    pub unit: String,
    pub n: usize,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Row {
    /// Summarises `samples` (any order); `None` when there are none.
    pub(crate) fn of(subject: &str, measure: &str, unit: &str, samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            subject: subject.into(),
            measure: measure.into(),
            unit: unit.into(),
            n: sorted.len(),
            min,
            p50: percentile(&sorted, 50.0),
            p90: percentile(&sorted, 90.0),
            p99: percentile(&sorted, 99.0),
            max,
        })
    }
}

/// The `p`-th percentile of a sorted, non-empty slice, interpolated between neighbours.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let rank = p / 100.0 * (sorted.len() - 1) as f64;
    let (low, high) = (rank.floor() as usize, rank.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (rank - low as f64)
}

/// A number that was promised, and what was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Target {
    pub measure: String,
    pub want: String,
    pub got: String,
    pub met: bool,
    pub note: String,
}

impl Report {
    pub(crate) fn row(&self, subject: &str, measure: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|r| r.subject == subject && r.measure == measure)
    }

    /// Shows it, and writes it below `dir`.
    pub(crate) fn publish(&self, dir: &Path) -> Result<()> {
        println!("{}", self.tables());
        println!("written: {}", self.write(dir)?.display());
        Ok(())
    }

    /// Writes `<dir>/<name>.json`, and gives its path.
    pub(crate) fn write(&self, dir: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let path = dir.join(format!("{}.json", self.name));
        std::fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The tables for people.
    pub(crate) fn tables(&self) -> String {
        let m = &self.machine;
        let kvm = match m.kvm {
            Kvm::Hardware => "hardware virtualisation",
            Kvm::NestedTcg => "SVM emulated by QEMU TCG; compare subjects, not absolute times",
            Kvm::PayloadOnly => "a KVM that runs small payloads only",
        };
        let mut out = format!(
            "\n{} on {}: {} cores, {} MiB, Linux {}, {kvm}\n",
            self.name,
            m.cpu,
            m.cores,
            m.memory >> 20,
            m.kernel
        );
        let mut rows = Table::new();
        rows.set_header([
            "subject", "measure", "unit", "n", "min", "p50", "p90", "p99", "max",
        ]);
        for r in &self.rows {
            let mut cells: Vec<Cell> = [&r.subject, &r.measure, &r.unit]
                .into_iter()
                .map(Cell::new)
                .collect();
            cells.push(Cell::new(r.n).set_alignment(CellAlignment::Right));
            for value in [r.min, r.p50, r.p90, r.p99, r.max] {
                cells.push(Cell::new(format!("{value:.1}")).set_alignment(CellAlignment::Right));
            }
            rows.add_row(cells);
        }
        out.push_str(&format!("{rows}\n"));
        if !self.targets.is_empty() {
            let mut targets = Table::new();
            targets.set_header(["target", "want", "got", "met", "note"]);
            for t in &self.targets {
                let met = if t.met { "yes" } else { "NO" };
                targets.add_row([t.measure.as_str(), &t.want, &t.got, met, &t.note]);
            }
            out.push_str(&format!("{targets}\n"));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_between_neighbours() {
        let row = Row::of("s", "m", "ms", &[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((row.min, row.p50, row.max, row.n), (1.0, 2.5, 4.0, 4));
        assert!((row.p90 - 3.7).abs() < 1e-9);
        let one = Row::of("s", "m", "ms", &[7.0]).unwrap();
        assert_eq!((one.min, one.p50, one.p99, one.max), (7.0, 7.0, 7.0, 7.0));
        assert!(Row::of("s", "m", "ms", &[]).is_none());
    }

    #[test]
    fn kvm_kinds_are_spelled_as_design_section_10_spells_them() {
        for (kind, text) in [
            (Kvm::Hardware, "hardware"),
            (Kvm::NestedTcg, "nested-tcg"),
            (Kvm::PayloadOnly, "payload-only"),
        ] {
            assert_eq!(serde_json::to_value(kind).unwrap(), text);
        }
    }
}
