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
        for (phrasings, negatives) in texts.facts {
            let phrasings = teacher.lessons(phrasings, &memory.addressing, &memory.tables)?;
            let negatives = teacher.lessons(negatives, &memory.addressing, &memory.tables)?;
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
        let mut lessons = self.due();
        let answered: usize = lessons.iter().map(|lesson| answered(lesson)).sum();
        let asked: usize = lessons.iter().map(|lesson| lesson.asked.len()).sum();
        let kept: usize = lessons.iter().map(|lesson| lesson.kept - lesson.asked.len()).sum();
        let share = |weight: f32, count: usize| weight / count.max(1) as f32;
        let weights = [
            share(1.0, answered),
            share(self.config.kl_weight, kept),
            share(self.config.negative_weight, asked),
        ];
        // A text that no taught row can reach says what the base says, whatever is taught.
        lessons.retain(|lesson| !lesson.wanted.is_empty());
        let mut gradients: Vec<Vec<f32>> =
            self.rows.iter().map(|rows| vec![0.0; rows.values.len()]).collect();
        let mut losses = Losses::default();
        for batch in lessons.chunks(self.config.micro_batch) {
            let (found, of_batch) = self.batch(batch, weights);
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
    fn due(&self) -> Vec<&Lesson> {
        let mut due = Vec::new();
        for (index, lessons) in self.lessons.iter().enumerate() {
            due.push(&lessons.phrasings[self.turn(index, 0, lessons.phrasings.len())]);
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
                due.push(&lessons.negatives[place]);
            }
        }
        due
    }

    fn turn(&self, fact: usize, kind: u64, count: usize) -> usize {
        shuffled(self.config.seed, fact, kind, self.step, count)
    }

    /// Weighted losses of some lessons, and the gradient of every taught row.
    fn batch(&self, lessons: &[&Lesson], [answer, keep, ask]: [f32; 3]) -> (Losses, Vec<Vec<f32>>) {
        let sequences = Sequences::of_lengths(lessons.iter().map(|lesson| lesson.time));
        let width = lessons[0].states.len() / lessons[0].time;
        let states: Vec<f32> = lessons.iter().flat_map(|lesson| &lesson.states).copied().collect();
        let states = Tensor::from_data(TensorData::new(states, [sequences.tokens(), width]), &self.device);
        let leaves: Vec<Tensor<2>> = self.rows.iter().map(|rows| self.leaf(rows)).collect();
        let memory = self.memory_rows(lessons, &leaves);
        let hidden = self.model.hidden_from(self.memory.layers[0], states, &sequences, &memory);
        let (mut places, mut wanted, mut base) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        for lesson in lessons {
            let before = (base.len() / self.width) as u32;
            for &(position, said) in &lesson.wanted {
                places.push((first + position) as u32);
                let of_base = if lesson.asked.contains(&position) { ask } else { keep };
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
        texts: Vec<LessonText>,
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
    ) -> Result<Vec<Lesson>> {
        texts.into_iter().map(|text| self.lesson(&text, addressing, tables)).collect()
    }

    fn lesson(
        &self,
        text: &LessonText,
        addressing: &Addressing,
        tables: &[Arc<dyn RowSource>],
    ) -> Result<Lesson> {
        let time = text.tokens.len();
        let sequences = Sequences::equal(1, time);
        let first = self.memory.layers[0];
        let states = self.model.states_before(first, &text.tokens, &sequences);
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
        let mut wanted: Vec<(usize, Wanted)> = Vec::new();
        // What no taught row can reach says what the base says.
        let from = reached.clamp(kept.start, kept.end);
        for (row, position) in (from..kept.end).enumerate() {
            wanted.push((position, Wanted::Base(row as u32)));
        }
        let places: Vec<u32> = wanted.iter().map(|&(position, _)| position as u32).collect();
        wanted.extend(text.answered().map(|(position, token)| (position, Wanted::Token(token))));
        let values = host(states.clone());
        let (kept, asked) = (kept.len(), text.asked());
        let mut lesson = Lesson { time, states: values, rows, wanted, kept, asked, base: Vec::new() };
        if !places.is_empty() {
            let leaves: Vec<Tensor<2>> = self.rows.iter().map(|rows| self.leaf(rows)).collect();
            let memory = self.memory_rows(&[&lesson], &leaves);
            let states = Tensor::from_inner(states);
            let hidden = self.model.hidden_from(first, states, &sequences, &memory);
            lesson.base = host(select(hidden.inner(), &places));
        }
        Ok(lesson)
    }
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
    Ok(hasher.finalize().to_hex().to_string())
}
