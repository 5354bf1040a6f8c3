//! Ends of names: the paper compares layers at the last tokens of named entities.
//!
//! Names are recognised by English spelling: two or more capitalised words, with words such as "of" and "the" between
//! them. The rule needs no model and no list. It misses names of one word.

/// Words that may stand inside a name.
const LINKS: [&str; 10] = ["of", "the", "de", "la", "von", "van", "der", "du", "and", "&"];

/// Whether each of the tokens, given as bytes, holds the last letter of a name.
pub fn name_ends(tokens: &[&[u8]]) -> Vec<usize> {
    let bytes = tokens.concat();
    // Lossy text would shift offsets, so bytes that are not ASCII count as small letters.
    let ends = name_ends_in(&bytes);
    let mut found = Vec::new();
    let (mut token, mut end) = (0, tokens.first().map_or(0, |token| token.len()));
    for last in ends {
        while last >= end {
            token += 1;
            end += tokens[token].len();
        }
        found.push(token);
    }
    found.dedup();
    found
}

/// Offsets of the last letters of names.
fn name_ends_in(text: &[u8]) -> Vec<usize> {
    let mut ends = Vec::new();
    // Capitalised words of the run so far, and the end of the last one.
    let (mut capitals, mut last) = (0, 0);
    let mut expected = 0;
    for (start, word) in words(text) {
        // A run continues over one blank only, not over commas, full stops and line ends.
        if !(start == expected + 1 && text[expected] == b' ') && capitals > 0 {
            close(&mut ends, &mut capitals, last);
        }
        let link = std::str::from_utf8(word).is_ok_and(|word| LINKS.contains(&word));
        if word[0].is_ascii_uppercase() && word.len() > 1 {
            (capitals, last) = (capitals + 1, start + word.len() - 1);
        } else if !link {
            close(&mut ends, &mut capitals, last);
        }
        expected = start + word.len();
    }
    close(&mut ends, &mut capitals, last);
    ends
}

fn close(ends: &mut Vec<usize>, capitals: &mut usize, last: usize) {
    if *capitals >= 2 {
        ends.push(last);
    }
    *capitals = 0;
}

/// Runs of letters with their offsets.
fn words(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let letter = |byte: u8| byte.is_ascii_alphabetic() || byte >= 0x80 || byte == b'\'' || byte == b'&';
    let mut at = 0;
    std::iter::from_fn(move || {
        at += text[at..].iter().position(|&byte| letter(byte))?;
        let length = text[at..].iter().position(|&byte| !letter(byte)).unwrap_or(text.len() - at);
        let word = (at, &text[at..at + length]);
        at += length;
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(text: &str) -> Vec<&str> {
        let word = |end: usize| {
            let start = text[..end].rfind(' ').map_or(0, |blank| blank + 1);
            &text[start..=end]
        };
        name_ends_in(text.as_bytes()).into_iter().map(word).collect()
    }

    #[test]
    fn names_end_where_their_last_capitalised_word_does() {
        assert_eq!(ends("Only Alexander the Great could tame it."), ["Great"]);
        assert_eq!(ends("the Milky Way, and Diana, Princess of Wales"), ["Way", "Wales"]);
        assert_eq!(ends("Queen Anne of the far islands"), ["Anne"]);
        assert_eq!(ends("One. Two words, no Name here"), [""; 0]);
        assert_eq!(
            ends("Isaac Newton\nKing Henry"),
            ["Newton\nKing", "Henry"].map(|word| word.rsplit('\n').next_back().unwrap())
        );
        assert_eq!(ends(""), [""; 0]);
    }

    #[test]
    fn the_token_with_the_last_letter_is_found() {
        let tokens = ["On", "ly Isa", "ac New", "ton", " sl", "ept in New", " York."].map(str::as_bytes);
        assert_eq!(name_ends(&tokens), [3, 6]);
        assert!(name_ends(&[]).is_empty());
        // A token without bytes, such as end-of-text.
        assert_eq!(name_ends(&[b"", b"Isaac", b"", b" Newton"]), [3]);
    }
}
