//! What a terminal can show.

use std::io::IsTerminal;

/// Whether `stream` is a terminal that understands control sequences: one that is not called dumb.
pub(crate) fn takes_controls(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && understands(std::env::var_os("TERM").as_deref())
}

/// Whether `stream` is to be written to in colours. `NO_COLOR` is respected (<https://no-color.org>).
pub(crate) fn takes_colour(stream: &impl IsTerminal) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    takes_controls(stream) && !refused
}

/// Whether a terminal of that name understands control sequences. Windows' terminals have none; elsewhere one without a
/// name promises nothing.
fn understands(term: Option<&std::ffi::OsStr>) -> bool {
    term.map_or(cfg!(windows), |term| term != "dumb" && !term.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dumb_terminals_get_text() {
        for (term, expected) in [("dumb", false), ("", false), ("xterm-256color", true)] {
            assert_eq!(understands(Some(term.as_ref())), expected);
        }
    }
}
