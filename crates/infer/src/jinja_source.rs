//! A chat template's source, rewritten where the engine knows less than Jinja on Python.
//!
//! * `{% generation %}` marks what the assistant says, for training. It changes no text, but for variables set in
//!   it, which end with it: `{% with %}`.
//! * `'%s' % value` formats a text. The engine's `%` knows numbers only, so that `a % b` becomes `a|__percent(b)`.
//! * `a ~ b` joins texts as Python writes values, so that each side becomes `a|string`.
//!
//! An operand that is more than a name, a literal, or something in brackets with what follows it is left as it is:
//! it is a calculation, whose result the engine writes as Python does.

use std::ops::Range;

/// The source with what the engine does not know rewritten.
pub(crate) fn rewritten(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while let Some(begin) = source[at..].find('{').map(|begin| at + begin) {
        out.push_str(&source[at..begin]);
        let rest = &source[begin..];
        let end = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map_or(source.len(), |end| begin + end + 2),
            Some(b'%' | b'{') => {
                let tag = Tag::read(source, begin);
                let end = if tag.name(source) == Some("raw") { raw_end(source, tag.end) } else { tag.end };
                out.push_str(&tag.rewritten(source));
                out.push_str(&source[tag.end..end]);
                at = end;
                continue;
            }
            _ => begin + 1,
        };
        out.push_str(&source[begin..end]);
        at = end;
    }
    out + &source[at..]
}

/// Where the raw text ends that begins at `from`; its end tag is read as any other.
fn raw_end(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(begin) = source[at..].find("{%").map(|begin| at + begin) {
        let name = source[begin + 2..].trim_start_matches(['-', '+']).trim_start();
        if name.starts_with("endraw") {
            return begin;
        }
        at = begin + 2;
    }
    source.len()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A text or a number.
    Literal,
    Name,
    Open,
    Close,
    Operator,
}

/// A `{{ … }}` or `{% … %}`, and the tokens in it.
struct Tag {
    start: usize,
    end: usize,
    tokens: Vec<(Kind, Range<usize>)>,
}

