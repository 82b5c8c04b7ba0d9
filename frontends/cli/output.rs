//! Printing of results: text, tables and JSON.

use crate::failure::Outcome;
use serde::Serialize;
use std::io::Write;

/// Prints one JSON object on one line.
pub fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string(value)
        .map_err(|e| quantc_ir::diag::Diag::bug(format!("a result does not serialize: {e}")))?;
    line(&text)
}

/// Prints a line.
pub fn line(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(())
}

/// Prints a text as it is and shows it at once.
pub fn piece(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// A table with columns as wide as their widest cell: the first to the left, the others to the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count());
        cells.chain(std::iter::once(head[i].chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (i, (cell, &width)) in cells.zip(&widths).enumerate() {
            match i {
                0 => line += &format!("{cell:<width$}"),
                _ => line += &format!("  {cell:>width$}"),
            }
        }
        line.trim_end().to_string() + "\n"
    };
    let mut text = print(&mut head.iter().copied());
    for row in rows {
        text += &print(&mut row.iter().map(String::as_str));
    }
    text
}

/// Bytes for people: `6.5 MiB`.
pub fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut x = n as f64;
    let mut unit = 0;
    while x >= 1024.0 && unit + 1 < units.len() {
        x /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{x:.1} {}", units[unit]) }
}
