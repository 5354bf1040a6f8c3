//! Questions: the rendered records of a task.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::Serde;
use toml::Spanned;

use super::data_file::{self, Record};
use super::error::{Error, Result};
use super::few_shot::FewShot;
use super::task_file::{Cloze, Form, Generation, MultipleChoice, Task};
use super::template::Templates;

/// The origin of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file of records.
    pub path: Arc<Path>,
    /// Line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.path.display(), self.line)
    }
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Its record.
    pub place: Place,
    /// What is asked.
    pub ask: Ask,
}

/// What is asked of the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// Which choice is the likeliest?
    Choice {
        /// Every choice in every paraphrase, `[paraphrases, choices]`.
        statements: Vec<Statement>,
        /// The choices as measured for normalisation, without the delimiter before them.
        choices: Vec<String>,
        /// Index of the right choice.
        answer: usize,
    },
    /// How likely is this continuation, and is it the greedy one?
    Cloze(Statement),
    /// What does the model generate after this?
    Generation {
        /// The prompt.
        prompt: String,
        /// The right answers.
        answers: Vec<String>,
    },
    /// How likely is this document?
    Document {
        /// Its text.
        text: String,
    },
}

impl Question {
    /// Adds the question's content to a hash.
    pub(crate) fn hash(&self, hash: &mut blake3::Hasher) {
        let mut add = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        match &self.ask {
            Ask::Choice { statements, choices, answer } => {
                add(&answer.to_string());
                choices.iter().for_each(|choice| add(choice));
                statements.iter().flat_map(|s| [&s.prompt, &s.continuation]).for_each(|text| add(text));
            }
            Ask::Cloze(statement) => {
                add(&statement.prompt);
                add(&statement.continuation);
            }
            Ask::Generation { prompt, answers } => {
                add(prompt);
                answers.iter().for_each(|answer| add(answer));
            }
            Ask::Document { text } => add(text),
        }
        hash.update(&(self.place.line as u64).to_le_bytes());
    }
}

/// A continuation of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The prompt.
    pub prompt: String,
    /// The scored continuation.
    pub continuation: String,
}

impl Task {
    /// The questions, in the order of their records; with `limit`, of the first `limit` records of every file. Files
    /// are looked for in `folder`, or without it beside the task file.
    ///
    /// # Errors
    /// A file that is missing or empty, or a record that does not fit the task, with its line.
    pub fn questions(
        &self,
        folder: Option<&Path>,
        few_shot: FewShot,
        limit: Option<usize>,
    ) -> Result<Vec<Question>> {
        let folder = self.folder(folder);
        let mut library = Library { folder, files: HashMap::new(), lists: HashMap::new() };
        let count = few_shot.count.unwrap_or(self.shots.count);
        if count > 0 && self.form.is_of_documents() {
            return Err(Error::Mismatch(format!("{}: tasks of documents have no examples", self.name)));
        }
        let mut questions = Vec::new();
        for path in data_files(&folder.join(&self.data), &self.leave_out)? {
            let writer = Writer::new(self, &path, library.read(&path, self.line_fields.as_deref())?);
            for index in 0..writer.records.len().min(limit.unwrap_or(usize::MAX)) {
                let shots = writer.shots(index, (count, few_shot.seed), &mut library)?;
                let ask = writer.ask(index, &shots, &mut library)?;
                questions.push(Question { place: writer.place(index), ask });
            }
        }
        Ok(questions)
    }
}

/// The file, or the files of the folder except those named in `leave_out`, in the order of their names.
fn data_files(path: &Path, leave_out: &[String]) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = path.read_dir().and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut files: Vec<PathBuf> =
        entries.map_err(Error::file("read", path))?.iter().map(std::fs::DirEntry::path).collect();
    files.retain(|file| {
        file.extension().is_some_and(|extension| ["jsonl", "csv", "parquet"].iter().any(|e| extension == *e))
    });
    for name in leave_out {
        let before = files.len();
        files.retain(|file| file.file_stem().is_none_or(|stem| stem != name.as_str()));
        if files.len() == before {
            return Err(Error::line(
                path,
                1,
                format!("the task leaves out {name}, but the folder does not have it"),
            ));
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::line(path, 1, "the folder has no .jsonl, .csv or .parquet file"));
    }
    Ok(files)
}

