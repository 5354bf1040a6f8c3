use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use engram_eval::tasks::{Error, Haystack, Questions, Ruler as Kind, RulerRecord};

use super::super::asking::{Asked, Memory};
use super::super::print;
use crate::device::DeviceKind;
use crate::failure::refuse;
use crate::files::write_file;
use crate::note::note;
use crate::opened_memories::MemoryOptions;
use crate::served::Numbers;
use crate::table::Table;

/// Write RULER's long-context tasks for `engram eval tasks`, at lengths counted in a model's tokens.
///
/// The tasks are needles to find (one; one among other keys; several values; several keys), variables to follow, words
/// to count and, with --questions, questions that one of many paragraphs answers. The same seed gives the same files.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval ruler runs/small --lengths 256,512 --out ruler
  engram eval ruler runs/small --lengths 4096 --kinds multi_query,variable_tracking --hay essays.txt --out ruler
  engram eval ruler runs/small --lengths 4096 --kinds question_answering --questions dev-v2.0.json --out ruler
  engram eval tasks runs/small ruler/*.toml --out results/small

A file of questions is SQuAD's JSON (dev-v1.1.json or dev-v2.0.json, https://rajpurkar.github.io/SQuAD-explorer), or
JSON lines with `question`, `answers` (a list; any of them is right), `context` and optionally `title`:
  {\"question\": \"Where does the Po end?\", \"answers\": [\"in the Adriatic\"], \"context\": \"The Po flows …\"}")]
pub(crate) struct Ruler {
    /// Model whose tokenizer counts the lengths: a checkpoint, a run's folder, or a model from outside.
    model: PathBuf,
    /// Tokens of prompt and answer together; separate several lengths by commas.
    #[arg(long, value_name = "N,…", value_delimiter = ',', required = true)]
    lengths: Vec<usize>,
    /// Kinds: single, multi_key, multi_value, multi_query, variable_tracking, common_words, frequent_words,
    /// question_answering. The default is every kind that has data.
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', value_parser = kind)]
    kinds: Vec<Kind>,
    /// Records per kind and length.
    #[arg(long, value_name = "N", default_value_t = 100)]
    samples: usize,
    /// Text to hide needles in. Each record takes its sentences from a random one on. Without it, a few fixed sentences
    /// repeat.
    #[arg(long, value_name = "FILE")]
    hay: Option<PathBuf>,
    /// Digits of the numbers to find, 2 to 9. Fewer digits are easier to copy.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(2..=9))]
    digits: u32,
    /// Questions and their paragraphs, for question_answering.
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Random seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the tasks and their records.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

fn kind(name: &str) -> Result<Kind, String> {
    let names = || Kind::ALL.map(Kind::name).join(", ");
    Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| format!("the kinds are {}", names()))
}

impl Ruler {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.samples == 0 {
            return refuse("--samples must be at least 1");
        }
        let kinds = self.kinds()?;
        let haystack = self.haystack()?;
        let model =
            Asked::open(&self.model, &MemoryOptions::default(), (DeviceKind::Cpu, Numbers::F32), Memory::On)?
                .scorer;
        let lengths = self.lengths(model.context());
        let tokens = |text: &str| Ok(model.encode(text)?.len() + 1);
        let (mut table, mut written) = (Table::new(["task", "records", "tokens of the longest"]), 0);
        for (&length, &kind) in lengths.iter().flat_map(|length| kinds.iter().map(move |kind| (length, kind)))
        {
            let name = format!("{}-{length}", kind.name());
            let records = match kind.records(&haystack, (length, self.samples), self.seed, &tokens) {
                Err(Error::Length(problem)) => {
                    note(format_args!("{name} is left out: {problem}"));
                    continue;
                }
                records => records?,
            };
            self.write(kind, &name, &records)?;
            written += 1;
            let longest = records.iter().map(|record| record.prompt_tokens).max().unwrap_or(0);
            table.row([name, records.len().to_string(), longest.to_string()]);
        }
        if written == 0 {
            note("nothing is written: no kind of record fits any of the --lengths");
            return Ok(());
        }
        print(table.to_string())
    }

    /// The lengths that fit the model's context, each once.
    fn lengths(&self, context: usize) -> Vec<usize> {
        let mut lengths = Vec::new();
        for &length in &self.lengths {
            if length > context {
                note(format_args!("--lengths {length} is left out: the model's context is {context}"));
            } else if !lengths.contains(&length) {
                lengths.push(length);
            }
        }
        lengths
    }

    /// The requested kinds, or all that have data.
    fn kinds(&self) -> anyhow::Result<Vec<Kind>> {
        let asks = self.kinds.contains(&Kind::QuestionAnswering);
        match (&self.questions, self.kinds.is_empty()) {
            (None, false) if asks => refuse(
                "question_answering needs --questions FILE: SQuAD's JSON, or JSON lines (see engram eval ruler --help)",
            ),
            (Some(_), false) if !asks => refuse(
                "--questions is for question_answering alone, which --kinds leaves out: name it there, too",
            ),
            (None, true) => {
                note(format_args!("question_answering is left out: it needs --questions FILE"));
                Ok(Kind::ALL.into_iter().filter(|&kind| kind != Kind::QuestionAnswering).collect())
            }
            (Some(_), true) => Ok(Kind::ALL.to_vec()),
            (_, false) => Ok(self.kinds.clone()),
        }
    }

    /// The text that needles are hidden in.
    fn haystack(&self) -> anyhow::Result<Haystack> {
        let haystack = match &self.hay {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                Haystack::of(&text.with_context(|| format!("cannot read {}", path.display()))?)?
            }
            None => Haystack::repeated(),
        };
        let haystack = haystack.with_digits(self.digits)?;
        let Some(path) = &self.questions else { return Ok(haystack) };
        let questions = Questions::read(path)?;
        if questions.unanswerable() > 0 {
            let (left, all) = (questions.unanswerable(), questions.unanswerable() + questions.count());
            note(format_args!(
                "{}: {left} of {all} questions have no answer and are left out",
                path.display()
            ));
        }
        Ok(haystack.with_questions(questions))
    }

    /// The records, and the task file beside them.
    fn write(&self, kind: Kind, name: &str, records: &[RulerRecord]) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.out)
            .with_context(|| format!("cannot create {}", self.out.display()))?;
        let mut lines = String::new();
        for record in records {
            lines += &serde_json::to_string(record)?;
            lines.push('\n');
        }
        write_file(&self.out.join(format!("{name}.jsonl")), &lines)?;
        let tokens = records.iter().map(|record| record.answer_tokens).max().unwrap_or(1);
        let task = format!(
            "# RULER (arXiv 2404.06654): {name}, seed {}.\ndata = \"{name}.jsonl\"\n\n[generation]\n\
             prompt = \"{{{{ prompt }}}}\"\nanswers = \"answers\"\ncompare = {}\nignore_case = true\n\
             stop = []\ntokens = {tokens}\n",
            self.seed,
            serde_json::to_string(&kind.compare())?
        );
        write_file(&self.out.join(format!("{name}.toml")), &task)
    }
}
