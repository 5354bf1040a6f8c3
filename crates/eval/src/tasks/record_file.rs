//! Outcomes on disk: a header, then one line per answered question. An interrupted run resumes from it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::options::AskOptions;
use super::outcome::{Outcome, Said};
use super::question::{Ask, Question};
use super::scorer::Scorer;
use super::task_file::Task;

/// The questions and the model. Files whose headers differ only in the model can be compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The task's name.
    pub task: String,
    /// blake3 of the task file and of all rendered questions.
    pub questions_hash: String,
    /// Total number of questions.
    pub questions: usize,
    /// Identifies the model.
    pub model: String,
    /// The model's name for people: the path it was opened by, and its changes.
    pub model_name: String,
}

/// An open file of outcomes, for appending.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    file: File,
}

impl RecordFile {
    /// Opens the file for a run with this header: a new one, or an existing one to resume. Returns the outcomes that it
    /// holds. Removes an incomplete last line.
    ///
    /// # Errors
    /// A file that cannot be written, or that belongs to another run.
    pub fn open(path: &Path, header: &Header, questions: &[Question]) -> Result<(Self, Vec<Outcome>)> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::file("open", path))?;
        let Contents { header: found, outcomes, whole } = Contents::read(&file, path)?;
        match found {
            Some(found) if found.same_run(header) => check(path, &outcomes, questions)?,
            Some(found) => {
                let problem = found.difference(header);
                return Err(Error::line(path, 1, format!("{problem}; choose another folder for this run")));
            }
            None => {}
        }
        file.set_len(whole).map_err(Error::file("write", path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::file("write", path))?;
        let mut record = Self { path: path.to_owned(), file };
        if whole == 0 {
            record.line(header)?;
        }
        Ok((record, outcomes))
    }

    /// Adds an outcome.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, outcome: &Outcome) -> Result<()> {
        self.line(outcome)
    }

    /// One write per line: a killed run leaves at most its last line incomplete.
    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value).map_err(|error| Error::Mismatch(error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::file("write", &self.path))
    }
}

/// Reads a file of outcomes, in the order of the questions.
///
/// # Errors
/// A file that cannot be read, or is not a file of outcomes.
pub fn read_record(path: &Path) -> Result<(Header, Vec<Outcome>)> {
    let file = File::open(path).map_err(Error::file("read", path))?;
    let Contents { header, mut outcomes, .. } = Contents::read(&file, path)?;
    let header = header.ok_or_else(|| Error::line(path, 1, "the file is empty"))?;
    outcomes.sort_by_key(|outcome| outcome.question);
    Ok((header, outcomes))
}

/// Makes the tokens that another run of `task` found to be key the key tokens of this one, so that models are compared
/// on the same tokens.
///
/// # Errors
/// When this is not a task of long documents, or the file is not a record of one.
pub fn use_keys(task: &mut Task, path: &Path) -> Result<()> {
    let (_, outcomes) = read_record(path)?;
    let keys = |outcome: Outcome| match outcome.said {
        Said::LongDocument { keys, .. } => Ok(keys),
        _ => Err(Error::line(path, 1, "not the record of a task with [long_perplexity]")),
    };
    task.set_keys(outcomes.into_iter().map(keys).collect::<Result<Vec<_>>>()?)
}

impl Header {
    /// The header of a run that asks these questions of a model, which is shown as `model_name`.
    pub fn new(
        task: &Task,
        questions: &[Question],
        options: AskOptions,
        (scorer, model_name): (&dyn Scorer, &str),
    ) -> Self {
        let mut hash = blake3::Hasher::new();
        // The size of batches changes only rounding.
        hash.update(task.hash().as_bytes()).update(&[options.cut.into()]);
        questions.iter().for_each(|question| question.hash(&mut hash));
        Self {
            task: task.name().to_owned(),
            questions_hash: hash.finalize().to_hex().to_string(),
            questions: questions.len(),
            model: scorer.identity(),
            model_name: model_name.to_owned(),
        }
    }

    /// Whether a run with `other` continues this one. The path of the model may differ.
    fn same_run(&self, other: &Self) -> bool {
        Self { model_name: other.model_name.clone(), ..self.clone() } == *other
    }

    fn difference(&self, other: &Self) -> String {
        if self.task != other.task {
            return format!("this file belongs to the task {}, not {}", self.task, other.task);
        }
        if self.model != other.model {
            return format!("this file belongs to another model, `{}`", self.model_name);
        }
        "this file has other questions: the task, its data, the examples or the limit changed".into()
    }
}