/// Files of records that were read.
struct Library<'a> {
    folder: &'a Path,
    files: HashMap<PathBuf, Arc<[Record]>>,
    /// The same, as templates see them.
    lists: HashMap<PathBuf, Value>,
}

impl Library<'_> {
    fn read(&mut self, path: &Path, line_fields: Option<&[String]>) -> Result<Arc<[Record]>> {
        if let Some(records) = self.files.get(path) {
            return Ok(records.clone());
        }
        let records: Arc<[Record]> = data_file::read(path, line_fields)?.into();
        self.files.insert(path.to_owned(), records.clone());
        Ok(records)
    }

    fn list(&mut self, path: &Path, records: &[Record]) -> Value {
        let list = || records.iter().map(|record| Value::from(Serde(&record.fields))).collect();
        self.lists.entry(path.to_owned()).or_insert_with(list).clone()
    }
}

/// Renders the records of one file.
struct Writer<'a> {
    task: &'a Task,
    path: Arc<Path>,
    records: Arc<[Record]>,
    templates: Templates,
}

impl<'a> Writer<'a> {
    fn new(task: &'a Task, path: &Path, records: Arc<[Record]>) -> Self {
        Self { task, path: path.into(), records, templates: Templates::new() }
    }

    fn place(&self, index: usize) -> Place {
        Place { path: self.path.clone(), line: self.records[index].line }
    }

