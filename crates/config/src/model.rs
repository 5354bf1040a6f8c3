//! The shape of a model, as written in a configuration file.
//!
//! Every struct refuses unknown keys, and [`ModelConfig::validate`] refuses impossible values. Both name the key, so
//! that the caller can point at its line.

use engram_address::{AddressConfig, AddressError, Arithmetic, Boundary, assign_primes};
use serde::{Deserialize, Serialize};

use crate::attention::AttentionConfig;
use crate::error::{ConfigError, positive};
use crate::feed_forward::{Activation, ExpertsConfig, FeedForwardConfig};
use crate::init::InitConfig;

/// A language model: backbone, experts and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Width of one residual stream.
    pub width: usize,
    /// Number of transformer blocks, each with attention and feed-forward.
    pub blocks: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Epsilon of the backbone's RMS norms.
    #[serde(default = "default_epsilon")]
    pub norm_epsilon: f32,
    /// Whether the output head is the transposed embedding.
    #[serde(default)]
    pub tied_head: bool,
    /// Factor of the embeddings before the first block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_scale: Option<f32>,
    /// Whether the outputs of attention and feed-forward are normalised before they are added to the residual stream
    /// (Gemma 2, arXiv 2408.00118, section 2).
    #[serde(default, skip_serializing_if = "is_false")]
    pub post_norms: bool,
    /// Size of the initial weights.
    #[serde(default, skip_serializing_if = "InitConfig::is_default")]
    pub init: InitConfig,
    /// Attention of every block.
    pub attention: AttentionConfig,
    /// Feed-forward of the blocks without experts.
    pub feed_forward: FeedForwardConfig,
    /// Experts in the feed-forward of the later blocks. Without it, every block is dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsConfig>,
    /// Manifold-constrained hyper-connections. Without them, there is one plain residual stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hyper_connections: Option<HyperConnectionConfig>,
    /// Conditional memory. Without it, the model is the plain backbone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryConfig>,
}

/// Hyper-connections whose residual mixing is doubly stochastic (arXiv 2512.24880).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct HyperConnectionConfig {
    /// Number of residual streams.
    pub streams: usize,
    /// Number of alternating row and column normalisations.
    #[serde(default = "default_sinkhorn_iterations")]
    pub sinkhorn_iterations: usize,
}

/// How a memory is read into the model: one of the two published forms, or a simpler one for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MemoryForm {
    /// The form of the paper and its demonstration code: projection biases and a short convolution.
    Paper,
    /// DeepSeek-V4.1's: no biases, no convolution, one fused projection.
    V41,
    /// A plain additive table: the mean of a token's rows, as wide as a stream, is added to every stream.
    Added,
    /// Over-encoding (arXiv 2501.16975): projected rows, averaged with the input embedding.
    OverEncoding,
    /// Projected rows, added to the values of the block's attention.
    AttentionValues,
}

impl MemoryForm {
    /// Whether a gate scales what the memory adds.
    pub fn is_gated(self) -> bool {
        matches!(self, Self::Paper | Self::V41)
    }
}

/// The gates of a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// One gate per residual stream, each with a key of its own (paper, section 2.4).
    #[default]
    PerStream,
    /// One gate for all streams: the mean of the streams against one key.
    Shared,
    /// No gate: every value is added whole, and there are no keys.
    None,
}

/// What a gate computes from a query and a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GateForm {
    /// `σ(√|s|·sign s)` of `s = ⟨RMSNorm(h), RMSNorm(k)⟩/√width`, as published.
    #[default]
    SignedRoot,
    /// `σ(⟨h, k⟩/√width)`: no norms, and no weights.
    Sigmoid,
}

impl GateForm {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Gate {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How tokens are mapped to classes before they are hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Tokens whose normalised texts agree share a class (paper, section 2.2).
    Normalised,
    /// Every token is a class of its own.
    None,
}

/// The n-grams whose rows a position reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Lookup {
    /// Those that end there.
    #[default]
    Own,
    /// Those that end at an earlier position, drawn once. A control: these rows say nothing about the token.
    Permuted,
}

