//! Scores and continuations of many texts are those of each by itself.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use common::{EVERYTHING, Fixture, PLAIN, VOCABULARY, WITHOUT_MEMORY, random_tokens};
use engram_infer::{Offline, OfflineError, ScoredText};
use proptest::prelude::*;

fn offline(fixture: &Fixture) -> Offline {
    Offline::new(fixture.decoder(), fixture.tiers(), 1 << 22, 2).unwrap()
}

/// Texts of few tokens that share beginnings.
fn texts() -> impl Strategy<Value = Vec<(Vec<u32>, usize)>> {
    let text = (0_usize..60, 0_usize..3, prop::collection::vec(0_u32..3, 2..40), 1_usize..30);
    prop::collection::vec(text, 1..12).prop_map(|texts| {
        let common = random_tokens(60, 1);
        let text = |(shared, skip, own, first): (usize, usize, Vec<u32>, usize)| {
            let tokens: Vec<u32> = common[..shared].iter().copied().chain(own).skip(skip).take(96).collect();
            let first = first.min(tokens.len() - 1).max(1);
            (tokens, first)
        };
        texts.into_iter().map(text).filter(|(tokens, _)| tokens.len() > 1).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn company_changes_no_bit(
        config in prop_oneof![Just(EVERYTHING), Just(PLAIN), Just(WITHOUT_MEMORY)],
        texts in texts(),
    ) {
        let fixture = Fixture::new(config);
        let scored: Vec<ScoredText<'_>> =
            texts.iter().map(|(tokens, first)| ScoredText { tokens, first: *first }).collect();
        let mut together = offline(&fixture);
        let found = together.score(&scored).unwrap();
        for (text, found) in scored.iter().zip(&found) {
            let alone = offline(&fixture).score(&[*text]).unwrap();
            prop_assert_eq!(&alone[0], found);
            prop_assert_eq!(found.len(), text.tokens.len() - text.first);
        }
        // What is known from before is computed no other way.
        prop_assert_eq!(together.score(&scored).unwrap(), found);
    }
}

#[test]
fn scores_are_the_logarithms_of_probabilities() {
    for config in [EVERYTHING, PLAIN] {
        let fixture = Fixture::new(config);
        let tokens = random_tokens(30, 4);
        let found = offline(&fixture).score(&[ScoredText { tokens: &tokens, first: 1 }]).unwrap();
        for ((logits, token), found) in fixture.plain_logits(&tokens).iter().zip(&tokens[1..]).zip(&found[0])
        {
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            let expected = f64::from(logits[*token as usize]) - total.ln();
            assert!((f64::from(found.logprob) - expected).abs() < 2e-4);
        }
    }
}

#[test]
fn continuations_are_the_likeliest_tokens() {
    for (config, memory) in [(EVERYTHING, true), (EVERYTHING, false), (WITHOUT_MEMORY, true)] {
        let fixture = Fixture::new(config);
        let make = || if memory { offline(&fixture) } else { offline(&fixture).without_memory() };
        // More texts than are continued at once, some of which begin alike.
        let prompts: Vec<Vec<u32>> =
            (0..80).map(|seed| random_tokens(1 + seed as usize % 40, seed / 3)).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let never = &|| false;
        let mut all = make();
        let found = all.proceed(&prompts, (12, VOCABULARY as u32), &mut |_, _| false, never).unwrap();
        for (prompt, text) in prompts.iter().zip(&found) {
            let alone = make().proceed(&[prompt], (12, VOCABULARY as u32), &mut |_, _| false, never).unwrap();
            assert_eq!((&alone[0], text.len()), (text, 12));
            if memory {
                // Each is the likeliest where it stands.
                let whole = [prompt, &text[..]].concat();
                let scored = [ScoredText { tokens: &whole, first: prompt.len() }];
                assert!(all.score(&scored).unwrap()[0].iter().all(|score| score.likeliest));
            }
        }
        let end = found[0][3];
        let short = make().proceed(&prompts[..1], (12, end), &mut |_, _| false, never).unwrap();
        let first = found[0].iter().position(|&token| token == end).unwrap();
        assert_eq!(short[0], found[0][..first], "an end token ends a text");
        let mut two = |_: usize, text: &[u32]| text.len() == 2;
        let short = make().proceed(&prompts, (12, VOCABULARY as u32), &mut two, never).unwrap();
        assert!(short.iter().zip(&found).all(|(short, all)| short[..] == all[..2]));
        let stopped = make().proceed(&prompts, (12, VOCABULARY as u32), &mut two, &|| true);
        assert!(matches!(stopped, Err(OfflineError::Interrupted)));
    }
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let fixture = Fixture::new(PLAIN);
    let mut offline = offline(&fixture);
    let mut score =
        |tokens: &[u32], first: usize| offline.score(&[ScoredText { tokens, first }]).unwrap_err();
    assert!(matches!(score(&[1, 64], 1), OfflineError::Token { token: 64, vocabulary: 64 }));
    assert!(matches!(score(&[1, 2], 0), OfflineError::Empty));
    assert!(matches!(score(&[1, 2], 2), OfflineError::Empty));
    assert!(matches!(score(&[1; 98], 1), OfflineError::TooLong { tokens: 97, context: 96 }));
    let long = offline.proceed(&[&[1; 90]], (8, 64), &mut |_, _| false, &|| false);
    assert!(matches!(long, Err(OfflineError::TooLong { tokens: 97, context: 96 })));
}
