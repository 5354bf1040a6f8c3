//! Bytes that arrive in pieces, given out as text.

/// Gives out characters when they are whole. Bytes that can become no character come out as U+FFFD, as in
/// [`String::from_utf8_lossy`].
#[derive(Debug, Default)]
pub struct TextStream {
    pending: Vec<u8>,
}

impl TextStream {
    /// Adds bytes; returns the text that is now complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let keep = unfinished(&self.pending);
        let complete: Vec<u8> = self.pending.drain(..self.pending.len() - keep).collect();
        String::from_utf8_lossy(&complete).into_owned()
    }

    /// The rest: nothing, or the beginning of a character that never ended.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// How many bytes at the end begin a character that more bytes could complete.
fn unfinished(bytes: &[u8]) -> usize {
    let last = bytes.utf8_chunks().last();
    let invalid = last.map_or(&[][..], |chunk| chunk.invalid());
    // A broken sequence in the middle has ended; only the very last may still go on.
    match std::str::from_utf8(invalid) {
        Err(error) if error.error_len().is_none() => invalid.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::TextStream;

    /// Pushes `bytes` in pieces of `size`.
    fn streamed(bytes: &[u8], size: usize) -> (Vec<String>, String) {
        let mut stream = TextStream::default();
        let pieces = bytes.chunks(size).map(|piece| stream.push(piece)).collect();
        (pieces, stream.finish())
    }

    #[test]
    fn characters_stay_whole_in_any_pieces() {
        let text = "naïve — 東京 🌌!";
        for size in 1..8 {
            let (pieces, rest) = streamed(text.as_bytes(), size);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
            assert_eq!(pieces.concat() + &rest, text);
        }
    }

    #[test]
    fn broken_bytes_are_replaced_at_once() {
        for size in 1..5 {
            let (pieces, rest) = streamed(b"a\xffb\xe6\x9d", size);
            assert_eq!(pieces.concat(), "a\u{fffd}b");
            assert_eq!(rest, "\u{fffd}");
        }
    }
}
