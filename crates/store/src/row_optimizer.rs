//! Optimisers that touch only the rows that a batch used.

#[cfg(feature = "train")]
use crate::balanced_momentum::BalancedStep;
use crate::error::{Result, StoreError};
#[cfg(feature = "train")]
use crate::records::{RecordsMut, VALUES_PER_TASK};
#[cfg(feature = "train")]
use crate::simd::vectorized;

/// How a row learns from its gradient. State exists per row; rows without a gradient keep values *and* state
/// as they are, and there is no weight decay (it would touch every row). The rate is given with each update.
///
/// With gradient g of a row that step t touches (t counts the table's updates, from 1):
///
/// **Adam** (two moments per value; the lazy form, step for step PyTorch's `SparseAdam`):
///
/// ```text
/// m ← m + (1 − β1)(g − m)
/// v ← v + (1 − β2)(g² − v)
/// p ← p − rate · √(1 − β2ᵗ) / (1 − β1ᵗ) · m / (√v + ε)
/// ```
///
/// **Adam by row**: the same, but t counts the row's own updates, so that a row that is first touched late takes its
/// first steps as a row that is touched at once does: step for step PyTorch's `Adam` on that row alone. A state value
/// more per row counts them, exactly up to 2²⁴ updates, where any correction is long 1.
///
/// **Row-wise Adam** (one second moment per *row*, a state of 4 bytes whatever the width):
///
/// ```text
/// s = mean over the row of g²
/// v ← s                      at the row's first touch (v = 0)
/// v ← v + (1 − β2)(s − v)    afterwards
/// p ← p − rate · g / (√v + ε)
/// ```
///
/// A correction of the bias by the table's step count would be wrong for a row first touched late: at step
/// 1000 with β2 = 0.999 its v would hold a thousandth of s, and its first step would be 31 times too long.
/// Starting v at the first s has no bias to correct, so that a row's first step has root mean square `rate`
/// whenever it comes.
///
/// **Balanced momentum** (one moment per value; how DeepSeek-V4.1 trains its tables). With U the rows of a step,
/// \[rows, width\]:
///
/// ```text
/// m ← β·m + g
/// U = g + β·m
/// K times, by turns: all rows of U to root mean square 1, all columns of U to root mean square 1
/// p ← p − rate · scale · U
/// ```
///
/// Rows whose root mean square is at most `floor` times that of all of U take no step and count for no column.
/// An odd K ends with rows, so that a row's step has root mean square `rate · scale`, however seldom it comes.
///
/// **Frozen**: rows stay as they were made; there is no state.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields))]
#[non_exhaustive]
pub enum RowOptimizer {
    /// Two moments per value.
    Adam {
        /// Decay of the first moment, in [0, 1).
        beta1: f64,
        /// Decay of the second moment, in [0, 1).
        beta2: f64,
        /// Added to the root of the second moment; above 0.
        epsilon: f64,
    },
    /// Two moments per value, their bias corrected by the count of the row's own updates.
    AdamByRow {
        /// Decay of the first moment, in [0, 1).
        beta1: f64,
        /// Decay of the second moment, in [0, 1).
        beta2: f64,
        /// Added to the root of the second moment; above 0.
        epsilon: f64,
    },
    /// One second moment per row.
    RowWiseAdam {
        /// Decay of the second moment, in [0, 1).
        beta2: f64,
        /// Added to the root of the second moment; above 0.
        epsilon: f64,
    },
    /// Momentum with steps balanced between rows and columns.
    BalancedMomentum {
        /// β, in [0, 1).
        momentum: f64,
        /// K, normalisations of rows and columns together; at least 1.
        iterations: u32,
        /// Share of the root mean square over all rows below which a row rests, in [0, 1).
        floor: f64,
        /// Root mean square of a step at rate 1; above 0.
        scale: f64,
    },
    /// Nothing is learned.
    Frozen,
}

impl RowOptimizer {
    /// Adam with the customary β1 = 0.9, β2 = 0.999, ε = 1e-8.
    pub const fn adam() -> Self {
        Self::Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }

    /// Row-wise Adam with β2 = 0.999, ε = 1e-8.
    pub const fn row_wise_adam() -> Self {
        Self::RowWiseAdam { beta2: 0.999, epsilon: 1e-8 }
    }

    /// Balanced momentum with V4.1's settings: β = 0.95, K = 11, a floor of 1e-3 and a scale of 0.18.
    pub const fn balanced_momentum() -> Self {
        Self::BalancedMomentum { momentum: 0.95, iterations: 11, floor: 1e-3, scale: 0.18 }
    }