    /// The variables of templates: the record's fields, the name of its file, all records of its file, and the tables.
    fn fields(&self, record: &Record, library: &mut Library<'_>) -> Result<Fields> {
        let mut fields: Vec<(String, Value)> =
            record.fields.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))).collect();
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        fields.push(("file".into(), Value::from(stem.into_owned())));
        fields.push(("all".into(), library.list(&self.path, &self.records)));
        for (name, path) in &self.task.tables {
            let path = self.text("tables", path, record, &Value::from_pairs(fields.clone()))?;
            let path = library.folder.join(path);
            let records = library.read(&path, None)?;
            fields.push((name.clone(), library.list(&path, &records)));
        }
        Ok(Fields(fields))
    }

    fn error(&self, record: &Record, key: &str, reason: &str) -> Error {
        let problem = format!("`{key}` of {}: {reason}", self.task.path.display());
        Error::line(&self.path, record.line, problem)
    }

    fn text(&self, key: &str, template: &str, record: &Record, fields: &Value) -> Result<String> {
        self.templates.render(template, fields).map_err(|reason| self.error(record, key, &reason))
    }

    fn texts(
        &self,
        key: &str,
        list: &Spanned<String>,
        record: &Record,
        fields: &Value,
    ) -> Result<Vec<String>> {
        let texts = self.templates.texts(list.as_ref(), fields);
        texts.map_err(|reason| self.error(record, key, &reason))
    }

    /// The preamble and the solved examples before question `index`.
    fn shots(&self, index: usize, (count, seed): (usize, u64), library: &mut Library<'_>) -> Result<String> {
        let (record, shots) = (&self.records[index], &self.task.shots);
        if count == 0 && self.task.preamble.is_empty() {
            return Ok(String::new());
        }
        let fields = self.fields(record, library)?.value();
        let mut before = self.text("preamble", &self.task.preamble, record, &fields)?;
        if count == 0 {
            return Ok(before);
        }
        let source = match &shots.data {
            Some(path) => {
                let path = library.folder.join(self.text("few_shot.data", path.as_ref(), record, &fields)?);
                let examples = library.read(&path, self.task.line_fields.as_deref())?;
                Self::new(self.task, &path, examples)
            }
            None => Self::new(self.task, &self.path, self.records.clone()),
        };
        let except = shots.data.is_none().then_some(index);
        let there = source.records.len();
        let chosen = shots.choose.indices(count, there, except, (seed, index as u64)).ok_or_else(|| {
            let problem = format!("{there} records are too few for {count} examples before each question");
            Error::line(&source.path, 1, problem)
        })?;
        for index in chosen {
            before += &source.solved(index, library)?;
            before += &shots.separator;
        }
        Ok(before)
    }

    /// A record as a solved example.
    fn solved(&self, index: usize, library: &mut Library<'_>) -> Result<String> {
        let record = &self.records[index];
        let fields = self.fields(record, library)?;
        match &self.task.form {
            Form::MultipleChoice { text } => {
                let (statements, choices, answer) = self.choices(text, record, &fields)?;
                let statement = &statements[..choices.len()][answer];
                Ok(format!("{}{}", statement.prompt, statement.continuation))
            }
            Form::Cloze { text } => {
                let statement = self.cloze(text, record, &fields.value())?;
                Ok(format!("{}{}", statement.prompt, statement.continuation))
            }
            Form::Generation { text, .. } => {
                let fields = fields.value();
                let (prompt, answers) = self.generation(text, record, &fields)?;
                let shown = match &text.shown {
                    Some(shown) => self.text("shown", shown.as_ref(), record, &fields)?,
                    None => answers[0].clone(),
                };
                Ok(format!("{prompt}{}{shown}", text.delimiter))
            }
            Form::Perplexity { .. } | Form::LongPerplexity { .. } => {
                Err(self.error(record, "few_shot", "tasks of documents have no examples"))
            }
        }
    }

    fn ask(&self, index: usize, before: &str, library: &mut Library<'_>) -> Result<Ask> {
        let record = &self.records[index];
        let fields = self.fields(record, library)?;
        match &self.task.form {
            Form::MultipleChoice { text } => {
                let (mut statements, choices, answer) = self.choices(text, record, &fields)?;
                statements.iter_mut().for_each(|statement| statement.prompt.insert_str(0, before));
                Ok(Ask::Choice { statements, choices, answer })
            }
            Form::Cloze { text } => {
                let mut statement = self.cloze(text, record, &fields.value())?;
                statement.prompt.insert_str(0, before);
                Ok(Ask::Cloze(statement))
            }
            Form::Generation { text, .. } => {
                let (prompt, answers) = self.generation(text, record, &fields.value())?;
                Ok(Ask::Generation { prompt: format!("{before}{prompt}"), answers })
            }
            Form::Perplexity { text } => self.document(&text.text, record, &fields.value()),
            Form::LongPerplexity { text, .. } => self.document(&text.text, record, &fields.value()),
        }
    }

    /// Statements `[paraphrases, choices]`, choices, and the index of the answer.
    fn choices(
        &self,
        text: &MultipleChoice,
        record: &Record,
        fields: &Fields,
    ) -> Result<(Vec<Statement>, Vec<String>, usize)> {
        let whole = fields.value();
        let choices = self.texts("choices", &text.choices, record, &whole)?;
        if choices.len() < 2 {
            return Err(self.error(record, "choices", "has fewer than two choices"));
        }
        let paraphrases = match &text.paraphrases {
            Some(list) => self.texts("paraphrases", list, record, &whole)?.into_iter().map(Some).collect(),
            None => vec![None],
        };
        if paraphrases.is_empty() {
            return Err(self.error(record, "paraphrases", "is empty"));
        }
        let (mut statements, mut measured) = (Vec::new(), Vec::new());
        for paraphrase in paraphrases {
            for choice in &choices {
                let fields = fields.with(choice, paraphrase.as_deref());
                let prompt = self.text("prompt", text.prompt.as_ref(), record, &fields)?;
                let said = match &text.continuation {
                    Some(template) => self.text("continuation", template.as_ref(), record, &fields)?,
                    None => choice.clone(),
                };
                if said.is_empty() {
                    return Err(self.error(record, "choices", "has an empty choice"));
                }
                statements.push(Statement { prompt, continuation: format!("{}{said}", text.delimiter) });
                measured.push(said);
            }
        }
        measured.truncate(choices.len());
        let answer = self.answer(text, &choices, record, &whole)?;
        Ok((statements, measured, answer))
    }

    /// The index of the right choice, given as a number or as the choice's text.
    fn answer(
        &self,
        text: &MultipleChoice,
        choices: &[String],
        record: &Record,
        fields: &Value,
    ) -> Result<usize> {
        let value = self.templates.value(text.answer.as_ref(), fields);
        let value = value.map_err(|reason| self.error(record, "answer", &reason))?;
        let index = match value.as_str() {
            Some(text) => choices.iter().position(|choice| choice == text),
            None => value.as_i64().and_then(|index| usize::try_from(index).ok()),
        };
        index.filter(|&index| index < choices.len()).ok_or_else(|| {
            let candidates: Vec<String> = choices.iter().map(|choice| format!("{choice:?}")).collect();
            let problem = format!("{value} is not among the choices: {}", candidates.join(", "));
            self.error(record, "answer", &problem)
        })
    }

    fn cloze(&self, text: &Cloze, record: &Record, fields: &Value) -> Result<Statement> {
        let prompt = self.text("prompt", text.prompt.as_ref(), record, fields)?;
        let target = self.text("target", text.target.as_ref(), record, fields)?;
        if target.is_empty() {
            return Err(self.error(record, "target", "is empty"));
        }
        Ok(Statement { prompt, continuation: format!("{}{target}", text.delimiter) })
    }

    fn document(&self, template: &Spanned<String>, record: &Record, fields: &Value) -> Result<Ask> {
        let text = self.text("text", template.as_ref(), record, fields)?;
        if text.is_empty() {
            return Err(self.error(record, "text", "is empty"));
        }
        Ok(Ask::Document { text })
    }

    fn generation(
        &self,
        text: &Generation,
        record: &Record,
        fields: &Value,
    ) -> Result<(String, Vec<String>)> {
        let prompt = self.text("prompt", text.prompt.as_ref(), record, fields)?;
        let answers = self.texts("answers", &text.answers, record, fields)?;
        if answers.is_empty() {
            return Err(self.error(record, "answers", "is empty"));
        }
        Ok((prompt, answers))
    }
}

