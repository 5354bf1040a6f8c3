//! Random row ids for measurements: fast, and the same on every machine.

/// SplitMix64 (Steele et al. 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(scatter(seed))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        scatter(self.0)
    }

    /// From 0 to one less than `end`; uniform to within 2⁶⁴ / `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// One of `end` ids by Zipf's law: probability proportional to rank to the power −`exponent`, with the rank taken
    /// as continuous. Ranks are scattered over the ids.
    pub(crate) fn zipf(&mut self, end: u64, exponent: f64) -> u64 {
        let uniform = (self.next() >> 11) as f64 / 2f64.powi(53);
        let most = end as f64 + 1.0;
        let rank = if (exponent - 1.0).abs() < 1e-9 {
            most.powf(uniform)
        } else {
            let power = 1.0 - exponent;
            ((most.powf(power) - 1.0) * uniform + 1.0).powf(1.0 / power)
        };
        let rank = (rank as u64).clamp(1, end);
        ((u128::from(scatter(rank)) * u128::from(end)) >> 64) as u64
    }
}

fn scatter(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn uniform_ids_reach_everything_alike() {
        let mut random = Random::new(5);
        let mut counts = [0u32; 10];
        (0..100_000).for_each(|_| counts[random.below(10) as usize] += 1);
        assert!(counts.iter().all(|&count| (9_600..10_400).contains(&count)), "{counts:?}");
    }

    #[test]
    fn zipf_ids_follow_their_law() {
        for exponent in [0.8, 1.0, 1.2] {
            let mut random = Random::new(5);
            let mut counts: HashMap<u64, u32> = HashMap::new();
            (0..200_000).for_each(|_| *counts.entry(random.zipf(1_000_000, exponent)).or_default() += 1);
            assert!(counts.keys().all(|&id| id < 1_000_000));
            let mut counts: Vec<u32> = counts.into_values().collect();
            counts.sort_unstable_by(|a, b| b.cmp(a));
            // Ranks 16 to 31 against 64 to 127: four times the rank, and four times the number of ranks.
            let of = |ranks: std::ops::Range<usize>| f64::from(counts[ranks].iter().sum::<u32>());
            let ratio = of(63..127) / of(15..31);
            let wanted = 4f64.powf(1.0 - exponent);
            assert!((ratio / wanted - 1.0).abs() < 0.12, "{exponent}: {ratio} for {wanted}");
        }
    }
}
