//! Methods of Python's texts, lists and dictionaries that chat templates call.
//!
//! Positions and widths count characters, as in Python. What is not here is left to `minijinja-contrib`.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// The method `name` of `value`.
pub(crate) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => text_method(state, value.as_str().unwrap_or_default(), name, args),
        ValueKind::Seq => list_method(value, name, args),
        ValueKind::Map if name == "copy" => from_args(args).map(|()| value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    };
    match found {
        Err(error) if error.kind() == ErrorKind::UnknownMethod => {
            minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
        }
        found => found,
    }
}

fn unknown() -> Error {
    Error::from(ErrorKind::UnknownMethod)
}

fn invalid(problem: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

fn text_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    Ok(match name {
        "split" | "rsplit" => split(text, name == "rsplit", args)?,
        "splitlines" => split_lines(text, args)?,
        "partition" | "rpartition" => partition(text, name == "rpartition", args)?,
        "find" | "rfind" | "index" | "rindex" => return find(text, name, args),
        "count" => {
            let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let inside = slice(text, start, end);
            let count =
                if part.is_empty() { inside.chars().count() + 1 } else { inside.matches(part).count() };
            Value::from(count)
        }
        "replace" => {
            let (from, to, count, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
            let count = count.or(kwargs.get("count")?);
            kwargs.assert_all_used()?;
            let most = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
            // The result may be the square of what it is made of: it is paid for before it is made.
            let length = text.matches(from).take(most).count().saturating_mul(to.len());
            state.consume_fuel(length as u64 / 64)?;
            text.replacen(from, to, most).into()
        }
        "removeprefix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_prefix(part).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_suffix(part).unwrap_or(text).into()
        }
        "title" | "capitalize" | "swapcase" | "casefold" => {
            let () = from_args(args)?;
            cased(text, name).into()
        }
        "istitle" => {
            let () = from_args(args)?;
            (text.chars().any(char::is_alphabetic) && text == cased(text, "title")).into()
        }
        "isdecimal" => {
            let () = from_args(args)?;
            (!text.is_empty() && text.chars().all(|letter| letter.is_ascii_digit())).into()
        }
        "isidentifier" => {
            let () = from_args(args)?;
            let begins = text.starts_with(|letter: char| letter == '_' || letter.is_alphabetic());
            (begins && text.chars().all(|letter| letter == '_' || letter.is_alphanumeric())).into()
        }
        "isprintable" => {
            let () = from_args(args)?;
            text.chars().all(|letter| !letter.is_control()).into()
        }
        "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            justified(text, name, width, fill.unwrap_or(" "))?.into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let width = width.saturating_sub(sign.len());
            (sign.to_owned() + &justified(digits, "rjust", width, "0")?).into()
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            expand_tabs(text, size.unwrap_or(8))?.into()
        }
        _ => return Err(unknown()),
    })
}

/// Characters of `text` from `start` to `end`, counted from its end where negative.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> &str {
    let count = text.chars().count() as i64;
    let place = |at: Option<i64>, otherwise: i64| match at {
        None => otherwise,
        Some(at) if at < 0 => (at + count).max(0),
        Some(at) => at.min(count),
    };
    let (start, end) = (place(start, 0), place(end, count));
    if start >= end {
        return "";
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    &text[byte(start)..byte(end)]
}

fn find(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let inside = slice(text, start, end);
    let found = if name.starts_with('r') { inside.rfind(part) } else { inside.find(part) };
    // `inside` is a part of `text`, so that the distance of their beginnings is where it lies.
    let before = inside.as_ptr() as usize - text.as_ptr() as usize;
    let begins = if inside.is_empty() { 0 } else { before };
    match found {
        Some(at) => Ok(Value::from(text[..begins + at].chars().count())),
        None if name.ends_with("index") => Err(invalid("substring not found")),
        None => Ok(Value::from(-1)),
    }
}

