//! Rotary positions (RoPE, arXiv 2104.09864), stretched to a longer context by YaRN (arXiv 2309.00071).

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use engram_kernels::Angles;

use engram_config::{AttentionConfig, BlockRotary, ModelConfig, YarnConfig};

/// Cosines and sines of every position and frequency, `[time, width/2]`. Dimension i is paired with i + width/2.
#[derive(Debug, Clone)]
pub struct Rotary {
    width: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    inverse_temperature: f32,
}

impl Rotary {
    /// Angles `position · base^(−2i/width)` for `time` positions.
    pub fn new(width: usize, base: f32, time: usize) -> Self {
        Self::of(width, frequencies(width, base), time, 1.0)
    }

    /// The same, stretched: a pair that turns fully less than α times over the original context turns slower by the
    /// scale; one that turns more than β times stays; between the two, in proportion. Scores are divided by a
    /// temperature, too. With a scale of 1 this is [`new`](Self::new), bit for bit.
    pub fn stretched(width: usize, base: f32, time: usize, yarn: &YarnConfig) -> Self {
        Self::of(width, yarn.frequencies(width, base), time, yarn.inverse_temperature())
    }

    /// Those of a model, over its whole context.
    pub fn of_model(config: &ModelConfig) -> Self {
        let ((width, base), context) = (config.attention.rotary(), config.context);
        match config.attention.yarn() {
            Some(yarn) => Self::stretched(width, base, context, yarn),
            None => Self::new(width, base, context),
        }
    }

    /// Those of every block of a model, over its whole context; none where heads are not rotated. Blocks that have the
    /// same share them.
    pub fn of_blocks(config: &ModelConfig) -> Vec<Option<Self>> {
        if let AttentionConfig::Latent(_) = config.attention {
            return vec![Some(Self::of_model(config)); config.blocks];
        }
        let mut known: Vec<(BlockRotary, Self)> = Vec::new();
        let mut of_block = |block: usize| {
            let rotary = config.attention.rotary_of(block)?;
            if let Some((_, found)) = known.iter().find(|(of, _)| *of == rotary) {
                return Some(found.clone());
            }
            let BlockRotary { width, ref frequencies, amplitude } = rotary;
            let mut found = Self::of(width, frequencies.clone(), config.context, 1.0);
            if amplitude != 1.0 {
                let grown = |values: &[f32]| values.iter().map(|value| value * amplitude).collect();
                (found.cos, found.sin) = (grown(&found.cos), grown(&found.sin));
            }
            known.push((rotary, found.clone()));
            Some(found)
        };
        (0..config.blocks).map(&mut of_block).collect()
    }

