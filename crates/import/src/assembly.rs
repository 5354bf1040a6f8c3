//! From the tensors of a file to the weights of a model, by the names that they have here.

use std::collections::BTreeSet;
use std::path::Path;

use engram_config::{AttentionConfig, ExpertScore, ExpertsConfig, LatentConfig, ModelConfig, PlainConfig};

use crate::architectures::Storage;
use crate::error::{Error, Result};
use crate::weight::{Weight, Weights};

/// Where tensors come from.
pub(crate) trait Tensors {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;
    /// Names of all tensors.
    fn names(&self) -> BTreeSet<String>;
    /// A tensor where it lies.
    ///
    /// # Errors
    /// When it is missing or of a type that is not known.
    fn weight(&self, name: &str) -> Result<Weight>;
}

/// What a source calls the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Hugging Face's library.
    Hub,
    /// ggml.
    Gguf,
}

/// The weights of a model.
///
/// # Errors
/// The first tensor that is missing, of another shape or of a type that is not known, or that has no place in the model.
pub(crate) fn assemble(
    tensors: &dyn Tensors,
    dialect: Dialect,
    config: &ModelConfig,
    storage: Storage,
) -> Result<Weights> {
    let there = tensors.names();
    let mut assembly = Assembly { tensors, dialect, config, storage, there, weights: Weights::default() };
    assembly.outer()?;
    for block in 0..config.blocks {
        assembly.block(block)?;
    }
    assembly.refuse_others()?;
    Ok(assembly.weights)
}

struct Assembly<'a> {
    tensors: &'a dyn Tensors,
    dialect: Dialect,
    config: &'a ModelConfig,
    storage: Storage,
    /// Names that have not been taken.
    there: BTreeSet<String>,
    weights: Weights,
}