impl Lookup {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The memory: hashed n-gram tables and the module that reads them into the residual streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Form of the module.
    #[serde(default = "default_form")]
    pub form: MemoryForm,
    /// The gates.
    #[serde(default, skip_serializing_if = "Gate::is_default")]
    pub gate: Gate,
    /// What a gate computes.
    #[serde(default, skip_serializing_if = "GateForm::is_default")]
    pub gate_form: GateForm,
    /// Whether a short convolution follows the gate. Default: as in the published form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convolution: Option<bool>,
    /// Blocks, counted from 0, that read a memory before their attention. Each has its own table.
    pub layers: Vec<usize>,
    /// Longest n-gram; the orders are 2 to this one.
    pub max_order: usize,
    /// Hash heads per order.
    pub heads: usize,
    /// Values per row.
    pub row_width: usize,
    /// Rows per head for each order 2..=max_order. Each head takes the next unused prime above.
    pub rows_per_head: Vec<u64>,
    /// Compression of the vocabulary before hashing.
    #[serde(default = "default_compression")]
    pub compression: Compression,
    /// The n-grams whose rows a position reads.
    #[serde(default, skip_serializing_if = "Lookup::is_default")]
    pub lookup: Lookup,
    /// Seed of the hash multipliers.
    #[serde(default)]
    pub seed: u64,
    /// Token that stands before the beginning of a sequence.
    #[serde(default)]
    pub pad_id: u32,
    /// Taps of the short convolution (its dilation is `max_order`). Only for the paper's form.
    #[serde(default = "default_kernel")]
    pub kernel: usize,
    /// Standard deviation of the initial rows. With 0, unseen n-grams add nothing.
    #[serde(default)]
    pub row_init: f32,
}

fn is_false(value: &bool) -> bool {
    !value
}
fn default_epsilon() -> f32 {
    1e-6
}
fn default_sinkhorn_iterations() -> usize {
    20
}
fn default_form() -> MemoryForm {
    MemoryForm::Paper
}
fn default_compression() -> Compression {
    Compression::Normalised
}
fn default_kernel() -> usize {
    4
}

impl ModelConfig {
    /// Number of residual streams: 1 without hyper-connections.
    pub fn streams(&self) -> usize {
        self.hyper_connections.as_ref().map_or(1, |hyper| hyper.streams)
    }

    /// Rows of each memory layer's table: the sum of its heads' primes.
    ///
    /// # Errors
    /// When the primes run out.
    pub fn table_rows(&self) -> Result<Vec<u64>, AddressError> {
        let Some(memory) = &self.memory else { return Ok(Vec::new()) };
        let primes = assign_primes(memory.layers.len(), &memory.rows_per_head, memory.heads)?;
        Ok(primes.iter().map(|orders| orders.iter().flatten().sum()).collect())
    }

    /// Initial scale of the weights that write to the residual stream. Each block writes twice, and the sum should not
    /// grow with depth.
    pub fn output_scale(&self) -> f32 {
        self.init.output.unwrap_or_else(|| (2.0 * self.blocks as f32).sqrt().recip())
    }

    /// The experts of block `block`, if it has any.
    pub fn experts_of(&self, block: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|experts| experts.are_in(block))
    }

    /// The first key by which this model differs from those that can be trained here, if any. Such models come from
    /// outside; they can be decoded, evaluated and served.
    pub fn untrainable(&self) -> Option<&'static str> {
        let departures = [
            // Experts have a SwiGLU.
            (
                self.experts.is_some() && self.feed_forward.activation != Activation::Swiglu,
                "model.feed_forward.activation",
            ),
        ];
        let here = departures.into_iter().find_map(|(departs, key)| departs.then_some(key));
        here.or_else(|| self.attention.untrainable())
            .or_else(|| self.experts.as_ref().and_then(ExpertsConfig::untrainable))
    }

    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first invalid key, below `model.`, with the reason.
    pub fn validate(&self) -> Result<(), ConfigError> {
        positive("model.vocabulary", self.vocabulary)?;
        positive("model.width", self.width)?;
        positive("model.blocks", self.blocks)?;
        positive("model.context", self.context)?;
        positive("model.feed_forward.width", self.feed_forward.width)?;
        self.validate_sizes()?;
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon.is_finite()) {
            return Err(ConfigError::new("model.norm_epsilon", "must be above 0"));
        }
        if self.embedding_scale.is_some_and(|scale| !(scale > 0.0 && scale.is_finite())) {
            return Err(ConfigError::new("model.embedding_scale", "must be above 0"));
        }
        self.init.validate()?;
        self.attention.validate(self.blocks)?;
        if let Some(yarn) = self.attention.yarn()
            && self.context as f32 > yarn.scale * yarn.original_context as f32
        {
            let reason = format!(
                "is {}, but the scale {} times the original context of {} is less: raise `model.attention.yarn.scale`",
                self.context, yarn.scale, yarn.original_context
            );
            return Err(ConfigError::new("model.context", reason));
        }
        if let Some(experts) = &self.experts {
            experts.validate(self.blocks)?;
        }
        if let Some(hyper) = &self.hyper_connections {
            hyper.validate()?;
        }
        if let Some(memory) = &self.memory {
            memory.validate(self)?;
        }
        Ok(())
    }
}

