//! What the rows of a new table hold.

use crate::error::{Result, StoreError};
use crate::split_mix::{GOLDEN, scatter};

/// The values of a new table's rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields))]
#[non_exhaustive]
pub enum RowInit {
    /// All zero. No memory is touched until a row is.
    Zeros,
    /// Independent normal values with mean 0. A row's values depend on `seed`, its id and the column alone,
    /// not on the number of rows, of threads, or on where the table lives.
    Normal {
        /// The standard deviation; from 0 to [`LARGEST_DEVIATION`].
        deviation: f32,
        /// The stream to draw from; tables of one model should differ in it.
        seed: u64,
    },
}

/// The largest standard deviation. No value drawn is 7 deviations from 0 (√(2 ln 2³²) = 6.66), so that all are finite.
pub const LARGEST_DEVIATION: f32 = 1e37;

impl RowInit {
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            Self::Normal { deviation, .. } if !(0.0..=LARGEST_DEVIATION).contains(&deviation) => {
                Err(StoreError::setting("deviation", deviation, "from 0 to 1e37"))
            }
            _ => Ok(()),
        }
    }

    /// Writes the first values of row `id`.
    pub fn fill(&self, id: u64, row: &mut [f32]) {
        match *self {
            Self::Zeros => row.fill(0.0),
            Self::Normal { deviation, seed } => normal(deviation, scatter(seed).wrapping_add(id), row),
        }
    }
}

/// A counter-based generator: number k of a stream is a hash of the stream and k (SplitMix64, Steele et al.
/// 2014), and every such number becomes a pair of normal values (Box and Muller 1958).
fn normal(deviation: f32, stream: u64, row: &mut [f32]) {
    let start = scatter(stream);
    for (k, pair) in (1..).zip(row.chunks_mut(2)) {
        let random = scatter(start.wrapping_add(GOLDEN.wrapping_mul(k)));
        // Halves of 32 bits: the first in (0, 1], since its logarithm is taken, the second in [0, 1).
        let [first, second] =
            [(random >> 32) + 1, random & 0xffff_ffff].map(|half| half as f64 / 2f64.powi(32));
        let radius = f64::from(deviation) * (-2.0 * first.ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * second).sin_cos();
        for (value, part) in pair.iter_mut().zip([cosine, sine]) {
            *value = (radius * part) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(init: RowInit, ids: std::ops::Range<u64>, width: usize) -> Vec<f32> {
        let mut rows = vec![f32::NAN; (ids.end - ids.start) as usize * width];
        ids.zip(rows.chunks_exact_mut(width)).for_each(|(id, row)| init.fill(id, row));
        rows
    }

    #[test]
    fn values_are_normal_and_uncorrelated_within_and_between_rows() {
        let values = rows(RowInit::Normal { deviation: 2.0, seed: 7 }, 0..4000, 64);
        let count = values.len() as f64;
        let moment =
            |power: i32| values.iter().map(|&v| (f64::from(v) / 2.0).powi(power)).sum::<f64>() / count;
        // Standard errors of the moments of 256,000 normal values, times five.
        for (power, wanted, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            let tolerance = 5.0 * (variance / count).sqrt();
            assert!((moment(power) - wanted).abs() < tolerance, "moment {power}: {}", moment(power));
        }
        for lag in [1, 2, 63, 64, 65, 128] {
            let products = values.iter().zip(&values[lag..]).map(|(a, b)| f64::from(a * b) / 4.0);
            assert!((products.sum::<f64>() / count).abs() < 5.0 / count.sqrt(), "lag {lag}");
        }
    }

    #[test]
    fn seeds_and_rows_differ_and_a_row_stays_itself() {
        let normal = |seed| RowInit::Normal { deviation: 1.0, seed };
        assert_eq!(rows(normal(1), 5..6, 8), rows(normal(1), 0..10, 8)[40..48]);
        assert_eq!(rows(normal(1), 5..6, 3), rows(normal(1), 5..6, 8)[..3]);
        assert_ne!(rows(normal(1), 5..6, 8), rows(normal(2), 5..6, 8));
        assert_ne!(rows(normal(1), 5..6, 8), rows(normal(2), 4..5, 8), "streams are not shifted copies");
        assert!(rows(RowInit::Zeros, 0..3, 4).iter().all(|&value| value == 0.0));
    }
}