impl Tag {
    /// The tag that begins at `start`. One that never ends goes to the end of the source, for the engine to refuse.
    fn read(source: &str, start: usize) -> Self {
        let close = if source[start..].starts_with("{%") { "%}" } else { "}}" };
        let mut tokens = Vec::new();
        let (mut at, mut depth) = (start + 2, 0_usize);
        if source[at..].starts_with(['-', '+']) {
            at += 1;
        }
        while let Some(letter) = source[at..].chars().next() {
            let rest = &source[at..];
            let ends = rest.starts_with(close)
                || rest.strip_prefix(['-', '+']).is_some_and(|rest| rest.starts_with(close));
            if depth == 0 && ends {
                let end = at + rest.find(close).unwrap_or(0) + close.len();
                return Self { start, end, tokens };
            }
            let (kind, length) = match letter {
                letter if letter.is_whitespace() => {
                    at += letter.len_utf8();
                    continue;
                }
                '"' | '\'' => (Kind::Literal, text_length(rest, letter)),
                '0'..='9' => (Kind::Literal, number_length(rest)),
                letter if letter.is_alphabetic() || letter == '_' => (Kind::Name, name_length(rest)),
                '(' | '[' | '{' => {
                    depth += 1;
                    (Kind::Open, 1)
                }
                ')' | ']' | '}' => {
                    depth = depth.saturating_sub(1);
                    (Kind::Close, 1)
                }
                _ => {
                    let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|two| rest.starts_with(two));
                    (Kind::Operator, if two { 2 } else { letter.len_utf8() })
                }
            };
            tokens.push((kind, at..at + length));
            at += length;
        }
        Self { start, end: source.len(), tokens }
    }

    /// The name of a statement.
    fn name<'a>(&self, source: &'a str) -> Option<&'a str> {
        let (kind, range) = self.tokens.first()?;
        (source[self.start..].starts_with("{%") && *kind == Kind::Name).then(|| &source[range.clone()])
    }

    fn rewritten(&self, source: &str) -> String {
        let mut edits: Vec<(Range<usize>, &str)> = Vec::new();
        match self.name(source) {
            Some("generation") if self.tokens.len() == 1 => edits.push((self.tokens[0].1.clone(), "with")),
            Some("endgeneration") if self.tokens.len() == 1 => {
                edits.push((self.tokens[0].1.clone(), "endwith"));
            }
            _ => {}
        }
        for index in 0..self.tokens.len() {
            match self.word(source, index) {
                "%" => edits.extend(self.percent(source, index).into_iter().flatten()),
                "~" => edits.extend(self.joined(source, index)),
                _ => {}
            }
        }
        edits.sort_by_key(|(range, _)| (range.start, range.end));
        let (mut out, mut at) = (String::new(), self.start);
        for (range, text) in edits {
            out.push_str(&source[at..range.start]);
            out.push_str(text);
            at = range.end;
        }
        out + &source[at..self.end]
    }

    fn word<'a>(&self, source: &'a str, index: usize) -> &'a str {
        self.tokens.get(index).map_or("", |(_, range)| &source[range.clone()])
    }

    fn kind(&self, index: usize) -> Option<Kind> {
        self.tokens.get(index).map(|(kind, _)| *kind)
    }

    /// `a % b` to `a|__percent(b)`.
    fn percent(&self, source: &str, operator: usize) -> Option<[(Range<usize>, &'static str); 2]> {
        self.left_operand(source, operator)?;
        let last = self.right_operand(source, operator)?;
        let end = self.tokens[last].1.end;
        Some([(self.tokens[operator].1.clone(), "|__percent("), (end..end, ")")])
    }

    /// `a ~ b` to `a|string ~ b|string`, each side where it can be.
    fn joined(&self, source: &str, operator: usize) -> Vec<(Range<usize>, &'static str)> {
        let mut edits = Vec::new();
        let mut add = |last: usize| {
            let end = self.tokens[last].1.end;
            edits.push((end..end, "|string"));
        };
        if self.left_operand(source, operator).is_some() && self.kind(operator - 1) != Some(Kind::Literal) {
            // Between two `~` the other one adds it.
            let first = self.left_operand(source, operator).unwrap_or(operator);
            if first == 0 || self.word(source, first - 1) != "~" {
                add(operator - 1);
            }
        }
        if let Some(last) = self.right_operand(source, operator)
            && !(last == operator + 1 && self.kind(last) == Some(Kind::Literal))
            && !["*", "/", "//", "%", "**", "is"].contains(&self.word(source, last + 1))
        {
            add(last);
        }
        edits
    }

    /// Where the operand before `operator` begins, if it stands alone.
    fn left_operand(&self, source: &str, operator: usize) -> Option<usize> {
        let mut at = operator.checked_sub(1)?;
        loop {
            let closed = self.kind(at) == Some(Kind::Close);
            if closed {
                at = self.opening(at)?;
            } else if self.kind(at) == Some(Kind::Operator) || self.kind(at) == Some(Kind::Open) {
                return None;
            }
            let Some(before) = at.checked_sub(1) else { return Some(at) };
            match (self.kind(before)?, self.word(source, before)) {
                (Kind::Operator, "." | "|") => at = before.checked_sub(1)?,
                // A call or a place in a list.
                (Kind::Name | Kind::Close | Kind::Literal, word) if closed && !is_keyword(word) => {
                    at = before
                }
                (Kind::Operator, "*" | "/" | "//" | "%" | "**") => return None,
                // A sign, unless it stands between two operands.
                (Kind::Operator, "-" | "+") => {
                    let binary = before.checked_sub(1).is_some_and(|left| {
                        self.kind(left) != Some(Kind::Operator) && self.kind(left) != Some(Kind::Open)
                    });
                    return binary.then_some(at);
                }
                _ => return Some(at),
            }
        }
    }

    /// Where the operand after `operator` ends.
    fn right_operand(&self, source: &str, operator: usize) -> Option<usize> {
        let mut at = operator + 1;
        while ["-", "+"].contains(&self.word(source, at)) {
            at += 1;
        }
        match self.kind(at)? {
            Kind::Open => at = self.closing(at)?,
            Kind::Literal | Kind::Name => {}
            Kind::Close | Kind::Operator => return None,
        }
        loop {
            match (self.kind(at + 1), self.word(source, at + 1)) {
                (Some(Kind::Operator), "." | "|") if self.kind(at + 2) == Some(Kind::Name) => at += 2,
                (Some(Kind::Open), "(" | "[") => at = self.closing(at + 1)?,
                _ => return Some(at),
            }
        }
    }

    fn opening(&self, close: usize) -> Option<usize> {
        let mut depth = 0;
        (0..=close).rev().find(|&at| {
            match self.kind(at) {
                Some(Kind::Close) => depth += 1,
                Some(Kind::Open) => depth -= 1,
                _ => {}
            }
            depth == 0
        })
    }

    fn closing(&self, open: usize) -> Option<usize> {
        let mut depth = 0;
        (open..self.tokens.len()).find(|&at| {
            match self.kind(at) {
                Some(Kind::Open) => depth += 1,
                Some(Kind::Close) => depth -= 1,
                _ => {}
            }
            depth == 0
        })
    }
}

