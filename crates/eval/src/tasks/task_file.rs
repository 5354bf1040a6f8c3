//! Task files: TOML.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::answer::{AnswerRule, Compare, Which};
use super::error::{Error, Result};
use super::few_shot::Choose;
use super::hub_data::{HubData, is_inside, is_repository};
use super::template::Templates;

/// A task: the place of its records, and how each becomes a question.
#[derive(Debug)]
pub struct Task {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// blake3 of the file's text.
    pub(crate) hash: blake3::Hash,
    pub(crate) kind: Option<TaskKind>,
    pub(crate) data: String,
    /// Names, without ending, of files in the data's folder that do not belong to the set.
    pub(crate) leave_out: Vec<String>,
    pub(crate) line_fields: Option<Vec<String>>,
    pub(crate) tables: BTreeMap<String, String>,
    pub(crate) preamble: String,
    pub(crate) shots: Shots,
    pub(crate) hub: Option<HubData>,
    pub(crate) form: Form,
}

/// What a task tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Facts that the prompt does not contain.
    Facts,
    /// Conclusions from a passage in the prompt.
    Reading,
    /// Common knowledge about everyday life.
    CommonSense,
    /// Questions from schools and universities, which need knowledge and reasoning.
    Exams,
    /// Calculation.
    Mathematics,
    /// The likelihood of running text.
    Text,
}

impl TaskKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Facts, Self::Reading, Self::CommonSense, Self::Exams, Self::Mathematics, Self::Text];

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Facts => "facts",
            Self::Reading => "reading",
            Self::CommonSense => "common sense",
            Self::Exams => "exams",
            Self::Mathematics => "mathematics",
            Self::Text => "text",
        }
    }
}

/// What is asked, and how it is scored. Texts are templates over a record; `choices`, `answer`, `answers` and
/// `paraphrases` are expressions.
#[derive(Debug)]
pub enum Form {
    /// The likeliest of several continuations is the answer.
    MultipleChoice {
        /// Templates and expressions.
        text: MultipleChoice,
    },
    /// The continuation should be the likeliest text.
    Cloze {
        /// Templates.
        text: Cloze,
    },
    /// A text is generated and compared with the answers.
    Generation {
        /// Templates and expressions.
        text: Generation,
        /// How answers are compared.
        rule: AnswerRule,
    },
    /// The likelihood of whole documents.
    Perplexity {
        /// Templates.
        text: Perplexity,
    },
    /// The likelihood of those tokens of long documents that need distant context.
    LongPerplexity {
        /// Templates and limits.
        text: LongPerplexity,
        /// Key tokens by document, if another model found them.
        keys: Option<Vec<Vec<usize>>>,
    },
}

/// See [`Form::MultipleChoice`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultipleChoice {
    pub(crate) prompt: Spanned<String>,
    pub(crate) choices: Spanned<String>,
    pub(crate) answer: Spanned<String>,
    pub(crate) continuation: Option<Spanned<String>>,
    pub(crate) paraphrases: Option<Spanned<String>>,
    #[serde(default = "blank")]
    pub(crate) delimiter: String,
}

/// See [`Form::Cloze`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cloze {
    pub(crate) prompt: Spanned<String>,
    pub(crate) target: Spanned<String>,
    #[serde(default = "blank")]
    pub(crate) delimiter: String,
}

/// See [`Form::Generation`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    pub(crate) prompt: Spanned<String>,
    pub(crate) answers: Spanned<String>,
    /// The answer in a solved example. Default: the first answer.
    pub(crate) shown: Option<Spanned<String>>,
    #[serde(default = "blank")]
    pub(crate) delimiter: String,
    /// Texts that end the answer.
    pub(crate) stop: Vec<String>,
    /// Maximum number of tokens.
    pub(crate) tokens: usize,
    extract: Option<Extract>,
    #[serde(default)]
    remove: Vec<Spanned<String>>,
    #[serde(default)]
    ignore_case: bool,
    #[serde(default)]
    compare: Compare,
}

/// See [`Form::Perplexity`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Perplexity {
    pub(crate) text: Spanned<String>,
    /// Tokens of context that a window repeats from the previous one; see [`windows`](super::windows).
    pub(crate) overlap: Option<usize>,
}

/// See [`Form::LongPerplexity`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongPerplexity {
    pub(crate) text: Spanned<String>,
    /// Minimum number of tokens of the short context.
    pub(crate) short: usize,
    /// Number of tokens predicted from one short window.
    pub(crate) step: usize,
    /// A key token gains more than this from the long context, in nats.
    #[serde(default = "two")]
    pub(crate) alpha: f64,
    /// A key token's log-probability with the long context is above this.
    #[serde(default = "minus_two")]
    pub(crate) beta: f64,
}