/// `split` and `rsplit`: at a separator, or at runs of white space; `maxsplit` times at most.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator, most, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => kwargs.get("sep")?,
    };
    let most = most.or(kwargs.get("maxsplit")?).and_then(|most| usize::try_from(most).ok());
    kwargs.assert_all_used()?;
    let separator = separator.filter(|separator| !separator.is_none());
    let parts: Vec<&str> = match &separator {
        None => split_at_blanks(text, from_right, most),
        Some(separator) => {
            let separator = separator.as_str().ok_or_else(|| invalid("the separator must be a text"))?;
            if separator.is_empty() {
                return Err(invalid("empty separator"));
            }
            match (most, from_right) {
                (None, _) => text.split(separator).collect(),
                (Some(most), false) => text.splitn(most + 1, separator).collect(),
                (Some(most), true) => {
                    let mut parts: Vec<&str> = text.rsplitn(most + 1, separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
    };
    Ok(list_of(&parts))
}

fn list_of(parts: &[&str]) -> Value {
    parts.iter().map(|&part| Value::from(part)).collect()
}

fn split_at_blanks(text: &str, from_right: bool, most: Option<usize>) -> Vec<&str> {
    let Some(most) = most else { return text.split_whitespace().collect() };
    let mut parts = Vec::new();
    let mut rest = if from_right { text.trim_end() } else { text.trim_start() };
    while !rest.is_empty() {
        if parts.len() == most {
            // What is left stays as it is, blanks at its other end too.
            parts.push(rest);
            break;
        }
        if from_right {
            let at = rest.rfind(char::is_whitespace);
            let (before, word) = at.map_or(("", rest), |at| {
                let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                (&rest[..at], &rest[at + width..])
            });
            parts.push(word);
            rest = before.trim_end();
        } else {
            let (word, after) = rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len()));
            parts.push(word);
            rest = after.trim_start();
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['\n', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']);
        let Some(end) = end else {
            lines.push(rest);
            break;
        };
        let mark = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        lines.push(&rest[..if keep { end + mark } else { end }]);
        rest = &rest[end + mark..];
    }
    Ok(list_of(&lines))
}

fn partition(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let parts = match (from_right, text.split_once(separator), text.rsplit_once(separator)) {
        (false, Some((before, after)), _) | (true, _, Some((before, after))) => (before, separator, after),
        (false, None, _) => (text, "", ""),
        (true, _, None) => ("", "", text),
    };
    Ok(Value::from(parts))
}

fn cased(text: &str, name: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for letter in text.chars() {
        let upper = match name {
            "title" => !inside,
            "capitalize" => out.is_empty(),
            "swapcase" => letter.is_lowercase(),
            _ => false,
        };
        inside = letter.is_alphabetic();
        match (upper, name, letter) {
            (_, "casefold", 'ß' | 'ẞ') => out.push_str("ss"),
            (true, ..) => out.extend(letter.to_uppercase()),
            (false, ..) => out.extend(letter.to_lowercase()),
        }
    }
    out
}

/// Longest text that a method may fill up to.
const LONGEST: usize = 1 << 20;

fn justified(text: &str, name: &str, width: usize, fill: &str) -> Result<String, Error> {
    let mut letters = fill.chars();
    let (Some(fill), None) = (letters.next(), letters.next()) else {
        return Err(invalid("the fill character must be exactly one character long"));
    };
    if width > LONGEST {
        return Err(invalid(format!("a width of {width} is above {LONGEST}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // As Python has it, where the text cannot stand in the middle.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |count: usize| std::iter::repeat_n(fill, count);
    Ok(fill(left).chain(text.chars()).chain(fill(missing - left)).collect())
}

fn expand_tabs(text: &str, size: usize) -> Result<String, Error> {
    if size > 1000 {
        return Err(invalid(format!("a tab of {size} is above 1000")));
    }
    let (mut out, mut column) = (String::new(), 0);
    for letter in text.chars() {
        match letter {
            '\t' if size > 0 => {
                let count = size - column % size;
                out.extend(std::iter::repeat_n(' ', count));
                column += count;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(letter);
                column = 0;
            }
            _ => {
                out.push(letter);
                column += 1;
            }
        }
    }
    Ok(out)
}

fn list_method(list: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "index" => {
            let (item,): (Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|found| found == item);
            at.map(Value::from).ok_or_else(|| invalid("the value is not in the list"))
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(list.clone())
        }
        _ => Err(unknown()),
    }
}
