use crate::numpy_random::NumpyRandom;

/// One odd multiplier per position of the longest n-gram, position 0 being the current token.
///
/// They are `2v + 1` for the first `max_order` draws v of
/// `numpy.random.default_rng(seed + 10007·layer).integers(0, bound, max_order, int64)`. The bound keeps every product
/// with a class below 2^63. A larger order continues the same stream, so the multipliers of a smaller order are a
/// prefix.
///
/// `classes` is the number of vocabulary classes. A different number changes every multiplier.
pub fn draw_multipliers(seed: u64, layer: usize, classes: usize, max_order: usize) -> Vec<i64> {
    const LAYER_STRIDE: u128 = 10007;
    let largest = i64::MAX as u64 / (classes.max(1) as u64);
    let bound = (largest / 2).max(1);
    NumpyRandom::new(u128::from(seed) + LAYER_STRIDE * layer as u128)
        .integers(bound, max_order)
        .into_iter()
        .map(|draw| 2 * draw as i64 + 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greater_order_continues_the_stream() {
        let three = draw_multipliers(0, 1, 99_092, 3);
        assert_eq!(three, [76632096046245, 4839876093313, 35959672319349]);
        assert_eq!(draw_multipliers(0, 1, 99_092, 4)[..3], three);
    }

    #[test]
    fn products_stay_below_two_to_the_63() {
        for classes in [1, 2, 3, 1000, 99_092, 1 << 31] {
            for multiplier in draw_multipliers(7, 3, classes, 16) {
                assert!(multiplier > 0 && multiplier % 2 == 1);
                let largest = i128::from(multiplier) * (classes as i128 - 1);
                assert!(largest <= i128::from(i64::MAX), "{multiplier} × {classes}");
            }
        }
    }
}
