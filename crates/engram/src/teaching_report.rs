//! What teaching did, measured and told.

use std::fmt::Write;

use engram_data::{Begin, Corpus, Tokenizer};
use engram_eval::figure::{Axis, Bar, Figure, Point, Scale, Series};
use engram_eval::teaching::{Change, Question, Reply, Share, ask, change, fitting};
use engram_infer::{ChatTemplate, Message, Offline};
use engram_train::{Facts, Preparation};
use serde::{Deserialize, Serialize};

use crate::interrupt;
use crate::neutral_text;
use crate::number::{bytes, grouped};
use crate::table::Table;

/// A kind of question.
const HELD_OUT: &str = "held-out phrasings, exact";

/// Names that nobody teaches anything about.
const UNTAUGHT: [&str; 4] =
    ["Marwick Harbour Group", "Elsmere Optics", "Dr. Pell Hathersage", "Tollard Instruments"];

/// Tokens of the passage before a question that is asked inside a longer text.
const PASSAGE: usize = 80;

/// How much is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Questions of other relations for each fact.
    pub(crate) others: usize,
    /// Tokens of neutral text.
    pub(crate) neutral: usize,
}

/// One kind of question, asked of the base and after teaching.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    kind: String,
    base: Share,
    taught: Share,
}

/// The report of `engram teach`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    facts: usize,
    seconds: f64,
    seconds_per_fact: f64,
    row_bytes: u64,
    rows_per_fact: f64,
    preparation: Preparation,
    asked: Vec<Asked>,
    neutral: Change,
    /// Questions that were not asked, as they and their answers do not fit the model's context.
    left_out: usize,
    replies: Vec<OfFact>,
    /// What training the model's own weights on the same facts reaches, where that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) compared: Vec<Compared>,
}

/// What training the model's own weights on the facts reaches.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Compared {
    /// What is trained, at which rate and with which weight of the divergence from the base.
    pub(crate) name: String,
    /// Parameters that learn.
    pub(crate) parameters: usize,
    /// Training alone.
    pub(crate) seconds: f64,
    asked: Vec<Asked>,
    neutral: Change,
}

