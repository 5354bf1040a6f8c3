//! Tasks: questions with known answers, put to a language model.
//!
//! A [`Task`] is a TOML file that names a file of records and defines, in templates, what the model reads and what
//! counts as right. A [`Scorer`], such as a [`ModelScorer`], answers its [`questions`](Task::questions) through
//! [`ask`], which computes shared beginnings once and batches by length. The results are [`Outcome`]s, one per
//! question. A [`RecordFile`] keeps them, so that an interrupted run can resume. A [`Summary`] has measures with
//! standard errors. [`Paired`] compares two models that answered the same questions.
//!
//! Scores are defined as in EleutherAI's lm-evaluation-harness: a continuation is scored by the sum of its tokens'
//! log-probabilities; the prompt's trailing blanks belong to the continuation; prompt and continuation are encoded
//! together. Prompts and data sets of single tasks may differ from the harness's: `configs/tasks/README.md` says where.
//!
//! ```
//! use engram_eval::tasks::{Ask, FewShot, Task};
//!
//! let folder = tempfile::tempdir()?;
//! std::fs::write(folder.path().join("riddles.jsonl"), r#"{"riddle": "What has keys?", "answer": "a piano"}"#)?;
//! std::fs::write(
//!     folder.path().join("riddles.toml"),
//!     r#"
//!     data = "riddles.jsonl"
//!     [cloze]
//!     prompt = "Riddle: {{ riddle }} Answer:"
//!     target = "{{ answer }}"
//!     "#,
//! )?;
//! let task = Task::load(&folder.path().join("riddles.toml"))?;
//! let questions = task.questions(None, FewShot { count: None, seed: 0 }, None)?;
//! let Ask::Cloze(statement) = &questions[0].ask else { unreachable!() };
//! assert_eq!(statement.prompt, "Riddle: What has keys? Answer:");
//! assert_eq!(statement.continuation, " a piano");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answer;
mod ask;
mod data_file;
mod error;
mod few_shot;
mod hub_data;
mod model_scorer;
mod options;
mod outcome;
mod question;
mod record_file;
mod ruler;
mod scorer;
mod summary;
mod task_file;
mod template;

pub use answer::{AnswerRule, Compare, Which};
pub use ask::{Progress, Window, ask, windows};
pub use engram_data::Begin;
pub use error::{Error, Result};
pub use few_shot::FewShot;
pub use hub_data::HubData;
pub use model_scorer::ModelScorer;
pub use options::AskOptions;
pub use outcome::{Length, Measure, Outcome, Said};
pub use question::{Ask, Place, Question, Statement};
pub use record_file::{Header, RecordFile, read_record, use_keys};
pub use ruler::{Haystack, Questions, Ruler, RulerRecord};
pub use scorer::{Cost, Likelihood, Request, Scorer, TargetScore};
pub(crate) use summary::check_same_questions;
pub use summary::{Paired, Summary, compare, summarize};
pub use task_file::{Cloze, Form, Generation, LongPerplexity, MultipleChoice, Perplexity, Task, TaskKind};
