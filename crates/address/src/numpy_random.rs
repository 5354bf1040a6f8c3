//! The part of numpy's `random` module that drew the published multipliers: `SeedSequence`, `PCG64` (the XSL-RR 128/64
//! output of a 128-bit linear congruential generator) and Lemire's bounded draw.

/// `numpy.random.default_rng(seed)`, bit for bit.
#[derive(Clone, Debug)]
pub(crate) struct NumpyRandom {
    state: u128,
    increment: u128,
    /// The upper half of a 64-bit output whose lower half was already returned as a 32-bit draw.
    half: Option<u32>,
}

impl NumpyRandom {
    /// The generator for a seed. (numpy takes integers of any size; 128 bits cover every seed used here.)
    pub(crate) fn new(seed: u128) -> Self {
        let words = seed_sequence(seed);
        let join = |high: u64, low: u64| (u128::from(high) << 64) | u128::from(low);
        let mut random = Self { state: 0, increment: (join(words[2], words[3]) << 1) | 1, half: None };
        random.step();
        random.state = random.state.wrapping_add(join(words[0], words[1]));
        random.step();
        random
    }

    /// `integers(0, bound, count, int64)`.
    ///
    /// numpy chooses the method by the bound: no draw at all for 1, 32-bit draws up to 2^32, 64-bit draws above.
    pub(crate) fn integers(&mut self, bound: u64, count: usize) -> Vec<u64> {
        assert!(bound > 0, "numpy refuses an empty range as well");
        (0..count)
            .map(|_| match bound {
                1 => 0,
                0x1_0000_0000 => u64::from(self.next_u32()),
                2..0x1_0000_0000 => u64::from(self.below_u32(bound as u32)),
                _ => self.below_u64(bound),
            })
            .collect()
    }

    fn below_u64(&mut self, bound: u64) -> u64 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    fn below_u32(&mut self, bound: u32) -> u32 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(half) = self.half.take() {
            return half;
        }
        let word = self.next_u64();
        self.half = Some((word >> 32) as u32);
        word as u32
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    fn step(&mut self) {
        const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }
}

/// `SeedSequence(seed).generate_state(4, uint64)`: the seed's 32-bit words are mixed into a pool of four, and eight
/// words are drawn from the pool.
fn seed_sequence(seed: u128) -> [u64; 4] {
    // A seed has at most four words, which all fit into the pool. Missing words are zero.
    let mut absorb = Scramble { factor: 0x43b0_d7e5, step: 0x931e_8875 };
    let mut pool: [u32; 4] = std::array::from_fn(|i| absorb.word((seed >> (32 * i)) as u32));
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                pool[target] = mix(pool[target], absorb.word(pool[source]));
            }
        }
    }
    let mut emit = Scramble { factor: 0x8b51_f9dd, step: 0x58f3_8ded };
    let words: [u32; 8] = std::array::from_fn(|i| emit.word(pool[i % 4]));
    std::array::from_fn(|i| u64::from(words[2 * i]) | (u64::from(words[2 * i + 1]) << 32))
}

/// A multiplicative hash of words whose factor changes with every word.
struct Scramble {
    factor: u32,
    step: u32,
}

impl Scramble {
    fn word(&mut self, word: u32) -> u32 {
        let word = word ^ self.factor;
        self.factor = self.factor.wrapping_mul(self.step);
        let word = word.wrapping_mul(self.factor);
        word ^ (word >> 16)
    }
}

fn mix(x: u32, y: u32) -> u32 {
    let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
    mixed ^ (mixed >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `numpy.random.default_rng(seed).integers(0, bound, len(expected), numpy.int64)` of numpy 2.
    #[test]
    fn draws_are_numpys() {
        let cases: [(u128, u64, &[u64]); 8] = [
            (0, 7, &[5, 4, 3, 1, 2, 0]),
            (1, 1, &[0, 0, 0]),
            (5, 1 << 32, &[2881021352, 3457461230, 97294837, 3470079269, 2013703616]),
            (5, (1 << 32) - 1, &[2881021351, 3457461229, 97294836, 3470079268, 2013703615]),
            (6, (1 << 32) + 1, &[2311398289, 1474337159, 1585131725, 1608451361, 4241043940]),
            (
                1 << 32,
                i64::MAX as u64,
                &[8206391887579712273, 5138691512939900389, 7387073252730270942, 8822282796967251138],
            ),
            (
                12345678901234567890123,
                1_000_000_000_000,
                &[901503297394, 20360974458, 2578911601, 636718822928],
            ),
            // A bound that rejects a quarter of all 64-bit words.
            (
                3,
                3 << 61,
                &[
                    1638143553428909947,
                    5542839372172834964,
                    4027122783265899181,
                    651137615030404517,
                    2996168181739171682,
                    3313851260618361780,
                    1104998578845871980,
                    5081458767915139890,
                ],
            ),
        ];
        for (seed, bound, expected) in cases {
            let drawn = NumpyRandom::new(seed).integers(bound, expected.len());
            assert_eq!(drawn, expected, "seed {seed}, bound {bound}");
        }
    }
}
