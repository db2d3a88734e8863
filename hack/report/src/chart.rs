//! The chart for a page: paired bars with whiskers, as one self-contained SVG.
//!
//! Results of one unit share an axis where that leaves every bar visible; otherwise each pair has its own
//! scale and the chart says so. Every value stands beside its bar, so nobody has to read it off a grid.

use std::fmt::Write;

use crate::figures::{Better, Verdict, better, quantity, verdict};
use crate::schema::{Comparison, Report};
use crate::stats::Summary;

const WIDTH: f64 = 860.0;
const MARGIN: f64 = 36.0;
/// Room right of the longest bar for its value.
const VALUE_ROOM: f64 = 104.0;
const BAR: f64 = 18.0;
const BAR_GAP: f64 = 7.0;
const NAME_LINE: f64 = 32.0;
const RESULT_GAP: f64 = 26.0;
const AXIS: f64 = 30.0;
const SECTION_GAP: f64 = 8.0;
const SECTION_LINE: f64 = 34.0;
/// On a shared axis the shortest bar must still be this part of the longest.
const SHARED_AXIS_RANGE: f64 = 25.0;

const OURS: &str = "#0d9488";
const PEER: &str = "#c3ccd8";
const INK: &str = "#16202e";
const SOFT: &str = "#64748b";
const GRID: &str = "#edf1f5";

/// Draws `report` under `title`.
pub fn svg(title: &str, report: &Report) -> String {
    let sections = by_unit(&report.results);
    let bars_left = MARGIN + label_width(&report.results);
    let mut body = String::new();
    let mut y = MARGIN + 50.0;
    for section in &sections {
        y = draw_section(&mut body, section, sections.len() > 1, bars_left, y);
    }
    if sections.is_empty() {
        text(&mut body, MARGIN, y + 18.0, "s", SOFT, "start", "nothing was measured");
        y += 40.0;
    }
    frame(title, y + MARGIN - RESULT_GAP, &body)
}

fn frame(title: &str, height: f64, body: &str) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#,
        escape(title)
    );
    out += concat!(
        "<style>\n",
        "text { font-family: system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; }\n",
        ".t { font-size: 21px; font-weight: 650; letter-spacing: -0.2px; }\n",
        ".n { font-size: 14.5px; font-weight: 600; paint-order: stroke; stroke: #ffffff; stroke-width: 5px; }\n",
        ".r { font-size: 13px; font-weight: 650; }\n",
        ".s { font-size: 12.5px; }\n",
        ".v { font-size: 12.5px; font-variant-numeric: tabular-nums; }\n",
        "</style>\n"
    );
    let _ = writeln!(
        out,
        r##"<rect x="0.5" y="0.5" width="{}" height="{}" rx="12" fill="#ffffff" stroke="#e2e8f0"/>"##,
        WIDTH - 1.0,
        height - 1.0
    );
    text(&mut out, MARGIN, MARGIN + 14.0, "t", INK, "start", title);
    text(
        &mut out,
        WIDTH - MARGIN,
        MARGIN + 12.0,
        "s",
        SOFT,
        "end",
        "bar: median · whisker: 10th to 90th percentile",
    );
    out += body;
    out += "</svg>\n";
    out
}

/// The results grouped by unit, units and results in the order of the report.
fn by_unit(results: &[Comparison]) -> Vec<Vec<&Comparison>> {
    let mut sections: Vec<Vec<&Comparison>> = Vec::new();
    for result in results {
        match sections.iter_mut().find(|section| section[0].unit == result.unit) {
            Some(section) => section.push(result),
            None => sections.push(vec![result]),
        }
    }
    sections
}

fn draw_section(out: &mut String, section: &[&Comparison], with_heading: bool, left: f64, mut y: f64) -> f64 {
    let unit = &section[0].unit;
    let direction = match better(unit) {
        Better::Lower => "shorter is better",
        Better::Higher => "longer is better",
    };
    let shared = shared_axis(section);
    let note = match (shared, section.len()) {
        (None, 2..) => format!("{direction}; each pair on its own scale"),
        _ => direction.to_owned(),
    };
    let heading = if with_heading && !unit.is_empty() { format!("{unit} · {note}") } else { note };
    text(out, MARGIN, y + 8.0, "s", SOFT, "start", &heading);
    y += SECTION_LINE;

    let heights: f64 = section.iter().map(|result| height(result)).sum();
    let ticks = shared.map(ticks).unwrap_or_default();
    let room = WIDTH - MARGIN - VALUE_ROOM - left;
    if let Some(&end) = ticks.last() {
        for &tick in &ticks {
            let x = left + room * tick / end;
            line(out, (x, y - 6.0), (x, y + heights - RESULT_GAP + 8.0), GRID, 1.0);
            // A tick is a round number: its shortest form, without the digits a measurement has.
            let label = if tick > 0.0 { format!("{} {unit}", short(tick)) } else { "0".into() };
            text(out, x, y + heights - RESULT_GAP + 24.0, "s", SOFT, "middle", &label);
        }
    }
    for result in section {
        let end = ticks.last().copied().unwrap_or_else(|| reach(result));
        // Nothing but zeros: any scale draws them right.
        draw_result(out, result, left, if end > 0.0 { room / end } else { 0.0 }, y);
        y += height(result);
    }
    y + if ticks.is_empty() { SECTION_GAP } else { AXIS }
}

