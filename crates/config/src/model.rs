//! The shape of a model, as written in a configuration file.
//!
//! Every struct refuses unknown keys, and [`ModelConfig::validate`] refuses values that no model could have;
//! both name the key, so that whoever loads the file can point at its line.

use engram_address::{AddressConfig, AddressError, Arithmetic, Boundary, assign_primes};
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// A language model: backbone, experts and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Width of one residual stream.
    pub width: usize,
    /// Transformer blocks: attention and feed-forward each.
    pub blocks: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Epsilon of the backbone's RMS norms.
    #[serde(default = "default_epsilon")]
    pub norm_epsilon: f32,
    /// Whether the output head is the transposed embedding.
    #[serde(default)]
    pub tied_head: bool,
    /// Attention of every block.
    pub attention: AttentionConfig,
    /// Feed-forward of the blocks without experts.
    pub feed_forward: FeedForwardConfig,
    /// Experts in the feed-forward of the later blocks; none: every block is dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsConfig>,
    /// Manifold-constrained hyper-connections; none: one plain residual stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hyper_connections: Option<HyperConnectionConfig>,
    /// Conditional memory; none: the plain backbone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryConfig>,
}

/// How tokens look at earlier tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum AttentionConfig {
    /// Multi-head latent attention with decoupled rotary dimensions (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    Latent {
        /// Attention heads.
        heads: usize,
        /// Rank of the query's latent; none: queries are projected directly.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        query_rank: Option<usize>,
        /// Rank of the joint key-value latent, which is all that is cached at inference.
        latent_rank: usize,
        /// Width of a head's content part, which carries no position.
        content_width: usize,
        /// Width of a head's rotary part, whose key all heads share.
        rotary_width: usize,
        /// Width of a head's values.
        value_width: usize,
        /// Base of the rotary frequencies.
        #[serde(default = "default_rotary_base")]
        rotary_base: f32,
        /// Stretches the rotary positions to a context longer than the one trained on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        yarn: Option<YarnConfig>,
    },
    /// Plain multi-head attention with rotary positions over whole heads.
    Plain {
        /// Attention heads.
        heads: usize,
        /// Heads of keys and values, each shared by as many successive heads as there are for one (grouped queries,
        /// arXiv 2305.13245); none: every head has its own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key_heads: Option<usize>,
        /// Width of a head.
        head_width: usize,
        /// Base of the rotary frequencies.
        #[serde(default = "default_rotary_base")]
        rotary_base: f32,
    },
}

/// How rotary positions are stretched (YaRN, arXiv 2309.00071). The defaults are those of the paper's extension to
/// 32k.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnConfig {
    /// How many times longer the context becomes; 1 changes nothing.
    #[serde(default = "default_yarn_scale")]
    pub scale: f32,
    /// The context that the model was trained on before.
    pub original_context: usize,
    /// Pairs with fewer turns over the original context are stretched fully.
    #[serde(default = "default_yarn_alpha")]
    pub alpha: f32,
    /// Pairs with more turns stay as they are.
    #[serde(default = "default_yarn_beta")]
    pub beta: f32,
    /// Scores are multiplied by (0.1·factor·ln scale + 1)².
    #[serde(default = "default_yarn_factor")]
    pub factor: f32,
}

impl YarnConfig {
    /// What scores are multiplied by.
    pub fn inverse_temperature(&self) -> f32 {
        (0.1 * self.factor * self.scale.ln() + 1.0).powi(2)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        positive("model.attention.yarn.original_context", self.original_context)?;
        let checks = [
            ("model.attention.yarn.scale", self.scale >= 1.0 && self.scale.is_finite(), "must be at least 1"),
            ("model.attention.yarn.alpha", self.alpha >= 0.0, "must be at least 0"),
            (
                "model.attention.yarn.beta",
                self.beta > self.alpha && self.beta.is_finite(),
                "must be above `alpha`",
            ),
            (
                "model.attention.yarn.factor",
                self.factor >= 0.0 && self.factor.is_finite(),
                "must be at least 0",
            ),
        ];
        match checks.iter().find(|(_, right, _)| !right) {
            Some((key, _, reason)) => Err(ConfigError::new(*key, *reason)),
            None => Ok(()),
        }
    }
}

/// A SwiGLU feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedForwardConfig {
    /// Hidden width.
    pub width: usize,
}

