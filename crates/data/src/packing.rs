//! How a window of training text is divided into sequences: not at all, or into its documents.

/// How the tokens of a window divide into sequences that do not see each other.
///
/// Attention, the n-grams of a memory and its short convolution end with a sequence, and rotary positions start at 0.
/// To the model, each sequence is a separate text.
///
/// An end-of-text token is the first token of the sequence that follows it. A text begins with one, unless `[text]`
/// says otherwise, and its first token is predicted from it alone. As the target of the token before, it ends that
/// document. If the window's edge cuts a document, the window holds the part inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// A window is one sequence: documents see those before them.
    Together,
    /// Every document is a sequence.
    Apart {
        /// The token at which the next document begins.
        end_of_text: u32,
    },
}

impl Packing {
    /// The packing of a run with `documents_apart`, for documents that end with `end_of_text`.
    pub fn new(documents_apart: bool, end_of_text: u32) -> Self {
        if documents_apart { Self::Apart { end_of_text } } else { Self::Together }
    }

    /// Lengths of the sequences in `count` windows of equal length, `[count·time]` tokens.
    ///
    /// # Panics
    /// When there is no token, or windows differ in length.
    pub fn lengths(self, tokens: &[u32], count: usize) -> Vec<usize> {
        let time = tokens.len() / count;
        assert!(time > 0 && time * count == tokens.len(), "windows of one length");
        match self {
            Self::Together => vec![time; count],
            Self::Apart { end_of_text } => {
                let windows = tokens.chunks_exact(time);
                windows.flat_map(|window| document_lengths(window, end_of_text)).collect()
            }
        }
    }
}

/// Tokens of each document in a window.
fn document_lengths(window: &[u32], end_of_text: u32) -> Vec<usize> {
    let later = (1..window.len()).filter(|&at| window[at] == end_of_text);
    let bounds: Vec<usize> = std::iter::once(0).chain(later).chain([window.len()]).collect();
    bounds.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 9;

    #[test]
    fn documents_begin_with_the_end_of_the_one_before() {
        let apart = Packing::new(true, END);
        let lengths = |tokens: &[u32], count| apart.lengths(tokens, count);
        assert_eq!(lengths(&[1, 2, END, 3, 4, 5], 1), [2, 4]);
        assert_eq!(lengths(&[END, 1, END, 2], 1), [2, 2]);
        assert_eq!(lengths(&[END, END, END], 1), [1, 1, 1]);
        assert_eq!(lengths(&[1, 2, 3], 1), [3]);
        assert_eq!(lengths(&[1, 2, END], 1), [2, 1]);
        // The edge of a window also ends a document.
        assert_eq!(lengths(&[1, 2, 3, 4, END, 5], 2), [3, 1, 2]);
    }

    #[test]
    fn together_a_window_is_one_sequence() {
        let together = Packing::new(false, END);
        assert_eq!(together.lengths(&[1, END, 3, 4], 2), [2, 2]);
    }
}