fn draw_result(out: &mut String, result: &Comparison, left: f64, scale: f64, y: f64) {
    text(out, MARGIN, y + 14.0, "n", INK, "start", &result.name);
    if let Some((words, verdict)) = verdict(result) {
        pill(out, WIDTH - MARGIN, y, &words, verdict);
    }
    let mut y = y + NAME_LINE - 6.0;
    let mut side = |name: &str, summary: &Summary, fill: &str, ink: &str| {
        text(out, left - 12.0, y + BAR - 5.0, "s", SOFT, "end", name);
        let end = left + summary.median * scale;
        let _ = writeln!(
            out,
            r#"<rect x="{left:.1}" y="{y:.1}" width="{:.1}" height="{BAR}" rx="4" fill="{fill}"/>"#,
            (end - left).max(2.0)
        );
        let mut label_at = end;
        if summary.p10 < summary.p90 {
            whisker(out, left + summary.p10 * scale, left + summary.p90 * scale, y + BAR / 2.0, ink);
            label_at = end.max(left + summary.p90 * scale);
        }
        let label = quantity(summary.median, &result.unit);
        text(out, label_at + 10.0, y + BAR - 4.5, "v", INK, "start", &label);
        y += BAR + BAR_GAP;
    };
    side("ours", &result.ours, OURS, "#0b4f4a");
    if let (Some(peer), Some(name)) = (&result.peer, &result.peer_name) {
        side(name, peer, PEER, "#56657a");
    }
}

fn height(result: &Comparison) -> f64 {
    let bars = if result.peer.is_some() { 2.0 } else { 1.0 };
    NAME_LINE + bars * (BAR + BAR_GAP) - BAR_GAP + RESULT_GAP
}

/// How far right anything of this result goes.
fn reach(result: &Comparison) -> f64 {
    let peer = result.peer.map_or(0.0, |peer| peer.p90);
    result.ours.p90.max(peer)
}

/// The end of an axis for all of `section`, unless some bar would vanish on it.
fn shared_axis(section: &[&Comparison]) -> Option<f64> {
    let longest = section.iter().map(|result| reach(result)).fold(0.0, f64::max);
    // A short bar beside its own long peer is the message; a short pair beside a long one is a loss.
    let smallest = section.iter().map(|result| reach(result)).fold(f64::INFINITY, f64::min);
    (longest > 0.0 && longest <= smallest * SHARED_AXIS_RANGE).then_some(longest)
}

/// Round numbers from zero to at least `end`, about five of them.
fn ticks(end: f64) -> Vec<f64> {
    let rough = end / 5.0;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|digit| digit * magnitude)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(10.0 * magnitude);
    let mut ticks = vec![0.0];
    while ticks[ticks.len() - 1] < end - step * 1e-9 {
        let count = u32::try_from(ticks.len()).unwrap_or(u32::MAX);
        ticks.push(f64::from(count) * step);
    }
    ticks
}

/// `tick` without trailing zeros, and without the dust that multiplying a step leaves.
fn short(tick: f64) -> f64 {
    let scale = 10f64.powf(3.0 - tick.log10().floor());
    (tick * scale).round() / scale
}

/// Room for the longest name of a side; an estimate, as an SVG cannot measure its fonts.
fn label_width(results: &[Comparison]) -> f64 {
    let longest = results
        .iter()
        .filter_map(|result| result.peer_name.as_deref())
        .chain(["ours"])
        .map(|name| name.chars().count())
        .max()
        .unwrap_or(4);
    16.0 + 7.2 * f64::from(u32::try_from(longest.min(30)).unwrap_or(30))
}

fn whisker(out: &mut String, from: f64, to: f64, y: f64, ink: &str) {
    line(out, (from, y), (to, y), ink, 1.6);
    for x in [from, to] {
        line(out, (x, y - 4.5), (x, y + 4.5), ink, 1.6);
    }
}