/// Fine-grained routed experts beside shared ones (DeepSeekMoE, arXiv 2401.06066) with sigmoid scores and
/// loss-free balancing (arXiv 2408.15664). No token is ever dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// The first block, counted from 0, that has experts; those before it are dense.
    pub first_block: usize,
    /// Routed experts.
    pub routed: usize,
    /// Routed experts that see a token.
    pub active: usize,
    /// Hidden width of one routed expert.
    pub width: usize,
    /// Hidden width of the shared expert (shared experts lie side by side: two of 128 are one of 256).
    pub shared_width: usize,
    /// Step of the balancing bias, by the sign of an expert's load error.
    #[serde(default = "default_balance_rate")]
    pub balance_rate: f32,
}

/// Hyper-connections whose residual mixing is doubly stochastic (arXiv 2512.24880).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HyperConnectionConfig {
    /// Residual streams.
    pub streams: usize,
    /// Alternating row and column normalisations.
    #[serde(default = "default_sinkhorn_iterations")]
    pub sinkhorn_iterations: usize,
}

/// How a memory is read into the model: one of the two published forms, or a simpler one to compare them with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryForm {
    /// The paper's and its demonstration code's: projection biases and a short convolution.
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
    /// Whether a gate decides how far the memory is read.
    pub fn is_gated(self) -> bool {
        matches!(self, Self::Paper | Self::V41)
    }
}

/// What decides how far a memory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// Every residual stream against a key of its own (paper, section 2.4).
    #[default]
    PerStream,
    /// The mean of the streams against one key: one gate for all.
    Shared,
    /// Nothing: every value is added whole, and there are no keys.
    None,
}

impl Gate {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How tokens are mapped to classes before they are hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Tokens whose normalised texts agree share a class (paper, section 2.2).
    Normalised,
    /// Every token is a class of its own.
    None,
}

/// Which n-grams' rows a position reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lookup {
    /// Those that end there.
    #[default]
    Own,
    /// Those that end at an earlier position, drawn once for all: a control, whose rows say nothing of the token.
    Permuted,
}

impl Lookup {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The memory: hashed n-gram tables and the module that reads them into the residual streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Form of the module.
    #[serde(default = "default_form")]
    pub form: MemoryForm,
    /// What decides how far it is read.
    #[serde(default, skip_serializing_if = "Gate::is_default")]
    pub gate: Gate,
    /// Whether a short convolution follows the gate; none: as the form was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convolution: Option<bool>,
    /// Blocks, counted from 0, before whose attention a memory is read; each has a table of its own.
    pub layers: Vec<usize>,
    /// Longest n-gram: orders 2 to this one are looked up.
    pub max_order: usize,
    /// Hash heads per order.
    pub heads: usize,
    /// Values per row.
    pub row_width: usize,
    /// Rows per head for each order 2..=max_order; every head takes the next unused prime above.
    pub rows_per_head: Vec<u64>,
    /// Compression of the vocabulary before hashing.
    #[serde(default = "default_compression")]
    pub compression: Compression,
    /// Which n-grams' rows a position reads.
    #[serde(default, skip_serializing_if = "Lookup::is_default")]
    pub lookup: Lookup,
    /// Seed of the hash multipliers.
    #[serde(default)]
    pub seed: u64,
    /// Token that stands before the beginning of a sequence.
    #[serde(default)]
    pub pad_id: u32,
    /// Taps of the short convolution (its dilation is `max_order`); the paper's form only.
    #[serde(default = "default_kernel")]
    pub kernel: usize,
    /// Standard deviation of the rows at the start; 0 leaves unseen n-grams silent.
    #[serde(default)]
    pub row_init: f32,
}

