//! Teaching facts through memory rows alone.
//!
//! A fact's rows are those of the n-grams inside its subject that end with it, and of the n-grams inside its answer; a
//! census of common text keeps those n-grams that ordinary text contains. Each step asks one phrasing of every fact. The
//! loss is the cross-entropy of the answers, and at the other positions of the phrasings the divergence from the base.
//! All else stays as it is, so that whoever takes the rows away has the base back, bit for bit.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use engram_address::Addressing;
use engram_config::{CompareConfig, MemoryConfig, ModelConfig, TeachConfig};
use engram_data::{Corpus, Tokenizer};
use engram_import::{Checkpoint, CheckpointWriter, HostTensor, Model};
use engram_model::{LanguageModel, MemoryRows, Sequences};
use engram_store::RowSource;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::census::{Census, Ngram};
use crate::error::{Error, Result};
use crate::fact_texts::{FactTexts, shuffled};
use crate::facts::Facts;
use crate::fresh_memory;
use crate::frozen::frozen;
use crate::lesson::{Lesson, LessonRows, LessonText, Slot};
use crate::soft_targets::{Losses, Wanted, host, select, soft_targets};
use crate::tables::can_be_learnt;
use crate::taught_rows::TaughtRows;

/// A memory to teach.
pub struct TaughtMemory {
    /// Its configuration.
    pub config: MemoryConfig,
    /// From tokens to its rows.
    pub addressing: Addressing,
    /// Its weights, by the names of a checkpoint; none: they are the base's own, or drawn.
    pub weights: BTreeMap<String, HostTensor>,
    /// Rows of each memory layer as they are.
    pub tables: Vec<Arc<dyn RowSource>>,
}

/// What became of the facts before the first step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Preparation {
    /// Tokens of common text that were looked through.
    pub census_tokens: u64,
    /// N-grams that are taught.
    pub ngrams: usize,
    /// N-grams that are left out, since common text contains them.
    pub common: usize,
    /// Rows of all layers that are taught.
    pub rows: usize,
    /// Rows that two n-grams share.
    pub collisions: usize,
    /// Facts of which no n-gram of the subject is left to teach.
    pub without_subject: Vec<String>,
}

/// Losses of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TeachReport {
    /// Mean cross-entropy of the answers' tokens, in nats.
    pub answers: f64,
    /// Mean divergence from the base at the other positions and at the ends of questions, by their weights, in nats.
    pub divergence: f64,
}

/// Facts being taught.
pub struct Teacher {
    config: TeachConfig,
    device: Device,
    model: LanguageModel,
    memory: MemoryConfig,
    /// Weights of a memory that was drawn.
    drawn: BTreeMap<String, HostTensor>,
    /// Phrasings of each fact, then its questions of other relations and texts that are to stay.
    lessons: Vec<FactLessons>,
    rows: Vec<TaughtRows>,
    width: usize,
    step: usize,
    preparation: Preparation,
    identity: String,
}

struct FactLessons {
    phrasings: Vec<Lesson>,
    negatives: Vec<Lesson>,
}

/// Of how many positions of a phrasing the divergence from the base is taken in a step. They are drawn again each time:
/// each costs two products with the vocabulary.
const POSITIONS_DRAWN: usize = 4;

/// A lesson of a step, with those of its positions that bring a loss to it.
struct Due<'a> {
    lesson: &'a Lesson,
    wanted: Vec<(usize, Wanted)>,
    /// For how many positions each stands that is to say what the base says.
    stands_for: f32,
}

impl<'a> Due<'a> {
    fn whole(lesson: &'a Lesson) -> Self {
        Self { lesson, wanted: lesson.wanted.clone(), stands_for: 1.0 }
    }