/// Number of solved examples before a question.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Shots {
    pub(crate) count: usize,
    /// File of examples, a template over the record. Default: the file of the questions.
    pub(crate) data: Option<Spanned<String>>,
    pub(crate) choose: Choose,
    pub(crate) separator: String,
}

impl Default for Shots {
    fn default() -> Self {
        Self { count: 0, data: None, choose: Choose::Random, separator: "\n\n".into() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extract {
    pattern: Spanned<String>,
    #[serde(default)]
    which: Which,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskFile {
    name: Option<String>,
    kind: Option<TaskKind>,
    data: String,
    #[serde(default)]
    leave_out: Vec<String>,
    line_fields: Option<Spanned<Vec<String>>>,
    #[serde(default)]
    tables: BTreeMap<String, Spanned<String>>,
    preamble: Option<Spanned<String>>,
    #[serde(default)]
    few_shot: Shots,
    hub: Option<HubData>,
    multiple_choice: Option<MultipleChoice>,
    cloze: Option<Cloze>,
    generation: Option<Generation>,
    perplexity: Option<Perplexity>,
    long_perplexity: Option<LongPerplexity>,
}

fn two() -> f64 {
    2.0
}

fn minus_two() -> f64 {
    -2.0
}

fn blank() -> String {
    " ".into()
}

impl Task {
    /// Reads a task file.
    ///
    /// # Errors
    /// A file that cannot be read, or an invalid key, template or expression, with its line.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
        let file: TaskFile = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(&text, span.start));
            Error::line(path, line, error.message().trim())
        })?;
        let check = Check { path, text: &text, templates: Templates::new() };
        file.into_task(&check)
    }

    /// Its name: by default, the file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its kind, if its file gives one.
    pub fn kind(&self) -> Option<TaskKind> {
        self.kind
    }

    /// The source of its records on the Hugging Face hub, if its file gives one.
    pub fn hub(&self) -> Option<&HubData> {
        self.hub.as_ref()
    }

    /// The file of its records, or a folder of such files, in `folder`, or without it beside the task file.
    pub fn data_path(&self, folder: Option<&Path>) -> PathBuf {
        self.folder(folder).join(&self.data)
    }

    /// The folder of its data.
    pub(crate) fn folder<'a>(&'a self, folder: Option<&'a Path>) -> &'a Path {
        folder.or(self.path.parent()).unwrap_or(Path::new("."))
    }

    /// For a task with generated answers, the task that asks for the likelihood of the right answer: the answer that a
    /// solved example would show.
    pub fn answers(&self) -> Option<Self> {
        let Form::Generation { text, .. } = &self.form else { return None };
        let first = || {
            let of = text.answers.as_ref();
            let first = format!("{{% set right = ({of}) %}}{{{{ right if right is string else right[0] }}}}");
            Spanned::new(text.answers.span(), first)
        };
        let target = text.shown.clone().unwrap_or_else(first);
        let text = Cloze { prompt: text.prompt.clone(), target, delimiter: text.delimiter.clone() };
        Some(Self {
            name: format!("{}.answers", self.name),
            path: self.path.clone(),
            hash: self.hash,
            kind: self.kind,
            data: self.data.clone(),
            leave_out: self.leave_out.clone(),
            line_fields: self.line_fields.clone(),
            tables: self.tables.clone(),
            preamble: self.preamble.clone(),
            shots: self.shots.clone(),
            hub: self.hub.clone(),
            form: Form::Cloze { text },
        })
    }

    /// Identifies this version of the task.
    pub fn hash(&self) -> String {
        self.hash.to_hex().to_string()
    }

    /// The name of its file of outcomes.
    pub fn record_name(&self) -> String {
        format!("{}.jsonl", self.name)
    }

    /// Makes the tokens `keys`, by question, the key tokens.
    ///
    /// # Errors
    /// When this is not a task of long documents.
    pub(crate) fn set_keys(&mut self, found: Vec<Vec<usize>>) -> Result<()> {
        let Form::LongPerplexity { keys, .. } = &mut self.form else {
            let problem = format!("{}: only tasks with [long_perplexity] have key tokens", self.name);
            return Err(Error::Mismatch(problem));
        };
        let mut hash = blake3::Hasher::new();
        hash.update(self.hash.as_bytes()).update(format!("{found:?}").as_bytes());
        self.hash = hash.finalize();
        *keys = Some(found);
        Ok(())
    }

    /// What is asked.
    pub fn form(&self) -> &Form {
        &self.form
    }
}

impl Form {
    /// Whether whole documents are read, without a prompt.
    pub(crate) fn is_of_documents(&self) -> bool {
        matches!(self, Self::Perplexity { .. } | Self::LongPerplexity { .. })
    }
}

