//! The source of a task's records on the Hugging Face hub, and the conversion of its records.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::Value;
use minijinja::value::Serde;
use serde::Deserialize;
use toml::Spanned;

use super::data_file;
use super::error::{Error, Result};
use super::template::Templates;

/// `[hub]` of a task file: a file of a data set.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubData {
    /// The data set, `owner/name`.
    pub(crate) repository: Spanned<String>,
    /// The file's path in it.
    pub(crate) file: Spanned<String>,
    /// A branch, a tag or a commit.
    #[serde(default = "main")]
    pub(crate) revision: String,
    /// The fields of the task's records, as expressions over the hub's records. Without it, the file is used unchanged.
    pub(crate) record: Option<BTreeMap<String, Spanned<String>>>,
}

fn main() -> String {
    "main".into()
}

impl HubData {
    /// The data set, `owner/name`.
    pub fn repository(&self) -> &str {
        self.repository.as_ref()
    }

    /// The file's path in it, with `/` between folders.
    pub fn file(&self) -> &str {
        self.file.as_ref()
    }

    /// A branch, a tag or a commit of it.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The task's records, as JSON lines, from the downloaded file at `path`; none if that file is used unchanged.
    ///
    /// # Errors
    /// A file that cannot be read, or a record for which an expression fails.
    pub fn records(&self, path: &Path) -> Result<Option<String>> {
        let Some(fields) = &self.record else { return Ok(None) };
        let (templates, mut lines) = (Templates::new(), String::new());
        for record in data_file::read(path, None)? {
            let there = Value::from(Serde(&record.fields));
            let here = fields.iter().map(|(name, expression)| {
                let value = templates.value(expression.as_ref(), &there);
                let value =
                    value.and_then(|value| serde_json::to_value(value).map_err(|error| error.to_string()));
                let problem = |problem| format!("`hub.record.{name}`: {problem}");
                Ok((name.clone(), value.map_err(|error| Error::line(path, record.line, problem(error)))?))
            });
            let here = here.collect::<Result<serde_json::Map<_, _>>>()?;
            lines += &serde_json::Value::Object(here).to_string();
            lines.push('\n');
        }
        Ok(Some(lines))
    }
}

/// Whether `name` is a valid name of a data set.
pub(crate) fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c))
    };
    name.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// Whether `path` stays in its repository.
pub(crate) fn is_inside(path: &str) -> bool {
    path.split('/').all(|part| !["", ".", ".."].contains(&part)) && !path.contains('\\')
}

#[cfg(test)]
mod tests {
    use super::super::task_file::Task;
    use super::*;

    fn load(hub: &str) -> Result<Task> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arc.toml");
        let form = "[cloze]\nprompt = '{{ query }}'\ntarget = '{{ gold }}'\n";
        std::fs::write(&path, format!("data = 'a.jsonl'\n{form}[hub]\n{hub}")).unwrap();
        Task::load(&path)
    }

    #[test]
    fn records_there_become_records_here() {
        let task = load(
            "repository = 'allenai/ai2_arc'\nfile = 'ARC-Easy/test.jsonl'\n[hub.record]\n\
             query = \"'Question: ' ~ question\"\nchoices = 'choices.text'\n\
             gold = \"(choices.label | join | split(answerKey) | list)[0] | length\"\n",
        )
        .unwrap();
        let hub = task.hub().unwrap();
        assert_eq!(
            (hub.repository(), hub.file(), hub.revision()),
            ("allenai/ai2_arc", "ARC-Easy/test.jsonl", "main")
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there.jsonl");
        let record =
            r#"{"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}"#;
        std::fs::write(&path, record).unwrap();
        let expected = "{\"choices\":[\"x\",\"y\"],\"gold\":1,\"query\":\"Question: Why?\"}\n";
        assert_eq!(hub.records(&path).unwrap().unwrap(), expected);
        std::fs::write(&path, format!("{record}\n{{\"question\": \"Why?\"}}\n")).unwrap();
        let error = hub.records(&path).unwrap_err().to_string();
        assert!(error.contains("there.jsonl:2: `hub.record.choices`"), "{error}");
        let whole = load("repository = 'a/b'\nfile = 'c.jsonl'\nrevision = 'v1'\n").unwrap();
        assert!(whole.hub().unwrap().records(Path::new("nowhere")).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_is_named_with_its_line() {
        let file = "file = 'a.jsonl'";
        let cases = [
            ("repository = 'arc'\nfile = 'a.jsonl'".to_owned(), ":6: `hub.repository`"),
            ("repository = 'a/../b'\nfile = 'a.jsonl'".to_owned(), ":6: `hub.repository`"),
            ("repository = 'a/b'\nfile = '/a.jsonl'".to_owned(), ":7: `hub.file`"),
            ("repository = 'a/b'\nfile = 'x/../../a.jsonl'".to_owned(), ":7: `hub.file`"),
            (
                "repository = 'a/b'\nfile = 'a.parquet'".to_owned(),
                ":7: `data` is a .jsonl file, but `hub.file` is not",
            ),
            (
                format!("repository = 'a/b'\n{file}\nrecord.gold = 'a +'"),
                ":8: `hub.record.gold` is not a valid expression",
            ),
            (format!("repository = 'a/b'\n{file}\nbranch = 'a'"), ":8: unknown field `branch`"),
        ];
        for (hub, message) in cases {
            let error = load(&hub).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