    /// State values kept per row of `width` values: the first kind, then the second. 0: there is none.
    pub const fn state_widths(&self, width: usize) -> [usize; 2] {
        match self {
            Self::Adam { .. } => [width, width],
            // The count stands last.
            Self::AdamByRow { .. } => [width, width + 1],
            Self::RowWiseAdam { .. } => [1, 0],
            Self::BalancedMomentum { .. } => [width, 0],
            Self::Frozen => [0, 0],
        }
    }

    /// Fails if a setting is outside its range.
    pub(crate) fn check(&self) -> Result<()> {
        let (beta1, beta2, epsilon) = match *self {
            Self::Adam { beta1, beta2, epsilon } | Self::AdamByRow { beta1, beta2, epsilon } => {
                (beta1, beta2, epsilon)
            }
            Self::RowWiseAdam { beta2, epsilon } => (0.0, beta2, epsilon),
            Self::BalancedMomentum { momentum, iterations, floor, scale } => {
                return check_balanced(momentum, iterations, floor, scale);
            }
            Self::Frozen => return Ok(()),
        };
        let unit = UNIT;
        if !(0.0..1.0).contains(&beta1) {
            return Err(StoreError::setting("beta1", beta1, unit));
        }
        if !(0.0..1.0).contains(&beta2) {
            return Err(StoreError::setting("beta2", beta2, unit));
        }
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(StoreError::setting("epsilon", epsilon, "finite and above 0"));
        }
        Ok(())
    }

    /// The largest magnitude of a gradient in a table of rows of `width` values.
    ///
    /// Second moments are averages of g², or of its mean over the row: the sum of a row's squares stays below a
    /// quarter of the largest `f32`, which leaves room for rounding. A momentum β below 1 − 2⁻²⁴ multiplies
    /// gradients by less than 2²⁴, and their sums are squared in f64.
    pub fn largest_gradient(width: usize) -> f32 {
        (f64::from(f32::MAX) / 4.0 / width as f64).sqrt() as f32
    }

    /// This optimiser's step number `step` (from 1) at `rate`.
    #[cfg(feature = "train")]
    pub(crate) fn step(&self, step: u64, rate: f32) -> RowStep {
        match *self {
            Self::Adam { beta1, beta2, epsilon } => {
                let correction = |beta: f64| 1.0 - beta.powf(step as f64);
                RowStep::Adam {
                    take1: (1.0 - beta1) as f32,
                    take2: (1.0 - beta2) as f32,
                    epsilon: epsilon as f32,
                    size: (f64::from(rate) * correction(beta2).sqrt() / correction(beta1)) as f32,
                }
            }
            Self::AdamByRow { beta1, beta2, epsilon } => {
                RowStep::AdamByRow { beta1, beta2, epsilon: epsilon as f32, rate }
            }
            Self::RowWiseAdam { beta2, epsilon } => {
                RowStep::RowWise { take2: (1.0 - beta2) as f32, epsilon: epsilon as f32, rate }
            }
            Self::BalancedMomentum { momentum, iterations, floor, scale } => {
                let size = f64::from(rate) * scale;
                RowStep::Balanced(BalancedStep { momentum: momentum as f32, iterations, floor, size })
            }
            Self::Frozen => RowStep::Rest,
        }
    }
}

const UNIT: &str = "at least 0 and below 1";

fn check_balanced(momentum: f64, iterations: u32, floor: f64, scale: f64) -> Result<()> {
    for (name, value) in [("momentum", momentum), ("floor", floor)] {
        if !(0.0..1.0).contains(&value) {
            return Err(StoreError::setting(name, value, UNIT));
        }
    }
    if iterations == 0 {
        return Err(StoreError::setting("iterations", iterations, "at least 1"));
    }
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(StoreError::setting("scale", scale, "finite and above 0"));
    }
    Ok(())
}

/// One step's constants, worked out in f64 and rounded once.
#[cfg(feature = "train")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum RowStep {
    Adam { take1: f32, take2: f32, epsilon: f32, size: f32 },
    AdamByRow { beta1: f64, beta2: f64, epsilon: f32, rate: f32 },
    RowWise { take2: f32, epsilon: f32, rate: f32 },
    Balanced(BalancedStep),
    Rest,
}

