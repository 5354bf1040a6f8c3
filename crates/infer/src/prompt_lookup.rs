//! Drafts for speculative decoding: what followed the last time that these tokens stood here.
//!
//! A draft costs a look at the tokens so far. The model computes the drafted tokens in one step with the token that
//! is due, and those are kept that it would have drawn itself, so that the answer is the same with drafts and
//! without.

/// Tokens at the end that must have occurred before.
const LONGEST: usize = 4;
/// Fewer than these say too little about what comes.
const SHORTEST: usize = 2;

/// Up to `most` tokens that followed the newest earlier occurrence of the longest run of tokens that ends `tokens`.
pub(crate) fn draft(tokens: &[u32], most: usize) -> &[u32] {
    if most == 0 {
        return &[];
    }
    for length in (SHORTEST..=LONGEST.min(tokens.len().saturating_sub(1))).rev() {
        let (before, end) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - length..]);
        if let Some(start) = before.windows(length).rposition(|window| window == end) {
            let next = start + length;
            return &tokens[next..tokens.len().min(next + most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::draft;

    #[test]
    fn the_newest_and_longest_occurrence_counts() {
        assert_eq!(draft(&[1, 2, 3, 9, 1, 2, 3], 3), [9, 1, 2]);
        assert_eq!(draft(&[1, 2, 7, 1, 2, 8, 1, 2], 1), [8]);
        assert_eq!(draft(&[5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 2), [7, 6], "three tokens say more than two");
        assert_eq!(draft(&[4, 4, 4, 4], 9), [4], "an occurrence may overlap the end");
    }

    #[test]
    fn without_an_occurrence_there_is_no_draft() {
        for tokens in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[1, 3, 2, 3]] {
            assert!(draft(tokens, 4).is_empty(), "{tokens:?}");
        }
        assert!(draft(&[1, 2, 3, 1, 2], 0).is_empty());
    }
}
