//! A ratio of sums, such as nats per token, and its standard error.
//!
//! For amounts a_i and sizes b_i with the sums A and B, the ratio is R = A/B. Leaving out each one in turn (the
//! jackknife) changes R by −u_i, `u_i = (a_i − R·b_i) / (B − b_i)`, its influence. Over the n with b_i ≠ 0, the
//! variance is `(n−1)/n · Σ u_i²`. For a mean, where each b is 1, that is the variance of the sample over n. One that
//! holds much of B pulls R towards itself; leaving it out shows how far. Unequal b have the precision of fewer equal
//! ones, `B² / Σ b_i²` (Kish). One less than that are the error's degrees of freedom.

/// The ratio of the sums of `(amount, size)`.
pub(crate) fn ratio(amounts: &[(f64, f64)]) -> f64 {
    amounts.iter().map(|(amount, _)| amount).sum::<f64>() / total(amounts)
}

/// B.
pub(crate) fn total(amounts: &[(f64, f64)]) -> f64 {
    amounts.iter().map(|(_, of)| of).sum()
}

/// The number of equal parts with the same precision as parts of these sizes.
pub(crate) fn equal_parts(sizes: impl Iterator<Item = f64> + Clone) -> f64 {
    sizes.clone().sum::<f64>().powi(2) / sizes.map(|size| size * size).sum::<f64>()
}

/// The u_i; none if one of them holds all of B.
pub(crate) fn influences(amounts: &[(f64, f64)]) -> Option<Vec<f64>> {
    let (ratio, total) = (ratio(amounts), total(amounts));
    let influence = |&(amount, of): &(f64, f64)| (of < total).then(|| (amount - ratio * of) / (total - of));
    amounts.iter().map(influence).collect()
}

/// The standard error of a ratio of `count` with these influences; none for fewer than two.
pub(crate) fn jackknife_error(influences: &[f64], count: usize) -> Option<f64> {
    let squares: f64 = influences.iter().map(|influence| influence * influence).sum();
    let n = count as f64;
    (count > 1).then(|| ((n - 1.0) / n * squares).sqrt())
}

/// The ratio and its standard error; none if fewer than two sizes are above 0.
pub(crate) fn ratio_with_error(amounts: &[(f64, f64)]) -> (f64, Option<f64>) {
    let count = amounts.iter().filter(|&&amount| amount != (0.0, 0.0)).count();
    (ratio(amounts), influences(amounts).and_then(|influences| jackknife_error(&influences, count)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_that_holds_all_says_nothing_of_others() {
        assert_eq!(ratio_with_error(&[(3.0, 2.0)]), (1.5, None));
        assert_eq!(ratio_with_error(&[(3.0, 2.0), (0.0, 0.0)]), (1.5, None));
        assert_eq!(equal_parts([2.0, 2.0, 2.0].into_iter()), 3.0);
        assert_eq!(equal_parts([3.0, 1.0].into_iter()), 1.6);
        // An amount of 0 with size 0 does not count.
        let two = [(1.0, 1.0), (3.0, 1.0)];
        assert_eq!(ratio_with_error(&two), (2.0, Some(1.0)));
        assert_eq!(ratio_with_error(&[two[0], (0.0, 0.0), two[1]]), (2.0, Some(1.0)));
    }

    proptest! {
        #[test]
        fn an_influence_is_what_leaving_out_changes(
            amounts in proptest::collection::vec((-5.0..5.0f64, 0.1..20.0f64), 2..12),
        ) {
            let influences = influences(&amounts).unwrap();
            for (left_out, influence) in influences.iter().enumerate() {
                let mut rest = amounts.clone();
                rest.remove(left_out);
                prop_assert!((ratio(&amounts) - ratio(&rest) - influence).abs() < 1e-9);
            }
        }

        #[test]
        fn of_a_mean_it_is_the_samples(values in proptest::collection::vec(-5.0..5.0f64, 2..20)) {
            let (mean, error) = ratio_with_error(&values.iter().map(|&value| (value, 1.0)).collect::<Vec<_>>());
            let n = values.len() as f64;
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
            prop_assert!((error.unwrap() - (variance / n).sqrt()).abs() < 1e-9);
        }
    }
}
