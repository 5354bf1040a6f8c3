//! Facts trained into a model's own weights, to compare with teaching them through rows: by an adapter of low rank, or by
//! all weights of the blocks.
//!
//! Texts, their order and the loss are those of teaching; only the weights of the loss and the rate are its own. The
//! embedding, the head and the last norm stay as they are.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use engram_config::TeachConfig;
use engram_import::{HostTensor, Model};
use engram_kernels::AdamStep;
use engram_model::{LanguageModel, Sequences};

use crate::dense_adam::{DenseAdam, Named, clip};
use crate::error::{Error, Result};
use crate::fact_texts::{FactTexts, shuffled};
use crate::facts::Facts;
use crate::frozen::frozen;
use crate::lesson::LessonText;
use crate::low_rank::LowRank;
use crate::parameters;
use crate::soft_targets::{Wanted, host, select, soft_targets};

/// Largest global norm of a step's gradient.
const CLIP: f32 = 1.0;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tuning {
    /// An adapter of this rank on all matrices of the blocks.
    LowRank(usize),
    /// All weights of the blocks.
    Full,
}

/// Facts being trained into a model's weights.
pub struct Tuner {
    config: TeachConfig,
    device: Device,
    /// Absent only while its weights are replaced.
    model: Option<LanguageModel>,
    low: Option<LowRank>,
    weights: BTreeMap<String, HostTensor>,
    adam: DenseAdam,
    lessons: Vec<[Vec<Text>; 2]>,
    width: usize,
    step: usize,
}

/// A text, what its positions are to say, and what the base says there.
struct Text {
    tokens: Vec<u32>,
    /// Positions with a loss; whether the weight of questions is theirs.
    wanted: Vec<(usize, Wanted, bool)>,
    /// Hidden states of the base where it is asked, `[·, width]`.
    base: Vec<f32>,
}

impl Tuner {
    /// Prepares `facts` for the weights of `model`, which has no memory. Of `config`, steps, rate, weights and order are
    /// used; rows are not.
    ///
    /// # Errors
    /// When the model has a memory or cannot be computed with gradients, or a fact cannot be taught.
    pub fn new(model: &Model, facts: &Facts, config: TeachConfig, what: Tuning) -> Result<Self> {
        config.validate()?;
        let described = &model.config().model;
        if described.memory.is_some() {
            let problem = "only a model without a memory is compared with its own weights' training";
            return Err(Error::Mismatch(problem.into()));
        }
        let device = Device::flex().autodiff();
        let texts = FactTexts::of(facts, &config, (model.tokenizer(), model.begin()), described.context)?;
        let base = frozen(model, described, BTreeMap::new(), &device)?;
        let (low, weights) = match what {
            Tuning::LowRank(rank) => {
                let low = LowRank::new(&base, Some(rank), 0, &device.clone().inner());
                let weights = low.draw(config.seed);
                (Some(low), weights)
            }
            Tuning::Full => {
                let mut weights = parameters::export(&base);
                weights.retain(|name, _| of_blocks(name));
                (None, weights)
            }
        };
        let width = described.width;
        let mut lessons = Vec::new();
        for (phrasings, questions) in &texts.facts {
            lessons.push(
                [phrasings, questions]
                    .map(|texts| texts.iter().map(|text| Text::of(text, &base)).collect::<Vec<_>>()),
            );
        }
        let learns = |name: &str| match &low {
            Some(low) => low.changes(name),
            None => of_blocks(name),
        };
        let model = Some(parameters::train_only(base, &learns));
        let adam = DenseAdam::default();
        let mut tuner = Self { config, device, model, low, weights, adam, lessons, width, step: 0 };
        tuner.place();
        Ok(tuner)
    }