impl Assembly<'_> {
    fn outer(&mut self) -> Result<()> {
        let (vocabulary, width) = (self.config.vocabulary, self.config.width);
        let [embedding, norm, head] = match self.dialect {
            Dialect::Hub => ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
            Dialect::Gguf => ["token_embd.weight", "output_norm.weight", "output.weight"],
        };
        let weight = self.take(embedding, &[vocabulary, width])?;
        self.weights.insert("embedding".into(), weight);
        if !self.config.tied_head {
            let weight = self.take(head, &[vocabulary, width])?;
            self.weights.insert("head".into(), weight);
        }
        let weight = self.take_norm(norm, width)?;
        self.weights.insert("norm.weight".into(), weight);
        Ok(())
    }

    fn block(&mut self, block: usize) -> Result<()> {
        let width = self.config.width;
        self.norm(block, "attention_norm", width)?;
        self.norm(block, "feed_forward_norm", width)?;
        if self.config.post_norms {
            self.norm(block, "attention_post_norm", width)?;
            self.norm(block, "feed_forward_post_norm", width)?;
        }
        match &self.config.attention {
            AttentionConfig::Plain(plain) => self.plain(block, &plain.clone())?,
            AttentionConfig::Latent(latent) => self.latent(block, &latent.clone())?,
        }
        match self.config.experts_of(block).cloned() {
            Some(experts) => self.experts(block, &experts),
            None => self.dense(block),
        }
    }

    fn plain(&mut self, block: usize, plain: &PlainConfig) -> Result<()> {
        let width = self.config.width;
        let (heads, key_heads) = (plain.heads, plain.key_heads.unwrap_or(plain.heads));
        let (query, key) = (heads * plain.head_width, key_heads * plain.head_width);
        let parts = [("query", query, heads), ("key", key, key_heads), ("value", key, 0)];
        let fused = match self.storage.fused {
            true => Some(self.take(&self.name(block, "attention.qkv.weight"), &[query + 2 * key, width])?),
            false => None,
        };
        let mut first = 0;
        for (part, outputs, heads) in parts {
            let part = format!("attention.{part}");
            let weight = match &fused {
                Some(fused) => fused.rows(first..first + outputs),
                None => self.take(&self.name(block, &format!("{part}.weight")), &[outputs, width])?,
            };
            first += outputs;
            let rotary = plain.rotary_width.unwrap_or(plain.head_width);
            let order = self.storage.neighbours.then(|| pairs_apart(heads, plain.head_width, 0, rotary));
            let order = order.filter(|order| !order.is_empty());
            if plain.bias {
                let bias = self.take(&self.name(block, &format!("{part}.bias")), &[outputs])?;
                let values = bias.values();
                let bias = match &order {
                    Some(order) => order.iter().map(|&from| values[from as usize]).collect(),
                    None => values,
                };
                let bias = Weight::owned(vec![outputs], bias);
                self.put(block, &format!("{part}.bias"), bias);
            }
            let weight = match order {
                Some(order) => weight.reordered(&order),
                None => weight,
            };
            self.put(block, &format!("{part}.weight"), weight);
        }
        self.matrix(block, "attention.output.weight", &[width, query])?;
        if plain.output_bias {
            self.matrix(block, "attention.output.bias", &[width])?;
        }
        if plain.query_key_norm {
            self.norm(block, "attention.query_norm", plain.head_width)?;
            self.norm(block, "attention.key_norm", plain.head_width)?;
        }
        Ok(())
    }

    fn latent(&mut self, block: usize, latent: &LatentConfig) -> Result<()> {
        let width = self.config.width;
        let &LatentConfig {
            heads,
            latent_rank,
            content_width: content,
            rotary_width: rotary,
            value_width: value,
            ..
        } = latent;
        let neighbours = self.storage.neighbours;
        let queries = heads * (content + rotary);
        let (query_up, inputs) = match latent.query_rank {
            Some(rank) => {
                self.matrix(block, "attention.query_down.weight", &[rank, width])?;
                self.norm(block, "attention.latent_query_norm", rank)?;
                ("attention.query_up.weight", rank)
            }
            None => ("attention.query.weight", width),
        };
        let mut weight = self.take(&self.name(block, query_up), &[queries, inputs])?;
        if neighbours {
            weight = weight.reordered(&pairs_apart(heads, content + rotary, content, rotary));
        }
        self.put(block, "attention.query_up.weight", weight);
        let down = "attention.latent_down.weight";
        let mut weight = self.take(&self.name(block, down), &[latent_rank + rotary, width])?;
        if neighbours {
            weight = weight.reordered(&pairs_apart(1, latent_rank + rotary, latent_rank, rotary));
        }
        self.put(block, down, weight);
        self.norm(block, "attention.latent_norm", latent_rank)?;
        let up = "attention.latent_up.weight";
        let key_up = self.name(block, "attention.key_up.weight");
        let weight = if self.there.contains(&key_up) {
            let key = self.take(&key_up, &[heads, latent_rank, content])?;
            let value =
                self.take(&self.name(block, "attention.value_up.weight"), &[heads, value, latent_rank])?;
            keys_values_together(&key, &value, latent)
        } else {
            self.take(&self.name(block, up), &[heads * (content + value), latent_rank])?
        };
        self.put(block, up, weight);
        self.matrix(block, "attention.output.weight", &[width, heads * value])
    }

    fn dense(&mut self, block: usize) -> Result<()> {
        let (width, hidden) = (self.config.width, self.config.feed_forward.width);
        if self.storage.fused {
            let both = self.take(&self.name(block, "feed_forward.gate_up.weight"), &[2 * hidden, width])?;
            self.put(block, "feed_forward.gate.weight", both.rows(0..hidden));
            self.put(block, "feed_forward.up.weight", both.rows(hidden..2 * hidden));
            return self.matrix(block, "feed_forward.output.weight", &[width, hidden]);
        }
        self.gated(block, "feed_forward", hidden)
    }

    fn gated(&mut self, block: usize, part: &str, hidden: usize) -> Result<()> {
        let width = self.config.width;
        self.matrix(block, &format!("{part}.gate.weight"), &[hidden, width])?;
        self.matrix(block, &format!("{part}.up.weight"), &[hidden, width])?;
        self.matrix(block, &format!("{part}.output.weight"), &[width, hidden])
    }

    fn experts(&mut self, block: usize, experts: &ExpertsConfig) -> Result<()> {
        let (width, hidden, routed) = (self.config.width, experts.width, experts.routed);
        self.matrix(block, "feed_forward.router.weight", &[routed, width])?;
        let balance = self.name(block, "feed_forward.balance");
        if experts.score == ExpertScore::Sigmoid && self.there.contains(&balance) {
            self.matrix(block, "feed_forward.balance", &[routed])?;
        }
        match self.dialect {
            Dialect::Hub => {
                for expert in 0..routed {
                    self.gated(block, &format!("feed_forward.experts.{expert}"), hidden)?;
                }
            }
            Dialect::Gguf => {
                for (part, rows, inputs) in
                    [("gate", hidden, width), ("up", hidden, width), ("output", width, hidden)]
                {
                    let name = self.name(block, &format!("feed_forward.experts.{part}.weight"));
                    let all = self.take(&name, &[routed, rows, inputs])?;
                    for expert in 0..routed {
                        let one = all.rows(expert * rows..(expert + 1) * rows);
                        self.put(block, &format!("feed_forward.experts.{expert}.{part}.weight"), one);
                    }
                }
            }
        }
        match experts.shared_width {
            0 => Ok(()),
            hidden => self.gated(block, "feed_forward.shared", hidden),
        }
    }

    /// Takes the tensor of a norm, of this name here.
    fn norm(&mut self, block: usize, part: &str, width: usize) -> Result<()> {
        let weight = self.take_norm(&self.name(block, &format!("{part}.weight")), width)?;
        // The two norms of queries have one name here: no model has both.
        let part = if part == "attention.latent_query_norm" { "attention.query_norm" } else { part };
        self.put(block, &format!("{part}.weight"), weight);
        Ok(())
    }

    fn take_norm(&mut self, name: &str, width: usize) -> Result<Weight> {
        let weight = self.take(name, &[width])?;
        if !self.storage.norms_without_one {
            return Ok(weight);
        }
        let values: Vec<f32> = weight.values().into_iter().map(|value| 1.0 + value).collect();
        Ok(Weight::owned(vec![width], values))
    }

    /// Takes a tensor as it is, of this name here.
    fn matrix(&mut self, block: usize, part: &str, shape: &[usize]) -> Result<()> {
        let weight = self.take(&self.name(block, part), shape)?;
        self.put(block, part, weight);
        Ok(())
    }

    fn put(&mut self, block: usize, part: &str, weight: Weight) {
        self.weights.insert(format!("blocks.{block}.{part}"), weight);
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        let weight = self.tensors.weight(name)?;
        if weight.shape() != shape {
            let found = weight.shape();
            let problem = format!("tensor `{name}` is {found:?}; the settings say {shape:?}");
            return Err(Error::model(self.tensors.path(), problem));
        }
        self.there.remove(name);
        Ok(weight)
    }

    /// What the source calls a tensor of block `block`.
    fn name(&self, block: usize, part: &str) -> String {
        match self.dialect {
            Dialect::Hub => format!("model.layers.{block}.{}", hub_part(part, self.config.post_norms)),
            Dialect::Gguf => format!("blk.{block}.{}", gguf_part(part)),
        }
    }

    /// Refuses a tensor without a place: it would be a part of the model left out.
    fn refuse_others(&self) -> Result<()> {
        let blocks = self.config.blocks;
        let extra = blocks..blocks + self.storage.extra_blocks;
        match self
            .there
            .iter()
            .find(|name| !is_buffer(name) && !block_of(name).is_some_and(|b| extra.contains(&b)))
        {
            Some(name) => {
                let problem =
                    format!("tensor `{name}` has no place in this architecture as it is known here");
                Err(Error::model(self.tensors.path(), problem))
            }
            None => Ok(()),
        }
    }
}

