//! Conversations for supervised fine-tuning (SFT), packed into windows: shards with loss masks.
//!
//! A window of `window` inputs holds whole conversations; the rest of it is padding. Best fit, longest first: a
//! conversation goes into the fullest window that still has room for it. The first token of the data, and each token of
//! padding, is an end-of-text token: an empty document, which no loss counts. A conversation's first token is thus
//! predicted from the end-of-text token before it, as in a corpus.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::{folder_of, new_folder, sync_folder};
use crate::prepare::place;
use crate::shard_writer::write_masked_split;
use crate::tokenizer::Tokenizer;

/// A conversation in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    tokens: Vec<u32>,
    /// Whether a loss counts each token as a target.
    counted: Vec<bool>,
    bytes: u64,
    /// What decides whether it is held out.
    key: String,
}

impl Conversation {
    /// A conversation of `tokens`, each with whether a loss counts it as a target. The last is the end-of-text token.
    /// `bytes` is the length of its text, and `key` alone decides whether it is held out.
    pub fn new(tokens: impl IntoIterator<Item = (u32, bool)>, bytes: u64, key: String) -> Self {
        let (tokens, counted) = tokens.into_iter().unzip();
        Self { tokens, counted, bytes, key }
    }

    /// The tokens, each with whether a loss counts it.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, bool)> + '_ {
        self.tokens.iter().copied().zip(self.counted.iter().copied())
    }

    /// Number of tokens, with the end-of-text token.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// The result of preparing conversations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ConversationSummary {
    /// The training split, in the folder `train`.
    pub train: ConversationSplit,
    /// The held-out split, in the folder `valid`; all zero if there is none.
    pub valid: ConversationSplit,
}

/// Counts of one split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ConversationSplit {
    /// Conversations.
    pub conversations: u64,
    /// Windows.
    pub windows: u64,
    /// Tokens of conversations, without padding.
    pub tokens: u64,
    /// Tokens that a loss counts.
    pub counted: u64,
}

/// Writes conversations as shards with loss masks in the new folder `out`, which appears when everything is written.
/// They are packed into windows of `window` inputs, the context of the model that learns them. The share `hold_out` of
/// them is held out.
///
/// # Errors
/// An `out` that exists, a share outside [0, 1) or that leaves nothing to train on, a conversation longer than a window
/// or without a token that counts, and errors of writing. After an error no output remains.
pub fn prepare_conversations(
    conversations: &[Conversation],
    tokenizer: &Tokenizer,
    out: &Path,
    window: usize,
    hold_out: f64,
) -> Result<ConversationSummary> {
    if !(0.0..1.0).contains(&hold_out) {
        return Err(Error::option("hold_out", hold_out, "must be at least 0 and below 1"));
    }
    let width = u32::try_from(window).ok().filter(|&width| width > 0);
    let width =
        width.ok_or_else(|| Error::option("context", window, "must be at least 1 and fit 32 bits"))?;
    if out.symlink_metadata().is_ok() {
        return Err(Error::Exists { path: out.to_owned() });
    }
    conversations.iter().try_for_each(|conversation| conversation.check(window, tokenizer))?;
    let (valid, train): (Vec<_>, Vec<_>) =
        conversations.iter().partition(|conversation| place(&conversation.key) < hold_out);
    if train.is_empty() {
        let reason = format!("leaves none of {} conversations for training", conversations.len());
        return Err(Error::option("hold_out", hold_out, reason));
    }
    let parent = folder_of(out);
    let work = new_folder(parent, ".preparing-").map_err(Error::write(parent))?;
    let write = |name: &str, list: &[&Conversation]| -> Result<ConversationSplit> {
        if list.is_empty() {
            return Ok(ConversationSplit::default());
        }
        let packed = Packed::of(list, window, tokenizer.end_of_text());
        write_masked_split(&work.path().join(name), tokenizer, &packed.documents, &packed.counted, width)?;
        Ok(packed.split)
    };
    let summary = ConversationSummary { train: write("train", &train)?, valid: write("valid", &valid)? };
    std::fs::rename(work.keep(), out).map_err(Error::write(out))?;
    sync_folder(parent)?;
    Ok(summary)
}

impl Conversation {
    fn check(&self, window: usize, tokenizer: &Tokenizer) -> Result<()> {
        let refuse = |reason: String| Err(Error::option("conversation", &self.key, reason));
        if self.len() > window {
            return refuse(format!("has {} tokens, more than the context of {window}", self.len()));
        }
        if self.tokens.last() != Some(&tokenizer.end_of_text()) {
            return refuse("does not end with the end-of-text token".into());
        }
        if !self.counted.contains(&true) {
            return refuse("has no token that a loss counts".into());
        }
        Ok(())
    }
}

