//! A sum of amounts per what they are amounts of, such as nats per token, and how sure it is.
//!
//! Of amounts a_i of b_i, with the sums A and B, the ratio is R = A/B. Each is left out in turn (the jackknife): R
//! changes by −u_i, `u_i = (a_i − R·b_i) / (B − b_i)`, its influence, and over n that are anything at all the variance is
//! `(n−1)/n · Σ u_i²`. For a mean, where each b is 1, that is the variance of the sample over n. Where one holds much of
//! B it pulls R towards itself, and would seem to lie near it if it were not left out. Unequal b say no more than fewer
//! equal ones, `B² / Σ b_i²` (Kish), one less than which are the error's degrees of freedom.

/// The ratio of the sums of `(amount, what it is an amount of)`.
pub(crate) fn ratio(amounts: &[(f64, f64)]) -> f64 {
    amounts.iter().map(|(amount, _)| amount).sum::<f64>() / total(amounts)
}

/// B.
pub(crate) fn total(amounts: &[(f64, f64)]) -> f64 {
    amounts.iter().map(|(_, of)| of).sum()
}

/// How many equal parts would say as much as those of these sizes.
pub(crate) fn equal_parts(sizes: impl Iterator<Item = f64> + Clone) -> f64 {
    sizes.clone().sum::<f64>().powi(2) / sizes.map(|size| size * size).sum::<f64>()
}

/// The u_i; none where one is an amount of all there is.
pub(crate) fn influences(amounts: &[(f64, f64)]) -> Option<Vec<f64>> {
    let (ratio, total) = (ratio(amounts), total(amounts));
    let influence = |&(amount, of): &(f64, f64)| (of < total).then(|| (amount - ratio * of) / (total - of));
    amounts.iter().map(influence).collect()
}

/// The standard error of what `count` have these influences on; none for fewer than two.
pub(crate) fn jackknife_error(influences: &[f64], count: usize) -> Option<f64> {
    let squares: f64 = influences.iter().map(|influence| influence * influence).sum();
    let n = count as f64;
    (count > 1).then(|| ((n - 1.0) / n * squares).sqrt())
}

/// The ratio and its standard error; none where fewer than two are anything.
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
        // Nothing of nothing does not count.
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