/// Names and values of a template's variables.
struct Fields(Vec<(String, Value)>);

impl Fields {
    fn value(&self) -> Value {
        Value::from_pairs(self.0.clone())
    }

    /// With the choice, and the paraphrase that it is inserted into.
    fn with(&self, choice: &str, paraphrase: Option<&str>) -> Value {
        let more = paraphrase.map(|paraphrase| ("paraphrase".to_owned(), Value::from(paraphrase)));
        let more = more.into_iter().chain([("choice".to_owned(), Value::from(choice))]);
        Value::from_pairs(self.0.iter().cloned().chain(more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: FewShot = FewShot { count: None, seed: 0 };

    /// A folder with a task and its files.
    struct Desk(tempfile::TempDir);

    impl Desk {
        fn new(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = folder.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self(folder)
        }

        fn questions(&self, few_shot: FewShot, limit: Option<usize>) -> Result<Vec<Question>> {
            Task::load(&self.0.path().join("task.toml"))?.questions(None, few_shot, limit)
        }

        fn asks(&self, few_shot: FewShot) -> Vec<Ask> {
            self.questions(few_shot, None).unwrap().into_iter().map(|question| question.ask).collect()
        }
    }

    fn statement(prompt: &str, continuation: &str) -> Statement {
        Statement { prompt: prompt.into(), continuation: continuation.into() }
    }

    const CHOICE: &str =
        "data = 'a.jsonl'\n[multiple_choice]\nprompt = \"Q: {{ q }}\\nA:\"\nchoices = 'c'\nanswer = 'g'";

    #[test]
    fn choices_continue_one_prompt() {
        let data = "{\"q\": \"Sky?\", \"c\": [\"red\", \"blue\"], \"g\": 1}\n\
                    {\"q\": \"Sea?\", \"c\": [\"wet\", \"dry\"], \"g\": \"wet\"}\n";
        let desk = Desk::new(&[("task.toml", CHOICE), ("a.jsonl", data)]);
        let asks = desk.asks(NONE);
        let expected = Ask::Choice {
            statements: vec![statement("Q: Sky?\nA:", " red"), statement("Q: Sky?\nA:", " blue")],
            choices: vec!["red".into(), "blue".into()],
            answer: 1,
        };
        assert_eq!(asks[0], expected);
        assert!(matches!(&asks[1], Ask::Choice { answer: 0, .. }));
        assert_eq!(desk.questions(NONE, Some(1)).unwrap().len(), 1);

        let shot = desk.asks(FewShot { count: Some(1), seed: 3 });
        let Ask::Choice { statements, .. } = &shot[0] else { panic!("{shot:?}") };
        assert_eq!(statements[1], statement("Q: Sea?\nA: wet\n\nQ: Sky?\nA:", " blue"));
        let error = desk.questions(FewShot { count: Some(2), seed: 3 }, None).unwrap_err().to_string();
        assert!(error.contains("a.jsonl:1: 2 records are too few for 2 examples"), "{error}");
    }

    #[test]
    fn a_choice_may_stand_in_the_prompt() {
        let task = "data = 'a.jsonl'\n[multiple_choice]\nprompt = '{{ choice }}'\nchoices = 'c'\n\
                    continuation = '{{ end }}'\nanswer = 'g'";
        let data = "{\"c\": [\"so Ann\", \"so Bo\"], \"end\": \"won.\", \"g\": 0}";
        let asks = Desk::new(&[("task.toml", task), ("a.jsonl", data)]).asks(NONE);
        let Ask::Choice { statements, choices, .. } = &asks[0] else { panic!("{asks:?}") };
        assert_eq!(statements[..], [statement("so Ann", " won."), statement("so Bo", " won.")]);
        assert_eq!(choices[..], ["won.", "won."]);
    }

    #[test]
    fn facts_are_asked_in_every_paraphrase() {
        let task = "data = 'facts'\ntables.patterns = 'patterns/{{ file }}.jsonl'\n[multiple_choice]\n\
                    paraphrases = \"patterns | map(attribute='pattern')\"\n\
                    choices = \"all | map(attribute='object') | unique\"\nanswer = 'object'\n\
                    prompt = \"{{ (paraphrase | split(' [Y]') | list)[0] | replace('[X]', subject) }}\"";
        let files = [
            ("task.toml", task),
            (
                "facts/p1.jsonl",
                "{\"subject\": \"Paris\", \"object\": \"France\"}\n{\"subject\": \"Rome\", \"object\": \"Italy\"}\n\
                 {\"subject\": \"Milan\", \"object\": \"Italy\"}",
            ),
            ("patterns/p1.jsonl", "{\"pattern\": \"[X] is in [Y].\"}\n{\"pattern\": \"[X], [Y]\"}"),
        ];
        let asks = Desk::new(&files).asks(NONE);
        let Ask::Choice { statements, answer, .. } = &asks[1] else { panic!("{asks:?}") };
        let expected =
            [("Rome is in", " France"), ("Rome is in", " Italy"), ("Rome,", " France"), ("Rome,", " Italy")];
        assert_eq!(statements[..], expected.map(|(prompt, end)| statement(prompt, end)));
        assert_eq!(*answer, 1);
    }

    #[test]
    fn cloze_generation_and_documents() {
        let data = "{\"a\": \"one\", \"b\": [\"two\", \"2\"]}";
        let of = |form: &str| {
            Desk::new(&[("task.toml", &format!("data = 'a.jsonl'\n{form}")), ("a.jsonl", data)]).asks(NONE)
        };
        let cloze = of("[cloze]\nprompt = '{{ a }}'\ntarget = '{{ b[0] }}'");
        assert_eq!(cloze, [Ask::Cloze(statement("one", " two"))]);
        let generation = of("[generation]\nprompt = '{{ a }}'\nanswers = 'b'\nstop = []\ntokens = 3");
        let answers = vec!["two".into(), "2".into()];
        assert_eq!(generation, [Ask::Generation { prompt: "one".into(), answers }]);
        assert_eq!(of("[perplexity]\ntext = '{{ a }}'"), [Ask::Document { text: "one".into() }]);
    }

    #[test]
    fn the_right_answer_of_a_generation_is_a_cloze() {
        let answers = |form: &str, data: &str| -> Vec<Ask> {
            let task = format!(
                "data = 'a.jsonl'\n[generation]\nprompt = 'Q: {{{{ q }}}}'\n{form}\nstop = []\ntokens = 3"
            );
            let desk = Desk::new(&[("task.toml", &task), ("a.jsonl", data)]);
            let task = Task::load(&desk.0.path().join("task.toml")).unwrap().answers().unwrap();
            assert_eq!(task.name(), "task.answers");
            task.questions(None, NONE, None).unwrap().into_iter().map(|question| question.ask).collect()
        };
        let expected = |end: &str| [Ask::Cloze(statement("Q: one", end))];
        let data = "{\"q\": \"one\", \"names\": [\"two\", \"2\"], \"best\": \"zwei\"}";
        assert_eq!(answers("answers = 'names'", data), expected(" two"));
        assert_eq!(answers("answers = 'best'", data), expected(" zwei"));
        assert_eq!(
            answers("answers = 'best'\nshown = '= {{ best }}.'\ndelimiter = ''", data),
            expected("= zwei.")
        );
        assert!(
            Task::load(&Desk::new(&[("task.toml", CHOICE)]).0.path().join("task.toml"))
                .unwrap()
                .answers()
                .is_none()
        );
    }

    #[test]
    fn examples_come_from_their_own_file_after_a_preamble() {
        let task = "data = 'test'\npreamble = 'On {{ file }}. '\n\
                    few_shot = { count = 1, data = 'dev/{{ file }}.csv', choose = 'first', separator = ' / ' }\n\
                    [cloze]\nprompt = '{{ a }}'\ntarget = '{{ b }}'";
        let files = [("task.toml", task), ("test/x.csv", "a,b\n1,2\n"), ("dev/x.csv", "a,b\n3,4\n5,6\n")];
        assert_eq!(Desk::new(&files).asks(NONE), [Ask::Cloze(statement("On x. 3 4 / 1", " 2"))]);
    }

    #[test]
    fn records_that_do_not_fit_are_named_with_their_line() {
        let record = "{\"q\": \"\", \"c\": [\"a\", \"b\"], \"g\": 0}\n";
        let cases = [
            ("{\"q\": \"\", \"c\": [\"a\", \"b\"], \"g\": 2}", "2 is not among the choices: \"a\", \"b\""),
            ("{\"q\": \"\", \"c\": [\"a\", \"b\"], \"g\": \"c\"}", "c is not among the choices"),
            ("{\"q\": \"\", \"c\": [\"a\", \"b\"], \"g\": -1}", "-1 is not among the choices"),
            ("{\"q\": \"\", \"c\": [\"a\", \"b\"]}", "`answer` of"),
            ("{\"c\": [\"a\", \"b\"], \"g\": 0}", "`prompt` of"),
            ("{\"q\": \"\", \"c\": [\"a\"], \"g\": 0}", "fewer than two"),
            ("{\"q\": \"\", \"c\": [\"a\", \"\"], \"g\": 0}", "has an empty choice"),
            ("{\"q\": \"\", \"c\": 7, \"g\": 0}", "is not a list of texts"),
        ];
        for (line, message) in cases {
            let desk = Desk::new(&[("task.toml", CHOICE), ("a.jsonl", &format!("{record}{line}"))]);
            let error = desk.questions(NONE, None).unwrap_err().to_string();
            assert!(error.contains("a.jsonl:2: ") && error.contains(message), "{error}");
        }
    }

    #[test]
    fn files_of_a_folder_may_be_left_out() {
        let task = |names: &str| {
            format!("data = 'set'\nleave_out = {names}\n[cloze]\nprompt = '{{{{ file }}}}'\ntarget = 'x'")
        };
        let files = |names: &str| {
            let task = task(names);
            Desk::new(&[("task.toml", task.as_str()), ("set/a.jsonl", "{}"), ("set/b.csv", "c\n1\n")])
        };
        assert_eq!(files("[]").asks(NONE).len(), 2);
        assert_eq!(files("['a']").asks(NONE), [Ask::Cloze(statement("b", " x"))]);
        let error = files("['c']").questions(NONE, None).unwrap_err().to_string();
        assert!(error.contains("the task leaves out c, but"), "{error}");
        let error = files("['a', 'b']").questions(NONE, None).unwrap_err().to_string();
        assert!(error.contains("the folder has no .jsonl"), "{error}");
    }

    #[test]
    fn missing_and_empty_sets_are_refused() {
        let missing = Desk::new(&[("task.toml", CHOICE)]);
        assert!(missing.questions(NONE, None).unwrap_err().to_string().contains("a.jsonl: cannot read"));
        let empty = Desk::new(&[("task.toml", CHOICE), ("a.jsonl", "")]);
        assert!(
            empty
                .questions(NONE, None)
                .unwrap_err()
                .to_string()
                .contains("a.jsonl:1: the file has no records")
        );
    }
}