/// Conversations in windows, one after another.
struct Packed {
    /// Tokens and bytes of text of each document.
    documents: Vec<(Vec<u32>, u64)>,
    counted: Vec<bool>,
    split: ConversationSplit,
}

impl Packed {
    fn of(conversations: &[&Conversation], window: usize, end: u32) -> Self {
        let padding = || (vec![end], 0);
        let (mut documents, mut counted) = (vec![padding()], vec![false]);
        let lengths: Vec<usize> = conversations.iter().map(|conversation| conversation.len()).collect();
        let windows = best_fit(&lengths, window);
        for window_of in &windows {
            let before = counted.len();
            for &index in window_of {
                let conversation = conversations[index];
                documents.push((conversation.tokens.clone(), conversation.bytes));
                counted.extend(&conversation.counted);
            }
            let rest = window - (counted.len() - before);
            documents.extend(std::iter::repeat_with(padding).take(rest));
            counted.extend(std::iter::repeat_n(false, rest));
        }
        let split = ConversationSplit {
            conversations: conversations.len() as u64,
            windows: windows.len() as u64,
            tokens: lengths.iter().sum::<usize>() as u64,
            counted: counted.iter().filter(|counts| **counts).count() as u64,
        };
        Self { documents, counted, split }
    }
}

/// Which of the items go into each window of `capacity`, none of them longer: the longest first, each into the fullest
/// window with room for it.
fn best_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    // Stable: of equals, the first in the file comes first.
    order.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let mut windows: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in order {
        let room = by_room.range(lengths[index]..).next().map(|(&room, _)| room);
        let (room, window) = match room.and_then(|room| Some((room, by_room.get_mut(&room)?.pop()?))) {
            Some(found) => found,
            None => {
                windows.push(Vec::new());
                (capacity, windows.len() - 1)
            }
        };
        by_room.retain(|_, windows| !windows.is_empty());
        windows[window].push(index);
        by_room.entry(room - lengths[index]).or_default().push(window);
    }
    windows
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow::Continue;
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;
    use crate::corpus::Corpus;
    use crate::packing::Packing;
    use crate::token_shards::TokenShards;
    use crate::tokenizer::TokenizerTraining;

    fn tokenizer() -> &'static Tokenizer {
        static ONCE: OnceLock<Tokenizer> = OnceLock::new();
        ONCE.get_or_init(|| {
            let corpus = Corpus::embedded("a.txt", b"some words, and some other words").unwrap();
            let training = TokenizerTraining { vocabulary: 262, ..Default::default() };
            Tokenizer::train(&corpus, &training, &mut |_| Continue(())).unwrap()
        })
    }

    /// `prompt` tokens that do not count, then `answer` tokens and the end that do.
    fn conversation(prompt: usize, answer: usize, number: usize) -> Conversation {
        let end = tokenizer().end_of_text();
        let word = |index: usize| 10 + (number + index) as u32 % 90;
        let prompt_tokens = (0..prompt).map(|index| (word(index), false));
        let answer_tokens = (0..answer).map(|index| (word(index + 7), true));
        let tokens = prompt_tokens.chain(answer_tokens).chain([(end, true)]);
        Conversation::new(tokens, (prompt + answer) as u64, format!("{number}"))
    }

    #[test]
    fn a_window_holds_whole_conversations_and_the_mask_is_that_of_the_answers() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let list = [conversation(2, 3, 0), conversation(1, 1, 1), conversation(4, 4, 2)];
        let summary = prepare_conversations(&list, tokenizer(), &out, 10, 0.0).unwrap();
        let expected = ConversationSplit { conversations: 3, windows: 2, tokens: 18, counted: 11 };
        assert_eq!(summary.train, expected);
        let shards = TokenShards::open(&out.join("train")).unwrap();
        shards.verify().unwrap();
        let end = tokenizer().end_of_text();
        // The longest is alone; the two others share a window, and one token of padding is left.
        let [a, b, c] = [&list[0], &list[1], &list[2]].map(|one| one.tokens.clone());
        let expected = [&[end][..], &c, &[end], &a, &b, &[end]].concat();
        assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected);
        assert_eq!((shards.window(), shards.len()), (Some(10), 21));
        let counted =
            [&[false][..], &list[2].counted, &[false], &list[0].counted, &list[1].counted, &[false]];
        assert_eq!(shards.counted(0..21).unwrap(), counted.concat());
        assert_eq!(shards.counted_tokens(), 11);
        // The end-of-text token of a document is the first of the next one, and an end inside is none.
        let lengths = |start| {
            let window = shards.tokens(start..start + 10).unwrap();
            shards.lengths(Packing::new(true, end), start, &window)
        };
        assert_eq!((lengths(0), lengths(10)), (vec![9, 1], vec![6, 3, 1]));
    }

    #[test]
    fn an_end_token_inside_a_conversation_does_not_end_it() {
        let folder = tempfile::tempdir().unwrap();
        let end = tokenizer().end_of_text();
        let turns =
            [(20, false), (end, false), (21, true), (end, true), (22, false), (23, true), (end, true)];
        let list = [Conversation::new(turns, 4, "a".into())];
        prepare_conversations(&list, tokenizer(), &folder.path().join("data"), 9, 0.0).unwrap();
        let shards = TokenShards::open(&folder.path().join("data/train")).unwrap();
        let window = shards.tokens(0..9).unwrap();
        assert_eq!(shards.lengths(Packing::new(true, end), 0, &window), [7, 1, 1]);
        assert_eq!(shards.lengths(Packing::Together, 0, &window), [9]);
    }

    #[test]
    fn the_mask_belongs_to_the_data_and_its_shard() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let list: Vec<_> = (0..20).map(|number| conversation(2, 3, number)).collect();
        let mut other = list.clone();
        other[3].counted[2] = false;
        for (name, list) in [("one", &list), ("two", &other), ("again", &list)] {
            prepare_conversations(list, tokenizer(), &path(name), 16, 0.0).unwrap();
        }
        let identity = |name: &str| TokenShards::open(&path(name).join("train")).unwrap().identity();
        assert_ne!(identity("one"), identity("two"), "the same tokens, another mask");
        assert_eq!(identity("one"), identity("again"));

        let mask = |name: &str| path(name).join("train/00000.mask");
        let refused = |expected: &str| {
            let message = TokenShards::open(&path("one").join("train")).unwrap_err().to_string();
            assert!(message.contains("00000.mask") && message.contains(expected), "{message}");
        };
        let good = std::fs::read(mask("one")).unwrap();
        for (at, expected) in [(0, "ENGRMASK"), (8, "version"), (20, "checksum"), (130, "checksum")] {
            let mut bytes = good.clone();
            bytes[at] ^= 3;
            std::fs::write(mask("one"), bytes).unwrap();
            refused(expected);
        }
        let longer = [conversation(2, 4, 0)];
        prepare_conversations(&longer, tokenizer(), &path("longer"), 16, 0.0).unwrap();
        std::fs::copy(mask("longer"), mask("one")).unwrap();
        refused("another shard");
        std::fs::remove_file(mask("one")).unwrap();
        refused("cannot read");
    }

    #[test]
    fn what_cannot_be_learnt_is_refused_and_nothing_remains() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let refused = |list: &[Conversation], window, hold_out, expected: &str| {
            let message =
                prepare_conversations(list, tokenizer(), &out, window, hold_out).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        };
        let good = [conversation(2, 3, 0)];
        refused(&good, 5, 0.0, "6 tokens, more than the context of 5");
        refused(&good, 0, 0.0, "context = 0");
        refused(&good, 8, 1.0, "hold_out = 1");
        refused(&[], 8, 0.0, "hold_out = 0: leaves none of 0");
        let mut silent = good[0].clone();
        silent.counted.fill(false);
        refused(&[silent], 8, 0.0, "no token that a loss counts");
        let mut open = good[0].clone();
        open.tokens.pop();
        refused(&[open], 8, 0.0, "does not end");
    }

    proptest! {
        #[test]
        fn every_item_is_in_one_window_that_holds_it(
            lengths in proptest::collection::vec(1..30usize, 0..80),
        ) {
            let windows = best_fit(&lengths, 30);
            let mut all: Vec<usize> = windows.concat();
            all.sort();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let filled: Vec<usize> =
                windows.iter().map(|window| window.iter().map(|&index| lengths[index]).sum()).collect();
            prop_assert!(filled.iter().all(|&filled| filled <= 30));
            // No two windows could be one: at most one is at most half full.
            prop_assert!(filled.iter().filter(|&&filled| filled <= 15).count() <= 1);
        }
    }
}