/// A rounded label that ends at `right`.
fn pill(out: &mut String, right: f64, y: f64, words: &str, verdict: Verdict) {
    let (fill, ink) = match verdict {
        Verdict::Ahead => ("#d9f5ef", "#0a6b5f"),
        Verdict::Even => ("#eef2f6", "#475569"),
        Verdict::Behind => ("#fdeed3", "#94520a"),
    };
    let width = 22.0 + 7.4 * f64::from(u32::try_from(words.chars().count()).unwrap_or(u32::MAX));
    let _ = writeln!(
        out,
        r#"<rect x="{:.1}" y="{:.1}" width="{width:.1}" height="22" rx="11" fill="{fill}"/>"#,
        right - width,
        y - 2.0
    );
    text(out, right - width / 2.0, y + 13.5, "r", ink, "middle", words);
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), ink: &str, width: f64) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        out,
        r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{ink}" stroke-width="{width}" stroke-linecap="round"/>"#
    );
}

fn text(out: &mut String, x: f64, y: f64, class: &str, ink: &str, anchor: &str, words: &str) {
    let _ = writeln!(
        out,
        r#"<text class="{class}" x="{x:.1}" y="{y:.1}" fill="{ink}" text-anchor="{anchor}">{}</text>"#,
        escape(words)
    );
}

/// `words` as character data or attribute value. Control characters have no place in XML 1.0 at all.
fn escape(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    for letter in words.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            control if control.is_control() => out.push(' '),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &str, unit: &str, ours: &[f64], peer: &[f64]) -> Comparison {
        let peer = (!peer.is_empty()).then_some(("boot", peer));
        Comparison::of(name, unit, ours, peer).unwrap()
    }

    #[test]
    fn ticks_are_round_and_cover_the_end() {
        let cases: &[(f64, &[f64])] = &[
            (10.0, &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
            (8.3, &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
            (1.0, &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (1200.0, &[0.0, 250.0, 500.0, 750.0, 1000.0, 1250.0]),
        ];
        for (end, expected) in cases {
            let found = ticks(*end);
            assert_eq!(found.len(), expected.len(), "{end}: {found:?}");
            for (a, b) in found.iter().zip(*expected) {
                assert!((a - b).abs() < 1e-9, "{end}: {found:?}");
            }
        }
        for end in [0.0013, 0.7, 3.0, 77.0, 123_456.0] {
            let found = ticks(end);
            assert!(found[found.len() - 1] >= end && found.len() <= 8, "{end}: {found:?}");
        }
    }

    #[test]
    fn an_axis_is_shared_only_where_all_pairs_stay_visible() {
        let (a, b, c) = (
            result("a", "s", &[1.0], &[8.0]),
            result("b", "s", &[2.0], &[9.0]),
            result("c", "s", &[0.01], &[0.02]),
        );
        assert_eq!(shared_axis(&[&a, &b]), Some(9.0));
        assert_eq!(shared_axis(&[&a, &b, &c]), None);
        assert_eq!(shared_axis(&[&result("zero", "s", &[0.0], &[])]), None);
    }

    #[test]
    fn every_name_value_and_verdict_is_in_the_picture() {
        let report = Report {
            results: vec![
                result("start, x86_64", "s", &[1.0, 1.1, 1.2], &[7.0, 8.0, 9.0]),
                result("copy", "MiB/s", &[500.0], &[250.0]),
                result("memory", "MiB", &[120.0], &[]),
            ],
        };
        let picture = svg("bed", &report);
        for piece in [
            "start, x86_64",
            "1.10 s",
            "7.27× faster",
            "500 MiB/s",
            "2.00× faster",
            "120 MiB",
            "shorter is better",
            "longer is better",
            ">boot<",
        ] {
            assert!(picture.contains(piece), "{piece} is missing");
        }
        assert!(picture.contains(">200 MiB/s<"), "ticks are short: {picture}");
        assert!(svg("bed", &Report::default()).contains("nothing was measured"));
    }

    #[test]
    fn names_cannot_break_the_markup() {
        let picture =
            svg("a < \"b\" & c", &Report { results: vec![result("</svg>\u{1b}", "s", &[1.0], &[])] });
        assert_eq!(picture.matches("</svg>").count(), 1);
        assert!(picture.contains("&lt;/svg&gt; ") && picture.contains("&quot;b&quot; &amp; c"));
        assert!(!picture.contains('\u{1b}'));
    }

    #[test]
    fn no_coordinate_is_undefined() {
        let report =
            Report { results: vec![result("zero", "s", &[0.0], &[0.0]), result("one", "", &[1.0], &[])] };
        let picture = svg("x", &report);
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }
}
