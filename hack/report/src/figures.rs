//! How numbers are said: the same words in the table and in the chart.

use crate::schema::Comparison;

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// What the ratio means for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ahead,
    Even,
    Behind,
}

/// A rate, and the share of what went well, are better when higher; durations, sizes and counts when lower.
pub(crate) fn better(unit: &str) -> Better {
    if unit.ends_with("/s") || unit == "%" { Better::Higher } else { Better::Lower }
}

/// `value` with three significant digits and no more.
pub(crate) fn number(value: f64) -> String {
    // 9.996 would otherwise turn into 10.00: decide on the rounded value.
    let decimals = match value {
        v if v == 0.0 || v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// `value` with its unit.
pub(crate) fn quantity(value: f64, unit: &str) -> String {
    if unit.is_empty() { number(value) } else { format!("{} {unit}", number(value)) }
}

/// The ratio in words: "7.25× faster". A difference below 3 % is noise and said to be none.
pub(crate) fn verdict(result: &Comparison) -> Option<(String, Verdict)> {
    let ratio = result.ratio?;
    if ratio <= 0.0 {
        return None;
    }
    if (0.97..=1.03).contains(&ratio) {
        return Some(("on par".into(), Verdict::Even));
    }
    let ahead = match better(&result.unit) {
        Better::Lower => ratio < 1.0,
        Better::Higher => ratio > 1.0,
    };
    let [below, above] = match result.unit.as_str() {
        "B" | "KiB" | "MiB" | "GiB" | "kB" | "MB" | "GB" => ["smaller", "larger"],
        "%" | "exits" => ["less", "more"],
        _ if ahead => ["faster"; 2],
        _ => ["slower"; 2],
    };
    let word = if ratio < 1.0 { below } else { above };
    let times = if ratio < 1.0 { 1.0 / ratio } else { ratio };
    let verdict = if ahead { Verdict::Ahead } else { Verdict::Behind };
    Some((format!("{}× {word}", number(times)), verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        let cases = [
            (0.0, "0"),
            (0.0123, "0.012"),
            (0.99949, "0.999"),
            (0.9996, "1.00"),
            (1.234, "1.23"),
            (9.996, "10.0"),
            (12.34, "12.3"),
            (99.96, "100"),
            (12345.6, "12346"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text, "{value}");
        }
        assert_eq!(quantity(1.5, "s"), "1.50 s");
        assert_eq!(quantity(1.5, ""), "1.50");
    }

    #[test]
    fn the_verdict_knows_which_way_is_good() {
        let cases = [
            ("s", 1.0, 8.0, Some(("8.00× faster", Verdict::Ahead))),
            ("s", 8.0, 1.0, Some(("8.00× slower", Verdict::Behind))),
            ("MiB/s", 8.0, 1.0, Some(("8.00× faster", Verdict::Ahead))),
            ("MiB/s", 1.0, 2.0, Some(("2.00× slower", Verdict::Behind))),
            ("MiB", 1.0, 2.0, Some(("2.00× smaller", Verdict::Ahead))),
            ("MiB", 2.0, 1.0, Some(("2.00× larger", Verdict::Behind))),
            ("%", 80.0, 40.0, Some(("2.00× more", Verdict::Ahead))),
            ("exits", 80.0, 40.0, Some(("2.00× more", Verdict::Behind))),
            ("s", 1.01, 1.0, Some(("on par", Verdict::Even))),
            ("s", 1.0, 0.0, None),
            ("s", 0.0, 1.0, None),
        ];
        for (unit, ours, peer, expected) in cases {
            let result = Comparison::of("x", unit, &[ours], Some(("p", &[peer]))).unwrap();
            let expected = expected.map(|(text, verdict)| (text.to_owned(), verdict));
            assert_eq!(verdict(&result), expected, "{ours} {unit} by {peer}");
        }
    }
}
