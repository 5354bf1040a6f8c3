//! The part of a block after attention: a feed-forward layer, or experts.

use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, positive};

/// A gated feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct FeedForwardConfig {
    /// Hidden width.
    pub width: usize,
    /// The gate's nonlinearity, also in experts.
    #[serde(default, skip_serializing_if = "Activation::is_default")]
    pub activation: Activation,
}

/// The nonlinearity of a gated feed-forward (arXiv 2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// SiLU.
    #[default]
    Swiglu,
    /// GELU in its tanh approximation (Gemma).
    Geglu,
}

/// Fine-grained routed experts and shared ones (DeepSeekMoE, arXiv 2401.06066). Models trained here use sigmoid scores
/// and loss-free balancing (arXiv 2408.15664). No token is ever dropped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// The first block, counted from 0, with experts. Earlier blocks are dense.
    pub first_block: usize,
    /// Later blocks that are dense.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dense_blocks: Vec<usize>,
    /// Number of routed experts.
    pub routed: usize,
    /// Number of routed experts per token.
    pub active: usize,
    /// Hidden width of one routed expert.
    pub width: usize,
    /// Hidden width of the shared expert. Several shared experts act as one wider expert: two of 128 are one of 256.
    pub shared_width: usize,
    /// How the router's logits become scores.
    #[serde(default, skip_serializing_if = "ExpertScore::is_default")]
    pub score: ExpertScore,
    /// Whether the scores of a token's experts are divided by their sum.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub normalise: bool,
    /// Factor of the experts' weights after that.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub scaling: f32,
    /// Restricts a token's experts to its best groups. Default: no restriction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<ExpertGroups>,
    /// Step of the balancing bias, by the sign of an expert's load error.
    #[serde(default = "default_balance_rate")]
    pub balance_rate: f32,
    /// Weight of the loss that balances the experts within each sequence (DeepSeek-V3, arXiv 2412.19437, section
    /// 2.1.2). 0 turns it off.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sequence_balance: f32,
}

/// How the router's logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ExpertScore {
    /// A sigmoid of each logit. The balancing bias, `balance`, is added only for the choice.
    #[default]
    Sigmoid,
    /// A softmax over all routed experts.
    Softmax,
}

/// Group-limited routing (DeepSeek-V2, arXiv 2405.04434, section 2.2.2): successive experts form groups of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExpertGroups {
    /// Number of groups.
    pub count: usize,
    /// Number of groups that a token's experts come from.
    pub active: usize,
    /// The score that groups are chosen by.
    pub score: GroupScore,
}

/// The score that groups of experts are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The score of its best expert (DeepSeek V2).
    Best,
    /// The sum of its two best scores, balancing bias included (DeepSeek V3).
    TwoBest,
}

fn yes() -> bool {
    true
}
fn is_yes(value: &bool) -> bool {
    *value
}
fn is_zero(value: &f32) -> bool {
    *value == 0.0
}
fn one() -> f32 {
    1.0
}
fn is_one(value: &f32) -> bool {
    *value == 1.0
}
fn default_balance_rate() -> f32 {
    1e-3
}

impl Activation {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ExpertScore {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ExpertsConfig {
    /// Whether block `block` has experts.
    pub(crate) fn are_in(&self, block: usize) -> bool {
        block >= self.first_block && !self.dense_blocks.contains(&block)
    }

    /// The first key that only models from outside have, if there is one.
    pub(crate) fn untrainable(&self) -> Option<&'static str> {
        let departures = [
            (!self.dense_blocks.is_empty(), "model.experts.dense_blocks"),
            (!self.score.is_default(), "model.experts.score"),
            (!self.normalise, "model.experts.normalise"),
            (self.groups.is_some(), "model.experts.groups"),
        ];
        departures.into_iter().find_map(|(departs, key)| departs.then_some(key))
    }

    /// Hidden values of a block's experts, and the router's outputs, however many.
    pub(crate) fn hidden(&self) -> f64 {
        self.routed as f64 * (self.width as f64 + 1.0) + self.shared_width as f64
    }

    pub(crate) fn validate(&self, blocks: usize) -> Result<(), ConfigError> {
        positive("model.experts.routed", self.routed)?;
        positive("model.experts.active", self.active)?;
        positive("model.experts.width", self.width)?;
        if self.active > self.routed {
            return Err(ConfigError::new(
                "model.experts.active",
                format!("is {}, but must be at most the {} routed experts", self.active, self.routed),
            ));
        }
        if self.first_block >= blocks {
            return Err(ConfigError::new(
                "model.experts.first_block",
                format!(
                    "is {}, but the {blocks} blocks are counted from 0; leave `experts` out for a dense model",
                    self.first_block
                ),
            ));
        }
        let dense = "model.experts.dense_blocks";
        if let Some(block) =
            self.dense_blocks.iter().find(|&&block| block < self.first_block || block >= blocks)
        {
            let (first, last) = (self.first_block, blocks - 1);
            let reason = format!(
                "names block {block}, but must name blocks from {first}, the first with experts, to {last}"
            );
            return Err(ConfigError::new(dense, reason));
        }
        if !self.dense_blocks.is_sorted_by(|a, b| a < b) {
            return Err(ConfigError::new(dense, "must ascend without repeats"));
        }
        if !(self.scaling > 0.0 && self.scaling.is_finite()) {
            return Err(ConfigError::new("model.experts.scaling", "must be above 0"));
        }
        if let Some(groups) = &self.groups {
            groups.validate(self)?;
        }
        if !(self.sequence_balance >= 0.0 && self.sequence_balance.is_finite()) {
            return Err(ConfigError::new("model.experts.sequence_balance", "must be at least 0"));
        }
        if !(self.balance_rate >= 0.0 && self.balance_rate.is_finite()) {
            return Err(ConfigError::new("model.experts.balance_rate", "must be at least 0"));
        }
        Ok(())
    }
}

impl ExpertGroups {
    fn validate(&self, experts: &ExpertsConfig) -> Result<(), ConfigError> {
        let (count, routed) = (self.count, experts.routed);
        positive("model.experts.groups.count", count)?;
        positive("model.experts.groups.active", self.active)?;
        if !routed.is_multiple_of(count) {
            let reason = format!("is {count}, but must divide the number of routed experts, {routed}");
            return Err(ConfigError::new("model.experts.groups.count", reason));
        }
        if self.active > count {
            let reason = format!("is {}, but must be at most the {count} groups", self.active);
            return Err(ConfigError::new("model.experts.groups.active", reason));
        }
        let (size, active) = (routed / count, experts.active);
        if self.active * size < active {
            let reason = format!(
                "is {}: groups of {size} then hold fewer than the {active} active experts",
                self.active
            );
            return Err(ConfigError::new("model.experts.groups.active", reason));
        }
        if self.score == GroupScore::TwoBest && size < 2 {
            let reason =
                format!("adds the two best experts of a group, but the {count} groups have one expert each");
            return Err(ConfigError::new("model.experts.groups.score", reason));
        }
        Ok(())
    }
}
