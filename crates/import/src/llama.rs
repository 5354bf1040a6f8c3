//! A decoder of the Llama type (Touvron et al. 2023, arXiv 2302.13971): RMS norms, rotary positions, grouped queries,
//! SwiGLU; in f32, forward only.

use engram_kernels::{
    Angles, GroupedShape, Segment, TargetScore, linear, linear_add, linear_target_scores, rms_norm, rotary,
    segment_attention, swiglu,
};
use rayon::prelude::*;

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Tokens.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Added to the mean square in every norm.
    pub norm_epsilon: f32,
    /// Base of the rotary angles.
    pub rotary_base: f64,
    /// Most tokens of a text.
    pub context: usize,
}

impl LlamaConfig {
    /// Refuses sizes that make no model: what is wrong.
    pub(crate) fn validate(&self) -> std::result::Result<(), String> {
        let Self { vocabulary, width, blocks, heads, key_heads, head_width, feed_forward, context, .. } =
            *self;
        let sizes = [vocabulary, width, blocks, heads, key_heads, head_width, feed_forward, context];
        if sizes.contains(&0) {
            return Err("one of its sizes is 0".into());
        }
        if !heads.is_multiple_of(key_heads) {
            return Err(format!("{heads} query heads are not whole groups for {key_heads} key heads"));
        }
        if !head_width.is_multiple_of(2) {
            return Err(format!("a head of width {head_width} cannot be turned in pairs"));
        }
        Ok(())
    }

    /// Values of a token's queries, keys and values together.
    fn qkv(&self) -> usize {
        (self.heads + 2 * self.key_heads) * self.head_width
    }

    fn shape(&self) -> GroupedShape {
        GroupedShape { heads: self.heads, key_heads: self.key_heads, width: self.head_width }
    }

    /// Multiply-adds of a token's products in all blocks, without attention's own and without the head.
    pub fn products(&self) -> u64 {
        let attention = self.width * self.qkv() + self.heads * self.head_width * self.width;
        (self.blocks * (attention + 3 * self.width * self.feed_forward)) as u64
    }
}

/// Weights, each `[inputs, outputs]`.
#[derive(Debug)]
pub struct Llama {
    pub(crate) config: LlamaConfig,
    /// `[vocabulary, width]`.
    pub(crate) embedding: Vec<f32>,
    pub(crate) blocks: Vec<LlamaBlock>,
    /// `[width]`.
    pub(crate) norm: Vec<f32>,
    /// `[width, vocabulary]`.
    pub(crate) head: Vec<f32>,
    /// Whether the head is the transposed embedding.
    pub(crate) tied_head: bool,
}

/// One block's weights.
#[derive(Debug)]
pub(crate) struct LlamaBlock {
    /// `[width]`.
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys, values: `[width, (heads + 2·key_heads)·head_width]`.
    pub(crate) qkv: Vec<f32>,
    /// `[heads·head_width, width]`.
    pub(crate) output: Vec<f32>,
    /// `[width]`.
    pub(crate) feed_forward_norm: Vec<f32>,
    /// Gate, then up: `[width, 2·feed_forward]`.
    pub(crate) gate_up: Vec<f32>,
    /// `[feed_forward, width]`.
    pub(crate) down: Vec<f32>,
}

/// Keys and values of the rows so far, by block: `[rows, key_heads, head_width]`.
#[derive(Debug, Clone, Default)]
pub struct LlamaState {
    blocks: Vec<(Vec<f32>, Vec<f32>)>,
    rows: usize,
}

