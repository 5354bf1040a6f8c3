use crate::error::{AddressError, Result};

/// Maps token ids to classes: tokens whose texts differ only in case, accents or white space share one.
///
/// Section "Tokenizer compression" of the paper (arXiv 2601.07372). Classes are numbered from 0 without
/// gaps.
///
/// ```
/// use engram_address::Vocabulary;
///
/// let vocabulary = Vocabulary::from_classes(vec![0, 1, 0])?;
/// assert_eq!((vocabulary.len(), vocabulary.classes()), (3, 2));
/// assert_eq!(vocabulary.class(2)?, 0);
/// assert!(vocabulary.class(3).is_err());
/// # Ok::<(), engram_address::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    class_of: Vec<u32>,
    classes: usize,
}

impl Vocabulary {
    /// Every token is its own class: no compression. With 0 tokens it is empty; every addressing refuses it, because
    /// its pad must be a token.
    ///
    /// # Panics
    /// If ids do not fit 32 bits, which is from 2^32 + 1 tokens on.
    pub fn identity(tokens: usize) -> Self {
        let last = tokens.checked_sub(1).map(|last| u32::try_from(last).expect("token ids fit 32 bits"));
        Self { class_of: last.map_or(Vec::new(), |last| (0..=last).collect()), classes: tokens }
    }

    /// A given map: `class_of[token]`.
    ///
    /// # Errors
    /// An empty map, or one that skips a class. The number of classes decides every multiplier, so a map with the wrong
    /// number must not pass.
    pub fn from_classes(class_of: Vec<u32>) -> Result<Self> {
        let refuse = |problem: String| Err(AddressError::Classes { problem });
        let Some(&largest) = class_of.iter().max() else {
            return refuse("there are no tokens; give one class per token id".into());
        };
        if largest as usize >= class_of.len() {
            return refuse(format!(
                "{} tokens cannot have a class {largest}; number classes from 0 without gaps",
                class_of.len()
            ));
        }
        let mut used = vec![false; largest as usize + 1];
        class_of.iter().for_each(|&class| used[class as usize] = true);
        if let Some(gap) = used.iter().position(|used| !used) {
            return refuse(format!(
                "no token has class {gap} although class {largest} is used; number them without gaps"
            ));
        }
        Ok(Self { class_of, classes: used.len() })
    }

    /// Number of token ids, which are 0 to `len() - 1`.
    #[expect(clippy::len_without_is_empty, reason = "an empty vocabulary cannot address anything")]
    pub fn len(&self) -> usize {
        self.class_of.len()
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The class of a token.
    ///
    /// # Errors
    /// A token outside the vocabulary, reported as one at position 0.
    pub fn class(&self, token: u32) -> Result<u32> {
        self.class_at(token, 0)
    }

    /// The class of the token at a position; the error names the position.
    pub(crate) fn class_at(&self, token: u32, position: usize) -> Result<u32> {
        let class = self.class_of.get(token as usize).copied();
        class.ok_or(AddressError::OutOfVocabulary { token, position, len: self.len() })
    }

    /// The class of every token id.
    pub fn as_slice(&self) -> &[u32] {
        &self.class_of
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_maps_without_tokens_or_with_gaps_are_refused() {
        let problem = |classes| Vocabulary::from_classes(classes).unwrap_err().to_string();
        assert!(problem(vec![]).contains("no tokens"));
        assert!(problem(vec![0, 2, 2]).contains("class 1"));
        assert!(problem(vec![0, 9]).contains("class 9"));
    }

    #[test]
    fn an_identity_has_as_many_classes_as_tokens() {
        for tokens in [0, 1, 50] {
            let vocabulary = Vocabulary::identity(tokens);
            assert_eq!((vocabulary.len(), vocabulary.classes()), (tokens, tokens));
        }
        let error = Vocabulary::identity(0).class(0).unwrap_err().to_string();
        assert!(error.contains("token 0") && error.contains("no ids"), "{error}");
    }

    #[test]
    #[should_panic(expected = "token ids fit 32 bits")]
    fn an_identity_of_more_ids_than_there_are_is_a_defect() {
        Vocabulary::identity((1 << 32) + 1);
    }

    #[test]
    fn a_token_outside_names_itself_and_the_range() {
        let error = Vocabulary::identity(5).class_at(5, 17).unwrap_err().to_string();
        assert!(error.contains("token 5 at position 17") && error.contains("ids 0 to 4"), "{error}");
    }
}
