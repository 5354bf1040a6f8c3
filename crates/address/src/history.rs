use std::sync::Arc;

use crate::config::Boundary;
use crate::error::{AddressError, Result};
use crate::hash::Position;
use crate::scheme::Scheme;

/// Tokens with optional masks.
///
/// Converts from a slice of ids.
///
/// ```
/// use engram_address::Tokens;
///
/// let tokens = Tokens::from(&[5, 6, 7]).dead(&[false, true, false]);
/// assert_eq!(tokens.len(), 3);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    ids: &'a [u32],
    dead: Option<&'a [bool]>,
    starts: Option<&'a [bool]>,
}

impl<'a> Tokens<'a> {
    /// Marks dead positions (image tokens in V4.1), one entry per token. For later tokens, a dead position and
    /// everything older count as pad. The id of a dead position must still be in the vocabulary.
    pub fn dead(self, mask: &'a [bool]) -> Self {
        Self { dead: Some(mask), ..self }
    }

    /// Marks the first tokens of documents, one entry per token. For them and for later tokens, everything older counts
    /// as pad. Use it for packed documents without a boundary token; see also [`Boundary`].
    pub fn starts(self, mask: &'a [bool]) -> Self {
        Self { starts: Some(mask), ..self }
    }

    /// The token ids.
    pub fn ids(&self) -> &'a [u32] {
        self.ids
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Pieces of at most `size` tokens with their part of the masks. The masks have been checked.
    fn pieces(self, size: usize) -> impl Iterator<Item = Tokens<'a>> {
        (0..self.len()).step_by(size).map(move |start| {
            let range = start..self.len().min(start + size);
            Tokens {
                ids: &self.ids[range.clone()],
                dead: self.dead.map(|mask| &mask[range.clone()]),
                starts: self.starts.map(|mask| &mask[range]),
            }
        })
    }

    fn check_masks(&self) -> Result<()> {
        for (mask, entries) in [("dead", self.dead), ("starts", self.starts)] {
            if let Some(entries) = entries.filter(|entries| entries.len() != self.len()) {
                return Err(AddressError::MaskLength { mask, found: entries.len(), tokens: self.len() });
            }
        }
        Ok(())
    }
}

impl<'a> From<&'a [u32]> for Tokens<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Self { ids, dead: None, starts: None }
    }
}

impl<'a, const LEN: usize> From<&'a [u32; LEN]> for Tokens<'a> {
    fn from(ids: &'a [u32; LEN]) -> Self {
        Self::from(&ids[..])
    }
}

impl<'a> From<&'a Vec<u32>> for Tokens<'a> {
    fn from(ids: &'a Vec<u32>) -> Self {
        Self::from(&ids[..])
    }
}

/// The state of one sequence, shared by all memory layers.
///
/// Ids need only the last N−1 classes. A history keeps the whole sequence (8 bytes a token) so that it can be rolled
/// back to any length, unless [`with_rollback`](Self::with_rollback) limits it. A clone is a fork. Ids do not depend on
/// how a sequence is divided into pieces.
///
/// ```
/// use engram_address::{AddressConfig, Addressing, Arithmetic, Boundary, Vocabulary};
///
/// # let config = AddressConfig { seed: 0, layers: vec![1], max_order: 3, heads: 2, base_rows: vec![100,
/// 100],
/// #     pad_id: 2, boundary: Boundary::None, arithmetic: Arithmetic::Exact };
/// let addressing = Addressing::new(&config, Vocabulary::identity(50))?;
/// let mut whole = Vec::new();
/// addressing.row_ids(0, &[7, 8, 9], &mut whole)?;
///
/// let mut history = addressing.history();
/// let mut ids = Vec::new();
/// history.extend(&[7, 40, 41])?;
/// history.rollback(2)?;
/// history.extend(&[8, 9])?.row_ids(0, &mut ids)?;
/// assert_eq!(ids, whole[addressing.layers()[0].slots()..]);
/// # Ok::<(), engram_address::AddressError>(())
/// ```
#[derive(Clone, Debug)]
pub struct History {
    scheme: Arc<Scheme>,
    /// The newest positions of the sequence: all of them, or those needed as context and for rollback.
    positions: Vec<Position>,
    /// Number of older positions that were dropped.
    dropped: usize,
    rollback: usize,
}

impl History {
    pub(crate) fn new(scheme: Arc<Scheme>) -> Self {
        Self { scheme, positions: Vec::new(), dropped: 0, rollback: usize::MAX }
    }

    /// Keeps only what is needed to remove the newest `tokens` tokens, in one rollback or several. After a rollback,
    /// the full number is available again when as many tokens have been appended.
    pub fn with_rollback(mut self, tokens: usize) -> Self {
        self.rollback = tokens;
        self
    }

    /// Tokens of the sequence so far.
    pub fn len(&self) -> usize {
        self.dropped + self.positions.len()
    }