    /// All positions of the answer. Of those that are to say what the base says, the ones whose ranks are `chosen`: they
    /// stand for all, so that their loss has the same mean.
    fn of(lesson: &'a Lesson, chosen: &BTreeSet<usize>) -> Self {
        let is_of_base = |wanted: &Wanted| matches!(wanted, Wanted::Base(_));
        let count = lesson.wanted.iter().filter(|(_, wanted)| is_of_base(wanted)).count();
        let is_due =
            |(place, (_, wanted)): &(usize, &(usize, Wanted))| !is_of_base(wanted) || chosen.contains(place);
        // Those of the base come first.
        let wanted = lesson.wanted.iter().enumerate().filter(is_due).map(|(_, &wanted)| wanted).collect();
        Self { lesson, wanted, stands_for: count as f32 / chosen.len().max(1) as f32 }
    }
}

/// What a saved state says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: usize,
    identity: String,
}

impl Teacher {
    /// Prepares `facts` for `model` and `memory`. `census` is common text, whose n-grams are not taught.
    ///
    /// # Errors
    /// When the model cannot be computed with gradients, or a fact cannot be taught.
    pub fn new(
        model: &Model,
        memory: TaughtMemory,
        facts: &Facts,
        config: TeachConfig,
        census: &Corpus,
    ) -> Result<Self> {
        config.validate()?;
        let device = Device::flex().autodiff();
        let base = &model.config().model;
        let (streams, width) = (base.streams(), base.width);
        let begin = (model.tokenizer(), model.begin());
        let texts = FactTexts::of(facts, &config, begin, base.context)?;
        let is_new = base.memory.is_none() && memory.weights.is_empty();
        let described =
            ModelConfig { memory: if is_new { None } else { Some(memory.config.clone()) }, ..base.clone() };
        let mut backbone = frozen(model, &described, memory.weights, &device)?;
        let mut drawn = BTreeMap::new();
        if is_new {
            let (tokens, sequences) = texts.phrasings();
            let text = (&tokens[..], &sequences);
            let sizes = (streams, width);
            drawn = fresh_memory::draw(&mut backbone, &memory.config, sizes, config.seed, text, &device)?;
        }
        let mut preparation = Preparation::default();
        let chosen = texts.choose(&memory.addressing, model.tokenizer(), census, facts, &mut preparation)?;
        let rows =
            chosen.rows(&memory.addressing, &memory.tables, memory.config.row_width, &mut preparation)?;
        let identity = identity(model, &memory.config, facts, &config, &rows)?;
        let mut teacher = Self {
            config,
            device,
            model: backbone,
            memory: memory.config,
            drawn,
            lessons: Vec::new(),
            rows,
            width,
            step: 0,
            preparation,
            identity,
        };
        let counts: Vec<[usize; 2]> =
            texts.facts.iter().map(|(phrasings, negatives)| [phrasings.len(), negatives.len()]).collect();
        let all = texts.facts.into_iter().flat_map(|(phrasings, negatives)| [phrasings, negatives]).flatten();
        let all: Vec<LessonText> = all.collect();
        let mut lessons = teacher.lessons(&all, &memory.addressing, &memory.tables)?.into_iter();
        for [phrasings, negatives] in counts {
            let [phrasings, negatives] =
                [phrasings, negatives].map(|count| lessons.by_ref().take(count).collect());
            teacher.lessons.push(FactLessons { phrasings, negatives });
        }
        Ok(teacher)
    }

    /// What became of the facts before the first step.
    pub fn preparation(&self) -> &Preparation {
        &self.preparation
    }

    /// Steps taken.
    pub fn step_count(&self) -> usize {
        self.step
    }