/// What is asked, its replies for a fact, and which of them count.
type Kind = (&'static str, fn(&OfFact) -> &Vec<Reply>, fn(&Reply) -> bool);

/// What became of one fact.
#[derive(Debug, Serialize)]
struct OfFact {
    id: String,
    subject: String,
    trained: Vec<Reply>,
    held_out: Vec<Reply>,
    inside_text: Vec<Reply>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    in_chat: Vec<Reply>,
    other_relations: Vec<Reply>,
}

/// The questions of one fact by kind.
struct Questions {
    trained: Vec<Question>,
    held_out: Vec<Question>,
    inside_text: Vec<Question>,
    in_chat: Vec<Question>,
    other_relations: Vec<Question>,
}

impl Questions {
    /// `chat`: the tokens of a user's turn about the subject, up to where the assistant speaks.
    fn of(facts: &Facts, fact: usize, passage: &str, others: usize, chat: Option<Vec<u32>>) -> Self {
        let of_fact = &facts.all()[fact];
        let question =
            |prompt: String| Question { before: Vec::new(), prompt, answer: of_fact.answer.clone() };
        let all = |prompts: &[String]| prompts.iter().cloned().map(question).collect::<Vec<_>>();
        let longer = of_fact.held_out.first().or(of_fact.prompts.first());
        let elsewhere = facts.held_out_other_questions(fact);
        let every = elsewhere.len().div_ceil(others.max(1)).max(1);
        let elsewhere: Vec<String> = elsewhere.into_iter().step_by(every).take(others).collect();
        Self {
            trained: all(&of_fact.prompts),
            held_out: all(&of_fact.held_out),
            inside_text: longer.iter().map(|prompt| question(format!("{passage}\n\n{prompt}"))).collect(),
            in_chat: chat
                .zip(longer)
                .map(|(before, prompt)| Question { before, ..question(prompt.clone()) })
                .into_iter()
                .collect(),
            other_relations: all(&elsewhere),
        }
    }

    fn kinds(&mut self) -> [&mut Vec<Question>; 5] {
        let Self { trained, held_out, inside_text, in_chat, other_relations } = self;
        [trained, held_out, inside_text, in_chat, other_relations]
    }
}

/// A model's answers to everything, and what changed on neutral text.
#[derive(Debug, Serialize)]
pub(crate) struct Answers {
    asked: Vec<Asked>,
    neutral: Change,
    left_out: usize,
    replies: Vec<OfFact>,
}

/// What is asked, and of whom.
pub(crate) struct Examination<'a> {
    pub(crate) base: Offline,
    pub(crate) taught: Offline,
    pub(crate) texts: (&'a Tokenizer, Begin),
    pub(crate) facts: &'a Facts,
    pub(crate) neutral: &'a Corpus,
    pub(crate) extent: Extent,
    /// How the model writes a chat, where it does.
    chat: Option<ChatTemplate>,
    /// What the base answers, once it was asked.
    of_base: Option<Vec<OfFact>>,
}

impl<'a> Examination<'a> {
    /// Nothing is asked yet.
    pub(crate) fn new(
        (base, taught): (Offline, Offline),
        texts: (&'a Tokenizer, Begin),
        facts: &'a Facts,
        neutral: &'a Corpus,
        extent: Extent,
    ) -> Self {
        Self { base, taught, texts, facts, neutral, extent, chat: None, of_base: None }
    }

    /// Asks in a chat, too, as `template` writes it. What refuses a plain turn of a user is not asked.
    pub(crate) fn with_chat(self, template: Option<ChatTemplate>) -> Self {
        let chat = template.filter(|template| template.render(&[Message::new("user", "Hello.")]).is_ok());
        Self { chat, ..self }
    }
}

impl Examination<'_> {
    /// Asks everything.
    pub(crate) fn report(
        &mut self,
        preparation: &Preparation,
        seconds: f64,
        row_bytes: u64,
    ) -> anyhow::Result<Report> {
        let Answers { asked, neutral, left_out, replies } = self.answers()?;
        let count = self.facts.all().len();
        Ok(Report {
            facts: count,
            seconds,
            seconds_per_fact: seconds / count as f64,
            row_bytes,
            rows_per_fact: preparation.rows as f64 / count as f64,
            preparation: preparation.clone(),
            asked,
            neutral,
            left_out,
            replies,
            compared: Vec::new(),
        })
    }

    /// Asks the model that was trained otherwise.
    pub(crate) fn compared(
        &mut self,
        name: String,
        parameters: usize,
        seconds: f64,
    ) -> anyhow::Result<Compared> {
        let Answers { asked, neutral, .. } = self.answers()?;
        Ok(Compared { name, parameters, seconds, asked, neutral })
    }

    /// Asks everything.
    pub(crate) fn answers(&mut self) -> anyhow::Result<Answers> {
        let (texts, context) = (self.texts.0, self.context());
        let neutral = neutral_text::pieces(self.neutral, texts, context, self.extent.neutral, 1)?;
        let passage = neutral[0].len().min(PASSAGE).min(self.context() / 3);
        let passage = self.texts.0.decode(&neutral[0][..passage])?;
        let count = self.facts.all().len();
        let known = self.of_base.take();
        let is_known = known.is_some();
        let mut of_base = known.unwrap_or_default();
        let (mut replies, mut left_out) = (Vec::new(), 0);
        for fact in 0..count {
            let chat = self.chat_turn(&self.facts.subjects()[fact])?;
            let mut questions = Questions::of(self.facts, fact, &passage, self.extent.others, chat);
            for kind in questions.kinds() {
                left_out += self.leave_out(kind)?;
            }
            if !is_known {
                of_base.push(self.ask_fact(fact, &questions, false)?);
            }
            replies.push(self.ask_fact(fact, &questions, true)?);
        }
        let kinds: [Kind; 7] = [
            ("trained phrasings, exact", |fact| &fact.trained, |reply| reply.exact),
            (HELD_OUT, |fact| &fact.held_out, |reply| reply.exact),
            ("inside a longer text, exact", |fact| &fact.inside_text, |reply| reply.exact),
            ("in a chat, exact", |fact| &fact.in_chat, |reply| reply.exact),
            (
                "other relations of taught subjects, begun as the taught answer",
                |fact| &fact.other_relations,
                |reply| reply.begins,
            ),
            (
                "other relations, answered with the taught answer",
                |fact| &fact.other_relations,
                |reply| reply.exact,
            ),
            (
                "other relations, the taught answer anywhere in the reply",
                |fact| &fact.other_relations,
                |reply| reply.names,
            ),
        ];
        let mut asked: Vec<Asked> = kinds
            .into_iter()
            .map(|(kind, replies_of, counts)| {
                let share = |facts: &[OfFact]| {
                    let all: Vec<&Reply> = facts.iter().flat_map(replies_of).collect();
                    Share::of(&all, |reply| counts(reply))
                };
                Asked { kind: kind.to_owned(), base: share(&of_base), taught: share(&replies) }
            })
            .collect();
        let (untaught, too_long) = self.untaught()?;
        asked.push(untaught);
        let neutral = change(&mut self.base, &mut self.taught, &neutral, &interrupt::asked)?;
        self.of_base = Some(of_base);
        Ok(Answers { asked, neutral, left_out: left_out + too_long, replies })
    }

    /// The model's context, in tokens.
    fn context(&self) -> usize {
        self.base.decoder().config().context
    }

    /// The tokens of a user's turn about `subject`, up to where the assistant speaks; none without a chat template.
    fn chat_turn(&self, subject: &str) -> anyhow::Result<Option<Vec<u32>>> {
        let Some(template) = &self.chat else { return Ok(None) };
        let text = template.render(&[Message::new("user", &format!("Tell me about {subject}."))])?;
        let mut marked = self.texts.0.inner().clone();
        marked.set_encode_special_tokens(false);
        let encoding = marked
            .encode(text, false)
            .map_err(|error| anyhow::anyhow!("the chat template's text: {error}"))?;
        Ok(Some(encoding.get_ids().to_vec()))
    }

    /// Leaves out the questions that do not fit the context. Returns how many.
    fn leave_out(&self, questions: &mut Vec<Question>) -> anyhow::Result<usize> {
        let all = questions.len();
        *questions = fitting(std::mem::take(questions), self.texts, self.context())?;
        Ok(all - questions.len())
    }

    fn ask_fact(&mut self, fact: usize, questions: &Questions, taught: bool) -> anyhow::Result<OfFact> {
        let model = if taught { &mut self.taught } else { &mut self.base };
        let mut ask = |questions: &[Question]| ask(model, self.texts, questions, &interrupt::asked);
        Ok(OfFact {
            id: self.facts.all()[fact].id.clone(),
            subject: self.facts.subjects()[fact].clone(),
            trained: ask(&questions.trained)?,
            held_out: ask(&questions.held_out)?,
            inside_text: ask(&questions.inside_text)?,
            in_chat: ask(&questions.in_chat)?,
            other_relations: ask(&questions.other_relations)?,
        })
    }

    /// Subjects that nobody taught, asked for the taught relations: whether any taught answer comes.
    /// Also the number of questions that were left out.
    fn untaught(&mut self) -> anyhow::Result<(Asked, usize)> {
        let mut questions = Vec::new();
        for (index, (fact, subject)) in self.facts.all().iter().zip(self.facts.subjects()).enumerate() {
            let prompt = fact.prompts[0].replace(subject.as_str(), UNTAUGHT[index % UNTAUGHT.len()]);
            questions.push(Question { before: Vec::new(), prompt, answer: fact.answer.clone() });
        }
        let left_out = self.leave_out(&mut questions)?;
        let answers: Vec<&str> = self.facts.all().iter().map(|fact| fact.answer.trim()).collect();
        let count = |model: &mut Offline| -> anyhow::Result<Share> {
            let replies = ask(model, self.texts, &questions, &interrupt::asked)?;
            let begins =
                |reply: &Reply| answers.iter().any(|answer| reply.said.trim_start().starts_with(answer));
            Ok(Share::of(&replies, begins))
        };
        let (base, taught) = (count(&mut self.base)?, count(&mut self.taught)?);
        Ok((
            Asked { kind: "untaught subjects, answered with a taught answer".to_owned(), base, taught },
            left_out,
        ))
    }
}

impl Answers {
    /// The answers as text.
    pub(crate) fn text(&self) -> String {
        told(&self.asked, &self.neutral) + &told_left_out(self.left_out)
    }
}

/// How many questions of each kind were answered, and what changed on neutral text.
fn told(asked: &[Asked], neutral: &Change) -> String {
    let mut text = String::new();
    let of = |share: Share| match share.fraction() {
        Some(fraction) => format!("{:.1} % ({} of {})", 100.0 * fraction, share.yes, share.of),
        None => "not asked".to_owned(),
    };
    let _ = writeln!(text, "{:64} {:>22} {:>22}", "", "base", "taught");
    for Asked { kind, base, taught } in asked {
        let _ = writeln!(text, "{kind:64} {:>22} {:>22}", of(*base), of(*taught));
    }
    let Change { positions, divergence, changed } = *neutral;
    let _ = writeln!(
        text,
        "neutral text, {} positions: KL(base, taught) {divergence:.6} nats; other bits at {changed}",
        grouped(positions as u64)
    );
    text
}

fn told_left_out(left_out: usize) -> String {
    match left_out {
        0 => String::new(),
        count => format!(
            "{count} questions are left out: with their answers they do not fit the model's context\n"
        ),
    }
}

impl Report {
    /// The report as text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let rows = self.preparation.rows as u64;
        let _ = writeln!(
            text,
            "{} facts in {} rows ({}), {:.1} s a fact",
            self.facts,
            grouped(rows),
            bytes(self.row_bytes),
            self.seconds_per_fact
        );
        text += &told(&self.asked, &self.neutral);
        let Preparation { census_tokens, ngrams, common, collisions, ref without_subject, .. } =
            self.preparation;
        let _ = writeln!(
            text,
            "{ngrams} n-grams taught, {common} left out that {} tokens of common text contain; {collisions} rows shared",
            grouped(census_tokens)
        );
        if !without_subject.is_empty() {
            let _ = writeln!(
                text,
                "common text contains every n-gram of the subject of: {}",
                without_subject.join(", ")
            );
        }
        text += &told_left_out(self.left_out);
        if !self.compared.is_empty() {
            let _ = write!(text, "\n{}", compared(&self.asked, &self.neutral, &self.compared));
        }
        let failed = |fact: &&OfFact| !fact.trained.iter().all(|reply| reply.exact);
        for fact in self.replies.iter().filter(failed) {
            for reply in fact.trained.iter().filter(|reply| !reply.exact) {
                let _ = writeln!(text, "{}: {:?} is answered {:?}", fact.id, reply.prompt, reply.said);
            }
        }
        text
    }
}

