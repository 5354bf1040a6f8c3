//! Configuration files: TOML, with file and line in every error.
//!
//! A file may have a base. It then states only the differences:
//!
//! ```toml
//! base = "moe-27b.toml"           # beside this file
//! remove = ["train.schedule"]     # keys of the base to leave out
//!
//! [model.experts]
//! routed = 55
//! ```
//!
//! Tables are merged key by key. Anything else, and a table of another `kind`, replaces the base's value. Relative
//! paths start at the folder of the file that was opened.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::error::{ConfigError, Error, Result};
use crate::old_keys;

/// The origin of a configuration: a file and its bases.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file that was opened, then its base, then the base of that.
    files: Vec<File>,
}

#[derive(Debug, Clone)]
struct File {
    path: PathBuf,
    text: String,
}

/// Reads a TOML file and its bases. Also returns their texts, so that later errors can be [located](locate).
///
/// # Errors
/// When a file cannot be read, is its own base, or the files do not hold a `T`. The error names file and line.
pub fn load_toml<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(Source, T)> {
    let (source, mut merged) = read(path)?;
    let is_old = old_keys::translate(&mut merged).map_err(|error| locate(&source, &error))?;
    let [asked, bases @ ..] = &source.files[..] else {
        unreachable!("a source has the file that was asked for")
    };
    if bases.is_empty() && !is_old {
        let parsed = toml::from_str(&asked.text).map_err(|error| asked.refuse_toml(&error))?;
        return Ok((source, parsed));
    }
    // Serialized again, so that an error has a place in it, and so a key to look for in the files.
    let text = merged.to_string();
    match toml::from_str(&text) {
        Ok(parsed) => Ok((source, parsed)),
        Err(error) => {
            let key = key_at(&text, error.span().map_or(0, |span| span.start));
            Err(source.refuse(&key, error.message().trim().to_owned()))
        }
    }
}

/// Adds the file and line of `error`'s key; if the key is absent, those of its table.
pub fn locate(source: &Source, error: &ConfigError) -> Error {
    source.refuse(&error.key, error.to_string())
}

impl Source {
    /// An error at `key`, in the first file that has the key or the longest part of it.
    fn refuse(&self, key: &str, problem: String) -> Error {
        let places = self.files.iter().map(|file| (file, key_line(&file.text, key)));
        // The last of equals wins, so the opened file comes last.
        let (file, (_, line)) = places.rev().max_by_key(|(_, (depth, _))| *depth).expect("there is a file");
        Error::Config { path: file.path.clone(), line, problem }
    }
}

impl File {
    fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), text })
    }

    fn refuse(&self, key: &str, problem: impl Into<String>) -> Error {
        let (_, line) = key_line(&self.text, key);
        Error::Config { path: self.path.clone(), line, problem: problem.into() }
    }

    fn refuse_toml(&self, error: &toml::de::Error) -> Error {
        let line = error.span().map_or(1, |span| line_of(&self.text, span.start));
        Error::Config { path: self.path.clone(), line, problem: error.message().trim().to_owned() }
    }
}

/// The file at `path` with all its bases, and the merged result.
fn read(path: &Path) -> Result<(Source, Table)> {
    let mut files = Vec::<File>::new();
    let mut layers = Vec::new();
    let mut next = Some(path.to_owned());
    while let Some(path) = next {
        let file = File::read(&path)?;
        if files.iter().any(|seen| same_file(&seen.path, &path)) {
            let of = files.last().expect("a file that named it");
            return Err(of.refuse("base", format!("`base`: {} is based on itself", path.display())));
        }
        let mut table: Table = file.text.parse().map_err(|error| file.refuse_toml(&error))?;
        let (base, remove) = take_base(&file, &mut table)?;
        next = base.map(|base| path.parent().unwrap_or(Path::new("")).join(base));
        layers.push((table, remove));
        files.push(file);
    }
    let mut merged = Table::new();
    for ((table, remove), file) in layers.into_iter().zip(&files).rev() {
        for key in remove {
            if !take(&mut merged, &key) {
                return Err(file.refuse("remove", format!("`remove`: the base has no key `{key}`")));
            }
        }
        merge(&mut merged, table);
    }
    Ok((Source { files }, merged))
}