impl TaskFile {
    fn into_task(self, check: &Check<'_>) -> Result<Task> {
        for table in self.tables.values() {
            check.template("tables", table)?;
        }
        if let Some(preamble) = &self.preamble {
            check.template("preamble", preamble)?;
        }
        if let Some(data) = &self.few_shot.data {
            check.template("few_shot.data", data)?;
        }
        if let Some(fields) = &self.line_fields
            && fields.as_ref().is_empty()
        {
            return Err(check.at(fields.span().start, "`line_fields` is empty: list the field of each line"));
        }
        if let Some(hub) = &self.hub {
            check.hub(hub, &self.data)?;
        }
        let name = check.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if self.name.as_ref().is_some_and(|name| name.contains('/') || name.is_empty()) {
            return Err(Error::line(check.path, 1, "`name` must be a valid file name"));
        }
        let forms =
            (self.multiple_choice, self.cloze, self.generation, (self.perplexity, self.long_perplexity));
        let form = form(forms, check)?;
        if form.is_of_documents() && self.few_shot.count > 0 {
            return Err(Error::line(check.path, 1, "`few_shot`: tasks of documents have no examples"));
        }
        Ok(Task {
            name: self.name.unwrap_or(name),
            path: check.path.to_owned(),
            hash: blake3::hash(check.text.as_bytes()),
            kind: self.kind,
            data: self.data,
            leave_out: self.leave_out,
            line_fields: self.line_fields.map(Spanned::into_inner),
            tables: self.tables.into_iter().map(|(name, path)| (name, path.into_inner())).collect(),
            preamble: self.preamble.map(Spanned::into_inner).unwrap_or_default(),
            shots: self.few_shot,
            hub: self.hub,
            form,
        })
    }
}

type Forms =
    (Option<MultipleChoice>, Option<Cloze>, Option<Generation>, (Option<Perplexity>, Option<LongPerplexity>));

/// The one form of the file.
fn form(forms: Forms, check: &Check<'_>) -> Result<Form> {
    match forms {
        (Some(text), None, None, (None, None)) => {
            check.template("prompt", &text.prompt)?;
            check.expression("choices", &text.choices)?;
            check.expression("answer", &text.answer)?;
            text.continuation.iter().try_for_each(|text| check.template("continuation", text))?;
            text.paraphrases.iter().try_for_each(|text| check.expression("paraphrases", text))?;
            Ok(Form::MultipleChoice { text })
        }
        (None, Some(text), None, (None, None)) => {
            check.template("prompt", &text.prompt)?;
            check.template("target", &text.target)?;
            Ok(Form::Cloze { text })
        }
        (None, None, Some(text), (None, None)) => {
            check.template("prompt", &text.prompt)?;
            check.expression("answers", &text.answers)?;
            text.shown.iter().try_for_each(|text| check.template("shown", text))?;
            let rule = check.rule(&text)?;
            Ok(Form::Generation { text, rule })
        }
        (None, None, None, (Some(text), None)) => {
            check.template("text", &text.text)?;
            Ok(Form::Perplexity { text })
        }
        (None, None, None, (None, Some(text))) => {
            check.template("text", &text.text)?;
            Ok(Form::LongPerplexity { text, keys: None })
        }
        _ => {
            let problem = "a task needs exactly one of the tables [multiple_choice], [cloze], [generation], \
                           [perplexity] and [long_perplexity]";
            Err(Error::line(check.path, 1, problem))
        }
    }
}

/// Refuses invalid values, with their lines.
struct Check<'a> {
    path: &'a Path,
    text: &'a str,
    templates: Templates,
}