fn check(path: &Path, outcomes: &[Outcome], questions: &[Question]) -> Result<()> {
    for (index, outcome) in outcomes.iter().enumerate() {
        if !questions.get(outcome.question).is_some_and(|question| fits(outcome, question)) {
            return Err(Error::line(path, index + 2, "not an outcome of this task's questions"));
        }
    }
    Ok(())
}

/// Whether `outcome` is a possible outcome of `question`.
fn fits(outcome: &Outcome, question: &Question) -> bool {
    let form = match (&outcome.said, &question.ask) {
        (Said::Choice { log_probabilities, answer, .. }, Ask::Choice { choices, answer: right, .. }) => {
            log_probabilities.len() == choices.len() && answer == right
        }
        (Said::Cloze { .. }, Ask::Cloze(_))
        | (Said::Generation { .. }, Ask::Generation { .. })
        | (Said::Document { .. } | Said::LongDocument { .. }, Ask::Document { .. }) => true,
        _ => false,
    };
    form && outcome.line == question.place.line
}

struct Contents {
    header: Option<Header>,
    outcomes: Vec<Outcome>,
    /// Bytes of complete lines.
    whole: u64,
}

impl Contents {
    fn read(file: &File, path: &Path) -> Result<Self> {
        let (mut reader, mut line, mut number) = (BufReader::new(file), String::new(), 0);
        let mut contents = Self { header: None, outcomes: Vec::new(), whole: 0 };
        while reader.read_line(&mut line).map_err(Error::file("read", path))? > 0 {
            number += 1;
            if !line.ends_with('\n') {
                break;
            }
            let wrong = |error| Error::line(path, number, format!("not a line of results: {error}"));
            match contents.header {
                None => contents.header = Some(serde_json::from_str(&line).map_err(wrong)?),
                Some(_) => contents.outcomes.push(serde_json::from_str(&line).map_err(wrong)?),
            }
            contents.whole += line.len() as u64;
            line.clear();
        }
        Ok(contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::outcome::Said;
    use crate::tasks::question::{Ask, Place, Statement};

    fn questions() -> Vec<Question> {
        let statement = Statement { prompt: "a".into(), continuation: " b".into() };
        let place = |line| Place { path: Path::new("a.jsonl").into(), line };
        (1..=3).map(|line| Question { place: place(line), ask: Ask::Cloze(statement.clone()) }).collect()
    }

    fn outcome(question: usize) -> Outcome {
        Outcome {
            question,
            line: question + 1,
            said: Said::Cloze { log_probability: -0.1, tokens: 1, greedy: false },
        }
    }

    fn header() -> Header {
        let text = |text: &str| text.to_owned();
        Header {
            task: text("t"),
            questions_hash: text("h"),
            questions: 3,
            model: text("m"),
            model_name: text("n"),
        }
    }

    #[test]
    fn a_run_goes_on_and_an_unfinished_line_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (mut record, found) = RecordFile::open(&path, &header(), &questions()).unwrap();
        assert!(found.is_empty());
        record.add(&outcome(2)).unwrap();
        record.add(&outcome(0)).unwrap();
        record.file.write_all(b"{\"question\":1").unwrap();
        let moved = Header { model_name: "elsewhere".into(), ..header() };
        let (mut record, found) = RecordFile::open(&path, &moved, &questions()).unwrap();
        assert_eq!(found, [outcome(2), outcome(0)]);
        record.add(&outcome(1)).unwrap();
        let (found, outcomes) = read_record(&path).unwrap();
        assert_eq!((found, outcomes), (header(), vec![outcome(0), outcome(1), outcome(2)]));
    }

    #[test]
    fn another_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (mut record, _) = RecordFile::open(&path, &header(), &questions()).unwrap();
        let other = |change: fn(&mut Header)| {
            let mut header = header();
            change(&mut header);
            RecordFile::open(&path, &header, &questions()).unwrap_err().to_string()
        };
        assert!(
            other(|header| header.task = "u".into())
                .contains("t.jsonl:1: this file belongs to the task t, not u")
        );
        assert!(other(|header| header.model = "x".into()).contains("another model, `n`"));
        assert!(other(|header| header.questions_hash = "x".into()).contains("other questions"));
        record.add(&outcome(7)).unwrap();
        let error = RecordFile::open(&path, &header(), &questions()).unwrap_err().to_string();
        assert!(error.contains("t.jsonl:2: not an outcome"), "{error}");
        std::fs::write(&path, "{}\n").unwrap();
        assert!(read_record(&path).unwrap_err().to_string().contains("t.jsonl:1: not a line of results"));
    }
}