/// Words after which a bracket begins something of its own.
fn is_keyword(word: &str) -> bool {
    ["and", "else", "elif", "if", "in", "is", "not", "or", "print"].contains(&word)
}

fn text_length(rest: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, letter) in rest.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            letter if letter == mark => return at + letter.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

fn number_length(rest: &str) -> usize {
    let whole = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
    let after =
        rest[whole..].strip_prefix('.').filter(|after| after.starts_with(|d: char| d.is_ascii_digit()));
    whole + after.map_or(0, |after| 1 + name_length(after))
}

fn name_length(rest: &str) -> usize {
    rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::rewritten;

    #[test]
    fn what_the_engine_does_not_know_is_rewritten() {
        for (source, expected) in [
            ("{%- generation -%}a{% endgeneration %}", "{%- with -%}a{% endwith %}"),
            ("{{ '%s' % x }}", "{{ '%s' |__percent( x) }}"),
            ("{{ '%s: %d' % (m[0].role, 3) + 'a' }}", "{{ '%s: %d' |__percent( (m[0].role, 3)) + 'a' }}"),
            ("{{ loop.index0 % 2 == 0 }}", "{{ loop.index0 |__percent( 2) == 0 }}"),
            ("{{ f(a)[1].b|c(d) % -e.f }}", "{{ f(a)[1].b|c(d) |__percent( -e.f) }}"),
            ("{{ a ~ b ~ 'c' }}", "{{ a|string ~ b|string ~ 'c' }}"),
            ("{{ 'a' ~ b.c(1) }}", "{{ 'a' ~ b.c(1)|string }}"),
        ] {
            assert_eq!(rewritten(source), expected);
        }
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for source in [
            "a % b { } {x} 5%",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{{ a % b }}{% endraw %}",
            "{{ a * b % c }}{{ -7 % 3 }}",
            "{% if x %}%{% endif %}",
            "{{ {'a': {}}}}",
            "{{ '%}' }}{{ \"\\\"}}\" }}",
            "{% for",
            "{{ 'a",
            "{{ x if y else [1] }}",
        ] {
            assert_eq!(rewritten(source), source);
        }
    }

    proptest! {
        #[test]
        fn any_text_can_be_rewritten(source in r#"([{}%#~|.()\[\]'"a1é +-]|generation|raw|endraw|\{%|%\}|\{\{|\}\}){0,40}"#) {
            rewritten(&source);
        }
    }
}