    /// Whether the sequence is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends tokens. The result gives their row ids, layer by layer.
    ///
    /// # Errors
    /// A token outside the vocabulary (with its position in the sequence), or a mask of the wrong length. The history
    /// then stays unchanged.
    pub fn extend<'t>(&mut self, tokens: impl Into<Tokens<'t>>) -> Result<NewTokens<'_>> {
        let tokens = tokens.into();
        tokens.check_masks()?;
        self.forget();
        let first = self.positions.len();
        self.positions.reserve(tokens.len());
        for (i, &token) in tokens.ids.iter().enumerate() {
            let dead = tokens.dead.is_some_and(|mask| mask[i]);
            let start = tokens.starts.is_some_and(|mask| mask[i]);
            match self.position(token, dead, start) {
                Ok(position) => self.positions.push(position),
                Err(error) => {
                    self.positions.truncate(first);
                    return Err(error);
                }
            }
        }
        Ok(NewTokens { scheme: &self.scheme, positions: &self.positions, first })
    }

    /// One token of the sequence, for addressing it again; none if it or its context was dropped.
    ///
    /// ```
    /// # use engram_address::{AddressConfig, Addressing, Arithmetic, Boundary, Vocabulary};
    /// # let config = AddressConfig { seed: 0, layers: vec![1], max_order: 3, heads: 2, base_rows: vec![100, 100],
    /// #     pad_id: 2, boundary: Boundary::None, arithmetic: Arithmetic::Exact };
    /// # let addressing = Addressing::new(&config, Vocabulary::identity(50))?;
    /// let mut history = addressing.history();
    /// let (mut ids, mut again) = (Vec::new(), Vec::new());
    /// history.extend(&[7, 8, 9])?.row_ids(0, &mut ids)?;
    /// history.token(1).expect("it is kept").row_ids(0, &mut again)?;
    /// let slots = addressing.layers()[0].slots();
    /// assert_eq!(again, ids[slots..2 * slots]);
    /// assert!(history.token(3).is_none());
    /// # Ok::<(), engram_address::AddressError>(())
    /// ```
    pub fn token(&self, position: usize) -> Option<NewTokens<'_>> {
        let index = position.checked_sub(self.dropped)?;
        let whole = self.dropped == 0 || index >= self.sight();
        let positions = self.positions.get(..=index).filter(|_| whole)?;
        Some(NewTokens { scheme: &self.scheme, positions, first: index })
    }

    /// Removes the newest tokens.
    ///
    /// # Errors
    /// More tokens than the sequence has, or than [`with_rollback`](Self::with_rollback) keeps. The history then stays
    /// unchanged.
    pub fn rollback(&mut self, tokens: usize) -> Result<()> {
        let needed = if self.dropped == 0 { 0 } else { self.sight() };
        let available = self.positions.len().saturating_sub(needed);
        if tokens > available {
            return Err(AddressError::Rollback { asked: tokens, len: self.len(), available });
        }
        self.positions.truncate(self.positions.len() - tokens);
        Ok(())
    }

    /// The next token as the hash will see it.
    fn position(&self, token: u32, dead: bool, start: bool) -> Result<Position> {
        let Scheme { vocabulary, boundary, pad_class, .. } = &*self.scheme;
        let class = vocabulary.class_at(token, self.len())?;
        let start = start || *boundary == Boundary::Before(token);
        let reach = match self.positions.last() {
            Some(last) if !(dead || start || last.closes) => (last.reach + 1).min(self.sight() as u16),
            _ => 0,
        };
        let closes = dead || *boundary == Boundary::After(token);
        Ok(Position { class: if dead { *pad_class } else { class }, reach, closes })
    }

    /// Positions before a token that its longest n-gram includes.
    fn sight(&self) -> usize {
        self.scheme.max_order() - 1
    }

    /// Drops positions that no later token sees and no rollback reaches, once they are the larger part.
    fn forget(&mut self) {
        let kept = self.rollback.saturating_add(self.sight());
        if self.positions.len() / 2 > kept {
            let surplus = self.positions.len() - kept;
            self.positions.drain(..surplus);
            self.dropped += surplus;
        }
    }
}

/// Tokens just appended to a [`History`], ready for addressing in every layer.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    scheme: &'a Scheme,
    /// The new tokens, preceded by their context.
    positions: &'a [Position],
    first: usize,
}

impl NewTokens<'_> {
    /// The number of new tokens.
    pub fn len(&self) -> usize {
        self.positions.len() - self.first
    }

    /// Whether there are no new tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their row ids in a memory layer's table, `[time, order, head]`. Replaces the contents of `out`.
    ///
    /// # Errors
    /// A layer index that does not exist. (It counts memory layers from 0; it is not the block's id.)
    pub fn row_ids(&self, layer_index: usize, out: &mut Vec<u64>) -> Result<()> {
        out.resize(self.len() * self.scheme.layer(layer_index)?.slots(), 0);
        self.row_ids_into(layer_index, out)
    }

    /// The same, written to a slice of `len() * slots` entries.
    ///
    /// # Errors
    /// A layer index that does not exist, or a slice of the wrong length.
    pub fn row_ids_into(&self, layer_index: usize, out: &mut [u64]) -> Result<()> {
        let layer = self.scheme.layer(layer_index)?;
        let (tokens, slots) = (self.len(), layer.slots());
        if out.len() != tokens * slots {
            return Err(AddressError::OutputLength { tokens, slots, found: out.len() });
        }
        layer.row_ids(self.positions, self.first, self.scheme.pad_class, out);
        Ok(())
    }
}

