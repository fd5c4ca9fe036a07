//! An SVG plot of a report's phases: one stacked bar for each subject, medians, labelled in place.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A bar: what it stands for and its phases in order, in milliseconds.
pub(crate) struct Bar {
    pub label: String,
    pub phases: Vec<(String, f64)>,
}

const COLOURS: [RGBColor; 6] = [
    RGBColor(38, 70, 83),
    RGBColor(42, 157, 143),
    RGBColor(233, 196, 106),
    RGBColor(244, 162, 97),
    RGBColor(231, 111, 81),
    RGBColor(141, 153, 174),
];

/// Draws `bars` under each other with one time axis, and writes the picture to `path`.
pub(crate) fn stacked(path: &Path, title: &str, bars: &[Bar]) -> Result<()> {
    draw(path, title, bars).map_err(|e| anyhow!("drawing {}: {e}", path.display()))
}

fn draw(path: &Path, title: &str, bars: &[Bar]) -> Result<(), Box<dyn std::error::Error>> {
    let height = 150 + 70 * bars.len() as u32;
    let root = SVGBackend::new(path, (960, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let longest = bars
        .iter()
        .map(|b| b.phases.iter().map(|p| p.1).sum::<f64>())
        .fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .build_cartesian_2d(0.0..longest * 1.25, 0.0..bars.len() as f64 + 0.6)?;
    chart
        .configure_mesh()
        .disable_y_axis()
        .disable_y_mesh()
        .x_desc("milliseconds (median)")
        .draw()?;

    let mut legend: Vec<&str> = Vec::new();
    for (i, bar) in bars.iter().enumerate() {
        let (bottom, top) = (
            (bars.len() - 1 - i) as f64 + 0.1,
            (bars.len() - 1 - i) as f64 + 0.6,
        );
        let mut at = 0.0;
        for (name, ms) in &bar.phases {
            let index = legend.iter().position(|l| l == name).unwrap_or_else(|| {
                legend.push(name);
                legend.len() - 1
            });
            let colour = COLOURS[index % COLOURS.len()].filled();
            chart.draw_series([Rectangle::new([(at, bottom), (at + ms, top)], colour)])?;
            at += ms;
        }
        let text = format!("{}: {at:.0} ms", bar.label);
        chart.draw_series([Text::new(text, (0.0, top + 0.22), ("sans-serif", 15))])?;
    }
    for (index, name) in legend.iter().enumerate() {
        let y = 40 + 18 * index as i32;
        root.draw(&Rectangle::new(
            [(770, y), (784, y + 12)],
            COLOURS[index % COLOURS.len()].filled(),
        ))?;
        root.draw(&Text::new((*name).to_owned(), (790, y), ("sans-serif", 14)))?;
    }
    root.present()?;
    Ok(())
}