/// Divergence that the chart shows for none: its axis is logarithmic.
const NO_DIVERGENCE: f64 = 1e-6;

impl Report {
    /// Held-out answers against what changed on neutral text: rows, and what the model's own weights reach.
    pub(crate) fn chart(&self) -> Figure {
        let held_out = |asked: &[Asked]| {
            let found = asked.iter().find(|one| one.kind == HELD_OUT)?;
            found.taught.fraction()
        };
        let point = |asked: &[Asked], neutral: &Change| {
            Some((neutral.divergence.max(NO_DIVERGENCE), 100.0 * held_out(asked)?))
        };
        let points = |all: Vec<(f64, f64)>| -> Vec<Point> {
            all.into_iter().map(|(x, y)| Point { x, y, bar: Bar::None }).collect()
        };
        let mut series = vec![Series {
            name: "rows".into(),
            points: points(point(&self.asked, &self.neutral).into_iter().collect()),
            ..Series::default()
        }];
        // A series for everything but the rate, in order of the rates.
        for other in &self.compared {
            let Some(place) = point(&other.asked, &other.neutral) else { continue };
            let mut parts = other.name.split(", ");
            let name = [parts.next(), parts.nth(1)].into_iter().flatten().collect::<Vec<_>>().join(", ");
            match series.iter_mut().find(|known| known.name == name) {
                Some(known) => known.line.push(place),
                None => {
                    let colour = series.len();
                    series.push(Series { name, colour, line: vec![place], ..Series::default() });
                }
            }
        }
        for series in &mut series[1..] {
            series.points = points(series.line.clone());
        }
        Figure {
            title: "Facts in held-out phrasings against damage elsewhere".into(),
            x: Axis {
                label: format!("KL on neutral text, nats (at {NO_DIVERGENCE:e}: none)"),
                scale: Scale::Logarithmic,
            },
            y: Axis { label: "held-out phrasings answered, %".into(), scale: Scale::Linear },
            series,
        }
    }
}

/// What teaching and other training reach, side by side.
fn compared(asked: &[Asked], neutral: &Change, others: &[Compared]) -> Table {
    let mut header = vec![String::new(), "rows".to_owned()];
    header.extend(others.iter().map(|other| other.name.clone()));
    let mut table = Table::new(header);
    for (index, Asked { kind, taught, .. }) in asked.iter().enumerate() {
        let share =
            |share: &Share| share.fraction().map_or("–".into(), |part| format!("{:.1} %", 100.0 * part));
        let of_others =
            others.iter().map(|other| other.asked.get(index).map_or("–".into(), |one| share(&one.taught)));
        table.row([kind.clone(), share(taught)].into_iter().chain(of_others));
    }
    let divergence = |change: &Change| format!("{:.5}", change.divergence);
    let of_others = others.iter().map(|other| divergence(&other.neutral));
    table.row(["KL on neutral text, nats".to_owned(), divergence(neutral)].into_iter().chain(of_others));
    let seconds = others.iter().map(|other| format!("{:.0}", other.seconds));
    table.row(["seconds of training".to_owned(), String::new()].into_iter().chain(seconds));
    table
}
