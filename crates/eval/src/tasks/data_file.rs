//! Files of records: JSON lines, CSV with a header, Parquet, or groups of lines.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::SerializedFileReader;
use parquet::record::Row;
use serde_json::{Map, Value};

use super::error::{Error, Result};

/// One record, with its first line or its row number.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Record {
    /// Line, from 1.
    pub(crate) line: usize,
    /// The fields.
    pub(crate) fields: Map<String, Value>,
}

/// Reads `path`, whose name gives its format: `.jsonl`, `.csv` or `.parquet`. With `line_fields`, every group of that
/// many lines is a record instead, with these fields in order.
///
/// # Errors
/// A file that cannot be read, is empty, or has an invalid record.
pub(crate) fn read(path: &Path, line_fields: Option<&[String]>) -> Result<Vec<Record>> {
    let text = || text_of(path);
    let extension = path.extension().and_then(|extension| extension.to_str());
    let records = match (line_fields, extension) {
        (Some(fields), _) => line_groups(path, &text()?, fields)?,
        (None, Some("jsonl")) => json_lines(path, &text()?)?,
        (None, Some("csv")) => comma_separated(path, &text()?)?,
        (None, Some("parquet")) => parquet_rows(path)?,
        (None, _) => {
            text()?;
            let problem =
                "unknown format: use a .jsonl, .csv or .parquet file, or set `line_fields` in the task";
            return Err(Error::line(path, 1, problem));
        }
    };
    if records.is_empty() {
        return Err(Error::line(path, 1, "the file has no records"));
    }
    Ok(records)
}

/// The text of a file, without a byte order mark.
fn text_of(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::file("read", path))?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count();
        Error::line(path, line, format!("invalid UTF-8 at byte {offset}; convert the text to UTF-8"))
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<Record>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(index, line)| {
        let fields = serde_json::from_str(line)
            .map_err(|error| Error::line(path, index + 1, format!("not a JSON object: {error}")))?;
        Ok(Record { line: index + 1, fields })
    };
    lines.map(record).collect()
}

fn comma_separated(path: &Path, text: &str) -> Result<Vec<Record>> {
    let malformed = |error: csv::Error| {
        let line = error.position().map_or(1, |position| position.line() as usize);
        Error::line(path, line, format!("malformed CSV: {error}"))
    };
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(malformed)?.clone();
    let record = |row: csv::Result<csv::StringRecord>| {
        let row = row.map_err(malformed)?;
        let line = row.position().map_or(1, |position| position.line() as usize);
        let fields = header.iter().zip(&row).map(|(name, value)| (name.to_owned(), value.into())).collect();
        Ok(Record { line, fields })
    };
    reader.records().map(record).collect()
}

/// Bytes that are not text become base64, and NaN and infinities become null, because JSON has neither.
fn parquet_rows(path: &Path) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(Error::file("read", path))?;
    let mut records = Vec::new();
    let mut add = |row: parquet::errors::Result<Row>| -> parquet::errors::Result<()> {
        let line = records.len() + 1;
        let Value::Object(fields) = row?.to_json_value() else { unreachable!("a row is an object") };
        records.push(Record { line, fields });
        Ok(())
    };
    // Some decoders of the crate panic on damaged bytes.
    let read =
        std::panic::AssertUnwindSafe(|| SerializedFileReader::new(file)?.into_iter().try_for_each(&mut add));
    let problem = match std::panic::catch_unwind(read) {
        Ok(Ok(())) => return Ok(records),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the decoder failed".to_owned(),
    };
    Err(Error::line(path, records.len() + 1, format!("damaged Parquet: {problem}")))
}