    /// Whether all steps are taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.config.steps
    }

    /// The taught rows of each memory layer, in order.
    pub fn rows(&self) -> &[TaughtRows] {
        &self.rows
    }

    /// The weights of a memory that was drawn for a model without one, by the names of a checkpoint.
    pub fn drawn(&self) -> &BTreeMap<String, HostTensor> {
        &self.drawn
    }

    /// Asks one phrasing of every fact, and moves the rows.
    ///
    /// # Errors
    /// When a loss is not finite.
    pub fn step(&mut self) -> Result<TeachReport> {
        let mut due = self.due();
        let answered: usize = due.iter().map(|due| answered(due.lesson)).sum();
        let asked: usize = due.iter().map(|due| due.lesson.asked.len()).sum();
        let kept: usize = due.iter().map(|due| due.lesson.kept - due.lesson.asked.len()).sum();
        let share = |weight: f32, count: usize| weight / count.max(1) as f32;
        let weights = [
            share(1.0, answered),
            share(self.config.kl_weight, kept),
            share(self.config.negative_weight, asked),
        ];
        // A text that no taught row can reach says what the base says, whatever is taught.
        due.retain(|due| !due.wanted.is_empty());
        let mut gradients: Vec<Vec<f32>> =
            self.rows.iter().map(|rows| vec![0.0; rows.values.len()]).collect();
        let mut losses = Losses::default();
        let batches: Vec<&[Due]> = due.chunks(self.config.micro_batch).collect();
        let found: Vec<_> = batches.into_par_iter().map(|batch| self.batch(batch, weights)).collect();
        // In order, whatever thread computed what.
        for (found, of_batch) in found {
            losses.answers += found.answers;
            losses.divergence += found.divergence;
            for (all, found) in gradients.iter_mut().zip(of_batch) {
                all.iter_mut().zip(found).for_each(|(all, found)| *all += found);
            }
        }
        let learnable =
            self.rows.iter().zip(&gradients).all(|(rows, values)| can_be_learnt(values, rows.width));
        if !(losses.answers.is_finite() && losses.divergence.is_finite() && learnable) {
            return Err(Error::Diverged { step: self.step as u64 });
        }
        for (rows, gradient) in self.rows.iter_mut().zip(&gradients) {
            rows.update(gradient, self.step, &self.config);
        }
        self.step += 1;
        Ok(TeachReport {
            answers: losses.answers,
            divergence: self.mean_divergence(losses.divergence, kept, asked),
        })
    }

    /// Saves all that goes on needs, in `folder`.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let writer = CheckpointWriter::begin(folder, self.step as u64)?;
        let mut tensors = BTreeMap::new();
        for (layer, rows) in self.memory.layers.iter().zip(&self.rows) {
            let parts = [("values", &rows.values), ("first", &rows.first), ("second", &rows.second)];
            for (name, values) in parts {
                let shape = vec![rows.ids().len(), rows.width];
                tensors.insert(format!("{layer}.{name}"), HostTensor { shape, values: values.clone() });
            }
        }
        writer.tensors("rows.safetensors", &tensors)?;
        let state = State { step: self.step, identity: self.identity.clone() };
        let state = serde_json::to_vec(&state).map_err(|error| Error::weights(folder, error))?;
        writer.file("state.json", &state)?;
        writer.finish(1)?;
        Ok(())
    }

    /// Goes on from what was saved in `folder`.
    ///
    /// # Errors
    /// When nothing or something else was saved there.
    pub fn resume(&mut self, folder: &Path) -> Result<()> {
        let checkpoint = Checkpoint::open(folder)?;
        let state: State = checkpoint.json("state.json")?;
        if state.identity != self.identity {
            let problem = "it was saved for another model, other facts or other settings; give those again, or \
                           remove it to begin anew";
            return Err(Error::weights(checkpoint.folder(), problem));
        }
        let mut tensors = checkpoint.tensors("rows.safetensors")?;
        for (layer, rows) in self.memory.layers.iter().zip(&mut self.rows) {
            let count = rows.values.len();
            let mut take = |name: &str| {
                let found = tensors.remove(&format!("{layer}.{name}")).map(|tensor| tensor.values);
                let fits = found.filter(|values| values.len() == count);
                fits.ok_or_else(|| {
                    Error::weights(checkpoint.folder(), "its rows are not those of these facts")
                })
            };
            (rows.values, rows.first, rows.second) = (take("values")?, take("first")?, take("second")?);
        }
        self.step = state.step;
        Ok(())
    }

    /// The mean over both kinds of positions, each with its weight, from the weighted sum of their means.
    fn mean_divergence(&self, sum: f64, kept: usize, asked: usize) -> f64 {
        let TeachConfig { kl_weight, negative_weight, .. } = self.config;
        let weight = |weight: f32, count: usize| if count > 0 { f64::from(weight) } else { 0.0 };
        let weights = weight(kl_weight, kept) + weight(negative_weight, asked);
        if weights > 0.0 { sum / weights } else { 0.0 }
    }

    /// The lessons of this step.
    fn due(&self) -> Vec<Due<'_>> {
        let mut due = Vec::new();
        for (index, lessons) in self.lessons.iter().enumerate() {
            due.push(self.sampled(index, &lessons.phrasings[self.turn(index, 0, lessons.phrasings.len())]));
        }
        for (index, lessons) in self.lessons.iter().enumerate() {
            if lessons.negatives.is_empty() {
                continue;
            }
            // Texts that a fact lists to stay are trained to, also without questions of other relations.
            let each = self.config.negatives.max(1);
            for more in 0..each {
                let turn = self.step * each + more;
                let place = shuffled(self.config.seed, index, 1, turn, lessons.negatives.len());
                due.push(Due::whole(&lessons.negatives[place]));
            }
        }
        due
    }

    /// A phrasing of fact `fact`: all of its answer, and as many of the positions that are to stay as are due in a step.
    fn sampled<'a>(&self, fact: usize, lesson: &'a Lesson) -> Due<'a> {
        let (most, count) = (POSITIONS_DRAWN, lesson.wanted.len() - answered(lesson));
        if count <= most {
            return Due::whole(lesson);
        }
        let place = |more: usize| shuffled(self.config.seed, fact, 2, self.step * most + more, count);
        Due::of(lesson, &(0..most).map(place).collect())
    }

    fn turn(&self, fact: usize, kind: u64, count: usize) -> usize {
        shuffled(self.config.seed, fact, kind, self.step, count)
    }

    /// Weighted losses of some lessons, and the gradient of every taught row.
    fn batch(&self, due: &[Due<'_>], [answer, keep, ask]: [f32; 3]) -> (Losses, Vec<Vec<f32>>) {
        let lessons: Vec<&Lesson> = due.iter().map(|due| due.lesson).collect();
        let sequences = Sequences::of_lengths(lessons.iter().map(|lesson| lesson.time));
        let width = lessons[0].states.len() / lessons[0].time;
        let states: Vec<f32> = lessons.iter().flat_map(|lesson| &lesson.states).copied().collect();
        let states = Tensor::from_data(TensorData::new(states, [sequences.tokens(), width]), &self.device);
        let leaves: Vec<Tensor<2>> = self.rows.iter().map(|rows| self.leaf(rows)).collect();
        let memory = self.memory_rows(&lessons, &leaves);
        let hidden = self.model.hidden_from(self.memory.layers[0], states, &sequences, &memory);
        let (mut places, mut wanted, mut base) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        for Due { lesson, wanted: of_lesson, stands_for } in due {
            let before = (base.len() / self.width) as u32;
            for &(position, said) in of_lesson {
                places.push((first + position) as u32);
                let of_base = if lesson.asked.contains(&position) { ask } else { keep * stands_for };
                wanted.push(match said {
                    Wanted::Token(_) => (said, answer),
                    Wanted::Base(row) => (Wanted::Base(before + row), of_base),
                });
            }
            base.extend_from_slice(&lesson.base);
            first += lesson.time;
        }
        let chosen = select(hidden, &places);
        let (losses, slope) =
            soft_targets(&self.model, chosen.clone().inner(), &base, &wanted, &self.device.clone().inner());
        // Has the slope as its gradient.
        let surrogate = (chosen * Tensor::from_inner(slope)).sum();
        let gradients = surrogate.backward();
        let of_rows = |(leaf, rows): (&Tensor<2>, &TaughtRows)| match leaf.grad(&gradients) {
            Some(gradient) => host(gradient),
            None => vec![0.0; rows.values.len()],
        };
        (losses, leaves.iter().zip(&self.rows).map(of_rows).collect())
    }

    fn leaf(&self, rows: &TaughtRows) -> Tensor<2> {
        let data = TensorData::new(rows.values.clone(), [rows.ids().len(), rows.width]);
        Tensor::from_data(data, &self.device).require_grad()
    }

    /// What the memory layers read: taught rows first, then a row of zeros, then those that stay.
    fn memory_rows(&self, lessons: &[&Lesson], leaves: &[Tensor<2>]) -> Vec<MemoryRows> {
        let of_layer = |(layer, leaf): (usize, &Tensor<2>)| {
            let (taught, width) = (self.rows[layer].ids().len() as u32, self.rows[layer].width);
            let mut fixed = vec![0.0; width];
            let mut index = Vec::new();
            for lesson in lessons {
                let rows = &lesson.rows[layer];
                let before = taught + (fixed.len() / width) as u32;
                index.extend(rows.slots.iter().map(|slot| match *slot {
                    Slot::Taught(row) => row,
                    Slot::Zero => taught,
                    Slot::Fixed(row) => before + row,
                }));
                fixed.extend_from_slice(&rows.fixed);
            }
            let count = fixed.len() / width;
            let fixed = Tensor::from_data(TensorData::new(fixed, [count, width]), &self.device);
            MemoryRows { rows: Tensor::cat(vec![leaf.clone(), fixed], 0), index: index.into(), dead: None }
        };
        leaves.iter().enumerate().map(of_layer).collect()
    }

    /// `texts` with what is known of them before the first step.
    fn lessons(
        &self,
        texts: &[LessonText],
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
    ) -> Result<Vec<Lesson>> {
        let batches: Vec<&[LessonText]> = texts.chunks(self.config.micro_batch).collect();
        let batches = batches.into_par_iter().map(|batch| self.lessons_of(batch, addressing, tables));
        Ok(batches.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// The lessons of texts that are computed at once: all weights are read once for them.
    fn lessons_of(
        &self,
        texts: &[LessonText],
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
    ) -> Result<Vec<Lesson>> {
        let tokens: Vec<u32> = texts.iter().flat_map(|text| &text.tokens).copied().collect();
        let sequences = Sequences::of_lengths(texts.iter().map(|text| text.tokens.len()));
        let first = self.memory.layers[0];
        let states = self.model.states_before(first, &tokens, &sequences);
        let values = host(states.clone());
        let width = values.len() / tokens.len();
        let (mut lessons, mut places, mut before) = (Vec::new(), Vec::new(), 0);
        for text in texts {
            let own = &values[before * width..][..text.tokens.len() * width];
            let lesson = self.lesson(text, own.to_vec(), addressing, tables)?;
            places.extend(of_base(&lesson).map(|position| (before + position) as u32));
            before += lesson.time;
            lessons.push(lesson);
        }
        if places.is_empty() {
            return Ok(lessons);
        }
        let leaves: Vec<Tensor<2>> = self.rows.iter().map(|rows| self.leaf(rows)).collect();
        let memory = self.memory_rows(&lessons.iter().collect::<Vec<_>>(), &leaves);
        let hidden = self.model.hidden_from(first, Tensor::from_inner(states), &sequences, &memory);
        let base = host(select(hidden.inner(), &places));
        let mut rest = &base[..];
        for lesson in &mut lessons {
            let (own, others) = rest.split_at(of_base(lesson).count() * self.width);
            lesson.base = own.to_vec();
            rest = others;
        }
        Ok(lessons)
    }

    /// `text`, whose streams before the first memory block are `states`, without what the base says of it.
    fn lesson(
        &self,
        text: &LessonText,
        states: Vec<f32>,
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
    ) -> Result<Lesson> {
        let time = text.tokens.len();
        let mut rows = Vec::new();
        let mut reached = time;
        for (layer, (own, table)) in self.rows.iter().zip(tables).enumerate() {
            let mut ids = Vec::new();
            addressing.row_ids(layer, &text.tokens[..], &mut ids)?;
            let found = lesson_rows(&ids, own, table)?;
            let slots = ids.len() / time;
            let met = found.slots.iter().position(|slot| matches!(slot, Slot::Taught(_)));
            reached = reached.min(met.map_or(time, |place| place / slots));
            rows.push(found);
        }
        let kept = text.kept();
        // What no taught row can reach says what the base says.
        let from = reached.clamp(kept.start, kept.end);
        let of_base = (from..kept.end).zip(0..).map(|(position, row)| (position, Wanted::Base(row)));
        let of_answer = text.answered().map(|(position, token)| (position, Wanted::Token(token)));
        let wanted = of_base.chain(of_answer).collect();
        Ok(Lesson { time, states, rows, wanted, kept: kept.len(), asked: text.asked(), base: Vec::new() })
    }
}

/// The positions of `lesson` that are to say what the base says, in order.
fn of_base(lesson: &Lesson) -> impl Iterator<Item = usize> {
    let is_of_base = |wanted: &Wanted| matches!(wanted, Wanted::Base(_));
    lesson.wanted.iter().filter(move |(_, wanted)| is_of_base(wanted)).map(|&(position, _)| position)
}

fn answered(lesson: &Lesson) -> usize {
    lesson.wanted.iter().filter(|(_, wanted)| matches!(wanted, Wanted::Token(_))).count()
}

/// The rows that stand in `ids`; what is not taught is read from `table`.
fn lesson_rows(ids: &[u64], taught: &TaughtRows, table: &Arc<dyn RowSource>) -> Result<LessonRows> {
    let width = taught.width;
    let others: BTreeSet<u64> = ids.iter().copied().filter(|&id| taught.place(id).is_none()).collect();
    let others: Vec<u64> = others.into_iter().collect();
    let mut values = vec![0.0; others.len() * width];
    table.gather(&others, &mut values)?;
    let mut fixed = Vec::new();
    let mut slots_of_others = Vec::new();
    for row in values.chunks_exact(width) {
        slots_of_others.push(if row.iter().all(|&value| value == 0.0) {
            Slot::Zero
        } else {
            fixed.extend_from_slice(row);
            Slot::Fixed((fixed.len() / width - 1) as u32)
        });
    }
    let slot = |id: &u64| match (taught.place(*id), others.binary_search(id)) {
        (Some(place), _) => Slot::Taught(place as u32),
        (None, Ok(place)) => slots_of_others[place],
        (None, Err(_)) => Slot::Zero,
    };
    Ok(LessonRows { slots: ids.iter().map(slot).collect(), fixed })
}

impl FactTexts {
    /// The n-grams to teach: those that common text does not contain.
    fn choose(
        &self,
        addressing: &Addressing,
        tokenizer: &Tokenizer,
        census: &Corpus,
        facts: &Facts,
        preparation: &mut Preparation,
    ) -> Result<ChosenNgrams> {
        let vocabulary = addressing.vocabulary();
        let longest = addressing.max_order();
        let class = |tokens: &[u32]| -> Result<Ngram> {
            tokens.iter().map(|&token| Ok(vocabulary.class(token)?)).collect()
        };
        let mut candidates: BTreeMap<Ngram, Vec<u32>> = BTreeMap::new();
        let mut of_subjects: Vec<BTreeSet<Ngram>> = Vec::new();
        for ((phrasings, _), alone) in self.facts.iter().zip(&self.alone) {
            let mut of_subject = BTreeSet::new();
            for text in phrasings.iter().chain(alone) {
                for (end, order) in text.ngrams(longest) {
                    let tokens = &text.tokens[end + 1 - order..=end];
                    let classes = class(tokens)?;
                    if text.subjects.iter().any(|span| span.end == end + 1) {
                        of_subject.insert(classes.clone());
                    }
                    candidates.entry(classes).or_insert_with(|| tokens.to_vec());
                }
            }
            of_subjects.push(of_subject);
        }
        let mut common = Census::of(candidates.keys().cloned());
        common.read(census, tokenizer, vocabulary)?;
        let before = candidates.len();
        candidates.retain(|ngram, _| !common.contains(ngram));
        preparation.census_tokens = common.tokens();
        preparation.common = before - candidates.len();
        preparation.ngrams = candidates.len();
        for (fact, of_subject) in facts.all().iter().zip(&of_subjects) {
            if !of_subject.iter().any(|ngram| candidates.contains_key(ngram)) {
                preparation.without_subject.push(fact.id.clone());
            }
        }
        Ok(ChosenNgrams { tokens: candidates.into_values().collect() })
    }
}

/// N-grams whose rows are taught, by any of their tokens.
struct ChosenNgrams {
    tokens: Vec<Vec<u32>>,
}

impl ChosenNgrams {
    /// Their rows in every memory layer, as they are.
    fn rows(
        &self,
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
        width: usize,
        preparation: &mut Preparation,
    ) -> Result<Vec<TaughtRows>> {
        let mut layers = Vec::new();
        for (index, table) in tables.iter().enumerate() {
            let layer = &addressing.layers()[index];
            let heads = layer.heads();
            let mut ids = HashSet::new();
            for tokens in &self.tokens {
                let mut all = Vec::new();
                addressing.row_ids(index, &tokens[..], &mut all)?;
                // Of the last position, the heads of the n-gram's own order.
                let last = &all[all.len() - layer.slots()..];
                let of_order = &last[(tokens.len() - 2) * heads..][..heads];
                preparation.collisions += of_order.iter().filter(|&&id| !ids.insert(id)).count();
            }
            let mut ids: Vec<u64> = ids.into_iter().collect();
            ids.sort_unstable();
            let mut values = vec![0.0; ids.len() * width];
            table.gather(&ids, &mut values)?;
            preparation.rows += ids.len();
            layers.push(TaughtRows::new(width, ids, values));
        }
        if preparation.rows == 0 {
            let problem = "no n-gram of these facts is left to teach: the census contains all of them";
            return Err(Error::Mismatch(problem.into()));
        }
        Ok(layers)
    }
}

/// What tells this teaching from others: a state of one does not continue another.
fn identity(
    model: &Model,
    memory: &MemoryConfig,
    facts: &Facts,
    config: &TeachConfig,
    rows: &[TaughtRows],
) -> Result<String> {
    let text = |value: std::result::Result<String, toml::ser::Error>| {
        value.map_err(|error| Error::Mismatch(error.to_string()))
    };
    // What is trained beside it, to compare, changes nothing that is taught.
    let config = TeachConfig { compare: CompareConfig::default(), ..config.clone() };
    let parts = [model.identity()?, text(toml::to_string(memory))?, text(toml::to_string(&config))?];
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    for fact in facts.all() {
        hasher.update(format!("{:?}", (&fact.id, &fact.answer, &fact.prompts, &fact.keep)).as_bytes());
    }
    for id in rows.iter().flat_map(TaughtRows::ids) {
        hasher.update(&id.to_le_bytes());
    }
    // A run that was begun with another number of positions would go on in another way.
    hasher.update(&(POSITIONS_DRAWN as u64).to_le_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_that_are_drawn_stand_for_all() {
        let wanted: Vec<(usize, Wanted)> = vec![
            (3, Wanted::Base(0)),
            (4, Wanted::Base(1)),
            (5, Wanted::Base(2)),
            (6, Wanted::Token(7)),
            (7, Wanted::Token(8)),
        ];
        let lesson = Lesson {
            time: 9,
            states: Vec::new(),
            rows: Vec::new(),
            wanted: wanted.clone(),
            kept: 6,
            asked: 0..0,
            base: Vec::new(),
        };
        assert_eq!((Due::whole(&lesson).wanted, Due::whole(&lesson).stands_for), (wanted.clone(), 1.0));
        let some = Due::of(&lesson, &BTreeSet::from([0, 2]));
        assert_eq!(some.wanted, [wanted[0], wanted[2], wanted[3], wanted[4]]);
        assert_eq!(some.stands_for, 1.5);
    }
}
