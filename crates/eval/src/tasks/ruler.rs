//! RULER (Hsieh et al. 2024, arXiv 2404.06654): how far back a model can find, follow and count, at any length, from a
//! seed.
//!
//! Sizes are the published ones: four keys, values or queries; a chain of four hops; ten common words, each thirty times
//! among words that are there three times (six and one below 4096 tokens); coded words whose frequency falls with the
//! square of their rank, the most frequent of them dots. The sentences are ours, so that scores compare models
//! here, not with published tables.

use std::fmt::Write;

use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// A kind of task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ruler {
    /// One number to find.
    Single,
    /// One number to find among those of other keys.
    MultiKey,
    /// All numbers of one key.
    MultiValue,
    /// The numbers of several keys.
    MultiQuery,
    /// All variables that have a value, directly or through others.
    VariableTracking,
    /// The words that are there most often, where all others are rare.
    CommonWords,
    /// The three most frequent of coded words.
    FrequentWords,
}

/// What needles and assignments are hidden in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Haystack(Vec<String>);

/// A prompt with what should come after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RulerRecord {
    /// What the model reads.
    pub prompt: String,
    /// All of these should be in what it says.
    pub answers: Vec<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that the answer may take: those of the longest right one of all records, and half as many again.
    pub answer_tokens: usize,
}

/// Hidden keys, values or queries, where there are several.
const SEVERAL: usize = 4;
/// Hops of a chain of variables.
const HOPS: usize = 4;
/// Words that are common.
const COMMON: usize = 10;
/// Below this length lists of words are shorter.
const SHORT: usize = 4096;
/// Power of the rank with which frequencies fall.
const ZIPF: f64 = 2.0;
/// ζ(2): what the frequencies of all ranks add up to.
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

impl Ruler {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Single,
        Self::MultiKey,
        Self::MultiValue,
        Self::MultiQuery,
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
    ];

    /// Its name in files and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::MultiKey => "multi_key",
            Self::MultiValue => "multi_value",
            Self::MultiQuery => "multi_query",
            Self::VariableTracking => "variable_tracking",
            Self::CommonWords => "common_words",
            Self::FrequentWords => "frequent_words",
        }
    }

    /// `count` records whose prompt and answer have at most `length` tokens, and as much hay as fits; `tokens` counts
    /// them. The same seed gives the same records.
    ///
    /// # Errors
    /// When not even the smallest record fits, or a text has no tokens in the vocabulary.
    pub fn records(
        self,
        haystack: &Haystack,
        (length, count): (usize, usize),
        seed: u64,
        tokens: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<Vec<RulerRecord>> {
        let all = |reserve: usize| -> Result<Vec<RulerRecord>> {
            let record = |index| self.record(haystack, (length, reserve), (seed, index), tokens);
            (0..count as u64).map(record).collect()
        };
        // One limit for all answers: the longest's, and prompts that leave room for it.
        let reserve = all(0)?.iter().map(|record| record.answer_tokens).max().unwrap_or(0);
        all(reserve)
    }

    fn record(
        self,
        haystack: &Haystack,
        (length, reserve): (usize, usize),
        (seed, index): (u64, u64),
        tokens: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<RulerRecord> {
        let with = |hay: usize| -> Result<RulerRecord> {
            // The same needles whatever the hay.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(index);
            let (prompt, answers) = self.text(haystack, (hay, length), &mut random);
            let answer_tokens = reserve.max(tokens(&answers.join(", "))? * 3 / 2 + 2);
            Ok(RulerRecord { prompt_tokens: tokens(&prompt)?, prompt, answers, answer_tokens })
        };
        let fits = |record: &RulerRecord| record.prompt_tokens + record.answer_tokens <= length;
        let least = self.least();
        let mut best = with(least)?;
        if !fits(&best) {
            let needed = best.prompt_tokens + best.answer_tokens;
            let problem = format!("{}: the shortest takes {needed} tokens, more than {length}", self.name());
            return Err(Error::Mismatch(problem));
        }
        // Double, then halve the interval: what fits, and what does not.
        let (mut fitting, mut beyond) = (least, 2 * least);
        loop {
            let record = with(beyond)?;
            if !fits(&record) {
                break;
            }
            (best, fitting, beyond) = (record, beyond, 2 * beyond);
        }
        while beyond - fitting > (fitting / 256).max(1) {
            let middle = fitting.midpoint(beyond);
            let record = with(middle)?;
            if fits(&record) { (best, fitting) = (record, middle) } else { beyond = middle }
        }
        Ok(best)
    }

    /// The least hay: sentences, or words.
    fn least(self) -> usize {
        match self {
            Self::Single => 1,
            Self::MultiKey | Self::MultiValue | Self::MultiQuery => SEVERAL,
            Self::VariableTracking => HOPS + 1,
            Self::CommonWords => COMMON + 1,
            // Few enough that three words are still told apart by their number.
            Self::FrequentWords => 60,
        }
    }

    fn text(
        self,
        haystack: &Haystack,
        (hay, length): (usize, usize),
        random: &mut ChaCha8Rng,
    ) -> (String, Vec<String>) {
        match self {
            Self::Single => needles(haystack, hay, Needles { keys: 1, values: 1, queries: 1 }, random),
            Self::MultiKey => {
                needles(haystack, hay, Needles { keys: SEVERAL, values: 1, queries: 1 }, random)
            }
            Self::MultiValue => {
                needles(haystack, hay, Needles { keys: 1, values: SEVERAL, queries: 1 }, random)
            }
            Self::MultiQuery => {
                needles(haystack, hay, Needles { keys: SEVERAL, values: 1, queries: SEVERAL }, random)
            }
            Self::VariableTracking => variables(haystack, hay, random),
            Self::CommonWords => common_words(hay, length, random),
            Self::FrequentWords => frequent_words(hay, length, random),
        }
    }
}

impl Haystack {
    /// The same few sentences again and again.
    pub fn repeated() -> Self {
        let sentences =
            ["Grass is green.", "The sky is blue.", "The sun is warm.", "Off we go.", "And back we come."];
        Self(sentences.map(str::to_owned).into())
    }

    /// The sentences of a text.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let sentences = words.split_inclusive(|word| word.ends_with(['.', '!', '?']));
        let sentences: Vec<String> = sentences.map(|words| words.join(" ")).collect();
        if sentences.is_empty() {
            return Err(Error::Mismatch("a haystack without a sentence".into()));
        }
        Ok(Self(sentences))
    }

    /// The first `count` sentences, from the beginning again where they end, with `needles` among them in their order.
    fn hide(&self, count: usize, needles: &[String], random: &mut ChaCha8Rng) -> String {
        let mut places = sample(random, count + needles.len(), needles.len()).into_vec();
        places.sort_unstable();
        let (mut needles, mut hay) = (needles.iter(), self.0.iter().cycle());
        let mut sentences = Vec::with_capacity(count + places.len());
        for place in 0..count + places.len() {
            let next = if places.binary_search(&place).is_ok() { needles.next() } else { hay.next() };
            sentences.extend(next.map(String::as_str));
        }
        sentences.join(" ")
    }
}

