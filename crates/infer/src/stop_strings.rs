//! Text that ends where a stop string begins.

/// Gives text out as it comes, but for what may be the beginning of a stop string.
#[derive(Debug, Default)]
pub(crate) struct StopStrings {
    strings: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    pub(crate) fn new(strings: Vec<String>) -> Self {
        Self { strings, held: String::new(), stopped: false }
    }

    /// Adds text; gives what can be shown, and whether a stop string ended it.
    pub(crate) fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(end) = self.strings.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(end);
            self.stopped = true;
            return (std::mem::take(&mut self.held), true);
        }
        let mut from = self.held.len().saturating_sub(self.longest().saturating_sub(1));
        while !self.held.is_char_boundary(from) {
            from += 1;
        }
        let begins = |tail: &str| self.strings.iter().any(|stop| stop.starts_with(tail));
        let mut tails = self.held[from..].char_indices().map(|(at, _)| from + at);
        let keep = tails.find(|&at| begins(&self.held[at..])).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text that turned out to begin no stop string, at the end.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string ended the text.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn longest(&self) -> usize {
        self.strings.iter().map(String::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(strings: &[&str]) -> StopStrings {
        StopStrings::new(strings.iter().map(|&string| string.into()).collect())
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        let mut text = stops(&["\n\n", "END"]);
        assert_eq!(text.push("a\n"), ("a".into(), false));
        assert_eq!(text.push("b E"), ("\nb ".into(), false));
        assert_eq!(text.push("N"), (String::new(), false));
        assert_eq!(text.push("DLESS"), (String::new(), true));
        let mut text = stops(&["END"]);
        assert_eq!(text.push("THE EN"), ("THE ".into(), false));
        assert_eq!(text.finish(), "EN");
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            pieces in prop::collection::vec("[abß]{0,4}", 0..12), stop in prop::collection::vec("[abß]{1,3}", 0..3),
        ) {
            let whole: String = pieces.concat();
            let end = stop.iter().filter_map(|stop| whole.find(stop.as_str())).min();
            let mut text = StopStrings::new(stop);
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let (more, now) = text.push(piece);
                shown += &more;
                if now {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                shown += &text.finish();
            }
            // The earliest stop string of those that were whole first.
            prop_assert_eq!(stopped, end.is_some());
            match end {
                None => prop_assert_eq!(shown, whole),
                Some(end) => prop_assert!(shown.len() >= end && whole.starts_with(&shown)),
            }
        }
    }
}