#[cfg(feature = "train")]
impl RowStep {
    /// Applies the step to the rows `ids` (ascending, all inside `rows`) with gradients [ids, width].
    ///
    /// Rows are independent, or summed up in a fixed order, so the result does not depend on how the work is split.
    pub(crate) fn apply(self, mut rows: RecordsMut<'_>, ids: &[u64], grads: &[f32]) {
        match self {
            Self::Balanced(step) => return step.apply(&mut rows, ids, grads),
            Self::Rest => return,
            Self::Adam { .. } | Self::AdamByRow { .. } | Self::RowWise { .. } => {}
        }
        if grads.len() <= VALUES_PER_TASK || ids.len() < 2 || rayon::current_num_threads() == 1 {
            return self.apply_here(rows, ids, grads);
        }
        let middle = ids.len() / 2;
        let (grads_before, grads_after) = grads.split_at(middle * rows.widths[0]);
        let (before, after) = rows.split_at(ids[middle]);
        rayon::join(
            || self.apply(before, &ids[..middle], grads_before),
            || self.apply(after, &ids[middle..], grads_after),
        );
    }

    fn apply_here(self, rows: RecordsMut<'_>, ids: &[u64], grads: &[f32]) {
        let width = rows.widths[0];
        // One loop for each kind, compiled for the machine's vectors as a whole. Multiplying and adding are not fused, so
        // that every machine rounds alike.
        match self {
            Self::Adam { take1, take2, epsilon, size } => vectorized(
                #[inline(always)]
                || {
                    rows.for_each_here(
                        ids,
                        grads.chunks_exact(width),
                        #[inline(always)]
                        |record, grads| adam([take1, take2, epsilon, size], record, grads),
                    );
                },
            ),
            Self::AdamByRow { beta1, beta2, epsilon, rate } => vectorized(
                #[inline(always)]
                || {
                    rows.for_each_here(
                        ids,
                        grads.chunks_exact(width),
                        #[inline(always)]
                        |record, grads| adam_by_row([beta1, beta2], [epsilon, rate], record, grads),
                    );
                },
            ),
            Self::RowWise { take2, epsilon, rate } => vectorized(
                #[inline(always)]
                || {
                    rows.for_each_here(
                        ids,
                        grads.chunks_exact(width),
                        #[inline(always)]
                        |record, grads| row_wise([take2, epsilon, rate], record, grads),
                    );
                },
            ),
            Self::Balanced(_) | Self::Rest => {}
        }
    }
}

/// Steps a record: values, first and second moments, each as wide as `grads`.
#[cfg(feature = "train")]
#[inline(always)]
fn adam([take1, take2, epsilon, size]: [f32; 4], record: &mut [f32], grads: &[f32]) {
    let width = grads.len();
    let (values, state) = record.split_at_mut(width);
    let (first, second) = state.split_at_mut(width);
    // Slices whose equal length the compiler sees.
    let (values, first, second) = (&mut values[..width], &mut first[..width], &mut second[..width]);
    for i in 0..width {
        let (g, m, v) = (grads[i], first[i], second[i]);
        let (m, v) = (m + take1 * (g - m), v + take2 * (g * g - v));
        (first[i], second[i]) = (m, v);
        values[i] -= size * (m / (v.sqrt() + epsilon));
    }
}

/// As [`adam`], for a record behind whose moments stands the count of its updates.
#[cfg(feature = "train")]
#[inline(always)]
fn adam_by_row([beta1, beta2]: [f64; 2], [epsilon, rate]: [f32; 2], record: &mut [f32], grads: &[f32]) {
    let Some((count, record)) = record.split_last_mut() else { return };
    *count += 1.0;
    let correction = |beta: f64| 1.0 - beta.powf(f64::from(*count));
    let (root, first) = (correction(beta2).sqrt(), correction(beta1));
    // PyTorch's Adam adds ε to the corrected root, its SparseAdam to the root as it is.
    let (epsilon, size) = (epsilon * root as f32, (f64::from(rate) * root / first) as f32);
    adam([(1.0 - beta1) as f32, (1.0 - beta2) as f32, epsilon, size], record, grads);
}

/// Steps a record: values as wide as `grads`, and one second moment.
#[cfg(feature = "train")]
#[inline(always)]
fn row_wise([take2, epsilon, rate]: [f32; 3], record: &mut [f32], grads: &[f32]) {
    let (values, state) = record.split_at_mut(grads.len());
    let second = &mut state[0];
    let mean = sum_of_squares(grads) / grads.len() as f32;
    *second = if *second == 0.0 { mean } else { *second + take2 * (mean - *second) };
    let factor = rate / (second.sqrt() + epsilon);
    for (p, &g) in values.iter_mut().zip(grads) {
        *p -= factor * g;
    }
}

/// In eight fixed partial sums, so that it runs in vector registers and always rounds the same.
#[cfg(feature = "train")]
#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f32 {
    let mut partial = [0.0f32; 8];
    let chunks = values.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().map(|value| value * value).sum();
    for chunk in chunks {
        partial.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
    }
    partial.iter().sum::<f32>() + rest
}