/// Row ids of a whole sequence, in pieces that fit the fastest cache.
pub(crate) fn row_ids_of_sequence(
    scheme: &Arc<Scheme>,
    layer_index: usize,
    tokens: Tokens<'_>,
    out: &mut [u64],
) -> Result<()> {
    const PIECE: usize = 512;
    let slots = scheme.layer(layer_index)?.slots();
    if out.len() != tokens.len() * slots {
        return Err(AddressError::OutputLength { tokens: tokens.len(), slots, found: out.len() });
    }
    tokens.check_masks()?;
    let mut history = History::new(Arc::clone(scheme)).with_rollback(0);
    tokens
        .pieces(PIECE)
        .zip(out.chunks_mut(PIECE * slots))
        .try_for_each(|(piece, out)| history.extend(piece)?.row_ids_into(layer_index, out))
}

#[cfg(test)]
mod tests {
    use crate::{AddressConfig, Addressing, Arithmetic, Boundary, Tokens, Vocabulary};

    fn addressing() -> Addressing {
        let config = AddressConfig {
            seed: 0,
            layers: vec![1, 14],
            max_order: 3,
            heads: 2,
            base_rows: vec![100, 100],
            pad_id: 2,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        };
        Addressing::new(&config, Vocabulary::identity(50)).unwrap()
    }

    #[test]
    fn a_refused_token_leaves_the_history_as_it_was() {
        let addressing = addressing();
        let mut history = addressing.history();
        history.extend(&[7, 8]).unwrap();
        let error = history.extend(&[9, 50, 10]).unwrap_err().to_string();
        assert!(error.contains("token 50 at position 3"), "{error}");
        assert_eq!(history.len(), 2);

        let (mut after, mut whole) = (Vec::new(), Vec::new());
        history.extend(&[9]).unwrap().row_ids(0, &mut after).unwrap();
        addressing.row_ids(0, &[7, 8, 9], &mut whole).unwrap();
        assert_eq!(after, whole[8..]);
    }

    #[test]
    fn the_position_of_a_refused_token_is_that_in_the_whole_sequence() {
        let mut tokens = vec![3; 2000];
        tokens[1999] = 99;
        let error = addressing().row_ids(0, &tokens, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("token 99 at position 1999"), "{error}");
    }

    #[test]
    fn masks_of_another_length_are_refused() {
        let addressing = addressing();
        let tokens = Tokens::from(&[1, 2, 3]);
        let error = addressing.history().extend(tokens.dead(&[true])).unwrap_err().to_string();
        assert!(error.contains("`dead` mask has 1 entries for 3 tokens"), "{error}");
        let error =
            addressing.row_ids(0, tokens.starts(&[true; 4]), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("`starts` mask has 4 entries for 3 tokens"), "{error}");
    }

    #[test]
    fn rollbacks_beyond_the_start_are_refused() {
        let mut history = addressing().history();
        history.extend(&[1, 2, 3]).unwrap();
        let error = history.rollback(4).unwrap_err().to_string();
        assert!(error.contains("roll back 4 of 3 tokens"), "{error}");
        history.rollback(3).unwrap();
        assert!(history.is_empty());
    }

    #[test]
    fn a_limited_history_stays_small_and_keeps_its_promise() {
        let mut history = addressing().history().with_rollback(5);
        for token in 0..10_000 {
            history.extend(&[token % 50]).unwrap();
            assert!(history.positions.len() <= 2 * (5 + 2) + 2);
        }
        assert_eq!(history.len(), 10_000);
        history.clone().rollback(5).unwrap();
        let error = history.rollback(1000).unwrap_err().to_string();
        assert!(
            error.contains("roll back 1000 of 10000 tokens") && error.contains("with_rollback"),
            "{error}"
        );
    }

    #[test]
    fn wrong_layers_and_outputs_are_named() {
        let addressing = addressing();
        let error = addressing.row_ids(2, &[1], &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("index 2") && error.contains("[1, 14]"), "{error}");
        let error = addressing.row_ids_into(0, &[1, 2], &mut [0; 7]).unwrap_err().to_string();
        assert!(error.contains("8 entries") && error.contains("has 7"), "{error}");
        let mut history = addressing.history();
        assert!(history.extend(&[1, 2]).unwrap().row_ids_into(0, &mut [0; 7]).is_err());
    }
}