/// Blocks at most.
const MOST_BLOCKS: usize = 1 << 14;
/// Weights at most, and values of memory rows: 2⁵⁶, some seventy quadrillion.
const MOST_VALUES: f64 = (1_u64 << 56) as f64;

impl ModelConfig {
    /// Refuses sizes that give more values than can be counted, before anything is counted.
    fn validate_sizes(&self) -> Result<(), ConfigError> {
        if self.blocks > MOST_BLOCKS {
            let reason = format!("is {}, but may be at most {MOST_BLOCKS}", self.blocks);
            return Err(ConfigError::new("model.blocks", reason));
        }
        let (width, blocks) = (self.width as f64, self.blocks as f64);
        let memory = self.memory.as_ref();
        let counts = [
            ("model.vocabulary", 2.0 * width * self.vocabulary as f64),
            ("model.context", width * blocks * self.context as f64),
            ("model.attention", width * blocks * self.attention.most_outputs()),
            ("model.feed_forward.width", 3.0 * width * blocks * self.feed_forward.width as f64),
            (
                "model.experts",
                3.0 * width * blocks * self.experts.as_ref().map_or(0.0, ExpertsConfig::hidden),
            ),
            ("model.memory.rows_per_head", memory.map_or(0.0, MemoryConfig::row_values)),
            ("model.memory", width * memory.map_or(0.0, |memory| memory.projected(self.streams()))),
        ];
        match counts.iter().find(|(_, values)| *values > MOST_VALUES) {
            Some((key, values)) => {
                let reason =
                    format!("with the other sizes gives {values:.1e} values, more than can be counted");
                Err(ConfigError::new(*key, reason))
            }
            None => Ok(()),
        }
    }
}

impl HyperConnectionConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(2..=8).contains(&self.streams) {
            return Err(ConfigError::new(
                "model.hyper_connections.streams",
                format!("is {}, but must be 2 to 8; leave the table out for one plain stream", self.streams),
            ));
        }
        positive("model.hyper_connections.sinkhorn_iterations", self.sinkhorn_iterations)
    }
}

impl MemoryConfig {
    /// Values of the rows of all layers, however many.
    fn row_values(&self) -> f64 {
        let rows: f64 = self.rows_per_head.iter().map(|&rows| rows as f64).sum();
        rows * self.heads as f64 * self.row_width as f64 * self.layers.len() as f64
    }

    /// Weights of the projections of all layers for each value of a stream, or more, however many.
    fn projected(&self, streams: usize) -> f64 {
        let inputs = self.max_order as f64 * self.heads as f64 * self.row_width as f64 + self.kernel as f64;
        self.layers.len() as f64 * (streams + 1) as f64 * inputs
    }

    /// Orders of n-grams: 2 to `max_order`.
    pub fn orders(&self) -> usize {
        self.max_order - 1
    }

    /// Rows per token and layer: one per order and head.
    pub fn slots(&self) -> usize {
        self.orders() * self.heads
    }

    /// Width of the concatenated rows of one token, d_mem.
    pub fn width(&self) -> usize {
        self.slots() * self.row_width
    }

