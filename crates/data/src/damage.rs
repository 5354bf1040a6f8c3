//! Damaged records: what to do with them, and how many there were.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What to do with a damaged record. With neither option, the first one ends the reading.
///
/// With both, a text that can be repaired is repaired, and other records are skipped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OnDamage {
    /// Write U+FFFD for bytes that are not UTF-8, and for halves of UTF-16 pairs (`"\ud83d"`).
    pub replace: bool,
    /// Skip records that are not JSON, hold no text, or hold bytes that are not UTF-8.
    pub skip: bool,
}

/// How many records were damaged, and the first few.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageReport {
    /// Records that were skipped.
    pub skipped: u64,
    /// Records that were repaired with U+FFFD.
    pub replaced: u64,
    /// What was wrong with the first few, with file and place.
    pub first: Vec<String>,
}

impl DamageReport {
    /// Number of messages kept, enough to find the kind of damage.
    const FIRST: usize = 5;

    /// Whether no record was damaged.
    pub fn is_empty(&self) -> bool {
        self.skipped == 0 && self.replaced == 0
    }

    pub(crate) fn skip(&mut self, problem: &Error) {
        self.skipped += 1;
        self.keep(problem);
    }

    /// Counts a repaired record, whether it was damaged in one place or in several.
    pub(crate) fn replace(&mut self, record: Self) {
        if record.replaced > 0 {
            self.replaced += 1;
            self.first
                .extend(record.first.into_iter().take(1).take(Self::FIRST.saturating_sub(self.first.len())));
        }
    }

    fn keep(&mut self, problem: &Error) {
        if self.first.len() < Self::FIRST {
            self.first.push(problem.to_string());
        }
    }
}

/// Bytes of a text that may be damaged. `problem` names the place, given the offset of the first byte that is not
/// UTF-8.
///
/// # Errors
/// `problem`, if the policy does not replace.
pub(crate) fn text(
    bytes: Vec<u8>,
    policy: OnDamage,
    report: &mut DamageReport,
    problem: impl FnOnce(u64) -> Error,
) -> Result<String> {
    let error = match String::from_utf8(bytes) {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    let problem = problem(error.utf8_error().valid_up_to() as u64);
    if !policy.replace {
        return Err(problem);
    }
    report.replaced += 1;
    report.keep(&problem);
    Ok(replaced(error.as_bytes()))
}

/// The text of WTF-8. Each half of a UTF-16 pair (`ED A0..BF xx`) and each other ill-formed stretch becomes one U+FFFD.
fn replaced(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        match rest {
            [0xed, 0xa0..=0xbf, 0x80..=0xbf, after @ ..] => {
                text.push(char::REPLACEMENT_CHARACTER);
                rest = after;
            }
            _ => {
                let half = rest.windows(3).position(|at| matches!(at, [0xed, 0xa0..=0xbf, 0x80..=0xbf]));
                let (before, after) = rest.split_at(half.unwrap_or(rest.len()));
                text.push_str(&String::from_utf8_lossy(before));
                rest = after;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_one_replacement_each() {
        assert_eq!(replaced(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(replaced(b"\xed\xa0\xbdx\xed\xb8\x80"), "\u{fffd}x\u{fffd}");
        assert_eq!(replaced("é\u{d7ff}".as_bytes()), "é\u{d7ff}", "no half: U+D7FF begins with ED, too");
        assert_eq!(replaced(b"\xed\xa0"), "\u{fffd}\u{fffd}", "cut off");
    }

    proptest! {
        #[test]
        fn a_text_stays_and_damage_is_the_usual_replacement(text: String, damage in any::<Vec<u8>>()) {
            prop_assert_eq!(&replaced(text.as_bytes()), &text);
            let halves = damage.windows(3).any(|at| matches!(at, [0xed, 0xa0..=0xbf, 0x80..=0xbf]));
            if !halves {
                prop_assert_eq!(replaced(&damage), String::from_utf8_lossy(&damage).into_owned());
            }
        }
    }
}