    fn of(width: usize, frequencies: Vec<f64>, time: usize, inverse_temperature: f32) -> Self {
        let angles = (0..time).flat_map(|t| frequencies.iter().map(move |f| t as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self { width, cos: cos.into(), sin: sin.into(), inverse_temperature }
    }

    /// What the scores of attention are multiplied by, beside 1/√width; 1 unless stretched.
    pub(crate) fn inverse_temperature(&self) -> f32 {
        self.inverse_temperature
    }

    /// Cosines and sines of the first `time` positions, `[time, width/2]` each.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn angles(&self, time: usize) -> Angles<'_> {
        let count = time * self.width / 2;
        Angles { cos: &self.cos[..count], sin: &self.sin[..count] }
    }

    /// Rotates the leading values of every head of `[batch, time, heads, width]`, whose tokens stand at `positions`,
    /// `[time]`, in Burn's primitives. What lies behind them stays as it is.
    pub(crate) fn rotate(&self, x: Tensor<4>, positions: &[usize]) -> Tensor<4> {
        let [_, time, _, width] = x.dims();
        if width > self.width {
            let rest = x.clone().narrow(3, self.width, width - self.width);
            return Tensor::cat(vec![self.rotate(x.narrow(3, 0, self.width), positions), rest], 3);
        }
        let half = width / 2;
        let table = |values: &[f32], device: &Device| {
            let values = positions.iter().flat_map(|position| &values[position * half..][..half]);
            Tensor::<4>::from_data(TensorData::new(values.copied().collect(), [1, time, 1, half]), device)
        };
        let device = x.device();
        let (cos, sin) = (table(&self.cos, &device), table(&self.sin, &device));
        let mut halves = x.split(half, 3).into_iter();
        let (Some(a), Some(b)) = (halves.next(), halves.next()) else {
            unreachable!("an even width splits into two halves")
        };
        let rotated_a = a.clone() * cos.clone() - b.clone() * sin.clone();
        Tensor::cat(vec![rotated_a, b * cos + a * sin], 3)
    }
}

/// Radians per position of each pair.
fn frequencies(width: usize, base: f32) -> Vec<f64> {
    (0..width / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / width as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use engram_config::YarnRamp;

    fn yarn(scale: f32) -> YarnConfig {
        YarnConfig {
            scale,
            original_context: 4096,
            alpha: 1.0,
            beta: 32.0,
            factor: 0.707,
            ramp: YarnRamp::Turns,
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_scale_of_one_is_the_plain_embedding_bit_for_bit() {
        for (width, base) in [(4, 100.0), (64, 10_000.0), (64, 500_000.0)] {
            let (plain, found) =
                (Rotary::new(width, base, 300), Rotary::stretched(width, base, 300, &yarn(1.0)));
            assert_eq!(bits(&found.cos), bits(&plain.cos));
            assert_eq!(bits(&found.sin), bits(&plain.sin));
            assert_eq!(found.inverse_temperature(), 1.0);
        }
    }

    /// Values of DeepSeek-V2's `yarn_find_correction_range` and `yarn_linear_ramp_mask` for its published settings:
    /// width 64, base 10000, 40 times 4096 tokens, β from 32 to 1, which make a ramp from pair 10 to pair 23.
    #[test]
    fn by_the_index_the_ramp_is_that_of_deepseek() {
        let yarn = YarnConfig { ramp: YarnRamp::Index, ..yarn(40.0) };
        let (plain, found) = (frequencies(64, 10_000.0), yarn.frequencies(64, 10_000.0));
        for (pair, (plain, found)) in plain.iter().zip(&found).enumerate() {
            let stretched = ((pair as f64 - 10.0) / 13.0).clamp(0.0, 1.0);
            let expected = plain / 40.0 * stretched + plain * (1.0 - stretched);
            assert!((found / expected - 1.0).abs() < 1e-12, "pair {pair}: {found}, not {expected}");
        }
    }

    #[test]
    fn fast_pairs_stay_and_slow_ones_are_stretched() {
        let (width, base, scale) = (64, 10_000.0_f32, 10.0);
        let (plain, found) = (frequencies(width, base), Rotary::stretched(width, base, 2, &yarn(scale)));
        for (pair, frequency) in plain.iter().enumerate() {
            // The sine of one step is nearly its angle, or is compared as such.
            let step = f64::from(found.sin[width / 2 + pair]);
            let turns = 4096.0 * frequency / std::f64::consts::TAU;
            let expected = match turns {
                turns if turns > 32.0 => *frequency,
                turns if turns < 1.0 => frequency / f64::from(scale),
                turns => {
                    let kept = (turns - 1.0) / 31.0;
                    kept * frequency + (1.0 - kept) * frequency / f64::from(scale)
                }
            };
            assert!((step - expected.sin()).abs() < 1e-6, "pair {pair}: {step}, not {expected}");
        }
        // √(1/t) = 0.0707·ln 10 + 1, as DeepSeek-V2 has it; scores get its square.
        assert!((found.inverse_temperature() - 1.352_088).abs() < 1e-5, "{}", found.inverse_temperature());
    }
}