    /// Gates per token in a model with `streams` residual streams.
    pub fn gates(&self, streams: usize) -> usize {
        match self.gate {
            _ if !self.form.is_gated() => 0,
            Gate::PerStream => streams,
            Gate::Shared => 1,
            Gate::None => 0,
        }
    }

    /// The first key by which this memory differs from both published forms, if any. Readers of published models refuse
    /// it by name.
    pub fn departs(&self) -> Option<&'static str> {
        let departures = [
            (!self.form.is_gated(), "model.memory.form"),
            (!self.gate.is_default(), "model.memory.gate"),
            (!self.gate_form.is_default(), "model.memory.gate_form"),
            (self.has_convolution() != (self.form == MemoryForm::Paper), "model.memory.convolution"),
            (!self.lookup.is_default(), "model.memory.lookup"),
        ];
        departures.into_iter().find_map(|(departs, key)| departs.then_some(key))
    }

    /// Whether a short convolution follows the gate.
    pub fn has_convolution(&self) -> bool {
        self.convolution.unwrap_or(self.form == MemoryForm::Paper)
    }

    /// The addressing of this memory.
    pub fn addressing(&self) -> AddressConfig {
        AddressConfig {
            seed: self.seed,
            layers: self.layers.clone(),
            max_order: self.max_order,
            heads: self.heads,
            base_rows: self.rows_per_head.clone(),
            pad_id: self.pad_id,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        }
    }

    fn validate(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        let (blocks, vocabulary) = (model.blocks, model.vocabulary);
        self.validate_form(model)?;
        positive("model.memory.heads", self.heads)?;
        positive("model.memory.row_width", self.row_width)?;
        positive("model.memory.kernel", self.kernel)?;
        if !(2..=8).contains(&self.max_order) {
            return Err(ConfigError::new(
                "model.memory.max_order",
                format!("is {}: n-grams have 2 to 8 tokens", self.max_order),
            ));
        }
        if self.rows_per_head.len() != self.orders() {
            return Err(ConfigError::new(
                "model.memory.rows_per_head",
                format!(
                    "has {} values, but orders 2 to {} need {}: one per order",
                    self.rows_per_head.len(),
                    self.max_order,
                    self.orders()
                ),
            ));
        }
        if self.rows_per_head.iter().any(|&rows| rows < 2) {
            return Err(ConfigError::new("model.memory.rows_per_head", "every order needs at least 2 rows"));
        }
        if self.layers.is_empty() {
            return Err(ConfigError::new(
                "model.memory.layers",
                "is empty: name a block, or leave `memory` out for a model without memory",
            ));
        }
        if !self.layers.is_sorted_by(|a, b| a < b) {
            return Err(ConfigError::new("model.memory.layers", "must ascend without repeats"));
        }
        if let Some(&layer) = self.layers.iter().find(|&&layer| layer >= blocks) {
            return Err(ConfigError::new(
                "model.memory.layers",
                format!("names block {layer}, but the {blocks} blocks are counted from 0"),
            ));
        }
        if self.pad_id as usize >= vocabulary {
            return Err(ConfigError::new(
                "model.memory.pad_id",
                format!("is {}, outside the vocabulary of {vocabulary}", self.pad_id),
            ));
        }
        if !(self.row_init >= 0.0 && self.row_init.is_finite()) {
            return Err(ConfigError::new("model.memory.row_init", "must be at least 0"));
        }
        Ok(())
    }
}

