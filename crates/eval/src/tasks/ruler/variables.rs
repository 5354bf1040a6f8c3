//! Variables that take their values from one another (RULER, section 3, multi-hop tracing).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::haystack::Haystack;

/// Hops of a chain of variables.
pub(super) const HOPS: usize = 4;

pub(super) fn variables(haystack: &Haystack, hay: usize, random: &mut ChaCha8Rng) -> (String, Vec<String>) {
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

#[cfg(test)]
mod tests {
    use super::super::Ruler;
    use super::super::tests::one;
    use super::HOPS;

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
}
