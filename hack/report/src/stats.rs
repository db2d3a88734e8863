//! Samples in, the three numbers worth showing out.

use serde::{Deserialize, Serialize};

/// What is kept of a series of samples. Always `p10 <= median <= p90`, all finite and not negative, `n >= 1`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Half of the samples are below.
    pub median: f64,
    /// A tenth of the samples are below.
    pub p10: f64,
    /// A tenth of the samples are above.
    pub p90: f64,
    /// How many samples there were.
    pub n: u32,
}

/// Why a series of samples, or a summary read from a file, means nothing.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum BadSamples {
    /// There is nothing to summarise.
    #[error("no samples: at least one run must have succeeded")]
    None,
    /// More samples than a summary counts.
    #[error("more samples than fit a 32-bit count")]
    TooMany,
    /// Not a number, infinite, or below zero.
    #[error("{0} is not a measurement: it must be finite and not negative")]
    NotAMeasurement(f64),
    /// The percentiles contradict each other.
    #[error("p10 {p10}, median {median}, p90 {p90} are not in rising order")]
    Unordered {
        /// The lower percentile.
        p10: f64,
        /// The middle.
        median: f64,
        /// The upper percentile.
        p90: f64,
    },
}

impl Summary {
    /// Summarises `samples`, in any order.
    pub fn of(samples: &[f64]) -> Result<Self, BadSamples> {
        if samples.is_empty() {
            return Err(BadSamples::None);
        }
        let n = u32::try_from(samples.len()).map_err(|_| BadSamples::TooMany)?;
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let summary = Self {
            median: percentile(&sorted, 0.5),
            p10: percentile(&sorted, 0.1),
            p90: percentile(&sorted, 0.9),
            n,
        };
        // A bad sample may sit between the percentiles, so each one is looked at.
        for &sample in &sorted {
            check_number(sample)?;
        }
        summary.check()?;
        Ok(summary)
    }

    /// Whether this can have come from samples. Files are written by hand too.
    pub fn check(&self) -> Result<(), BadSamples> {
        if self.n == 0 {
            return Err(BadSamples::None);
        }
        for value in [self.p10, self.median, self.p90] {
            check_number(value)?;
        }
        if self.p10 > self.median || self.median > self.p90 {
            return Err(BadSamples::Unordered { p10: self.p10, median: self.median, p90: self.p90 });
        }
        Ok(())
    }
}

fn check_number(value: f64) -> Result<(), BadSamples> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(BadSamples::NotAMeasurement(value)) }
}

/// The value below which the fraction `rank` of `sorted` lies, between neighbours in proportion.
/// `sorted` must not be empty.
fn percentile(sorted: &[f64], rank: f64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "nobody takes 2^52 samples")]
    let position = rank * (sorted.len() - 1) as f64;
    #[allow(clippy::cast_sign_loss, reason = "rank and length are not negative")]
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * position.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn percentiles_interpolate_between_neighbours() {
        let cases: &[(&[f64], f64, f64, f64)] = &[
            (&[3.0], 3.0, 3.0, 3.0),
            (&[2.0, 1.0], 1.1, 1.5, 1.9),
            (&[5.0, 1.0, 3.0, 2.0, 4.0], 1.4, 3.0, 4.6),
            (&[0.0, 0.0, 0.0], 0.0, 0.0, 0.0),
        ];
        for (samples, p10, median, p90) in cases {
            let got = Summary::of(samples).unwrap();
            assert!(
                close(got.p10, *p10) && close(got.median, *median) && close(got.p90, *p90),
                "{samples:?} gave {got:?}"
            );
            assert_eq!(got.n as usize, samples.len());
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(Summary::of(&[]), Err(BadSamples::None));
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let found = Summary::of(&[1.0, 2.0, bad, 3.0, 4.0]);
            assert!(matches!(found, Err(BadSamples::NotAMeasurement(_))), "{bad} gave {found:?}");
        }
        let upside_down = Summary { median: 1.0, p10: 2.0, p90: 3.0, n: 3 };
        assert!(matches!(upside_down.check(), Err(BadSamples::Unordered { .. })));
        assert_eq!(Summary { n: 0, ..upside_down }.check(), Err(BadSamples::None));
    }
}
