//! SplitMix64 (Steele et al. 2014): numbers that look random, from a counter.

/// What the generator's state grows by: 2^64 over the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser: a bijection that scatters every bit of the input over all of the output.
#[inline]
pub(crate) fn scatter(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// The first number of the generator with the seed `state`: [`scatter`] leaves 0 as it is, this does not.
#[inline]
pub(crate) fn mix(state: u64) -> u64 {
    scatter(state.wrapping_add(GOLDEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_published_ones() {
        // The first numbers of the reference implementation with the seed 1234567.
        let numbers = [0, 1, 2].map(|i: u64| mix(1_234_567 + GOLDEN.wrapping_mul(i)));
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }
}