/// Whether a tensor follows from the settings: older files hold such.
fn is_buffer(name: &str) -> bool {
    [
        "rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
        "masked_bias",
        "embed_positions.inv_freq",
    ]
    .iter()
    .any(|buffer| name.ends_with(buffer))
        || matches!(name, "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight")
}

/// The block that a tensor belongs to.
fn block_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.").or_else(|| name.strip_prefix("blk."))?;
    rest.split_once('.')?.0.parse().ok()
}

/// Rows whose rotary pairs are neighbours, as rows whose pairs lie half the rotary width apart: of `heads` heads of
/// `width` rows, of which `rotary` from `first` on are rotated. No heads: no order.
fn pairs_apart(heads: usize, width: usize, first: usize, rotary: usize) -> Vec<u32> {
    let half = rotary / 2;
    let source = |row: usize| {
        let (head, at) = (row / width, row % width);
        match at.checked_sub(first).filter(|at| *at < rotary) {
            Some(at) => head * width + first + 2 * (at % half) + at / half,
            None => row,
        }
    };
    (0..heads * width).map(|row| source(row) as u32).collect()
}

/// Projections of the latent to keys, `[heads, latent, content]` (transposed, as the absorbed form needs them), and to
/// values, `[heads, value, latent]`, as one `[heads·(content + value), latent]`.
fn keys_values_together(key: &Weight, value: &Weight, latent: &LatentConfig) -> Weight {
    let &LatentConfig { heads, latent_rank: rank, content_width: content, value_width, .. } = latent;
    let (key, value) = (key.values(), value.values());
    let mut together = Vec::with_capacity(heads * (content + value_width) * rank);
    for head in 0..heads {
        let key = &key[head * rank * content..][..rank * content];
        for c in 0..content {
            together.extend((0..rank).map(|r| key[r * content + c]));
        }
        together.extend_from_slice(&value[head * value_width * rank..][..value_width * rank]);
    }
    Weight::owned(vec![heads * (content + value_width), rank], together)
}

