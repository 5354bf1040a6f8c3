//! Words to count (RULER, section 3, aggregation), and words as names.

use std::fmt::Write;

use rand::RngExt;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use super::haystack::SEVERAL;

/// Number of common words.
pub(super) const COMMON: usize = 10;
/// Lists of words are shorter below this length.
const SHORT: usize = 4096;
/// Exponent of the rank with which frequencies fall.
const ZIPF: f64 = 2.0;
/// ζ(2): the sum of the frequencies of all ranks.
const ZETA: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;
/// Coded words of a text, per token of its length.
const CODED: f64 = 1.0 / 50.0;

const ADJECTIVES: [&str; 32] = [
    "amber", "ancient", "bitter", "brave", "calm", "clever", "cold", "crimson", "dusty", "early", "faint",
    "gentle", "golden", "hollow", "humble", "idle", "jolly", "keen", "little", "lonely", "mellow", "narrow",
    "odd", "pale", "quiet", "rapid", "silent", "tall", "tender", "vivid", "warm", "young",
];
const NOUNS: [&str; 48] = [
    "anchor", "apple", "badger", "barrel", "basket", "beacon", "candle", "canyon", "castle", "cedar",
    "cotton", "dagger", "eagle", "falcon", "feather", "garden", "glacier", "hammer", "harbour", "island",
    "jacket", "kettle", "ladder", "lantern", "maple", "marble", "meadow", "mirror", "needle", "orchard",
    "otter", "parrot", "pebble", "pillow", "rabbit", "ribbon", "saddle", "shadow", "spider", "teapot",
    "temple", "thunder", "tunnel", "valley", "violin", "walnut", "window", "zebra",
];

pub(super) fn common_words(words: usize, length: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
    let (often, seldom) = if length < SHORT { (6, 1) } else { (30, 3) };
    let (few, fewer) = if length < SHORT { (3, 1) } else { (10, 3) };
    let example = if length < SHORT { 20 } else { 40 };
    let (shown, shown_answers) = word_list(example, few, fewer, random);
    let (asked, answers) = word_list(words, often, seldom, random);
    let question = |list: &str| {
        format!(
            "Some words of this numbered list are there more often than the others.\n{list}\n\
             Question: Which {COMMON} words are there most often?\nAnswer: The {COMMON} most common words are:"
        )
    };
    let solved = numbered(&shown_answers);
    (format!("{} {solved}\n{}", question(&shown), question(&asked)), answers)
}

/// A numbered list. The first words, which are returned, occur `often` times, the others `seldom` times.
fn word_list(words: usize, often: usize, seldom: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
    let words = names(words, random);
    let (common, others) = words.split_at(COMMON.min(words.len()));
    let repeat = |words: &[String], times: usize| {
        words.iter().flat_map(|word| std::iter::repeat_n(word.clone(), times)).collect::<Vec<_>>()
    };
    let mut all = repeat(common, often);
    all.extend(repeat(others, seldom));
    all.shuffle(random);
    (numbered(&all), common.to_vec())
}

fn numbered(words: &[String]) -> String {
    let mut text = String::new();
    for (index, word) in words.iter().enumerate() {
        let gap = if index == 0 { "" } else { " " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{gap}{}. {word}", index + 1);
    }
    text
}

pub(super) fn frequent_words(words: usize, length: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
    let distinct = ((length as f64 * CODED) as usize).max(SEVERAL);
    let mut codes: Vec<String> = vec!["...".into()];
    while codes.len() < distinct {
        let code: String = (0..6).map(|_| char::from(random.random_range(b'a'..=b'z'))).collect();
        if !codes.contains(&code) {
            codes.push(code);
        }
    }
    let mut all = Vec::new();
    for (rank, code) in (1..).zip(&codes) {
        let times = words as f64 * f64::from(rank).powf(-ZIPF) / ZETA;
        all.extend(std::iter::repeat_n(code.as_str(), times as usize));
    }
    all.shuffle(random);
    let prompt = format!(
        "Coded words follow, some of them more often than others; the dots do not count.\n{}\n\
         Question: Which three coded words are there most often?\n\
         Answer: The three most frequent coded words are",
        all.join(" ")
    );
    (prompt, codes[1..SEVERAL].to_vec())
}

/// Different names: single words, or pairs if there are too few.
pub(super) fn names(count: usize, random: &mut ChaCha8Rng) -> Vec<String> {
    let singles = ADJECTIVES.len() + NOUNS.len();
    let pairs = ADJECTIVES.len() * NOUNS.len();
    let pair = |index: usize| format!("{}-{}", ADJECTIVES[index / NOUNS.len()], NOUNS[index % NOUNS.len()]);
    if count <= SEVERAL {
        return sample(random, pairs, count).into_iter().map(pair).collect();
    }
    let word = |index: usize| match index {
        index if index < ADJECTIVES.len() => ADJECTIVES[index].to_owned(),
        index if index < singles => NOUNS[index - ADJECTIVES.len()].to_owned(),
        index if index < singles + pairs => pair(index - singles),
        // Beyond these, numbered pairs of pairs.
        index => format!("{}-{}", pair((index - singles) % pairs), (index - singles) / pairs),
    };
    let there = if count <= singles { singles } else { count.max(singles + pairs) };
    sample(random, there, count).into_iter().map(word).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::super::Ruler;
    use super::super::tests::one;
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn names_differ(count in 1_usize..3000, seed: u64) {
            let mut names = names(count, &mut ChaCha8Rng::seed_from_u64(seed));
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), count);
        }
    }

    #[test]
    fn answers_are_the_words_that_are_there_most_often() {
        for (kind, separator) in
            [(Ruler::CommonWords, "are there more often"), (Ruler::FrequentWords, "do not count")]
        {
            let record = one(kind, 900, 5);
            let text = record.prompt.rsplit(separator).next().unwrap().split("\nQuestion").next().unwrap();
            let mut counts: HashMap<&str, usize> = HashMap::new();
            for word in text.split_whitespace().filter(|word| !word.ends_with('.')) {
                *counts.entry(word).or_default() += 1;
            }
            let least = record.answers.iter().map(|answer| counts[answer.as_str()]).min().unwrap();
            let others =
                counts.iter().filter(|(word, _)| !record.answers.iter().any(|answer| answer == *word));
            assert!(others.into_iter().all(|(_, &count)| count < least), "{kind:?}");
        }
    }
}