/// How many of each.
struct Needles {
    keys: usize,
    values: usize,
    queries: usize,
}

fn needles(
    haystack: &Haystack,
    hay: usize,
    Needles { keys, values, queries }: Needles,
    random: &mut ChaCha8Rng,
) -> (String, Vec<String>) {
    let names = names(keys, random);
    let numbers: Vec<Vec<String>> = (names.iter())
        .map(|_| (0..values).map(|_| random.random_range(1_000_000..10_000_000_u32).to_string()).collect())
        .collect();
    let mut hidden: Vec<String> = (names.iter().zip(&numbers))
        .flat_map(|(name, numbers)| {
            numbers.iter().map(move |n| format!("The secret number of {name} is {n}."))
        })
        .collect();
    hidden.shuffle(random);
    let text = haystack.hide(hay, &hidden, random);
    let asked: Vec<usize> = sample(random, keys, queries).into_vec();
    let whose = list(&asked.iter().map(|&key| names[key].as_str()).collect::<Vec<_>>());
    let answers: Vec<String> = asked.into_iter().flat_map(|key| numbers[key].clone()).collect();
    let (numbers, are) = if answers.len() == 1 { ("number", "is") } else { ("numbers", "are") };
    let prompt = format!(
        "Secret numbers are hidden in this text. Keep them in mind: you will be asked for them.\n{text}\n\
         Question: Which secret {numbers} of {whose} {are} in the text?\n\
         Answer: The secret {numbers} of {whose} {are}"
    );
    (prompt, answers)
}

