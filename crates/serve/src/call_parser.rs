//! Calls of functions in the text of an answer, as it comes.

use crate::call_style::CallStyle;

/// What a piece of text turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text that is not a call.
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// More of the JSON of its arguments.
    Arguments(String),
}

#[derive(Debug)]
enum State {
    /// Text, in which calls may begin.
    Text,
    /// A call up to its arguments.
    Head,
    /// The arguments, an object.
    Arguments(Nesting),
    /// What follows them.
    Tail,
    /// Text that no call can interrupt.
    Plain,
}

/// Where in a JSON object the text has come.
#[derive(Debug, Default)]
struct Nesting {
    depth: usize,
    in_text: bool,
    escaped: bool,
}

impl Nesting {
    /// Bytes of `text` up to the end of the object, if it ends there.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_text => self.escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// Finds calls in text that follows the grammar of a style.
#[derive(Debug)]
pub(crate) struct CallParser {
    style: CallStyle,
    state: State,
    /// Text that is not yet known to be one thing or another.
    held: String,
}

impl CallParser {
    pub(crate) fn new(style: CallStyle) -> Self {
        Self { style, state: State::Text, held: String::new() }
    }

    /// Adds a token that stands for no text.
    pub(crate) fn token(&mut self, token: u32) -> Vec<Piece> {
        if self.style.token == Some(token) { self.push(self.style.trigger) } else { Vec::new() }
    }

    /// Adds text; gives what has become clear.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held += text;
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        pieces
    }

    /// What turned out to be text, at the end.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let is_text = matches!(self.state, State::Text | State::Plain) && !held.is_empty();
        is_text.then_some(Piece::Text(held)).into_iter().collect()
    }

    /// One step; whether there may be another.
    fn advance(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Plain => {
                let text = std::mem::take(&mut self.held);
                pieces.extend((!text.is_empty()).then_some(Piece::Text(text)));
                false
            }
            State::Text if self.style.trigger.is_empty() => {
                // A call is all of an answer, or none of it.
                if self.held.starts_with(CallStyle::HEAD) {
                    self.state = State::Head;
                } else if CallStyle::HEAD.starts_with(&self.held[..]) {
                    return false;
                } else {
                    self.state = State::Plain;
                }
                true
            }
            State::Text => {
                let opening = format!("{}{}", self.style.trigger, self.style.opening);
                let (at, found) = match self.held.find(&opening) {
                    Some(at) => (at, true),
                    None => (self.held.len() - overlap(&self.held, &opening), false),
                };
                let text: String = self.held.drain(..at).collect();
                pieces.extend((!text.is_empty()).then_some(Piece::Text(text)));
                if found {
                    self.held.drain(..opening.len());
                    self.state = State::Head;
                }
                found
            }
            State::Head => {
                let middle = self.style.middle();
                let Some(end) = self.held.find(&middle) else { return false };
                let head: String = self.held.drain(..end + middle.len()).collect();
                let name = head[..end].strip_prefix(CallStyle::HEAD).unwrap_or(&head[..end]);
                pieces.push(Piece::Call(name.to_owned()));
                self.state = State::Arguments(Nesting::default());
                true
            }
            State::Arguments(nesting) => {
                let end = nesting.end(&self.held);
                let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                pieces.extend((!text.is_empty()).then_some(Piece::Arguments(text)));
                if end.is_some() {
                    self.state = State::Tail;
                }
                end.is_some()
            }
            State::Tail => {
                // White space may stand before the brace.
                let next = format!("}}{}", self.style.between);
                let rest = self.held.trim_start();
                if !rest.starts_with(&next) {
                    return false;
                }
                self.held = rest[next.len()..].to_owned();
                self.state = State::Head;
                true
            }
        }
    }
}

/// Bytes at the end of `text` that begin `word`.
fn overlap(text: &str, word: &str) -> usize {
    let starts = word.char_indices().map(|(at, _)| at).skip(1).chain([word.len()]);
    starts.filter(|&count| text.ends_with(&word[..count])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call_style::STYLES;

    /// What becomes of `text` in pieces of `size` characters: the text, and the calls.
    fn parsed(style: CallStyle, text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let (mut parser, characters) = (CallParser::new(style), text.chars().collect::<Vec<_>>());
        let mut pieces: Vec<Piece> = characters
            .chunks(size)
            .flat_map(|piece| parser.push(&piece.iter().collect::<String>()))
            .collect();
        pieces.extend(parser.finish());
        let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for piece in pieces {
            match piece {
                Piece::Text(more) => text += &more,
                Piece::Call(name) => calls.push((name, String::new())),
                Piece::Arguments(more) => calls.last_mut().unwrap().1 += &more,
            }
        }
        (text, calls)
    }

    #[test]
    fn calls_are_found_in_any_pieces() {
        let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
        let first = r#"{"city": "S{o \"}\\", "of": [{}, "é"]}"#;
        for style in STYLES {
            let of =
                |name: &str, arguments: &str| format!("{{\"name\": \"{name}{}{arguments}}}", style.middle());
            let CallStyle { trigger, opening, between, closing, .. } = style;
            let text =
                format!("{trigger}{opening}{}{between}{}{closing}", of("weather", first), of("clock", "{}"));
            let before = if trigger.is_empty() { "" } else { "Let me < see [T é\n" };
            for size in [1, 2, 3, 7, 1000] {
                let found = parsed(style, &format!("{before}{text}"), size);
                let calls = vec![call("weather", first), call("clock", "{}")];
                assert_eq!(found, (before.to_owned(), calls), "{style:?} {size}");
                for plain in ["no call", "<tool_cal", "a {\"name\": ", "", "{\"nam"] {
                    assert_eq!(parsed(style, plain, size), (plain.to_owned(), vec![]), "{style:?} {size}");
                }
                // Cut in the middle of the arguments.
                let cut = format!("{trigger}{opening}{}", of("clock", "{\"a\": 12, \"b"))
                    .trim_end_matches('}')
                    .to_owned();
                assert_eq!(
                    parsed(style, &cut, size).1,
                    [call("clock", "{\"a\": 12, \"b")],
                    "{style:?} {size}"
                );
            }
        }
    }

    #[test]
    fn a_special_token_may_begin_calls() {
        let mut parser = CallParser::new(CallStyle { token: Some(7), ..STYLES[1] });
        assert_eq!(parser.push("a"), [Piece::Text("a".into())]);
        assert_eq!((parser.token(3), parser.token(7)), (vec![], vec![]));
        let found = parser.push(" [{\"name\": \"f\", \"arguments\": {}}]");
        assert_eq!(found, [Piece::Call("f".into()), Piece::Arguments("{}".into())]);
        assert_eq!(parser.finish(), []);
    }
}
