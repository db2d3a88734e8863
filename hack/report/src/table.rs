//! The table for a terminal.

use crate::figures::{number, quantity, verdict};
use crate::schema::Report;
use crate::stats::Summary;

/// Draws `report` under `title` as lines of text, each ended by a newline.
pub fn table(title: &str, report: &Report) -> String {
    let mut rows = vec![[
        title.to_owned(),
        "ours".into(),
        "p10 – p90".into(),
        "n".into(),
        "peer".into(),
        "p10 – p90".into(),
        "n".into(),
        "ours/peer".into(),
        String::new(),
    ]];
    for result in &report.results {
        let [ours, ours_range, ours_n] = side(&result.ours, &result.unit);
        let (peer, peer_range, peer_n) = match (&result.peer, &result.peer_name) {
            (Some(peer), Some(name)) => {
                let [value, range, n] = side(peer, &result.unit);
                (format!("{name} {value}"), range, n)
            }
            _ => ("–".into(), String::new(), String::new()),
        };
        let ratio = result.ratio.map_or_else(|| "–".into(), number);
        let words = verdict(result).map_or_else(String::new, |(words, _)| words);
        rows.push([result.name.clone(), ours, ours_range, ours_n, peer, peer_range, peer_n, ratio, words]);
    }
    align(&rows)
}

fn side(summary: &Summary, unit: &str) -> [String; 3] {
    [
        quantity(summary.median, unit),
        format!("{} – {}", number(summary.p10), number(summary.p90)),
        summary.n.to_string(),
    ]
}

/// The first and the last column to the left, the others to the right, a rule under the first row.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| {
                if column == 0 || column == N - 1 {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
        if index == 0 {
            out += &"─".repeat(widths.iter().sum::<usize>() + 2 * (N - 1));
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Comparison;

    #[test]
    fn columns_line_up_and_say_everything() {
        let report = Report {
            results: vec![
                Comparison::of("start, x86_64", "s", &[1.0, 1.1, 1.2], Some(("boot", &[7.0, 8.0, 9.0])))
                    .unwrap(),
                Comparison::of("memory", "MiB", &[120.0], None).unwrap(),
            ],
        };
        let text = table("bed", &report);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("bed ") && lines[0].contains("ours/peer"));
        for piece in ["start, x86_64", "1.10 s", "1.02 – 1.18", "boot 8.00 s", "0.138", "7.27× faster"] {
            assert!(lines[2].contains(piece), "{piece} in {}", lines[2]);
        }
        let column = |line: &str, piece: &str| line[..line.find(piece).unwrap()].chars().count();
        assert_eq!(
            column(lines[2], "1.10 s") + "1.10 s".len(),
            column(lines[3], "120 MiB") + "120 MiB".len(),
            "ours is aligned to the right"
        );
    }

    #[test]
    fn nothing_measured_is_a_header_only() {
        assert_eq!(table("bed", &Report::default()).lines().count(), 2);
    }
}