impl MemoryConfig {
    fn validate_form(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        if !self.form.is_gated() && !self.gate.is_default() {
            return Err(ConfigError::new(
                "model.memory.gate",
                "chooses a gate, but only the forms \"paper\" and \"v41\" have one: leave it out",
            ));
        }
        if !self.gate_form.is_default() && (!self.form.is_gated() || self.gate == Gate::None) {
            return Err(ConfigError::new(
                "model.memory.gate_form",
                "chooses what a gate computes, but this memory has none: leave it out",
            ));
        }
        if self.form == MemoryForm::Added && self.row_width != model.width {
            return Err(ConfigError::new(
                "model.memory.row_width",
                format!(
                    "is {}, but the form \"added\" needs the width of the streams, {}",
                    self.row_width, model.width
                ),
            ));
        }
        if self.form == MemoryForm::OverEncoding && self.layers != [0] {
            return Err(ConfigError::new(
                "model.memory.layers",
                "must be [0], because the form \"over_encoding\" reads rows at the input",
            ));
        }
        if self.gate == Gate::Shared && model.streams() == 1 {
            return Err(ConfigError::new(
                "model.memory.gate",
                "is \"shared\", but the model has only one residual stream: leave it out",
            ));
        }
        if self.convolution == Some(true) && self.form != MemoryForm::Paper {
            return Err(ConfigError::new(
                "model.memory.convolution",
                "is true, but only the form \"paper\" has a convolution: choose that form, or leave it out",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = r#"
        vocabulary = 64
        width = 16
        blocks = 4
        context = 32
        attention = { kind = "plain", heads = 2, head_width = 8 }
        feed_forward = { width = 32 }
    "#;

    /// A pretrained model that uses every key of plain attention.
    const PRETRAINED: &str = r#"
        vocabulary = 64
        width = 16
        blocks = 4
        context = 32
        embedding_scale = 4.0
        post_norms = true
        feed_forward = { width = 32, activation = "geglu" }
        [attention]
        kind = "plain"
        heads = 4
        key_heads = 2
        head_width = 8
        rotary_width = 4
        query_key_norm = true
        bias = true
        output_bias = true
        scale = 0.25
        window = 8
        local_blocks = [0, 2]
        local_rotary_base = 100.0
        unrotated_blocks = [3]
        rotary_scaling = { kind = "linear", factor = 8.0 }
        [experts]
        first_block = 1
        dense_blocks = [2]
        routed = 8
        active = 2
        width = 4
        shared_width = 0
        score = "softmax"
        normalise = false
        scaling = 2.5
        groups = { count = 4, active = 2, score = "best" }
    "#;

    fn read(text: &str) -> ModelConfig {
        toml::from_str(text).unwrap()
    }

    fn refused(text: &str, from: &str, to: &str) -> String {
        assert!(text.contains(from), "{from}");
        read(&text.replace(from, to)).validate().unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_given_is_not_written() {
        let plain = read(PLAIN);
        plain.validate().unwrap();
        assert_eq!(plain.untrainable(), None);
        let written = toml::to_string(&plain).unwrap();
        for key in ["embedding_scale", "post_norms", "activation", "bias", "window", "unrotated", "scaling"] {
            assert!(!written.contains(key), "{key} in {written}");
        }
    }

    #[test]
    fn a_pretrained_model_is_read_back_and_never_trained() {
        let model = read(PRETRAINED);
        model.validate().unwrap();
        assert_eq!(read(&toml::to_string_pretty(&model).unwrap()), model);
        assert_eq!(model.untrainable(), Some("model.feed_forward.activation"));
        let blocks: Vec<bool> = (0..4).map(|block| model.experts_of(block).is_some()).collect();
        assert_eq!(blocks, [false, true, false, true]);
        assert_eq!(
            (0..4).map(|block| model.attention.window_of(block)).collect::<Vec<_>>(),
            [Some(8), None, Some(8), None]
        );
        // Local blocks have their own base and are not stretched. The last block has no positions.
        let frequencies = |block: usize| model.attention.rotary_of(block).map(|rotary| rotary.frequencies);
        assert_eq!(frequencies(0), Some(vec![1.0, 0.1]));
        assert_eq!(frequencies(1), Some(vec![0.125, 0.00125]));
        assert_eq!(frequencies(3), None);
        assert_eq!(model.attention.scale(), 0.25);
    }

    #[test]
    fn variants_of_dense_plain_models_are_trained() {
        for (section, key, value) in [
            ("attention", "bias", "true"),
            ("attention", "query_key_norm", "true"),
            ("attention", "window", "4"),
            ("attention", "unrotated_blocks", "[0]"),
            ("attention", "scale", "0.5"),
            ("attention", "rotary_scaling", "{ kind = \"linear\", factor = 2.0 }"),
            ("feed_forward", "activation", "\"geglu\""),
        ] {
            let (from, to) = (format!("{section} = {{"), format!("{section} = {{ {key} = {value},"));
            let model = read(&PLAIN.replace(&from, &to));
            model.validate().unwrap();
            assert_eq!(model.untrainable(), None, "{section}.{key}");
        }
    }

    #[test]
    fn what_no_model_could_have_is_refused_by_its_key() {
        for (from, to, key) in [
            ("rotary_width = 4", "rotary_width = 10", "model.attention.rotary_width"),
            ("rotary_width = 4", "rotary_width = 3", "model.attention.rotary_width"),
            ("window = 8", "", "model.attention.local_blocks"),
            ("window = 8", "window = 0", "model.attention.window"),
            ("local_blocks = [0, 2]", "local_blocks = [2, 0]", "model.attention.local_blocks"),
            ("local_blocks = [0, 2]", "local_blocks = [4]", "model.attention.local_blocks"),
            ("unrotated_blocks = [3]", "unrotated_blocks = [4]", "model.attention.unrotated_blocks"),
            ("scale = 0.25", "scale = 0.0", "model.attention.scale"),
            ("factor = 8.0", "factor = 0.0", "model.attention.rotary_scaling.factor"),
            ("embedding_scale = 4.0", "embedding_scale = -1.0", "model.embedding_scale"),
            ("dense_blocks = [2]", "dense_blocks = [0]", "model.experts.dense_blocks"),
            ("scaling = 2.5", "scaling = 0.0", "model.experts.scaling"),
            ("count = 4", "count = 3", "model.experts.groups.count"),
            ("active = 2, score", "active = 5, score", "model.experts.groups.active"),
        ] {
            let error = refused(PRETRAINED, from, to);
            assert!(error.starts_with(&format!("`{key}`: ")), "{to}: {error}");
        }
        assert!(toml::from_str::<ModelConfig>(&PLAIN.replace("heads = 2", "heads = 2, tails = 3")).is_err());
    }

    #[test]
    fn operations_of_a_window_are_fewer() {
        let whole = crate::Account::of(&read(PLAIN), &[]);
        let local = |window: usize| {
            let from = "head_width = 8";
            let config = read(&PLAIN.replace(from, &format!("head_width = 8, window = {window}")));
            crate::Account::of(&config, &[])
        };
        assert_eq!(local(32), whole);
        assert_eq!(local(100), whole);
        // By hand: 32 tokens see 1, 2, 3, 4, 4, … instead of 1 to 32; 2 heads, keys and values of 8, 4 blocks.
        let (seen, all) = (10 + 28 * 4, 32 * 33 / 2);
        assert_eq!(whole.forward_flops - local(4).forward_flops, 4 * 2 * 2 * 16 * (all - seen) / 32);
        assert_eq!(local(4).total, whole.total);
    }

    #[test]
    fn parameters_of_a_pretrained_model() {
        let account = crate::Account::of(&read(PRETRAINED), &[]);
        let attention = 2 * 16 * (4 + 2) * 8 + (4 + 2 * 2) * 8 + 16 + 2 * 8;
        let expert = 3 * 16 * 4;
        let blocks = 4 * (attention + 4 * 16) + 2 * 3 * 16 * 32 + 2 * (8 * expert + 16 * 8);
        assert_eq!(account.total, 2 * 64 * 16 + 16 + blocks);
        assert_eq!(account.experts, 2 * 8 * expert);
    }

    #[test]
    fn yarn_by_the_index_of_a_pair() {
        // DeepSeek's: 16 dimensions, base 10000, 64 positions before; ends of the ramp by hand:
        // 16·ln(64/(32·2π))/(2·ln 10000) < 0, and 16·ln(64/2π)/(2·ln 10000) = 2.02.
        let yarn = crate::RotaryScaling::Yarn {
            factor: 8.0,
            original_context: 64,
            fast: 32.0,
            slow: 1.0,
            truncate: true,
            amplitude: 1.0,
        };
        let plain: Vec<f64> = (0..8).map(|i| 10_000_f64.powf(-2.0 * f64::from(i) / 16.0)).collect();
        for (index, (found, plain)) in yarn.frequencies(16, 10_000.0).iter().zip(plain).enumerate() {
            let stretched = (index as f64 / 3.0).min(1.0);
            let expected = plain / 8.0 * stretched + plain * (1.0 - stretched);
            assert!((found - expected).abs() < 1e-12 * plain, "{index}: {found}, not {expected}");
        }
    }
}
