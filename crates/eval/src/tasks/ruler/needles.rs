//! Numbers hidden in a text, to be found by their owners' names (RULER, section 3, retrieval).

use rand::RngExt;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use super::haystack::Haystack;
use super::words::names;

/// How many of each.
pub(super) struct Needles {
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) queries: usize,
}

pub(super) fn needles(
    haystack: &Haystack,
    hay: usize,
    Needles { keys, values, queries }: Needles,
    random: &mut ChaCha8Rng,
) -> (String, Vec<String>) {
    let names = names(keys, random);
    let least = 10_u32.pow(haystack.digits() - 1);
    let numbers: Vec<Vec<String>> = (names.iter())
        .map(|_| (0..values).map(|_| random.random_range(least..10 * least).to_string()).collect())
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
    use super::super::Haystack;
    use super::super::Ruler;
    use super::super::tests::{one, words};

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
    fn numbers_have_the_digits_that_are_asked_for() {
        for digits in [2, 3, 9] {
            let haystack = Haystack::repeated().with_digits(digits).unwrap();
            for record in Ruler::MultiQuery.records(&haystack, (500, 5), 3, &words).unwrap() {
                assert!(record.answers.iter().all(|answer| answer.len() == digits as usize), "{record:?}");
            }
        }
        for digits in [0, 1, 10] {
            let error = Haystack::repeated().with_digits(digits).unwrap_err().to_string();
            assert!(error.contains("2 to 9"), "{error}");
        }
    }
}