impl LlamaState {
    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

impl Llama {
    /// Its sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Hidden states before the head, `[tokens, width]`, of new rows that `segments` cover; their keys and values are
    /// added to `state`. `positions` are those within each token's text.
    ///
    /// # Panics
    /// When a token is outside the vocabulary, there is none, there are not as many positions as tokens, or the segments do
    /// not cover the new rows.
    pub fn hidden(
        &self,
        tokens: &[u32],
        positions: &[usize],
        segments: &[Segment],
        state: &mut LlamaState,
    ) -> Vec<f32> {
        let width = self.config.width;
        assert_eq!(tokens.len(), positions.len(), "a position for each token");
        state.blocks.resize_with(self.blocks.len(), Default::default);
        let (cos, sin) = self.angles(positions);
        let angles = Angles { cos: &cos, sin: &sin };
        let mut x: Vec<f32> = Vec::with_capacity(tokens.len() * width);
        for &token in tokens {
            x.extend_from_slice(&self.embedding[token as usize * width..][..width]);
        }
        for (block, past) in self.blocks.iter().zip(&mut state.blocks) {
            block.attend(&mut x, angles, segments, past, &self.config);
            block.feed_forward(&mut x, &self.config);
        }
        state.rows += tokens.len();
        rms_norm(&x, Some(&self.norm), width, self.config.norm_epsilon).output
    }

    /// How `targets` `[tokens]` fare after the hidden states `[tokens, width]`.
    ///
    /// # Panics
    /// When there is no target, or the sizes differ.
    pub fn scores(&self, hidden: &[f32], targets: &[u32]) -> Vec<TargetScore> {
        linear_target_scores(hidden, &self.head, targets)
    }

    /// Logits `[tokens, vocabulary]` of the hidden states `[tokens, width]`.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        linear(hidden, &self.head, self.config.width)
    }

    /// Cosines and sines `[tokens, head_width/2]`.
    fn angles(&self, positions: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let half = self.config.head_width / 2;
        let frequency = |pair: usize| self.config.rotary_base.powf(-(pair as f64) / half as f64);
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip()
    }
}

impl LlamaBlock {
    /// Adds attention's output to `x`, `[tokens, width]`.
    fn attend(
        &self,
        x: &mut [f32],
        angles: Angles<'_>,
        segments: &[Segment],
        past: &mut (Vec<f32>, Vec<f32>),
        config: &LlamaConfig,
    ) {
        let &LlamaConfig { width, heads, key_heads, head_width, norm_epsilon, .. } = config;
        let normed = rms_norm(x, Some(&self.attention_norm), width, norm_epsilon).output;
        let qkv = linear(&normed, &self.qkv, width);
        let tokens = x.len() / width;
        let (query, key) = (heads * head_width, key_heads * head_width);
        let (mut q, mut k) = (vec![0.0; tokens * query], vec![0.0; tokens * key]);
        let seen = past.1.len();
        past.1.resize(seen + tokens * key, 0.0);
        (qkv.par_chunks_exact(query + 2 * key))
            .zip(q.par_chunks_exact_mut(query).zip(k.par_chunks_exact_mut(key)))
            .zip(past.1[seen..].par_chunks_exact_mut(key))
            .with_min_len(64)
            .for_each(|((row, (q, k)), v)| {
                q.copy_from_slice(&row[..query]);
                k.copy_from_slice(&row[query..query + key]);
                v.copy_from_slice(&row[query + key..]);
            });
        past.0.extend_from_slice(&rotary(&k, angles, key_heads, head_width));
        let q = rotary(&q, angles, heads, head_width);
        let attended = segment_attention(&q, &past.0, &past.1, segments, config.shape());
        linear_add(&attended, &self.output, query, x);
    }

    /// Adds the feed-forward's output to `x`, `[tokens, width]`.
    fn feed_forward(&self, x: &mut [f32], config: &LlamaConfig) {
        let normed = rms_norm(x, Some(&self.feed_forward_norm), config.width, config.norm_epsilon).output;
        let inner = swiglu(&linear(&normed, &self.gate_up, config.width), config.feed_forward);
        linear_add(&inner, &self.down, config.feed_forward, x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CONFIG, tensors, tiny};

    type Tensors = std::collections::BTreeMap<String, (Vec<usize>, Vec<f32>)>;

    fn norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
        let square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let inverse = 1.0 / (square + f64::from(CONFIG.norm_epsilon)).sqrt();
        x.iter().zip(weight).map(|(v, w)| v * inverse * f64::from(*w)).collect()
    }

