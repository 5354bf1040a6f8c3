//! Jinja as `transformers` sets it up for chat templates (`apply_chat_template`), with a limit on a template's work.

use std::fmt::Write;

use chrono::{DateTime, FixedOffset, Local};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use crate::python_text::{JsonStyle, json, text_of};
use crate::{jinja_source, python_methods};

/// Instructions, and pieces of 64 bytes that are made, before a template is stopped: of a short conversation, and for
/// each letter of a long one, of which a template may make some thirty copies.
const FUEL: (u64, f64) = (500_000, 0.5);

/// What a conversation of `letters` may cost.
pub(crate) fn fuel(letters: usize) -> u64 {
    FUEL.0 + (letters as f64 * FUEL.1) as u64
}

/// An environment without templates. `now` is what `strftime_now` tells; none: the time of this machine.
pub(crate) fn environment(now: Option<DateTime<FixedOffset>>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(FUEL.0));
    environment.set_unknown_method_callback(python_methods::call);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&text_of(value)?)?));
    environment.add_filter("string", |state: &mut State, value: Value| charged(state, text_of(&value)?));
    environment.add_filter("tojson", to_json);
    environment.add_filter("join", join);
    environment.add_filter("__percent", percent);
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    environment.add_function("strftime_now", move |format: &str| {
        let now = now.unwrap_or_else(|| Local::now().fixed_offset());
        let mut text = String::new();
        write!(text, "{}", now.format(format)).map(|()| text).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now has no format {format:?}"))
        })
    });
    Ok(environment)
}

/// Adds a template as Jinja on Python understands it.
pub(crate) fn add_template(
    environment: &mut Environment<'static>,
    name: &'static str,
    source: &str,
) -> Result<(), Error> {
    environment.add_template_owned(name, jinja_source::rewritten(source))
}

/// `tojson` of `transformers`: `json.dumps` without escapes of HTML or of letters outside ASCII.
fn to_json(state: &mut State, value: Value, indent: Option<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(count)) if count <= 100 => " ".repeat(count),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "`indent` must be a number up to 100 or a text",
                ));
            }
        }),
    };
    let own = JsonStyle::plain();
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")? {
        Some(separators) => match <[String; 2]>::try_from(separators) {
            Ok([item, key]) => (item, key),
            Err(_) => {
                return Err(Error::new(ErrorKind::InvalidOperation, "`separators` must be two texts"));
            }
        },
        // With an indent lines end without a blank.
        None if indent.is_some() => (",".into(), own.separators.1),
        None => own.separators,
    };
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    charged(state, json(&value, &JsonStyle { ascii, indent, separators, sort_keys })?)
}

/// A text that took work to make.
fn charged(state: &mut State, text: String) -> Result<String, Error> {
    state.consume_fuel(1 + text.len() as u64 / 64)?;
    Ok(text)
}

/// `join`, of values as Python writes them.
fn join(
    state: &mut State,
    value: Value,
    joiner: Option<&str>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let given: Option<String> = kwargs.get("d")?;
    let joiner = joiner.or(given.as_deref()).unwrap_or("");
    let named: Option<String> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    let attribute = attribute.or(named.as_deref());
    let mut out = String::new();
    for (index, item) in value.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(joiner);
        }
        let item = attribute.map_or_else(|| Ok(item.clone()), |name| item.get_attr(name))?;
        let before = out.len();
        out.push_str(&text_of(&item)?);
        state.consume_fuel(1 + ((out.len() - before + joiner.len()) / 64) as u64)?;
    }
    Ok(out)
}

/// `left % right`: a text's formatting, or the remainder with the sign of the divisor.
fn percent(state: &mut State, left: Value, right: Value) -> Result<Value, Error> {
    let Some(text) = left.as_str() else { return remainder(&left, &right) };
    let values = match right.kind() {
        ValueKind::Seq if right.is_tuple() => right.try_iter()?.collect(),
        _ => vec![right],
    };
    // `%s` writes other values than numbers as Python does.
    let written = |value: Value| match value.kind() {
        ValueKind::Number | ValueKind::String => Ok(value),
        ValueKind::Map if text.contains("%(") => Ok(value),
        _ => text_of(&value).map(Value::from),
    };
    let values: Vec<Value> = values.into_iter().map(written).collect::<Result<_, Error>>()?;
    // The engine's own filter asks what a result costs before it is made.
    state.apply_filter("format", &[std::slice::from_ref(&left), &values[..]].concat())
}

fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    let invalid = |problem: &str| Error::new(ErrorKind::InvalidOperation, problem.to_owned());
    let integer =
        |value: &Value| i128::try_from(value.clone()).ok().filter(|_| value.kind() != ValueKind::Bool);
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ if value.is_integer() => integer(value),
        _ => None,
    };
    match (whole(left), whole(right)) {
        (_, Some(0)) => Err(invalid("integer modulo by zero")),
        (Some(left), Some(right)) => {
            let rest = left.checked_rem(right).unwrap_or(0);
            Ok(Value::from(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }))
        }
        _ => {
            let number = |value: &Value| f64::try_from(value.clone()).ok().filter(|_| value.is_number());
            let (Some(left), Some(right)) = (number(left), number(right)) else {
                return Err(invalid("`%` takes two numbers, or a text and its values"));
            };
            if right == 0.0 {
                return Err(invalid("float modulo by zero"));
            }
            let rest = left % right;
            Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (right < 0.0) { rest + right } else { rest }))
        }
    }
}
