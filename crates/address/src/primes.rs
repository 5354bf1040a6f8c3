use std::collections::HashSet;

use crate::config::check_heads;
use crate::error::{AddressError, Result};

/// Maximum number of rows per head: the largest prime below 2^32.
pub const MAX_HEAD_ROWS: u64 = 4_294_967_291;

/// The table sizes of every head of a model: `[layer][order][head]`, each its own prime.
///
/// Goes through the layers, then the orders (`base_rows` has one entry per order, 2-grams first), then the heads. Each
/// head takes the next larger prime that no head of the model has yet, starting at the order's base.
///
/// # Errors
/// A base of 0, no heads or more than [`MAX_HEADS`](crate::MAX_HEADS), or a search that exceeds [`MAX_HEAD_ROWS`].
pub fn assign_primes(layers: usize, base_rows: &[u64], heads: usize) -> Result<Vec<Vec<Vec<u64>>>> {
    check_heads(heads)?;
    let mut taken = HashSet::new();
    let mut layer = || base_rows.iter().map(|&base| primes_of_order(base, heads, &mut taken)).collect();
    (0..layers).map(|_| layer()).collect()
}

fn primes_of_order(base: u64, heads: usize, taken: &mut HashSet<u64>) -> Result<Vec<u64>> {
    let failure = |problem: &str| AddressError::Config {
        key: "base_rows",
        problem: format!("{base} {problem}; a head has between 2 and {MAX_HEAD_ROWS} rows"),
    };
    if base == 0 {
        return Err(failure("leaves a head without rows"));
    }
    let mut candidate = base - 1;
    (0..heads)
        .map(|_| {
            loop {
                candidate += 1;
                if candidate > MAX_HEAD_ROWS {
                    return Err(failure("has too few primes above it"));
                }
                if is_prime(candidate) && taken.insert(candidate) {
                    return Ok(candidate);
                }
            }
        })
        .collect()
}

/// Trial division: at most 2^15 steps for the sizes allowed here.
fn is_prime(n: u64) -> bool {
    match n {
        0 | 1 => false,
        2 => true,
        _ => n % 2 == 1 && !(3..).step_by(2).take_while(|d| d * d <= n).any(|d| n.is_multiple_of(d)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_HEADS;

    #[test]
    fn primality_agrees_with_a_sieve() {
        let mut composite = vec![false; 10_000];
        for d in 2..100 {
            (2 * d..10_000).step_by(d).for_each(|multiple| composite[multiple] = true);
        }
        for (n, &composite) in composite.iter().enumerate().skip(2) {
            assert_eq!(is_prime(n as u64), !composite, "{n}");
        }
        assert!(!is_prime(0) && !is_prime(1));
        assert!(is_prime(MAX_HEAD_ROWS));
        assert!((MAX_HEAD_ROWS + 1..1 << 32).all(|n| !is_prime(n)));
    }

    #[test]
    fn no_two_heads_share_a_prime() {
        let primes = assign_primes(2, &[1000, 900], 3).unwrap();
        assert_eq!(primes[0], [[1009, 1013, 1019], [907, 911, 919]]);
        assert_eq!(primes[1], [[1021, 1031, 1033], [929, 937, 941]]);
        assert_eq!(assign_primes(1, &[7, 1], 2).unwrap(), [[[7, 11], [2, 3]]]);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(assign_primes(1, &[0], 1).unwrap_err().to_string().contains("base_rows"));
        assert!(assign_primes(1, &[MAX_HEAD_ROWS], 1).is_ok());
        let error = assign_primes(1, &[MAX_HEAD_ROWS], 2).unwrap_err().to_string();
        assert!(error.contains("4294967291 has too few primes above it"), "{error}");
        assert!(assign_primes(1, &[u64::MAX], 1).is_err());
        for heads in [0, MAX_HEADS + 1, usize::MAX] {
            let error = assign_primes(1, &[2], heads).unwrap_err().to_string();
            assert!(error.contains(&format!("`heads`: is {heads};")), "{error}");
        }
        assert_eq!(assign_primes(1, &[2], MAX_HEADS).unwrap()[0][0].len(), MAX_HEADS);
    }
}