    /// Weight `[outputs, inputs]` times x.
    fn times(weight: &[f32], x: &[f64]) -> Vec<f64> {
        weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, v)| f64::from(*w) * v).sum()).collect()
    }

    /// Turns each head of x by the angles of a position, pairs half a head apart.
    fn turn(x: &mut [f64], position: usize) {
        let half = CONFIG.head_width / 2;
        for head in x.chunks_mut(CONFIG.head_width) {
            for pair in 0..half {
                let angle = position as f64 * CONFIG.rotary_base.powf(-(pair as f64) / half as f64);
                let (a, b) = (head[pair], head[pair + half]);
                head[pair] = a * angle.cos() - b * angle.sin();
                head[pair + half] = a * angle.sin() + b * angle.cos();
            }
        }
    }

    /// The model from its definition, token by token, in f64: logits after the last token.
    fn by_definition(weights: &Tensors, tokens: &[u32]) -> Vec<f64> {
        let get = |name: &str| weights[name].1.as_slice();
        let embedding = get("model.embed_tokens.weight");
        let row = |token: u32| &embedding[token as usize * CONFIG.width..][..CONFIG.width];
        let mut x: Vec<Vec<f64>> =
            tokens.iter().map(|&token| row(token).iter().map(|&v| f64::from(v)).collect()).collect();
        for block in 0..CONFIG.blocks {
            let get = |part: &str| get(&format!("model.layers.{block}.{part}.weight")).to_vec();
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            let (width, group) = (CONFIG.head_width, CONFIG.heads / CONFIG.key_heads);
            for (position, x) in x.iter_mut().enumerate() {
                let normal = norm(x, &get("input_layernorm"));
                let mut q = times(&get("self_attn.q_proj"), &normal);
                let mut k = times(&get("self_attn.k_proj"), &normal);
                turn(&mut q, position);
                turn(&mut k, position);
                keys.push(k);
                values.push(times(&get("self_attn.v_proj"), &normal));
                let mut attended = Vec::new();
                for head in 0..CONFIG.heads {
                    let part = head / group * width..head / group * width + width;
                    let q = &q[head * width..][..width];
                    let weights: Vec<f64> = (keys.iter())
                        .map(|k| q.iter().zip(&k[part.clone()]).map(|(q, k)| q * k).sum::<f64>())
                        .map(|score| (score / (width as f64).sqrt()).exp())
                        .collect();
                    let total: f64 = weights.iter().sum();
                    attended.extend(part.map(|i| {
                        weights.iter().zip(&values).map(|(weight, value)| weight * value[i]).sum::<f64>()
                            / total
                    }));
                }
                let attended = times(&get("self_attn.o_proj"), &attended);
                x.iter_mut().zip(attended).for_each(|(x, y)| *x += y);
                let normal = norm(x, &get("post_attention_layernorm"));
                let (gate, up) = (times(&get("mlp.gate_proj"), &normal), times(&get("mlp.up_proj"), &normal));
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let fed = times(&get("mlp.down_proj"), &inner);
                x.iter_mut().zip(fed).for_each(|(x, y)| *x += y);
            }
        }
        times(embedding, &norm(&x[tokens.len() - 1], get("model.norm.weight")))
    }

    #[test]
    fn logits_are_those_of_the_definition() {
        let model = tiny(CONFIG.context, 1);
        let tokens = [5, 200, 7, 7, 31, 0, 256];
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let mut state = LlamaState::default();
        // In two steps: the second continues what the first has kept.
        let first = [Segment { seen: vec![], rows: 0..4 }];
        model.llama().hidden(&tokens[..4], &positions[..4], &first, &mut state);
        let second = [Segment { seen: Vec::from([0..2, 2..4]), rows: 4..7 }];
        let hidden = model.llama().hidden(&tokens[4..], &positions[4..], &second, &mut state);
        let found = model.llama().logits(&hidden[2 * CONFIG.width..]);
        let expected = by_definition(&tensors(1), &tokens);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{found}, not {expected}");
        }
        assert!(expected.iter().any(|logit| logit.abs() > 0.1));
    }
}
