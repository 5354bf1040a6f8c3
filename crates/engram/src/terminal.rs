//! What a terminal can show.

use std::io::IsTerminal;

/// Whether `stream` is a terminal that understands control sequences (not a dumb one).
pub(crate) fn takes_controls(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && understands(std::env::var_os("TERM").as_deref())
}

/// Whether to write colours to `stream`. Respects `NO_COLOR` (<https://no-color.org>).
pub(crate) fn takes_colour(stream: &impl IsTerminal) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    takes_controls(stream) && !refused
}

/// Whether a terminal of this name understands control sequences. On Windows, terminals have no name and do; elsewhere
/// a terminal without a name does not.
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