fn variables(haystack: &Haystack, hay: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
    let mut names: Vec<String> = Vec::new();
    while names.len() <= HOPS {
        let name: String = (0..5).map(|_| char::from(random.random_range(b'A'..=b'Z'))).collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let value = random.random_range(10_000..100_000_u32);
    let first = format!("VAR {} = {value}.", names[0]);
    let others = names.windows(2).map(|pair| format!("VAR {} = VAR {}.", pair[1], pair[0]));
    let chain: Vec<String> = std::iter::once(first).chain(others).collect();
    let text = haystack.hide(hay, &chain, random);
    let prompt = format!(
        "Variables get values in this text. Follow them.\n{text}\n\
         Question: Which variables have the value {value} in the end?\n\
         Answer: The {} variables with the value {value} are",
        names.len()
    );
    (prompt, names)
}

fn common_words(words: usize, length: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
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

/// A numbered list in which the first words, which are returned, are there `often` times and the rest `seldom` times.
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

fn frequent_words(words: usize, length: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
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

/// Different names: single words, or pairs where these do not suffice.
fn names(count: usize, random: &mut ChaCha8Rng) -> Vec<String> {
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
        // Beyond these, pairs of pairs, numbered on.
        index => format!("{}-{}", pair((index - singles) % pairs), (index - singles) / pairs),
    };
    let there = if count <= singles { singles } else { count.max(singles + pairs) };
    sample(random, there, count).into_iter().map(word).collect()
}

/// `a`, `a and b`, `a, b and c`.
fn list(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Words count as tokens.
    fn words(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn one(kind: Ruler, length: usize, seed: u64) -> RulerRecord {
        kind.records(&Haystack::repeated(), (length, 1), seed, &words).unwrap().remove(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn records_fill_their_length_and_hold_their_answers(length in 300_usize..3000, seed: u64) {
            for kind in Ruler::ALL {
                let record = one(kind, length, seed);
                prop_assert_eq!(record.prompt_tokens, words(&record.prompt).unwrap());
                let all = record.prompt_tokens + record.answer_tokens;
                prop_assert!(all <= length, "{kind:?}");
                // What is left is less than a sentence, a word's repetitions, or a step of the search.
                prop_assert!(all + 60 + length / 100 > length, "{kind:?}: {all} of {length}");
                prop_assert!(record.answers.iter().all(|answer| record.prompt.contains(answer.as_str())), "{kind:?}");
                prop_assert_eq!(&record, &one(kind, length, seed));
                prop_assert_ne!(record, one(kind, length, seed ^ 1));
            }
        }

        #[test]
        fn names_differ(count in 1_usize..3000, seed: u64) {
            let mut names = names(count, &mut ChaCha8Rng::seed_from_u64(seed));
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), count);
        }
    }

    #[test]
    fn needles_say_whose_numbers_they_are() {
        for (kind, keys, answers) in [
            (Ruler::Single, 1, 1),
            (Ruler::MultiKey, 4, 1),
            (Ruler::MultiValue, 4, 4),
            (Ruler::MultiQuery, 4, 4),
        ] {
            let record = one(kind, 500, 3);
            let text = record.prompt.split("Question: ").next().unwrap();
            assert_eq!(text.matches("The secret number of ").count(), keys, "{kind:?}");
            assert_eq!(record.answers.len(), answers, "{kind:?}");
            let question = record.prompt.rsplit("Answer: ").next().unwrap();
            for answer in &record.answers {
                let needle = record.prompt.split(". ").find(|sentence| sentence.ends_with(answer)).unwrap();
                let name = needle.split("number of ").nth(1).unwrap().split(" is").next().unwrap();
                assert!(question.contains(name), "{question}: {needle}");
            }
        }
    }

    #[test]
    fn a_chain_is_assigned_in_order() {
        let record = one(Ruler::VariableTracking, 500, 3);
        let at = |text: String| record.prompt.find(&text).unwrap();
        let mut before = at(format!("VAR {} = ", record.answers[0]));
        for pair in record.answers.windows(2) {
            let next = at(format!("VAR {} = VAR {}.", pair[1], pair[0]));
            assert!(next > before);
            before = next;
        }
        assert_eq!(record.answers.len(), HOPS + 1);
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

    #[test]
    fn a_text_is_hay_by_the_sentence() {
        let haystack = Haystack::of("One  two.\nThree! Four").unwrap();
        assert_eq!(haystack.0, ["One two.", "Three!", "Four"]);
        assert!(Haystack::of(" \n").is_err());
        let error = Ruler::MultiKey.records(&haystack, (20, 1), 0, &words).unwrap_err().to_string();
        assert!(error.contains("multi_key: the shortest takes"), "{error}");
    }
}
