//! `supermachine timeline`: the phases of a container's creation, as bars.

use std::fmt::Write;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::json;
use shim::inventory::Entry;
use shim::timeline::{Phase, Timeline};

use crate::{Failure, print, printable};

/// Columns of the longest bar.
const COLUMNS: usize = 48;

/// Prints it; writes a picture, too, if there is a place for one.
pub fn show(entry: &Entry, json: bool, svg: Option<&Path>) -> Result<(), Failure> {
    let mut phases = match Timeline::of(&entry.paths.task(&entry.id)).read() {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        other => other.map_err(|error| format!("reading the timeline of {}: {error}", entry.id))?,
    };
    if phases.is_empty() {
        return Err(format!("nothing is known yet of how {} was created", entry.id).into());
    }
    // What contains another comes before it.
    phases.sort_by_key(|phase| (phase.from, -phase.to));
    if let Some(path) = svg {
        std::fs::write(path, picture(&entry.id, &phases))
            .map_err(|error| format!("writing {}: {error}", path.display()))?;
    }
    if json {
        let begin = begin(&phases);
        let phases: Vec<_> = phases
            .iter()
            .map(|phase| {
                json!({ "name": phase.name, "from_ms": ms(phase.from - begin), "ms": ms(phase.to - phase.from) })
            })
            .collect();
        print(&format!("{:#}\n", json!({ "id": entry.id, "phases": phases })));
    } else {
        print(&chart(&entry.id, &phases));
    }
    Ok(())
}

fn begin(phases: &[Phase]) -> i64 {
    phases.iter().map(|phase| phase.from).min().unwrap_or(0)
}

/// How long all of it took.
fn length(phases: &[Phase]) -> i64 {
    let end = phases.iter().map(|phase| phase.to).max().unwrap_or(0);
    (end - begin(phases)).max(1)
}

#[allow(clippy::cast_precision_loss, reason = "of what is shown with one digit behind the point")]
fn ms(nanoseconds: i64) -> f64 {
    (nanoseconds as f64 / 1e5).round() / 10.0
}

/// Where a phase begins and ends, as parts of the whole.
#[allow(clippy::cast_precision_loss, reason = "parts of a picture")]
fn parts(phase: &Phase, phases: &[Phase]) -> (f64, f64) {
    let (begin, length) = (begin(phases), length(phases) as f64);
    let part = |time: i64| ((time - begin) as f64 / length).clamp(0.0, 1.0);
    (part(phase.from), part(phase.to).max(part(phase.from)))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "between 0 and COLUMNS"
)]
fn chart(id: &str, phases: &[Phase]) -> String {
    let width = phases.iter().map(|phase| phase.name.chars().count()).max().unwrap_or(0);
    let mut text = format!("{}: {:.1} ms\n", printable(id), ms(length(phases)));
    for phase in phases {
        let (from, to) = parts(phase, phases);
        let from = ((from * COLUMNS as f64) as usize).min(COLUMNS - 1);
        let to = ((to * COLUMNS as f64).ceil() as usize).clamp(from + 1, COLUMNS);
        let bar = format!("{}{}{}", " ".repeat(from), "█".repeat(to - from), " ".repeat(COLUMNS - to));
        let _ = writeln!(
            text,
            "  {:<width$} ▕{bar}▏ {:>9.1} ms",
            printable(&phase.name),
            ms(phase.to - phase.from)
        );
    }
    text
}

/// One self-contained SVG.
#[allow(clippy::cast_precision_loss, reason = "lines of a picture")]
fn picture(id: &str, phases: &[Phase]) -> String {
    const WIDTH: f64 = 860.0;
    const TOP: f64 = 64.0;
    const LEFT: f64 = 210.0;
    const BARS: f64 = 520.0;
    const LINE: f64 = 28.0;
    let height = TOP + LINE * phases.len() as f64 + 16.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"24\" y=\"34\" font-size=\"18\" font-weight=\"600\" fill=\"#16202e\">{}: {:.1} ms</text>\n",
        escaped(id),
        ms(length(phases))
    );
    for (line, phase) in phases.iter().enumerate() {
        let (from, to) = parts(phase, phases);
        let y = TOP + LINE * line as f64;
        let (x, width) = (LEFT + from * BARS, ((to - from) * BARS).max(1.0));
        let _ = writeln!(
            svg,
            "<text x=\"24\" y=\"{:.1}\" fill=\"#16202e\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{BARS}\" height=\"18\" fill=\"#edf1f5\"/>\
             <rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"18\" rx=\"2\" fill=\"#0d9488\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#64748b\">{:.1} ms</text>",
            y + 13.5,
            escaped(&phase.name),
            LEFT + BARS + 12.0,
            y + 13.5,
            ms(phase.to - phase.from)
        );
    }
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases() -> Vec<Phase> {
        let phase = |name: &str, from: i64, to: i64| Phase {
            name: name.into(),
            from: 1_000_000 * from,
            to: 1_000_000 * to,
        };
        vec![phase("create", 1000, 1100), phase("kernel", 1020, 1070), phase("agent <1>", 1099, 1100)]
    }

    #[test]
    fn bars_stand_where_their_time_was() {
        let chart = chart("web", &phases());
        let lines: Vec<_> = chart.lines().collect();
        assert_eq!(lines[0], "web: 100.0 ms");
        assert_eq!(lines[1], format!("  create    ▕{}▏     100.0 ms", "█".repeat(48)));
        assert_eq!(
            lines[2],
            format!("  kernel    ▕{}{}{}▏      50.0 ms", " ".repeat(9), "█".repeat(25), " ".repeat(14))
        );
        assert!(lines[3].ends_with("█▏       1.0 ms"), "{}", lines[3]);
    }

    #[test]
    fn a_picture_has_a_bar_for_each_phase_and_escapes_names() {
        let svg = picture("a&b", &phases());
        assert_eq!(svg.matches("#0d9488").count(), 3);
        assert!(svg.contains("a&amp;b: 100.0 ms") && svg.contains("agent &lt;1&gt;"));
        assert!(svg.contains("x=\"314.0\" y=\"92.0\" width=\"260.0\""), "{svg}");
    }

    #[test]
    fn times_that_make_no_sense_harm_nobody() {
        let odd = vec![Phase { name: "x".into(), from: 5, to: 2 }];
        assert!(chart("x", &odd).contains('█') && picture("x", &odd).contains("</svg>"));
    }
}
