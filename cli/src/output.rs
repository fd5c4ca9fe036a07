//! Tables for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::error::{About, Result};

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// JSON instead of tables.
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `people` makes of it.
    pub(crate) fn show<T: Serialize + ?Sized>(
        &self,
        value: &T,
        people: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let text = match self.json {
            true => serde_json::to_string_pretty(value).about("answer")?,
            false => people(value),
        };
        print(&text)
    }

    /// Prints a sentence for people; nothing with `--json`.
    pub(crate) fn say(&self, text: &str) -> Result<()> {
        if self.json { Ok(()) } else { print(text) }
    }
}

/// Prints a line. A reader that has gone away (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).about("standard output"),
        _ => Ok(()),
    }
}

/// A table with a head and no frame; `none` when it has no rows.
pub(crate) fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
    none: &str,
) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(head);
    let mut empty = true;
    for row in rows {
        empty = false;
        table.add_row(row);
    }
    if empty {
        return none.to_owned();
    }
    table
        .to_string()
        .lines()
        .map(|line| line.trim_end().strip_prefix(' ').unwrap_or(line).to_owned() + "\n")
        .collect::<String>()
        .trim_end()
        .to_owned()
}

/// A time for people, Unix seconds in.
pub(crate) fn time(unix: i64) -> String {
    jiff::Timestamp::from_second(unix).map_or_else(
        |_| unix.to_string(),
        |time| {
            time.to_zoned(jiff::tz::TimeZone::system())
                .strftime("%Y-%m-%d %H:%M")
                .to_string()
        },
    )
}

/// Microseconds as milliseconds.
pub(crate) fn millis(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

/// `-` for nothing.
pub(crate) fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_columns() {
        let text = table(["NAME", "STATE"], [["a".to_owned(), "up".to_owned()]], "none");
        assert_eq!(text.lines().collect::<Vec<_>>(), ["NAME  STATE", "a     up"]);
        assert_eq!(table(["NAME"], [], "no slices"), "no slices");
    }

    #[test]
    fn milliseconds_keep_a_digit() {
        assert_eq!(millis(1_234_567), "1234.5");
        assert_eq!(millis(49), "0.0");
    }
}
