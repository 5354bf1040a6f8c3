//! Text that has nothing to do with what is taught or grafted, to measure what changes on it.

use engram_data::{Corpus, Tokenizer};

use crate::failure::refuse;

/// Tokens of a piece, at most.
const PIECE: usize = 256;
/// Pieces of a document, at most: many documents tell more than much of one.
const PIECES: usize = 4;

/// Pieces of the documents of `corpus` in tokens: each of at least `least` and within `context`, all together at most
/// `most`.
///
/// # Errors
/// When the corpus cannot be read, or has no such piece.
pub(crate) fn pieces(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    context: usize,
    most: usize,
    least: usize,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let (mut texts, mut left) = (Vec::new(), most);
    for document in corpus.documents() {
        for piece in tokenizer.encode(&document?)?.chunks(PIECE.min(context)).take(PIECES) {
            if left < least {
                return Ok(texts);
            }
            let piece = &piece[..piece.len().min(left)];
            if piece.len() >= least {
                left -= piece.len();
                texts.push(piece.to_vec());
            }
        }
    }
    if texts.is_empty() {
        return refuse(format!(
            "the neutral text has no document of {least} or more tokens: name a corpus with `--neutral`"
        ));
    }
    Ok(texts)
}