impl Check<'_> {
    fn at(&self, offset: usize, problem: impl Into<String>) -> Error {
        Error::line(self.path, line_of(self.text, offset), problem)
    }

    fn template(&self, key: &str, template: &Spanned<String>) -> Result<()> {
        self.templates.check(template.as_ref()).map_err(|(line, reason)| {
            let first = line_of(self.text, template.span().start);
            // A text in triple quotes begins on the line after them.
            let opening = &self.text[template.span().start..];
            let first = first + usize::from(opening.starts_with("\"\"\"\n") || opening.starts_with("'''\n"));
            // A line end written as \n is not a line of the file.
            let line = if opening.starts_with("\"\"\"") || opening.starts_with("'''") { line } else { 0 };
            Error::line(self.path, first + line, format!("`{key}` is not a valid template: {reason}"))
        })
    }

    fn expression(&self, key: &str, expression: &Spanned<String>) -> Result<()> {
        self.templates.check_expression(expression.as_ref()).map_err(|reason| {
            self.at(expression.span().start, format!("`{key}` is not a valid expression: {reason}"))
        })
    }

    fn pattern(&self, key: &str, pattern: &Spanned<String>) -> Result<Regex> {
        Regex::new(pattern.as_ref()).map_err(|error| {
            self.at(pattern.span().start, format!("`{key}` is not a valid regular expression: {error}"))
        })
    }

    fn hub(&self, hub: &HubData, data: &str) -> Result<()> {
        let (repository, file) = (&hub.repository, &hub.file);
        if !is_repository(repository.as_ref()) {
            return Err(self.at(repository.span().start, "`hub.repository` must be `owner/name`"));
        }
        if !is_inside(file.as_ref()) {
            return Err(self.at(file.span().start, "`hub.file` must be a path in the repository"));
        }
        let ending =
            |path: &str| Path::new(path).extension().map(|ending| ending.to_string_lossy().into_owned());
        let written = if hub.record.is_some() { Some("jsonl".to_owned()) } else { ending(file.as_ref()) };
        if ending(data) != written {
            let ending = ending(data).unwrap_or_default();
            let problem = match hub.record {
                Some(_) => "`hub.record` writes JSON lines, so `data` must be a .jsonl file".to_owned(),
                None => format!(
                    "`data` is a .{ending} file, but `hub.file` is not: define its records in [hub.record]"
                ),
            };
            return Err(self.at(file.span().start, problem));
        }
        let fields = hub.record.iter().flatten();
        fields.into_iter().try_for_each(|(name, field)| self.expression(&format!("hub.record.{name}"), field))
    }

    fn rule(&self, text: &Generation) -> Result<AnswerRule> {
        let extract = match &text.extract {
            Some(extract) => Some((self.pattern("extract.pattern", &extract.pattern)?, extract.which)),
            None => None,
        };
        let remove = text.remove.iter().map(|pattern| self.pattern("remove", pattern));
        Ok(AnswerRule::new(extract, remove.collect::<Result<_>>()?, text.ignore_case, text.compare))
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Task> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whales.toml");
        std::fs::write(&path, text).unwrap();
        Task::load(&path)
    }

    const CLOZE: &str = "data = 'a.jsonl'\n[cloze]\nprompt = '{{ a }}'\ntarget = '{{ b }}'\n";

    #[test]
    fn a_task_is_named_by_its_file() {
        let task = load(CLOZE).unwrap();
        assert_eq!(task.name(), "whales");
        assert!(matches!(task.form(), Form::Cloze { .. }));
        assert_eq!(load(&format!("name = 'sea'\n{CLOZE}")).unwrap().name(), "sea");
        assert_ne!(load(&format!("{CLOZE}#")).unwrap().hash(), task.hash());
    }

    #[test]
    fn a_task_says_what_it_tests() {
        assert_eq!(load(CLOZE).unwrap().kind(), None);
        for kind in TaskKind::ALL {
            let key = kind.name().replace(' ', "_");
            assert_eq!(load(&format!("kind = '{key}'\n{CLOZE}")).unwrap().kind(), Some(kind));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let cases = [
            ("data = 'a.jsonl'\n", ":1: a task needs exactly one of the tables"),
            ("data = 'a.jsonl'\ndata = 'b'", ":2: duplicate key"),
            ("data = 'a.jsonl'\n[cloze]\nprompt = ''", ":2: missing field `target`"),
            (
                &format!("kind = 'fact'\n{CLOZE}"),
                ":1: unknown variant `fact`, expected one of `facts`, `reading`",
            ),
            (&CLOZE.replace("{{ b }}", "{{ b"), ":4: `target` is not a valid template"),
            (&CLOZE.replace("'{{ a }}'", "'''\n\n{{ a'''"), ":5: `prompt` is not a valid template"),
            (&CLOZE.replace("target", "targets"), ":4: unknown field `targets`"),
            (&format!("few_shot.count = -1\n{CLOZE}"), ":1: invalid value: integer `-1`"),
            (&format!("line_fields = []\n{CLOZE}"), ":1: `line_fields` is empty"),
            (
                "data = 'a.jsonl'\n[multiple_choice]\nprompt = ''\nchoices = 'a +'\nanswer = 'b'",
                ":4: `choices` is not a valid expression",
            ),
            (
                "data = 'a'\n[generation]\nprompt = ''\nanswers = 'a'\nstop = []\ntokens = 1\nremove = ['(']",
                ":7: `remove` is not a valid regular expression",
            ),
            ("few_shot.count = 1\ndata = 'a'\n[perplexity]\ntext = ''", "`few_shot`"),
        ];
        for (text, message) in cases {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}\n{text}");
        }
    }
}