/// The name in Hugging Face's library of a part of a block.
fn hub_part(part: &str, post_norms: bool) -> String {
    let (part, ending) = part.rsplit_once('.').unwrap_or((part, ""));
    let fixed = match part {
        "attention_norm" => "input_layernorm",
        "attention_post_norm" => "post_attention_layernorm",
        "feed_forward_norm" if post_norms => "pre_feedforward_layernorm",
        "feed_forward_norm" => "post_attention_layernorm",
        "feed_forward_post_norm" => "post_feedforward_layernorm",
        "attention.query" => "self_attn.q_proj",
        "attention.key" => "self_attn.k_proj",
        "attention.value" => "self_attn.v_proj",
        "attention.qkv" => "self_attn.qkv_proj",
        "attention.output" => "self_attn.o_proj",
        "attention.query_norm" => "self_attn.q_norm",
        "attention.key_norm" => "self_attn.k_norm",
        "attention.query_down" => "self_attn.q_a_proj",
        "attention.latent_query_norm" => "self_attn.q_a_layernorm",
        "attention.query_up" => "self_attn.q_b_proj",
        "attention.latent_down" => "self_attn.kv_a_proj_with_mqa",
        "attention.latent_norm" => "self_attn.kv_a_layernorm",
        "attention.latent_up" => "self_attn.kv_b_proj",
        "feed_forward.gate_up" => "mlp.gate_up_proj",
        "feed_forward.router" => "mlp.gate",
        // `feed_forward.balance`, without an ending.
        "feed_forward" => return "mlp.gate.e_score_correction_bias".into(),
        _ => {
            let (place, matrix) = part.rsplit_once('.').unwrap_or(("", part));
            let place = place.replace("feed_forward", "mlp").replace("shared", "shared_experts");
            let matrix = if matrix == "output" { "down" } else { matrix };
            return format!("{place}.{matrix}_proj.{ending}");
        }
    };
    format!("{fixed}.{ending}")
}

/// ggml's name of a part of a block.
fn gguf_part(part: &str) -> String {
    let (part, ending) = part.rsplit_once('.').unwrap_or((part, ""));
    let fixed = match part {
        "attention_norm" => "attn_norm",
        "attention_post_norm" => "post_attention_norm",
        "feed_forward_norm" => "ffn_norm",
        "feed_forward_post_norm" => "post_ffw_norm",
        "attention.query" => "attn_q",
        "attention.key" => "attn_k",
        "attention.value" => "attn_v",
        "attention.qkv" => "attn_qkv",
        "attention.output" => "attn_output",
        "attention.query_norm" => "attn_q_norm",
        "attention.key_norm" => "attn_k_norm",
        "attention.query_down" => "attn_q_a",
        "attention.latent_query_norm" => "attn_q_a_norm",
        "attention.query_up" => "attn_q_b",
        "attention.latent_down" => "attn_kv_a_mqa",
        "attention.latent_norm" => "attn_kv_a_norm",
        "attention.latent_up" => "attn_kv_b",
        "attention.key_up" => "attn_k_b",
        "attention.value_up" => "attn_v_b",
        "feed_forward.gate" => "ffn_gate",
        "feed_forward.up" => "ffn_up",
        "feed_forward.output" => "ffn_down",
        // Both in one, as ggml has it for Phi 3.
        "feed_forward.gate_up" => "ffn_up",
        "feed_forward.router" => "ffn_gate_inp",
        "feed_forward.experts.gate" => "ffn_gate_exps",
        "feed_forward.experts.up" => "ffn_up_exps",
        "feed_forward.experts.output" => "ffn_down_exps",
        "feed_forward.shared.gate" => "ffn_gate_shexp",
        "feed_forward.shared.up" => "ffn_up_shexp",
        "feed_forward.shared.output" => "ffn_down_shexp",
        // `feed_forward.balance`, without an ending.
        "feed_forward" => return "exp_probs_b.bias".into(),
        other => other,
    };
    format!("{fixed}.{ending}")
}