fn default_epsilon() -> f32 {
    1e-6
}
fn default_rotary_base() -> f32 {
    10_000.0
}
fn default_yarn_scale() -> f32 {
    10.0
}
fn default_yarn_alpha() -> f32 {
    1.0
}
fn default_yarn_beta() -> f32 {
    32.0
}
fn default_yarn_factor() -> f32 {
    0.707
}
fn default_balance_rate() -> f32 {
    1e-3
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
    /// Residual streams: 1 without hyper-connections.
    pub fn streams(&self) -> usize {
        self.hyper_connections.as_ref().map_or(1, |hyper| hyper.streams)
    }

    /// Rows of each memory layer's table: the sum of its heads' primes.
    ///
    /// # Errors
    /// When no primes are left for them.
    pub fn table_rows(&self) -> Result<Vec<u64>, AddressError> {
        let Some(memory) = &self.memory else { return Ok(Vec::new()) };
        let primes = assign_primes(memory.layers.len(), &memory.rows_per_head, memory.heads)?;
        Ok(primes.iter().map(|orders| orders.iter().flatten().sum()).collect())
    }

    /// Scale of the weights that write to the residual: each block writes twice, and their sum should not grow with
    /// depth.
    pub fn output_scale(&self) -> f32 {
        (2.0 * self.blocks as f32).sqrt().recip()
    }

    /// The experts of block `block`, if it has any.
    pub fn experts_of(&self, block: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|experts| block >= experts.first_block)
    }

    /// Refuses what no model could have.
    ///
    /// # Errors
    /// The first offending key, below `model.`, with the reason.
    pub fn validate(&self) -> Result<(), ConfigError> {
        positive("model.vocabulary", self.vocabulary)?;
        positive("model.width", self.width)?;
        positive("model.blocks", self.blocks)?;
        positive("model.context", self.context)?;
        positive("model.feed_forward.width", self.feed_forward.width)?;
        if !(self.norm_epsilon > 0.0 && self.norm_epsilon.is_finite()) {
            return Err(ConfigError::new("model.norm_epsilon", "must be above 0"));
        }
        self.attention.validate()?;
        if let Some(yarn) = self.attention.yarn()
            && self.context as f32 > yarn.scale * yarn.original_context as f32
        {
            let reason = format!(
                "is {}, but {} times the original context of {} is less: raise `model.attention.yarn.scale`",
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

impl AttentionConfig {
    /// Attention heads.
    pub fn heads(&self) -> usize {
        match *self {
            Self::Latent { heads, .. } | Self::Plain { heads, .. } => heads,
        }
    }

    /// Heads of keys and values: as many as heads, unless they are shared.
    pub fn key_heads(&self) -> usize {
        match *self {
            Self::Plain { heads, key_heads, .. } => key_heads.unwrap_or(heads),
            Self::Latent { heads, .. } => heads,
        }
    }

    /// Width of one head's queries and keys, and of its values.
    pub fn head_widths(&self) -> (usize, usize) {
        match *self {
            Self::Latent { content_width, rotary_width, value_width, .. } => {
                (content_width + rotary_width, value_width)
            }
            Self::Plain { head_width, .. } => (head_width, head_width),
        }
    }

    /// Width of the rotary part of a head and the base of its frequencies.
    pub fn rotary(&self) -> (usize, f32) {
        match *self {
            Self::Latent { rotary_width, rotary_base, .. } => (rotary_width, rotary_base),
            Self::Plain { head_width, rotary_base, .. } => (head_width, rotary_base),
        }
    }

    /// How its rotary positions are stretched, if they are.
    pub fn yarn(&self) -> Option<&YarnConfig> {
        match self {
            Self::Latent { yarn, .. } => yarn.as_ref(),
            Self::Plain { .. } => None,
        }
    }

    /// The same attention with its positions stretched so; plain attention stays as it is.
    pub fn with_yarn(mut self, stretched: Option<YarnConfig>) -> Self {
        if let Self::Latent { yarn, .. } = &mut self {
            *yarn = stretched;
        }
        self
    }

    fn validate(&self) -> Result<(), ConfigError> {
        positive("model.attention.heads", self.heads())?;
        let (heads, key_heads) = (self.heads(), self.key_heads());
        positive("model.attention.key_heads", key_heads)?;
        if !heads.is_multiple_of(key_heads) {
            return Err(ConfigError::new(
                "model.attention.key_heads",
                format!("is {key_heads}, which does not divide the {heads} heads into equal groups"),
            ));
        }
        if let Some(yarn) = self.yarn() {
            yarn.validate()?;
        }
        let (rotary_width, base) = self.rotary();
        let rotary_key = match *self {
            Self::Latent { query_rank, latent_rank, content_width, value_width, .. } => {
                if let Some(rank) = query_rank {
                    positive("model.attention.query_rank", rank)?;
                }
                positive("model.attention.latent_rank", latent_rank)?;
                positive("model.attention.content_width", content_width)?;
                positive("model.attention.value_width", value_width)?;
                "model.attention.rotary_width"
            }
            Self::Plain { .. } => "model.attention.head_width",
        };
        positive(rotary_key, rotary_width)?;
        if !rotary_width.is_multiple_of(2) {
            return Err(ConfigError::new(
                rotary_key,
                format!("is {rotary_width}, but rotary dimensions come in pairs: take an even number"),
            ));
        }
        if !(base > 1.0 && base.is_finite()) {
            return Err(ConfigError::new("model.attention.rotary_base", "must be above 1"));
        }
        Ok(())
    }
}

impl ExpertsConfig {
    fn validate(&self, blocks: usize) -> Result<(), ConfigError> {
        positive("model.experts.routed", self.routed)?;
        positive("model.experts.active", self.active)?;
        positive("model.experts.width", self.width)?;
        if self.active > self.routed {
            return Err(ConfigError::new(
                "model.experts.active",
                format!("is {}, more than the {} routed experts", self.active, self.routed),
            ));
        }
        if self.first_block >= blocks {
            return Err(ConfigError::new(
                "model.experts.first_block",
                format!(
                    "is {}, but the {blocks} blocks count from 0: leave `experts` out for a dense model",
                    self.first_block
                ),
            ));
        }
        if !(self.balance_rate >= 0.0 && self.balance_rate.is_finite()) {
            return Err(ConfigError::new("model.experts.balance_rate", "must be 0 or above"));
        }
        Ok(())
    }
}

impl HyperConnectionConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(2..=8).contains(&self.streams) {
            return Err(ConfigError::new(
                "model.hyper_connections.streams",
                format!("is {}: take 2 to 8, or leave the table out for one plain stream", self.streams),
            ));
        }
        positive("model.hyper_connections.sinkhorn_iterations", self.sinkhorn_iterations)
    }
}

impl MemoryConfig {
    /// Orders that are looked up: 2 to `max_order`.
    pub fn orders(&self) -> usize {
        self.max_order - 1
    }

    /// Rows fetched per token and layer: one per order and head.
    pub fn slots(&self) -> usize {
        self.orders() * self.heads
    }

    /// Width of the concatenated rows of one token, d_mem.
    pub fn width(&self) -> usize {
        self.slots() * self.row_width
    }

    /// Gates per token in a model of `streams` residual streams.
    pub fn gates(&self, streams: usize) -> usize {
        match self.gate {
            _ if !self.form.is_gated() => 0,
            Gate::PerStream => streams,
            Gate::Shared => 1,
            Gate::None => 0,
        }
    }

    /// The first key by which this memory departs from both published forms, if one does: what reads published models
    /// only can refuse it by name.
    pub fn departs(&self) -> Option<&'static str> {
        let departures = [
            (!self.form.is_gated(), "model.memory.form"),
            (!self.gate.is_default(), "model.memory.gate"),
            (self.has_convolution() != (self.form == MemoryForm::Paper), "model.memory.convolution"),
            (!self.lookup.is_default(), "model.memory.lookup"),
        ];
        departures.into_iter().find_map(|(departs, key)| departs.then_some(key))
    }

    /// Whether a short convolution follows the gate.
    pub fn has_convolution(&self) -> bool {
        self.convolution.unwrap_or(self.form == MemoryForm::Paper)
    }

    /// The addressing that this memory asks for.
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
                "is empty: name a block, or leave `memory` out for a model without",
            ));
        }
        if !self.layers.is_sorted_by(|a, b| a < b) {
            return Err(ConfigError::new("model.memory.layers", "must ascend without repeats"));
        }
        if let Some(&layer) = self.layers.iter().find(|&&layer| layer >= blocks) {
            return Err(ConfigError::new(
                "model.memory.layers",
                format!("names block {layer}, but the {blocks} blocks count from 0"),
            ));
        }
        if self.pad_id as usize >= vocabulary {
            return Err(ConfigError::new(
                "model.memory.pad_id",
                format!("is {}, outside the vocabulary of {vocabulary}", self.pad_id),
            ));
        }
        if !(self.row_init >= 0.0 && self.row_init.is_finite()) {
            return Err(ConfigError::new("model.memory.row_init", "must be 0 or above"));
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
        if self.form == MemoryForm::Added && self.row_width != model.width {
            return Err(ConfigError::new(
                "model.memory.row_width",
                format!(
                    "is {}, but the form \"added\" adds rows to streams of width {}: make them equal",
                    self.row_width, model.width
                ),
            ));
        }
        if self.form == MemoryForm::OverEncoding && self.layers != [0] {
            return Err(ConfigError::new(
                "model.memory.layers",
                "names another block than 0, but the form \"over_encoding\" is read at the input: take [0]",
            ));
        }
        if self.gate == Gate::Shared && model.streams() == 1 {
            return Err(ConfigError::new(
                "model.memory.gate",
                "is \"shared\", but the model has one residual stream, whose gate is no other's: leave it out",
            ));
        }
        if self.convolution == Some(true) && self.form != MemoryForm::Paper {
            return Err(ConfigError::new(
                "model.memory.convolution",
                "is true, but only the form \"paper\" has a convolution: take that, or leave it out",
            ));
        }
        Ok(())
    }
}

fn positive(key: &str, value: usize) -> Result<(), ConfigError> {
    if value == 0 { Err(ConfigError::new(key, "is 0: must be at least 1")) } else { Ok(()) }
}