fn line_groups(path: &Path, text: &str, fields: &[String]) -> Result<Vec<Record>> {
    let lines: Vec<&str> = text.lines().collect();
    let whole = lines.len() - lines.len() % fields.len();
    if whole < lines.len() {
        let problem = format!(
            "the file ends within a record: the last one has {} of {} lines",
            lines.len() - whole,
            fields.len()
        );
        return Err(Error::line(path, whole + 1, problem));
    }
    let record = |(index, lines): (usize, &[&str])| Record {
        line: index * fields.len() + 1,
        fields: fields.iter().cloned().zip(lines.iter().map(|&line| line.into())).collect(),
    };
    Ok(lines.chunks_exact(fields.len()).enumerate().map(record).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::data_type::{BoolType, ByteArray, ByteArrayType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;

    use super::*;

    fn records(name: &str, text: &str, line_fields: Option<&[&str]>) -> Result<Vec<Record>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let fields: Option<Vec<String>> =
            line_fields.map(|fields| fields.iter().map(|&f| f.into()).collect());
        read(&path, fields.as_deref())
    }

    /// A list in a struct, as on the Hugging Face hub, and columns that may be null.
    #[test]
    fn parquet_holds_lists_and_structs() {
        let schema = "message m {
            required binary question (UTF8); optional boolean right; required int64 number;
            required group choices { required group text (LIST) { repeated group list { required binary element (UTF8); } } }
        }";
        let texts = |texts: &[&str]| texts.iter().map(|&text| ByteArray::from(text)).collect::<Vec<_>>();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer =
            SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut index = 0;
        while let Some(mut column) = group.next_column().unwrap() {
            match index {
                0 => column.typed::<ByteArrayType>().write_batch(&texts(&["a?", "b?"]), None, None),
                1 => column.typed::<BoolType>().write_batch(&[true], Some(&[1, 0]), None),
                2 => column.typed::<Int64Type>().write_batch(&[3, -4], None, None),
                _ => {
                    let column = column.typed::<ByteArrayType>();
                    column.write_batch(&texts(&["x", "y", "z"]), Some(&[1, 1, 1]), Some(&[0, 1, 0]))
                }
            }
            .unwrap();
            column.close().unwrap();
            index += 1;
        }
        group.close().unwrap();
        writer.close().unwrap();
        let expected = [
            record(1, json!({"question": "a?", "right": true, "number": 3, "choices": {"text": ["x", "y"]}})),
            record(2, json!({"question": "b?", "right": null, "number": -4, "choices": {"text": ["z"]}})),
        ];
        assert_eq!(read(&path, None).unwrap(), expected);
        let whole = std::fs::read(&path).unwrap();
        for cut in [3, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(read(&path, None).unwrap_err().to_string().contains("damaged Parquet"));
        }
    }

    fn record(line: usize, fields: Value) -> Record {
        Record { line, fields: fields.as_object().unwrap().clone() }
    }

    #[test]
    fn three_formats_hold_records() {
        let expected = [record(1, json!({"a": "x, y", "b": "1"})), record(3, json!({"a": "z", "b": "2"}))];
        let json = "{\"a\": \"x, y\", \"b\": \"1\"}\n\n{\"a\": \"z\", \"b\": \"2\"}\n";
        assert_eq!(records("a.jsonl", json, None).unwrap(), expected);
        assert_eq!(records("a.jsonl", &format!("\u{feff}{json}"), None).unwrap(), expected);
        let marked = records("a.csv", "\u{feff}a,b\n\"x, y\",1\n", None).unwrap();
        assert_eq!(marked[0].fields, expected[0].fields, "the first column has no mark in its name");
        assert_eq!(records("a.txt", "x, y\n1\nz\n2\n", Some(&["a", "b"])).unwrap(), expected);
        let comma_separated = records("a.csv", "a,b\n\"x, y\",1\nz,2\n", None).unwrap();
        assert_eq!(comma_separated.iter().map(|record| record.line).collect::<Vec<_>>(), [2, 3]);
        assert!(comma_separated.iter().zip(&expected).all(|(found, record)| found.fields == record.fields));
    }

    #[test]
    fn bytes_that_are_no_text_are_named_with_their_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, b"{}\n{\"a\": \"\xff\"}\n").unwrap();
        let error = read(&path, None).unwrap_err().to_string();
        assert!(error.contains("a.jsonl:2: invalid UTF-8 at byte 10"), "{error}");
    }

    #[test]
    fn what_is_no_record_is_named_with_its_line() {
        let cases = [
            ("a.jsonl", "{}\n[1]\n", None, ":2: not a JSON object"),
            ("a.jsonl", "\n", None, ":1: the file has no records"),
            ("a.csv", "a,b\n1,2\n3\n", None, ":3: malformed CSV"),
            ("a.txt", "1\n2\n3\n", Some(&["a", "b"][..]), ":3: the file ends within a record"),
            ("a.xml", "", None, "unknown format"),
            ("a.parquet", "PAR1", None, ":1: damaged Parquet"),
        ];
        for (name, text, fields, message) in cases {
            let error = records(name, text, fields).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