/// Removes `base` and `remove` from `table` and returns them.
fn take_base(file: &File, table: &mut Table) -> Result<(Option<String>, Vec<String>)> {
    let string = |value: Value| match value {
        Value::String(text) => Some(text),
        _ => None,
    };
    let Some(base) = table.remove("base") else { return Ok((None, Vec::new())) };
    let Some(base) = string(base) else {
        return Err(file.refuse("base", "`base`: must be the path of a file"));
    };
    let remove = match table.remove("remove") {
        None => Some(Vec::new()),
        Some(Value::Array(keys)) => keys.into_iter().map(string).collect(),
        Some(_) => None,
    };
    match remove {
        Some(remove) => Ok((Some(base), remove)),
        None => {
            Err(file.refuse("remove", "`remove`: must be a list of dotted keys, such as [\"model.memory\"]"))
        }
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Removes the dotted `key`. Returns whether it was there.
fn take(table: &mut Table, key: &str) -> bool {
    match key.split_once('.') {
        None => table.remove(key).is_some(),
        Some((first, rest)) => match table.get_mut(first) {
            Some(Value::Table(inner)) => take(inner, rest),
            _ => false,
        },
    }
}

/// Merges `over` into `table`.
fn merge(table: &mut Table, over: Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(value)) if is_same_kind(below, &value) => {
                merge(below, value)
            }
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

/// Whether `over` changes `below` rather than replacing it by another kind.
fn is_same_kind(below: &Table, over: &Table) -> bool {
    over.get("kind").is_none_or(|kind| below.get("kind") == Some(kind))
}

/// How many parts of the dotted `key` the text has, and the line of the last of them; line 1 if it has none. A part such
/// as `source[1]` is a table in a list.
fn key_line(text: &str, key: &str) -> (usize, usize) {
    let (mut depth, mut line) = (0, 1);
    let Ok(document) = toml::de::DeTable::parse(text) else { return (depth, line) };
    let mut table = document.get_ref();
    for part in key.split('.') {
        let (part, index) = numbered(part);
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref().as_ref() == part) else {
            break;
        };
        (depth, line) = (depth + 1, line_of(text, name.span().start));
        let value = match (value.get_ref(), index) {
            (toml::de::DeValue::Array(values), Some(index)) => match values.get(index) {
                Some(value) => {
                    line = line_of(text, value.span().start);
                    value.get_ref()
                }
                None => break,
            },
            (value, _) => value,
        };
        match value {
            toml::de::DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    (depth, line)
}

/// The name and the index of a part such as `source[1]`.
fn numbered(part: &str) -> (&str, Option<usize>) {
    let index = |rest: &str| rest.strip_suffix(']')?.parse().ok();
    part.split_once('[').map_or((part, None), |(name, rest)| (name, index(rest)))
}

/// The dotted key at `offset` of a text whose tables all have headers.
fn key_at(text: &str, offset: usize) -> String {
    let mut table = "";
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let (content, end) = (line.trim(), start + line.len());
        if content.starts_with('[') {
            table = content.trim_matches(['[', ']']);
        }
        if offset < end {
            return match content.split_once(" = ") {
                Some((key, _)) if table.is_empty() => key.to_owned(),
                Some((key, _)) => format!("{table}.{key}"),
                None => table.to_owned(),
            };
        }
        start = end;
    }
    table.to_owned()
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Config {
        name: String,
        part: Part,
        list: Option<Vec<u32>>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
    enum Part {
        Round { radius: f64, colour: Option<String> },
        Square { side: f64 },
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn of(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            files.iter().for_each(|(name, text)| std::fs::write(folder.path().join(name), text).unwrap());
            Self(folder)
        }

        fn load(&self, name: &str) -> Result<Config> {
            load_toml(&self.0.path().join(name)).map(|(_, config)| config)
        }

        fn refused(&self, name: &str) -> String {
            let error = self.load(name).unwrap_err().to_string();
            error.rsplit_once('/').unwrap().1.to_owned()
        }
    }

    const ROUND: &str =
        "name = \"a\"\nlist = [1, 2]\n\n[part]\nkind = \"round\"\nradius = 1.0\ncolour = \"red\"\n";

    #[test]
    fn a_file_states_what_differs_from_its_base() {
        let folder = Folder::of(&[
            ("a.toml", ROUND),
            ("b.toml", "base = \"a.toml\"\nname = \"b\"\nlist = [3]\npart.radius = 2.0\n"),
            ("c.toml", "base = \"b.toml\"\nremove = [\"part.colour\", \"list\"]\n"),
            ("d.toml", "base = \"c.toml\"\npart = { kind = \"square\", side = 3.0 }\n"),
        ]);
        let round = |radius, colour: Option<&str>| Part::Round { radius, colour: colour.map(str::to_owned) };
        let config = |name: &str, part, list| Config { name: name.to_owned(), part, list };
        assert_eq!(folder.load("b.toml").unwrap(), config("b", round(2.0, Some("red")), Some(vec![3])));
        assert_eq!(folder.load("c.toml").unwrap(), config("b", round(2.0, None), None));
        assert_eq!(folder.load("d.toml").unwrap(), config("b", Part::Square { side: 3.0 }, None));
    }

    #[test]
    fn what_is_refused_has_the_file_and_line_that_states_it() {
        let folder = Folder::of(&[
            ("a.toml", ROUND),
            ("wrong.toml", "name = \"a\"\n\n[part]\nkind = \"round\"\nradius = \"wide\"\n"),
            ("own.toml", "base = \"a.toml\"\n\n[part]\nradius = \"wide\"\n"),
            ("theirs.toml", "base = \"wrong.toml\"\nname = \"b\"\n"),
            ("unknown.toml", "base = \"a.toml\"\n\n\nnmae = \"b\"\n"),
            ("gone.toml", "base = \"a.toml\"\nremove = [\"part.size\"]\n"),
            ("number.toml", "base = 3\n"),
        ]);
        assert!(folder.refused("own.toml").starts_with("own.toml:"), "{}", folder.refused("own.toml"));
        assert!(
            folder.refused("theirs.toml").starts_with("wrong.toml:"),
            "{}",
            folder.refused("theirs.toml")
        );
        let unknown = folder.refused("unknown.toml");
        assert!(unknown.starts_with("unknown.toml:4: ") && unknown.contains("nmae"), "{unknown}");
        assert_eq!(folder.refused("gone.toml"), "gone.toml:2: `remove`: the base has no key `part.size`");
        assert_eq!(folder.refused("number.toml"), "number.toml:1: `base`: must be the path of a file");
        let (source, _) =
            load_toml::<Config>(&folder.0.path().join("own.toml").with_file_name("a.toml")).unwrap();
        let error = locate(&source, &ConfigError::new("part.radius", "must be above 0")).to_string();
        assert!(error.ends_with("a.toml:6: `part.radius`: must be above 0"), "{error}");
    }

    #[test]
    fn a_table_in_a_list_has_its_own_line() {
        let text = "[data]\n[[data.source]]\nname = \"a\"\n[[data.source]]\nname = \"b\"\n\nweight = 0\n";
        assert_eq!(key_line(text, "data.source[1].weight"), (3, 7));
        assert_eq!(key_line(text, "data.source[0].name"), (3, 3));
        assert_eq!(key_line(text, "data.source[0].weight").1, 2);
        assert_eq!(key_line(text, "data.source[7].weight"), (2, 2));
    }

    #[test]
    fn no_file_is_based_on_itself() {
        let folder = Folder::of(&[("a.toml", "base = \"b.toml\"\n"), ("b.toml", "\nbase = \"a.toml\"\n")]);
        assert!(folder.refused("a.toml").contains("is based on itself"), "{}", folder.refused("a.toml"));
        let error = Folder::of(&[("a.toml", "base = \"none.toml\"\n")]).load("a.toml").unwrap_err();
        assert!(matches!(error, Error::Read { .. }) && error.is_input(), "{error}");
    }
}
