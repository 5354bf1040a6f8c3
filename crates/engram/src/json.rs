//! JSON that every reader understands.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// The largest whole number that readers with 64-bit floats represent exactly: 2⁵³.
const EXACT: u64 = 1 << 53;

/// `value` as indented JSON. Whole numbers beyond 2⁵³, which most readers round, become strings.
pub(crate) fn pretty(value: &impl Serialize) -> serde_json::Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, ExactNumbers(PrettyFormatter::new())))?;
    Ok(String::from_utf8(bytes).expect("JSON is UTF-8"))
}

/// A number that is always written as a string, for keys that also hold numbers beyond 2⁵³.
pub(crate) fn as_strings<S: serde::Serializer>(numbers: &[i64], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(numbers.iter().map(i64::to_string))
}

struct ExactNumbers(PrettyFormatter<'static>);

impl Formatter for ExactNumbers {
    fn write_u64<W: ?Sized + Write>(&mut self, writer: &mut W, value: u64) -> io::Result<()> {
        match value <= EXACT {
            true => write!(writer, "{value}"),
            false => write!(writer, "\"{value}\""),
        }
    }

    fn write_i64<W: ?Sized + Write>(&mut self, writer: &mut W, value: i64) -> io::Result<()> {
        match value.unsigned_abs() <= EXACT {
            true => write!(writer, "{value}"),
            false => write!(writer, "\"{value}\""),
        }
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_readers_round_are_strings() {
        let value =
            serde_json::json!({"a": [1u64 << 53, (1u64 << 53) + 1, u64::MAX], "b": {"c": i64::MIN, "d": -1}});
        let text = pretty(&value).unwrap();
        let expected = serde_json::json!({
            "a": [9_007_199_254_740_992u64, "9007199254740993", "18446744073709551615"],
            "b": {"c": "-9223372036854775808", "d": -1},
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), expected);
        let small = serde_json::json!({"x": [1, 2.5, "y", null, {}], "z": []});
        assert_eq!(pretty(&small).unwrap(), serde_json::to_string_pretty(&small).unwrap());
    }
}