    /// Whether all steps are taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.config.steps
    }

    /// Parameters that learn.
    pub fn parameters(&self) -> usize {
        self.weights.values().map(|weight| weight.values.len()).sum()
    }

    /// One step over one phrasing of every fact. Returns the mean cross-entropy of the answers' tokens, in nats.
    ///
    /// # Errors
    /// When a loss or a gradient is not finite.
    pub fn step(&mut self) -> Result<f64> {
        let due = self.due();
        let count = |is: &dyn Fn(&(usize, Wanted, bool)) -> bool| {
            due.iter().map(|text| text.wanted.iter().filter(|wanted| is(wanted)).count()).sum::<usize>()
        };
        let is_token = |wanted: &Wanted| matches!(wanted, Wanted::Token(_));
        let share = |weight: f32, count: usize| weight / count.max(1) as f32;
        let answer = share(1.0, count(&|(_, wanted, _)| is_token(wanted)));
        let keep = share(self.config.kl_weight, count(&|(_, wanted, asked)| !is_token(wanted) && !asked));
        let ask =
            share(self.config.negative_weight, count(&|(_, wanted, asked)| !is_token(wanted) && *asked));
        let (mut answers, mut gradients) = (0.0, Named::new());
        for texts in due.chunks(self.config.micro_batch) {
            let (found, of_texts) = self.differentiate(texts, [answer, keep, ask]);
            answers += found;
            for (name, values) in of_texts {
                match gradients.get_mut(&name) {
                    Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                    None => _ = gradients.insert(name, values),
                }
            }
        }
        drop(due);
        let norm = clip(&mut gradients, CLIP);
        if !(answers.is_finite() && norm.is_finite()) {
            return Err(Error::Diverged { step: self.step as u64 });
        }
        let TeachConfig { beta1, beta2, epsilon, .. } = self.config;
        let rate = self.config.rate_of(self.step);
        self.step += 1;
        let step = AdamStep { rate, beta1, beta2, epsilon, decay: 0.0, step: self.step as u64 };
        self.adam.step(&mut self.weights, &gradients, &step);
        self.place();
        Ok(answers)
    }

    /// All weights of the model as they are now, by the names of a checkpoint.
    pub fn into_weights(self) -> BTreeMap<String, HostTensor> {
        self.model.as_ref().map(parameters::export).unwrap_or_default()
    }

    fn due(&self) -> Vec<&Text> {
        let mut due = Vec::new();
        let seed = self.config.seed;
        for (fact, [phrasings, questions]) in self.lessons.iter().enumerate() {
            due.push(&phrasings[shuffled(seed, fact, 0, self.step, phrasings.len())]);
            if questions.is_empty() {
                continue;
            }
            let each = self.config.negatives.max(1);
            let places =
                (0..each).map(|more| shuffled(seed, fact, 1, self.step * each + more, questions.len()));
            due.extend(places.map(|place| &questions[place]));
        }
        due
    }

    fn differentiate(&self, texts: &[&Text], [answer, keep, ask]: [f32; 3]) -> (f64, Named) {
        let model = self.model();
        let sequences = Sequences::of_lengths(texts.iter().map(|text| text.tokens.len()));
        let ids: Vec<u32> = texts.iter().flat_map(|text| &text.tokens).copied().collect();
        let streams = Tensor::from_inner(model.states_before(0, &ids, &sequences));
        let hidden = model.hidden_from(0, streams, &sequences, &[]);
        let (mut places, mut wanted, mut base) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        for text in texts {
            let before = (base.len() / self.width) as u32;
            for &(position, said, asked) in &text.wanted {
                places.push((first + position) as u32);
                let of_base = if asked { ask } else { keep };
                wanted.push(match said {
                    Wanted::Token(_) => (said, answer),
                    Wanted::Base(row) => (Wanted::Base(before + row), of_base),
                });
            }
            base.extend_from_slice(&text.base);
            first += text.tokens.len();
        }
        let chosen = select(hidden, &places);
        let inner = self.device.clone().inner();
        let (losses, slope) = soft_targets(model, chosen.clone().inner(), &base, &wanted, &inner);
        // Has the slope as its gradient.
        let mut gradients = (chosen * Tensor::from_inner(slope)).sum().backward();
        let dense = parameters::take_gradients(model, &mut gradients);
        let dense = match &self.low {
            Some(low) => low.gradients(dense, &self.weights),
            None => dense.into_iter().map(|(name, gradient)| (name, flat(gradient))).collect(),
        };
        (losses.answers, dense)
    }

    fn model(&self) -> &LanguageModel {
        self.model.as_ref().expect("the model is back after every update")
    }

    /// Puts the weights into the model.
    fn place(&mut self) {
        let model = self.model.take().expect("the model is back after every update");
        let device = self.device.clone().inner();
        let (low, weights) = (&self.low, &self.weights);
        self.model = Some(parameters::update(model, &mut |weight, values| match low {
            Some(low) => low.merged(&weight.name, weights).unwrap_or(values),
            None => match weights.get(&weight.name) {
                Some(own) => {
                    Tensor::from_data(TensorData::new(own.values.clone(), [own.values.len()]), &device)
                }
                None => values,
            },
        }));
    }
}

impl Text {
    fn of(text: &LessonText, base: &LanguageModel) -> Self {
        let (kept, asked) = (text.kept(), text.asked());
        let mut wanted: Vec<(usize, Wanted, bool)> = Vec::new();
        for (row, position) in kept.clone().enumerate() {
            wanted.push((position, Wanted::Base(row as u32), asked.contains(&position)));
        }
        wanted.extend(text.answered().map(|(position, token)| (position, Wanted::Token(token), false)));
        let places: Vec<u32> = kept.map(|position| position as u32).collect();
        let sequences = Sequences::equal(1, text.tokens.len());
        let streams = Tensor::from_inner(base.states_before(0, &text.tokens, &sequences));
        let hidden = base.hidden_from(0, streams, &sequences, &[]).inner();
        let base = if places.is_empty() { Vec::new() } else { host(select(hidden, &places)) };
        Self { tokens: text.tokens.clone(), wanted, base }
    }
}

fn of_blocks(name: &str) -> bool {
    name.starts_with("blocks.")
}

fn flat(tensor: Tensor<1>) -> Vec<f32> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.into_data().try_into_vec().expect("f32")
}
